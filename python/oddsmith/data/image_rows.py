"""ImageRows: token ids and pixel values of pairs whose prompts have images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .chat import TEXT_FIELDS, common_prefix_length, is_messages, row_text
from .pictures import row_pictures
from .processor import as_parts, image_parts, takes_images, template_source, tokenizer_of
from .rows import RowBuilder, split_answer

# What a processor returns beside the tokens of each sequence: a number for each token.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_TEXT_INPUTS = ("input_ids", "attention_mask", *TOKEN_TYPES)
# Returned for each token of a batch of prompts, so that answers could not be added.
_UNSUPPORTED_INPUTS = ("cross_attention_mask",)

# Why batches of such rows keep their padding.
NO_PACKING = "its rows have images, whose positions a packed row does not have"


@dataclass
class ImageBatch:
    """
    Rows of token ids, and the inputs of the model that come from their images.

    Args:
        rows (`list[dict]`): As from [`RowBuilder.tokenize_row`], with `prompt`, `chosen` and
            `rejected` as text and, for each name in `TOKEN_TYPES` that the processor returns,
            `chosen_{name}`, `rejected_{name}` and `prompt_{name}`.
        overlength (`list[bool]`): Which rows were too long.
        inputs (`dict[str, Tensor]`): `pixel_values` and what else the processor returns, of the
            images of all rows in order.
        images (`list[int]`): Images of each row.
    """

    rows: list[dict[str, Any]]
    overlength: list[bool]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    images: list[int] = field(default_factory=list)


class PromptTooLong(ValueError):
    """The prompt of a row has images, and would have to be cut."""


class ImageRows:
    """
    Builds rows with images: the processor makes the tokens of a prompt, in which an image has as
    many tokens as the model makes of it, and its pixel values; the answers get the tokens of
    [`RowBuilder`], which also adds BOS and EOS and cuts answers to length.

    A prompt with images is never cut.

    Args:
        processor (`ProcessorMixin`): With an image processor and a tokenizer.
        builder ([`RowBuilder`]): Of the processor's tokenizer.

    Raises:
        ValueError: If `processor` makes no pixel values.
    """

    def __init__(self, processor: Any, builder: RowBuilder):
        if not takes_images(processor):
            raise ValueError(
                f"rows have images, but processing_class is a {type(processor).__name__} without "
                "an image processor; pass AutoProcessor.from_pretrained(...) of an image-text "
                "model, or train on the text alone with dataset.remove_columns(...)"
            )
        if builder.is_encoder_decoder:
            raise ValueError("rows have images and the model is an encoder-decoder; not supported")
        self.processor = processor
        self.builder = builder
        self.image_token_ids = image_token_ids(processor)

    def build(self, rows: Sequence[Mapping[str, Any]], where: Sequence[str]) -> ImageBatch:
        """
        The rows of a batch.

        Args:
            rows (`Sequence[Mapping]`): With `chosen`, `rejected`, `prompt` unless it is implicit,
                and `images` or `image`; strings or conversations.
            where (`Sequence[str]`): Names of the rows, for errors.

        Raises:
            ValueError: If a row has a fault, or its prompt has images and would have to be cut.
        """
        pictures, texts = [], []
        for row, at in zip(rows, where, strict=True):
            pictures.append(row_pictures(row, at))
            texts.append(self._text(row, len(pictures[-1]), at))
        prompts = [prompt for prompt, _, _ in texts]
        tokens = self._encode(texts)
        expanded, inputs = self._process(prompts, pictures)
        kinds = {kind for each in expanded.values() for kind in each if kind in TOKEN_TYPES}
        batch = ImageBatch([], [], inputs, [len(each) for each in pictures])
        for index, (text, at) in enumerate(zip(texts, where, strict=True)):
            prompt, *answers = tokens[index]
            try:
                row, too_long = self._row(prompt, answers, expanded.get(index))
            except PromptTooLong as error:
                raise PromptTooLong(f"{at}: {error}") from error
            except ValueError as error:
                raise ValueError(f"{at}: {error}") from error
            for kind in kinds:
                for side in TEXT_FIELDS:  # rows without images have text alone
                    row.setdefault(f"{side}_{kind}", [0] * len(row[f"{side}_input_ids"]))
            batch.rows.append({**dict(zip(TEXT_FIELDS, text, strict=True)), **row})
            batch.overlength.append(too_long)
        return batch

    def fits(self, row: Mapping[str, Any], where: str) -> bool:
        """
        Whether nothing of a row would be cut.

        Raises:
            ValueError: If the row has another fault.
        """
        try:
            return not self.build([row], [where]).overlength[0]
        except PromptTooLong:
            return False

    def _text(self, row: Mapping[str, Any], images: int, where: str) -> tuple[str, str, str]:
        """Prompt, chosen and rejected text, with a placeholder in the prompt for each image."""
        row = dict(row)
        if is_messages(row["chosen"]):
            if template_source(self.processor) is not self.processor:
                raise ValueError(
                    f"{where} is a conversation with images, but the processor has no chat "
                    "template; set processor.chat_template"
                )
            prompt = row.get("prompt")
            if (
                isinstance(prompt, str)
                and prompt
                and not common_prefix_length(row["chosen"], row["rejected"])
            ):
                # Answers alone, as in `row_text`.
                row["prompt"] = [{"role": "user", "content": prompt}]
            explicit = is_messages(row.get("prompt"))
            for name in ("prompt",) if explicit else ("chosen", "rejected"):
                row[name] = place_images(row[name], images, f"{where}: {name}")
        texts = row_text(row, self.processor, where)
        token = getattr(self.processor, "image_token", None)
        if token is not None:
            found = texts[0].count(token)
            if found != images:
                raise ValueError(
                    f"{where}: the prompt has {found} times {token!r} and the row {images} images; "
                    f"write {token!r} where each image belongs, or give messages"
                )
            if any(token in text for text in texts[1:]):
                raise ValueError(f"{where}: an answer has {token!r}; only prompts can have images")
        return texts

    def _encode(self, texts: Sequence[tuple[str, str, str]]) -> list[list[list[int]]]:
        """Ids of prompt, prompt with chosen, and prompt with rejected, of each row."""
        flat = [
            part
            for prompt, chosen, rejected in texts
            for part in (prompt, prompt + chosen, prompt + rejected)
        ]
        if not flat:
            return []
        ids = self.builder.processing_class(flat, add_special_tokens=False)["input_ids"]
        return [ids[start : start + 3] for start in range(0, len(ids), 3)]

    def _process(
        self, prompts: Sequence[str], pictures: Sequence[list[Any]]
    ) -> tuple[dict[int, dict[str, list[int]]], dict[str, Tensor]]:
        """Token columns of the prompts with images by row, and the inputs of those images."""
        rows = [index for index, listed in enumerate(pictures) if listed]
        if not rows:  # processors raise for a batch without images
            return {}, {}
        made = dict(
            self.processor(
                images=[pictures[index] for index in rows],
                text=[prompts[index] for index in rows],
                add_special_tokens=False,
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        )
        for name, value in made.items():
            if name in _UNSUPPORTED_INPUTS or not torch.is_tensor(value):
                raise ValueError(
                    f"{type(self.processor).__name__} returns {name}, which is not supported for "
                    "rows with images"
                )
        real = made["attention_mask"].bool()
        expanded = {
            index: {
                name: made[name][place][real[place]].tolist()
                for name in ("input_ids", *TOKEN_TYPES)
                if name in made
            }
            for place, index in enumerate(rows)
        }
        return expanded, {key: value for key, value in made.items() if key not in _TEXT_INPUTS}

    def _row(
        self,
        prompt: list[int],
        answers: Sequence[list[int]],
        expanded: dict[str, list[int]] | None,
    ) -> tuple[dict[str, Any], bool]:
        names = ("chosen", "rejected")
        sides = [split_answer(prompt, *each) for each in zip(answers, names, strict=True)]
        if any(token in self.image_token_ids for side in sides for token in side["input_ids"]):
            raise ValueError("an answer has a token that stands for an image; only prompts can")
        if expanded is None:
            return self.builder.assemble(prompt, *sides)

        whole = expanded["input_ids"]
        for side in sides:
            kept = len(side["prompt_input_ids"])
            # The last token may have merged with the answer; then it belongs to the answer.
            merged = len(prompt) - kept
            if side["prompt_input_ids"] != prompt[:kept] or whole[-1] != prompt[-1]:
                raise ValueError(
                    "the prompt's tokens change where the answer begins; end the prompt where a "
                    "word ends"
                )
            side["prompt_input_ids"] = whole[: len(whole) - merged]
            side["prompt_attention_mask"] = [1] * len(side["prompt_input_ids"])
        before = [len(side["prompt_input_ids"]) for side in sides]
        bos = self.builder.processing_class.bos_token_id
        first = int(bos is not None and whole[:1] != [bos])  # 1 if the builder adds BOS
        row, too_long = self.builder.assemble(whole, *sides)
        lengths = dict(zip((*names, "prompt"), (*before, min(before)), strict=True))
        for name in names:
            if sum(label < 0 for label in row[f"{name}_labels"]) != lengths[name] + first:
                raise PromptTooLong(
                    f"the prompt has {lengths[name] + first} tokens with its images, more than "
                    f"max_prompt_length {self.builder.max_prompt_length}, and cannot be cut; raise "
                    "or remove max_prompt_length, make the images smaller in the processor, or set "
                    "overlength='drop'"
                )
        for kind in TOKEN_TYPES:
            if kind in expanded:
                for name, length in lengths.items():
                    types = [0] * first + expanded[kind][:length]
                    row[f"{name}_{kind}"] = types + [0] * (
                        len(row[f"{name}_input_ids"]) - len(types)
                    )
        return row, too_long


def place_images(
    messages: Sequence[Mapping[str, Any]], images: int, where: str
) -> list[dict[str, Any]]:
    """
    Messages as parts, with a part for each image.

    As in TRL: where messages have image parts, these must be as many as there are images; where the
    content of the first user message is a string, its images come before the text.

    Raises:
        ValueError: If there is no place for the images, or an image is inside a message.
    """
    made = as_parts(messages)
    if not image_parts(made) and images:
        for index, message in enumerate(messages):
            if message.get("role") == "user" and isinstance(message.get("content"), str):
                parts = [{"type": "image"} for _ in range(images)]
                made[index]["content"] = [*parts, *made[index]["content"]]
                break
    found = image_parts(made)
    inside = [key for part in found for key in part if key not in ("type", "text")]
    if inside:
        raise ValueError(
            f"{where} has an image inside a message ({inside[0]}); put it into the column images, "
            "and {'type': 'image'} into the message"
        )
    if len(found) != images:
        raise ValueError(
            f"{where} has {len(found)} image parts and the row {images} images; must be as many"
        )
    return made


def image_token_ids(processor: Any) -> frozenset[int]:
    """The token ids that stand for images in a processor's prompts."""
    ids = getattr(processor, "image_token_ids", None) or [
        getattr(processor, "image_token_id", None)
    ]
    tokenizer = tokenizer_of(processor)
    listed = [*ids, getattr(tokenizer, "image_token_id", None)]
    return frozenset(int(token) for token in listed if isinstance(token, int))
