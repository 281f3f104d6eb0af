"""Text of a row: the shared prompt of a pair, and conversations through the chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, TypeVar, cast

from transformers import ProcessorMixin
from transformers.utils import logging

from .processor import as_parts, image_parts, template_source

logger = logging.get_logger(__name__)

TEXT_FIELDS: tuple[str, str, str] = ("prompt", "chosen", "rejected")

Messages = list[Mapping[str, Any]]
# Both sides of a pair are text, or both are messages.
_Text = TypeVar("_Text", str, Messages)


def is_messages(value: Any) -> TypeGuard[Messages]:
    """Whether `value` is a list of messages, such as `[{"role": "user", "content": "Hi"}]`."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    # Bisection by slice comparisons, which run in C, unlike a loop over characters.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def extract_prompt(chosen: _Text, rejected: _Text) -> tuple[_Text, _Text, _Text]:
    """
    Split off the prompt: the common beginning of both sides of a pair.

    The cut is that of TRL's `extract_prompt`: if one side is the beginning of the other, the last
    shared item belongs to the answers; so does a space right before the answers. One difference: if
    the sides share nothing and the chosen text ends in a space, TRL's index wraps around; here the
    prompt is empty.

    Args:
        chosen (`str` or `list`): Text, or messages, of the preferred side.
        rejected (`str` or `list`): Text, or messages, of the other side.

    Returns:
        `tuple`: Prompt, chosen and rejected, of the same types.
    """
    cut = common_prefix_length(chosen, rejected)
    if cut == min(len(chosen), len(rejected)):
        cut = max(cut - 1, 0)
    elif cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def row_text(row: Mapping[str, Any], processing_class: Any, where: str) -> tuple[str, str, str]:
    """
    Return prompt, chosen and rejected text of a row in any form that TRL accepts.

    Rows have strings or conversations, and the prompt in its column or implicit in both sides.
    Conversations go through the chat template, with the row's `tools` and `chat_template_kwargs` if
    it has them.

    Args:
        row (`Mapping[str, Any]`): One row of the dataset.
        processing_class (`PreTrainedTokenizerBase`): Holds the chat template.
        where (`str`): Names the row in errors.

    Raises:
        ValueError: If a field has the wrong type, or a conversation cannot be rendered.
    """
    values: list[Any] = [row.get(name) for name in TEXT_FIELDS]
    prompt, chosen, rejected = values
    conversational = is_messages(chosen)
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not (isinstance(value, str) or is_messages(value)):
            raise ValueError(f"{where}: {name} {_not_text(value)}")
        if is_messages(value) != conversational:
            raise ValueError(
                f"{where}: chosen and rejected must both be strings or both be lists of messages"
            )

    if "prompt" not in row or (prompt is None and conversational):
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    elif not (isinstance(prompt, str) or is_messages(prompt)):
        raise ValueError(f"{where}: prompt {_not_text(prompt)}")
    elif is_messages(prompt) != conversational:
        if not conversational:
            logger.warning_once(
                f"{where}: prompt is a list of messages but chosen and rejected are strings, so, "
                "as in TRL, the "
                "prompt is ignored and what both strings begin with takes its place; make all "
                "three messages."
            )
        own = prompt
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        if conversational and not prompt and isinstance(own, str) and own:
            # The answers alone, as messages; TRL fails here.
            prompt = cast(Messages, [{"role": "user", "content": own}])

    if conversational:
        for name in TEXT_FIELDS:
            if is_messages(row.get(name)):
                _check_contents(row[name], f"{where}: {name}")
        if not prompt:
            raise ValueError(
                f"{where}: chosen and rejected do not begin with the same message, so there is no "
                "prompt; "
                "add a prompt column"
            )
        prompt = cast(Messages, prompt)
        return _render_pair(row, prompt, chosen, rejected, processing_class, where)
    return cast(tuple[str, str, str], (prompt, chosen, rejected))


