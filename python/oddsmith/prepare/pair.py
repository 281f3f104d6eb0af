"""A preference pair in `oddsmith prepare`, and its input rows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.pictures import IMAGE_COLUMNS
from ..errors import UserError
from ..sources.records import Record

Messages = list[dict[str, str]]

# Roles of other collections, mapped to the names in chat templates.
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}


class BadRow(Exception):
    """A row that a format cannot read; the message has field, value and what is allowed."""


@dataclass(slots=True)
class Pair:
    """
    Two answers to a prompt, the better one first.

    Args:
        prompt (`str` or `list[dict]`): Text, or messages with `role` and `content`.
        chosen (`str` or `list[dict]`): The better answer without the prompt, of the same kind.
        rejected (`str` or `list[dict]`): The other answer.
        score_chosen (`float`, *optional*): Score of the chosen answer, higher is better.
        score_rejected (`float`, *optional*): Score of the rejected answer.
        votes (`tuple[int, int]`, *optional*): Judgements for and against the order, without ties.
        ranked (`bool`, *optional*): The order does not come from the scores, so equal scores do not
            contradict it.
        lang (`str`, *optional*): Language given in the row.
    """

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages
    score_chosen: float | None = None
    score_rejected: float | None = None
    votes: tuple[int, int] | None = None
    ranked: bool = False
    lang: str | None = None


@dataclass(slots=True)
class Unit:
    """
    The pairs of one or more input rows, which are counted together.

    Args:
        where (`str`): Names the first row.
        pairs (`list[Pair]`): Candidates.
        reason (`str`, *optional*): Why there are none.
        rows (`int`, *optional*, defaults to `1`): Rows of input.
    """

    where: str
    pairs: list[Pair] = field(default_factory=list)
    reason: str | None = None
    rows: int = 1

    def fates(self, outcomes: Sequence[str | None]) -> Iterator[tuple[str | None, int]]:
        """
        The result of each input row, given the results of the pairs.

        Args:
            outcomes (`Sequence[str | None]`): For each pair the reason for dropping it, or None.

        Returns:
            `Iterator[tuple[str | None, int]]`: Reasons (None: kept) and numbers of rows; the
                numbers add up to `rows`.
        """
        if self.pairs:
            yield (None if None in outcomes else outcomes[0]), self.rows
        else:
            yield self.reason, self.rows


def per_record(
    records: Iterable[Record], parse: Callable[[Mapping[str, Any]], Unit | list[Pair]], stop: bool
) -> Iterator[Unit]:
    """
    Units of a format whose records are one row each.

    Args:
        records (`Iterable[Record]`): Input.
        parse (`Callable`): Makes the pairs of a row, or a unit without pairs.
        stop (`bool`): Whether a bad row is an error; otherwise it is counted as such.

    Raises:
        UserError: For a bad row, with its file and line, if `stop`.
    """
    for record in records:
        try:
            parsed = parse(fields_of(record))
        except BadRow as bad:
            yield bad_unit(record, bad, stop)
            continue
        unit = parsed if isinstance(parsed, Unit) else Unit("", parsed)
        unit.where = record.where
        yield unit


def fields_of(record: Record) -> dict[str, Any]:
    """
    The fields of a row, of whatever format.

    Raises:
        BadRow: If it cannot be read, or has images.
    """
    if record.fields is None:
        raise BadRow(record.problem or "is not an object")
    if any(record.fields.get(name) for name in IMAGE_COLUMNS):
        raise BadRow(
            "the row has images, which the pairs would not have; train on such rows as they are, or "
            "remove the column"
        )
    return record.fields


def bad_unit(record: Record, bad: BadRow, stop: bool) -> Unit:
    """The unit of a bad row; raises [`UserError`] instead if `stop`."""
    if stop:
        raise UserError(
            f"{record.where}: {bad} (--bad_rows drop skips such rows and counts them)"
        ) from bad
    return Unit(record.where, reason="bad row")


def required(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        missing = "is null" if name in fields else "is missing"
        raise BadRow(f"field {name} {missing}; the fields are {', '.join(map(str, fields))}")
    return fields[name]


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"field {name} is {shown(value)}; must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"field {name} has half a surrogate pair at character {error.start + 1}; must be valid "
            "Unicode"
        ) from error
    return value


def number_of(value: Any, name: str) -> float | None:
    """A score from a number or its text; None for null, empty, "N/A" and NaN."""
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A", "NA")):
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        number = float(value)
    except ValueError:
        raise BadRow(f"field {name} is {shown(value)}; must be a number") from None
    return None if number != number else number


def messages_of(value: Any, name: str) -> Messages:
    """Messages for chat templates: known roles, and only role and content."""
    if not isinstance(value, list) or not value:
        raise BadRow(f"field {name} is {shown(value)}; must be a string or a list of messages")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise BadRow(f"field {name}[{index}] is {shown(message)}; must be a message")
        # ShareGPT's names as well as OpenAI's.
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if not isinstance(role, str):
            raise BadRow(f"field {name}[{index}].role is {shown(role)}; must be a string")
        text = text_of(content, f"{name}[{index}].content")
        messages.append({"role": ROLES.get(role, role), "content": text})
    return messages


def text_or_messages(value: Any, name: str) -> str | Messages:
    return text_of(value, name) if isinstance(value, str) else messages_of(value, name)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def shown(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{text} ({type(value).__name__})"
