"""Text of a row: the shared prompt of a pair, and conversations through the chat template."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

TEXT_FIELDS = ("prompt", "chosen", "rejected")


def is_messages(value: Any) -> bool:
    """Whether `value` is a list of messages, such as `[{"role": "user", "content": "Hi"}]`."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def common_prefix_length(a: Sequence, b: Sequence) -> int:
    """Number of leading items that two sequences share."""
    # Bisection over slice comparisons: they run in C, a loop over characters would not.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def extract_prompt(chosen: Sequence, rejected: Sequence) -> tuple[Sequence, Sequence, Sequence]:
    """
    Split off the prompt that both sides of a pair begin with.

    The same cut as TRL's `extract_prompt`: where one side is the beginning of the other, the last
    shared item stays with the answers; a space right before the answers goes with them. One
    difference: where the sides share nothing TRL lets the index wrap around if the chosen text ends
    in a space; here the prompt is empty.

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
    Prompt, chosen and rejected text of a row in any of the forms that TRL takes.

    Strings or conversations, with the prompt in a column of its own or implicit in both sides.
    Conversations go through the chat template, with the row's `tools` and `chat_template_kwargs` if
    it has them.

    Args:
        row (`Mapping[str, Any]`): One row of the dataset.
        processing_class (`PreTrainedTokenizerBase`): Holds the chat template.
        where (`str`): Names the row in errors.

    Raises:
        ValueError: If a field has the wrong type, or a conversation cannot be rendered.
    """
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
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
        prompt, chosen, rejected = extract_prompt(chosen, rejected)

    if conversational:
        if not prompt:
            raise ValueError(
                f"{where}: chosen and rejected do not begin with the same message, so there is no "
                "prompt; "
                "add a prompt column"
            )
        return _render_pair(row, prompt, chosen, rejected, processing_class, where)
    return prompt, chosen, rejected


def _not_text(value: Any) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return (
        f"is {shown} ({type(value).__name__}); must be a string or a list of messages "
        "such as [{'role': 'user', 'content': '...'}]"
    )


def _render_pair(
    row: Mapping[str, Any],
    prompt: list,
    chosen: list,
    rejected: list,
    processing_class: Any,
    where: str,
) -> tuple[str, str, str]:
    role = prompt[-1]["role"]
    if role not in ("user", "tool", "assistant"):
        raise ValueError(
            f"{where}: the prompt ends with a message of role {role!r}; must be 'user', 'tool' or "
            "'assistant'"
        )

    tools = row.get("tools") or None  # some templates announce tools for an empty list too
    if isinstance(tools, str):  # JSON, as datasets store tools whose schemas differ
        tools = json.loads(tools)

    def render(messages: list, **kwargs: bool) -> str:
        return processing_class.apply_chat_template(
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
        if getattr(processing_class, "chat_template", None) is None:
            raise ValueError(
                f"{where}: chosen and rejected are conversations, but the tokenizer has no chat "
                "template; set "
                "tokenizer.chat_template = '...' (a Jinja template), use the tokenizer of an "
                "instruct model, "
                "or give strings"
            ) from error
        raise ValueError(f"{where}: the chat template cannot render the row: {error}") from error

    # Some templates end the prompt alone (its generation prompt) otherwise than within the
    # conversation.
    cut = common_prefix_length(opening, with_chosen)
    cut = common_prefix_length(opening[:cut], with_rejected)
    return opening[:cut], with_chosen[cut:], with_rejected[cut:]