def _shown(value: Any) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{shown} ({type(value).__name__})"


def _not_text(value: Any) -> str:
    return (
        f"is {_shown(value)}; must be a string or a list of messages "
        "such as [{'role': 'user', 'content': '...'}]"
    )


def _tools(value: Any, where: str) -> list[Any] | None:
    if isinstance(value, str):
        # JSON, as datasets store tools whose schemas differ.
        try:
            parsed = json.loads(value) if value.strip() else None
        except ValueError:
            parsed = value
        if parsed is not None and not isinstance(parsed, list):
            raise ValueError(
                f"{where}: tools is {_shown(value)}; must be a list of JSON schemas, or its JSON; "
                "rename a column that is something else"
            )
        value = parsed
    return value or None  # some templates announce tools for an empty list too


def _check_contents(messages: Messages, where: str) -> None:
    """A message without content must have something else: most templates write None as a word."""
    for index, message in enumerate(messages):
        others = any(value for key, value in message.items() if key not in ("role", "content"))
        if message.get("content") is None and not others:
            raise ValueError(
                f"{where}[{index}] is a message of role {message['role']!r} whose content is None; "
                "must be text"
            )


def _render_pair(
    row: Mapping[str, Any],
    prompt: Messages,
    chosen: Messages,
    rejected: Messages,
    processing_class: Any,
    where: str,
) -> tuple[str, str, str]:
    role = prompt[-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise ValueError(
            f"{where}: the prompt ends with a message of role {role!r}; must be 'user', 'tool' or "
            "'assistant'"
        )

    tools = _tools(row.get("tools"), where)

    source: Any = template_source(processing_class)
    takes_parts = isinstance(source, ProcessorMixin)
    if takes_parts:
        prompt, chosen, rejected = (
            cast(Messages, as_parts(each)) for each in (prompt, chosen, rejected)
        )
        if row.get("images") is None and row.get("image") is None:
            if image_parts([*prompt, *chosen, *rejected]):
                raise ValueError(
                    f"{where}: its messages have image parts, but the row has no images; put them "
                    "into a column images, a list for each row"
                )

    def render(messages: Messages, **kwargs: bool) -> str:
        return source.apply_chat_template(
            messages,
            tools=tools,
            tokenize=False,
            **(row.get("chat_template_kwargs") or {}),
            **kwargs,
        )

    try:
        # An unfinished answer at the end of the prompt is continued; anything else is answered.
        opening = render(
            prompt,
            add_generation_prompt=role != "assistant",
            continue_final_message=role == "assistant",
        )
        with_chosen = render(prompt + chosen)
        with_rejected = render(prompt + rejected)
    except Exception as error:
        # A tokenizer with code of its own may render without a template.
        method = getattr(type(source), "apply_chat_template", None)
        own = getattr(method, "__module__", "") != "transformers.tokenization_utils_base"
        if not own and getattr(source, "chat_template", None) is None:
            raise ValueError(
                f"{where}: chosen and rejected are conversations, but the tokenizer has no chat "
                "template; set "
                "tokenizer.chat_template = '...' (a Jinja template), use the tokenizer of an "
                "instruct model, "
                "or give strings"
            ) from error
        if type(source).__module__ == "transformers.tokenization_mistral_common":
            raise ValueError(
                f"{where}: chosen and rejected are conversations, but mistral-common makes no text of a "
                "conversation that ends with an answer; use the model's tokenizer.json with a chat "
                "template (PreTrainedTokenizerFast.from_pretrained), or give strings"
            ) from error
        raise ValueError(f"{where}: the chat template cannot render the row: {error}") from error

    # Some templates end the prompt alone (its generation prompt) otherwise than within the
    # conversation.
    cut = common_prefix_length(opening, with_chosen)
    cut = common_prefix_length(opening[:cut], with_rejected)
    return opening[:cut], with_chosen[cut:], with_rejected[cut:]
