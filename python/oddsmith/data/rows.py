"""RowBuilder: makes token ids, cut to length, from the text of a pair."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging
from transformers.utils.import_utils import is_torch_xla_available

from .notes import RowNotes

logger = logging.get_logger(__name__)

# Tokens of one side of a pair; keys "prompt_input_ids", "prompt_attention_mask", "input_ids",
# "attention_mask".
Side = dict[str, list[int]]

# The columns that a row gets, of decoders and of encoder-decoder models.
TOKEN_COLUMNS = (
    *(
        f"{side}_{column}"
        for side in ("chosen", "rejected")
        for column in ("input_ids", "attention_mask", "labels", "decoder_input_ids")
    ),
    "prompt_input_ids",
    "prompt_attention_mask",
)

# TRL's default for the completions of encoder-decoder models.
_MAX_COMPLETION_LENGTH = 128


class RowBuilder:
    """
    Builds rows of token ids from the prompt, chosen and rejected text of a pair, exactly as TRL
    1.16 does.

    Without `max_prompt_length` only answers are cut, each to `max_length` minus its prompt; a
    longer prompt is kept (TRL's rule), so such a row has empty completions and more than
    `max_length` tokens. With `max_prompt_length` a pair that is too long has its prompt cut to that
    first, then, if it is still too long, its answers to the rest (the rule of TRL up to 0.27), and
    no row is longer than `max_length`. If both lengths are equal, that rule leaves no token of an
    answer, and TRL's loss is NaN: there each answer is cut to what its own prompt leaves.

    One difference: no `prompt_token_type_ids`, which TRL adds for BERT-like tokenizers and does not
    use.

    Args:
        processing_class (`PreTrainedTokenizerBase`):
            The tokenizer.
        max_length (`int`, *optional*, defaults to `1024`):
            Most tokens of prompt and completion together. Not used for encoder-decoder models.
        max_prompt_length (`int`, *optional*):
            See above. For encoder-decoder models: most tokens of the prompt.
        truncation_mode (`str`, *optional*, defaults to `"keep_end"`):
            End of the prompt that `max_prompt_length` keeps: `"keep_end"` or `"keep_start"`.
        label_pad_token_id (`int`, *optional*, defaults to `-100`):
            Label of prompt tokens.
        is_encoder_decoder (`bool`, *optional*, defaults to `False`):
            Build rows of an encoder-decoder model: the prompt for the encoder, answers as labels.
        max_completion_length (`int`, *optional*):
            Most tokens of a completion, for encoder-decoder models; 128 if not given.
        padding_value (`int`, *optional*):
            Token id that pads rows to `max_length` on TorchXLA, where every new length is compiled.
    """

    def __init__(
        self,
        processing_class: Any,
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        truncation_mode: str = "keep_end",
        label_pad_token_id: int = -100,
        is_encoder_decoder: bool = False,
        max_completion_length: int | None = None,
        padding_value: int | None = None,
    ):
        if truncation_mode not in ("keep_end", "keep_start"):
            raise ValueError(
                f"truncation_mode is {truncation_mode!r}; must be 'keep_end' or 'keep_start'"
            )
        if max_length is None or max_length <= 0:
            raise ValueError(f"max_length is {max_length}; must be positive")
        if max_prompt_length is not None and not 0 < max_prompt_length <= max_length:
            raise ValueError(
                f"max_prompt_length is {max_prompt_length}; must be positive and at most max_length "
                f"{max_length}"
            )
        if is_encoder_decoder and max_completion_length is None:
            logger.warning_once(
                "`max_completion_length` is not set for an encoder-decoder model: using "
                f"{_MAX_COMPLETION_LENGTH}."
            )
            max_completion_length = _MAX_COMPLETION_LENGTH
        self.processing_class = processing_class
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.truncation_mode = truncation_mode
        self.label_pad_token_id = label_pad_token_id
        self.is_encoder_decoder = is_encoder_decoder
        self.max_completion_length = max_completion_length
        self.padding_value = padding_value
        # By dataset name, the findings of prepare_dataset, for the report at the start.
        self.notes: dict[str, RowNotes] = {}
        # Whether the tokenizer does not take a list of texts.
        self._one_by_one = False

    def build_tokenized_answer(self, prompt: str, answer: str) -> Side:
        """
        Token ids of a prompt and its answer, encoded together and split where the answer begins.

        Encoding them together may merge the end of the prompt with the answer; then the boundary
        moves one token back, and the merged token belongs to the answer.

        Args:
            prompt (`str`): Text of the prompt.
            answer (`str`): Text of the answer.

        Returns:
            `dict[str, list[int]]`: `prompt_input_ids`, `prompt_attention_mask`, `input_ids`,
            `attention_mask`, without BOS and EOS.

        Raises:
            ValueError: If prompt and answer merge to fewer tokens than the prompt has alone.
        """
        prompt_ids, full_ids = self._encode([prompt, prompt + answer])
        return split_answer(prompt_ids, full_ids, "answer")

    def tokenize_row(
        self,
        feature: Mapping[str, Any],
        model: Any = None,
        build_tokenized_answer: Callable[[str, str], Side] | None = None,
    ) -> dict[str, list[int]]:
        """
        Token ids, attention masks and labels of one row.

        Args:
            feature (`Mapping[str, Any]`):
                Row with the strings `prompt`, `chosen` and `rejected`.
            model (`PreTrainedModel`, *optional*):
                An encoder-decoder model, to add its decoder inputs.
            build_tokenized_answer (`Callable`, *optional*):
                Replaces this class's method of that name.

        Returns:
            `dict[str, list[int]]`: `{chosen,rejected}_{input_ids,attention_mask,labels}` and
            `prompt_{input_ids,attention_mask}`; for an encoder-decoder model
            `{chosen,rejected}_labels` and the prompt.

        Raises:
            ValueError: If a field is not a string, or the prompts of the two sides differ by more
                than the last token.
        """
        texts = [_string(feature, name) for name in ("prompt", "chosen", "rejected")]
        if build_tokenized_answer is None or self.is_encoder_decoder:
            rows, _ = self.tokenize_batch(*([text] for text in texts))
            row = rows[0]
        else:
            prompt, *answers = texts
            sides = [build_tokenized_answer(prompt, answer) for answer in answers]
            (prompt_ids,) = self._encode([prompt])
            row = self.assemble(prompt_ids, *sides)[0]
        if model is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
            if self.is_encoder_decoder:
                for side in ("rejected", "chosen"):
                    labels = torch.tensor([row[f"{side}_labels"]])
                    decoder = model.prepare_decoder_input_ids_from_labels(labels=labels)
                    row[f"{side}_decoder_input_ids"] = decoder[0].tolist()
        return row

    def tokenize_batch(
        self,
        prompts: Sequence[str],
        chosen: Sequence[str],
        rejected: Sequence[str],
        where: Sequence[str] | None = None,
    ) -> tuple[list[dict[str, list[int]]], list[bool]]:
        """
        [`~RowBuilder.tokenize_row`] for many rows: encodes each text once, all in one call.

        Args:
            prompts (`Sequence[str]`): Text of the prompts.
            chosen (`Sequence[str]`): Text of the preferred answers.
            rejected (`Sequence[str]`): Text of the other answers.
            where (`Sequence[str]`, *optional*): Names of the rows, for errors.

        Returns:
            `tuple`: The rows, and for each whether it was too long.

        Raises:
            ValueError: As `tokenize_row`.
        """
        count = len(prompts)
        if self.is_encoder_decoder:
            build, texts = self._encoder_decoder_row, [*prompts, *chosen, *rejected]
            encoded = self._encode(texts, add_special_tokens=True)
        else:
            build = self._decoder_row
            texts = list(prompts)
            for answers in (chosen, rejected):
                texts += [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            encoded = self._encode(texts)

        rows, overlength = [], []
        for index in range(count):
            first, second, third = (encoded[part * count + index] for part in range(3))
            try:
                row, too_long = build(first, second, third, texts[index::count])
            except ValueError as error:
                raise ValueError(f"{where[index]}: {error}" if where else str(error)) from error
            rows.append(row)
            overlength.append(too_long)
        return rows, overlength

    def is_overlength(self, feature: Mapping[str, Any]) -> bool:
        """
        Whether a row has more tokens than allowed, so that it is cut or dropped.

        Args:
            feature (`Mapping[str, Any]`): Row with the strings `prompt`, `chosen` and `rejected`.
        """
        texts = ([_string(feature, name)] for name in ("prompt", "chosen", "rejected"))
        return self.tokenize_batch(*texts)[1][0]

    def _encode(self, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
        if not texts:
            return []
        if not self._one_by_one:
            try:
                encoded = self.processing_class(texts, add_special_tokens=add_special_tokens)
                ids = encoded["input_ids"]
                if len(ids) == len(texts) and not any(isinstance(row, int) for row in ids):
                    return ids
            except (TypeError, AttributeError):
                pass  # a tokenizer in Python may take one text at a time
            self._one_by_one = True
        return [
            self.processing_class(text, add_special_tokens=add_special_tokens)["input_ids"]
            for text in texts
        ]

    def _decoder_row(
        self, prompt: list[int], chosen: list[int], rejected: list[int], texts: list[str]
    ) -> tuple[dict[str, list[int]], bool]:
        return self.assemble(
            prompt,
            split_answer(prompt, chosen, "chosen"),
            split_answer(prompt, rejected, "rejected"),
        )

    def assemble(
        self, prompt: list[int], chosen: Side, rejected: Side
    ) -> tuple[dict[str, list[int]], bool]:
        """
        The row (BOS and EOS added, cut to length), and whether it was too long.

        Args:
            prompt (`list[int]`): Ids of the prompt alone.
            chosen (`dict`): Of [`split_answer`].
            rejected (`dict`): Of [`split_answer`].

        Raises:
            ValueError: If the prompts of the sides differ by more than the last token.
        """
        chosen, rejected = (
            {key: list(values) for key, values in side.items()} for side in (chosen, rejected)
        )
        prompts = chosen["prompt_input_ids"], rejected["prompt_input_ids"]
        if prompts[0] != prompts[1]:
            differing = sum(a != b for a, b in zip(*prompts, strict=False))
            if differing > 1 or abs(len(prompts[0]) - len(prompts[1])) > 1:
                raise ValueError(
                    "the prompt's tokens differ between chosen and rejected by more than the last "
                    "one; end the prompt where a word ends"
                )
        # A last token that merged with an answer is not part of the prompt for generation.
        prompt = prompt[: min(map(len, prompts))]
        alone = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}

        sides = (chosen, rejected)
        for tokens in (alone, *sides):
            self._add_bos(tokens)
        for tokens in sides:
            self._add_eos(tokens)
        overlength = self._cut(alone, chosen, rejected)

        row = {}
        for name, tokens in (("chosen", chosen), ("rejected", rejected)):
            for key in ("input_ids", "attention_mask"):
                row[f"{name}_{key}"] = tokens[f"prompt_{key}"] + tokens[key]
            masked = [self.label_pad_token_id] * len(tokens["prompt_input_ids"])
            row[f"{name}_labels"] = masked + tokens["input_ids"]
        check_not_empty(row)
        row.update(alone)
        return self._pad_for_xla(row), overlength

    def _add_bos(self, tokens: Side) -> None:
        bos, ids = self.processing_class.bos_token_id, tokens["prompt_input_ids"]
        if bos is not None and (not ids or ids[0] != bos):
            tokens["prompt_input_ids"] = [bos, *ids]
            tokens["prompt_attention_mask"] = [1, *tokens["prompt_attention_mask"]]

    def _add_eos(self, tokens: Side) -> None:
        # Without an EOS id TRL appends None, which breaks the collator; here nothing is appended.
        eos, ids = self.processing_class.eos_token_id, tokens["input_ids"]
        if eos is not None and (not ids or ids[-1] != eos):
            tokens["input_ids"] = [*ids, eos]
            tokens["attention_mask"] = [*tokens["attention_mask"], 1]

    def _cut(self, alone: Side, chosen: Side, rejected: Side) -> bool:
        """Cut to length in place; returns whether anything was cut."""
        sides = (chosen, rejected)
        overlength = False
        most = self.max_prompt_length
        if most is None:
            for tokens in sides:
                room = max(0, self.max_length - len(tokens["prompt_input_ids"]))
                overlength = overlength or len(tokens["input_ids"]) > room
                _cut_answer(tokens, room)
            return overlength

        # The longer answer decides for both sides, so that they keep the same prompt.
        room = self.max_length - max(len(tokens["input_ids"]) for tokens in sides)
        for tokens in (alone, *sides):
            if len(tokens["prompt_input_ids"]) > room:
                overlength = True
                self._cut_prompt(tokens, most)
        for tokens in sides:
            if len(tokens["prompt_input_ids"]) > room:
                before = most if most < self.max_length else len(tokens["prompt_input_ids"])
                _cut_answer(tokens, self.max_length - before)
        return overlength

    def _cut_prompt(self, tokens: Side, most: int) -> None:
        kept = slice(-most, None) if self.truncation_mode == "keep_end" else slice(most)
        for key in ("prompt_input_ids", "prompt_attention_mask"):
            tokens[key] = tokens[key][kept]

    def _encoder_decoder_row(
        self, prompt: list[int], chosen: list[int], rejected: list[int], texts: list[str]
    ) -> tuple[dict[str, list[int]], bool]:
        limits = (self.max_prompt_length, self.max_completion_length, self.max_completion_length)
        parts, overlength = [prompt, chosen, rejected], False
        for index, limit in enumerate(limits):
            if limit is not None and len(parts[index]) > limit:
                # The tokenizer cuts, because it keeps its special tokens (T5's EOS) at the end.
                overlength = True
                cut = self.processing_class(texts[index], truncation=True, max_length=limit)
                parts[index] = cut["input_ids"]
        prompt, chosen, rejected = parts
        row = {
            "chosen_labels": chosen,
            "rejected_labels": rejected,
            "prompt_input_ids": prompt,
            "prompt_attention_mask": [1] * len(prompt),
        }
        return self._pad_for_xla(row), overlength

    def _pad_for_xla(self, row: dict[str, list[int]]) -> dict[str, list[int]]:
        if not is_torch_xla_available():
            return row
        pad_id = self.padding_value
        pad_id = self.processing_class.pad_token_id if pad_id is None else pad_id
        pads = {"labels": self.label_pad_token_id, "input_ids": pad_id, "attention_mask": 0}
        for key, values in row.items():
            pad = pads[key.split("_", 1)[1]]
            row[key] = values + [pad] * (self.max_length - len(values))
        return row


def check_not_empty(row: Mapping[str, Any]) -> None:
    """
    Check that both sequences of a row have a token.

    Args:
        row (`Mapping[str, Sequence[int]]`): From [`RowBuilder.tokenize_row`].

    Raises:
        ValueError: If one has none: prompt and answer are empty and the tokenizer adds nothing.
    """
    for side in ("chosen", "rejected"):
        if len(row.get(f"{side}_input_ids", "-")) == 0:
            raise ValueError(EMPTY_ROW.format(side))


# Also raised by the fast rows.
EMPTY_ROW = (
    "prompt and {} are both empty, and the tokenizer adds neither BOS nor EOS, so the row has no "
    "token; remove it"
)


def split_answer(prompt: list[int], full: list[int], answer_name: str) -> Side:
    """
    Split the ids of a prompt and its answer where the answer begins.

    Args:
        prompt (`list[int]`): Ids of the prompt alone.
        full (`list[int]`): Ids of both, encoded together; a merged token belongs to the answer.
        answer_name (`str`): Names the answer in errors.

    Raises:
        ValueError: If `full` is shorter than `prompt`.
    """
    if len(full) < len(prompt):
        raise ValueError(
            f"prompt and {answer_name} together have {len(full)} tokens, fewer than the prompt alone "
            f"({len(prompt)}), "
            "so the answer has no first token; end the prompt where a word ends"
        )
    boundary = len(prompt)
    if full[:boundary] != prompt:
        boundary -= 1
    answer = full[boundary:]
    return {
        "prompt_input_ids": full[:boundary],
        "prompt_attention_mask": [1] * boundary,
        "input_ids": answer,
        "attention_mask": [1] * len(answer),
    }


def _cut_answer(tokens: Side, length: int) -> None:
    for key in ("input_ids", "attention_mask"):
        tokens[key] = tokens[key][:length]


def _string(feature: Mapping[str, Any], name: str) -> str:
    value = feature[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}; must be a string")
    return value
