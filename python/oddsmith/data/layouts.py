"""Layouts of preference rows: which columns hold the prompt and the two answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .chat import common_prefix_length, is_messages

__all__ = [
    "CONVERSATIONS",
    "QUESTIONS",
    "SIDES",
    "SYSTEMS",
    "Layout",
    "as_messages",
    "find_layout",
    "find_sides",
    "mapped_layout",
    "parse_column_mapping",
]

# Names of the preferred and the other answer, as public datasets have them.
SIDES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"),
    ("answer_chosen", "answer_rejected"),
    ("chosen_completion", "rejected_completion"),
    ("chosen_output", "rejected_output"),
    ("accepted", "rejected"),
    ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"),
    ("response_j", "response_k"),
    ("win", "lose"),
    ("y_w", "y_l"),
)
# Names of the prompt where there is no column `prompt`. The last ones only if they hold messages.
QUESTIONS = ("question", "instruction", "query", "input", "user_prompt", "user_input", "problem")
CONVERSATIONS = ("conversations", "conversation", "messages", "history", "trajectory", "context")
SYSTEMS = ("system", "system_prompt", "system_message")
# What column_mapping can map to.
TARGETS = ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs")

# Names of roles in ShareGPT's messages, `{"from": "human", "value": ..}`.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "prompter": "user"}


@dataclass(frozen=True)
class Layout:
    """
    The columns of a preference row.

    Args:
        chosen (`str`): The preferred answer.
        rejected (`str`): The other answer.
        prompt (`tuple[str, ...]`, *optional*):
            Columns of the prompt, joined by a line break; none if it is implicit.
        system (`str`, *optional*): The system message, which makes the row a conversation.
        history (`str`, *optional*): Earlier turns, as messages or as pairs of texts.
    """

    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: tuple[str, ...] = ()
    system: str | None = None
    history: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """All columns that are read."""
        others = (self.system, self.history)
        return (
            *self.prompt,
            *(each for each in others if each is not None),
            self.chosen,
            self.rejected,
        )

    @property
    def is_plain(self) -> bool:
        """Whether the columns have the trainer's names."""
        return set(self.sources) <= {"prompt", "chosen", "rejected"}

    @property
    def renames(self) -> dict[str, str]:
        """The trainer's name of each column, if the rows differ in names only."""
        names = dict(zip(self.prompt, ["prompt"], strict=False))
        return {**names, self.chosen: "chosen", self.rejected: "rejected"}

    def __str__(self) -> str:
        parts = []
        before = [each for each in (self.system, self.history, *self.prompt) if each]
        if before and before != ["prompt"]:
            parts.append(f"{' and '.join(before)} {'is' if len(before) == 1 else 'are'} the prompt")
        for side in ("chosen", "rejected"):
            if getattr(self, side) != side:
                parts.append(f"{getattr(self, side)} is {side}")
        return ", ".join(parts)

    def row(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """
        The `prompt` (unless it is implicit), `chosen` and `rejected` of a row.

        Text stays text, unless there is a system message, a history, or an answer in messages: then
        all three are lists of messages. Answers that begin with the prompt's messages lose them.

        Args:
            fields (`Mapping[str, Any]`): The row.
        """
        chosen, rejected = (as_messages(fields.get(name)) for name in (self.chosen, self.rejected))
        if self.prompt == ("prompt",) and self.system is None and self.history is None:
            prompt: Any = as_messages(fields.get("prompt"))
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if not (self.prompt or self.system or self.history):
            return {"chosen": chosen, "rejected": rejected}
        parts = [as_messages(fields.get(name)) for name in self.prompt]
        texts = [part for part in parts if isinstance(part, str) and part]
        messages = [message for part in parts if is_messages(part) for message in part]
        conversational = (
            bool(messages)
            or self.system is not None
            or self.history is not None
            or is_messages(chosen)
            or is_messages(rejected)
        )
        if not conversational:
            prompt = "\n".join(texts) if texts else (parts[0] if parts else None)
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        before = [] if self.system is None else _said("system", fields.get(self.system))
        before += [] if self.history is None else _turns(fields.get(self.history))
        prompt = [*before, *messages, *_said("user", "\n".join(texts))]
        sides = [
            _said("assistant", side) if isinstance(side, str) else side
            for side in (chosen, rejected)
        ]
        # Whole conversations, with or without the system message.
        for start in (prompt, prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt):
            if start and all(is_messages(side) and side[: len(start)] == start for side in sides):
                sides = [side[len(start) :] for side in sides]
                break
        return {"prompt": prompt or None, "chosen": sides[0], "rejected": sides[1]}


def as_messages(value: Any) -> Any:
    """Messages under their usual keys: of a single message, or of ShareGPT's; else the value."""
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        value = [value]
    if not isinstance(value, list) or not value:
        return value
    if not all(isinstance(each, Mapping) and ("role" in each or "from" in each) for each in value):
        return value
    return [dict(each) if "role" in each else _of_sharegpt(each) for each in value]


def _of_sharegpt(message: Mapping[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    role = message["from"]
    return {"role": ROLES.get(role, role), "content": message.get("value"), **others}


def _said(role: str, content: Any) -> list[dict[str, Any]]:
    """One message, or none if there is nothing in it."""
    return [{"role": role, "content": content}] if isinstance(content, str) and content else []


def _turns(history: Any) -> list[dict[str, Any]]:
    messages = as_messages(history)
    if is_messages(messages):
        return [dict(message) for message in messages]
    turns: list[dict[str, Any]] = []
    for asked, answered in history or []:
        turns += _said("user", asked) + _said("assistant", answered)
    return turns


def parse_column_mapping(value: Any, prompt_column: str | None = None) -> dict[str, str]:
    """
    Check a mapping of a dataset's column names to the trainer's.

    Args:
        value (`Mapping[str, str]`, *optional*): For instance `{"question": "prompt"}`.
        prompt_column (`str`, *optional*): Short for `{prompt_column: "prompt"}`.

    Raises:
        ValueError: If it maps to another name, or two columns to the same.
    """
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"column_mapping is {value!r}; must be a dict such as {{'question': 'prompt'}}"
        )
    mapping = dict(value or {})
    if prompt_column is not None:
        mapping[prompt_column] = "prompt"
    for name, target in mapping.items():
        if target not in TARGETS:
            raise ValueError(
                f"column_mapping has {name!r}: {target!r}; columns can become {', '.join(TARGETS)}"
            )
    if len(set(mapping.values())) < len(mapping):
        raise ValueError(f"column_mapping is {mapping}; two columns become the same")
    return mapping


def mapped_layout(mapping: Mapping[str, str], columns: Iterable[str], what: str) -> Layout:
    """
    The layout that a user's mapping describes.

    Args:
        mapping (`Mapping[str, str]`): From [`parse_column_mapping`].
        columns (`Iterable[str]`): The columns of the dataset.
        what (`str`): Names the dataset in errors.

    Raises:
        ValueError: If a column does not exist.
    """
    columns = list(columns)
    for name in mapping:
        if name not in columns:
            raise ValueError(
                f"{what} has no column {name}, which column_mapping names; it has "
                f"{', '.join(map(str, columns))}"
            )
    by_target = {target: name for name, target in mapping.items()}
    prompt = by_target.get("prompt", "prompt" if "prompt" in columns else None)
    sides = find_sides(columns) or ("chosen", "rejected")
    return Layout(
        by_target.get("chosen", sides[0]),
        by_target.get("rejected", sides[1]),
        () if prompt is None else (prompt,),
        by_target.get("system"),
    )


def find_layout(
    rows: Sequence[Mapping[str, Any]], *, what: str = "the dataset", system: bool = False
) -> Layout | None:
    """
    The layout of a dataset, by the names and values of its first rows.

    A column `prompt` is the prompt. Without one it is a column of another usual name, unless both
    answers already begin with what is in it.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): Some rows.
        what (`str`, *optional*): Names the dataset in errors.
        system (`bool`, *optional*, defaults to `False`):
            Whether a system message belongs to a column `prompt` too; TRL leaves it out.

    Returns:
        [`Layout`] or `None`: `None` if there are no two answers.

    Raises:
        ValueError: If several columns could be the prompt.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    sides = find_sides(columns)
    if sides is None:
        return None
    # Even if it is empty in these rows: it may not be in others.
    systems = [name for name in SYSTEMS if any(isinstance(row.get(name), str) for row in rows)][:1]
    if any(row.get("prompt") is not None for row in rows):
        if system and systems and all(isinstance(row.get("prompt"), str) for row in rows):
            return Layout(*sides, ("prompt",), systems[0])
        return Layout(*sides, ("prompt",))
    candidates = _candidates(rows, columns)
    layout = Layout(*sides)
    if any(_is_inside(rows, layout, name) for name in candidates):
        return layout
    if not candidates:
        return layout
    history, texts = None, [name for name in candidates if name not in CONVERSATIONS]
    conversations = [name for name in candidates if name in CONVERSATIONS]
    if len(conversations) == 1:
        history = conversations[0]
    if set(texts) == {"instruction", "input"}:  # the layout of Alpaca
        texts = ["instruction", "input"]
    elif len(texts) > 1 or len(conversations) > 1:
        named = " and ".join(texts if len(texts) > 1 else conversations)
        raise ValueError(
            f"{what} has no column prompt, and {named} could each be it; name one with "
            "prompt_column"
        )
    return Layout(*sides, tuple(texts), systems[0] if systems else None, history)


def find_sides(columns: Iterable[str]) -> tuple[str, str] | None:
    """The names of `chosen` and `rejected` among some columns, or None."""
    columns = set(columns)
    return next((sides for sides in SIDES if columns.issuperset(sides)), None)


def _has_text(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), str) and row[name] for row in rows)


def _candidates(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[str]:
    """Columns that may be the prompt."""
    found = [
        name
        for name in QUESTIONS
        if name in columns and (_has_text(rows, name) or _has_messages(rows, name))
    ]
    return found + [name for name in CONVERSATIONS if name in columns and _has_turns(rows, name)]


def _has_messages(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(is_messages(as_messages(row.get(name))) for row in rows)


def _has_turns(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [row.get(name) for row in rows]
    pairs = [
        isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value)
        for value in values
        if value
    ]
    return _has_messages(rows, name) or (bool(pairs) and all(pairs))


def _is_inside(rows: Sequence[Mapping[str, Any]], layout: Layout, name: str) -> bool:
    """Whether most answers already begin with what a column holds."""
    inside = known = 0
    for row in rows:
        pair = layout.row(row)
        chosen, rejected = pair["chosen"], pair["rejected"]
        asked = _last_text(as_messages(row.get(name)))
        if not asked:
            continue
        known += 1
        if isinstance(chosen, str) and isinstance(rejected, str):
            inside += asked in chosen[: common_prefix_length(chosen, rejected)]
        elif is_messages(chosen) and is_messages(rejected):
            shared = chosen[: common_prefix_length(chosen, rejected)]
            # An earlier turn of a conversation can have the same text as its end.
            inside += any(asked in str(message.get("content")) for message in shared)
    return known > 0 and 2 * inside > known


def _last_text(value: Any) -> str:
    if is_messages(value):
        value = value[-1].get("content")
    elif isinstance(value, list) and value and isinstance(value[-1], list):
        value = value[-1][0]
    return value.strip() if isinstance(value, str) else ""
