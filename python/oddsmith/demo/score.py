"""Scores a model on the demo's held-out pairs.

In plain torch on purpose: the scores do not depend on the fused head that the training used.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .tasks import TASKS, is_correct

BATCH_SIZE = 160
# The longest answer of the tasks has 9 tokens and the EOS token.
MAX_NEW_TOKENS = 12


def batches(rows: Sequence[dict]) -> Iterator[Sequence[dict]]:
    for start in range(0, len(rows), BATCH_SIZE):
        yield rows[start : start + BATCH_SIZE]


@torch.no_grad()
def mean_logps(model: Any, tokenizer: Any, rows: Sequence[dict], side: str) -> Tensor:
    """Mean log-probability of the completion's tokens, EOS included, for each row's `side`.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, with a chat template.
        rows (`Sequence[dict]`): Rows of [`~oddsmith.demo.tasks.make_pairs`].
        side (`str`): `"chosen"` or `"rejected"`.

    Returns:
        `Tensor`: fp32 of shape `(len(rows),)`.
    """
    means = []
    for batch in batches(rows):
        prompts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False) for row in batch]
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            for row in batch
        ]
        encode = {"add_special_tokens": False, "return_attention_mask": False}
        prompt_lengths = torch.tensor([len(ids) for ids in tokenizer(prompts, **encode).input_ids])
        sequences = [torch.tensor(ids) for ids in tokenizer(texts, **encode).input_ids]
        lengths = torch.tensor([len(ids) for ids in sequences])
        ids = torch.nn.utils.rnn.pad_sequence(
            sequences, batch_first=True, padding_value=tokenizer.pad_token_id
        )
        positions = torch.arange(ids.shape[1])
        attention_mask = (positions < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        # Position t predicts token t + 1: the first completion token is at its prompt's length.
        targets = positions[1:]
        completion = (targets >= prompt_lengths[:, None]) & (targets < lengths[:, None])
        means.append((logps * completion).sum(1) / completion.sum(1))
    return torch.cat(means)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, rows: Sequence[dict]) -> list[str]:
    """The model's greedy answer to each row's prompt."""
    answers = []
    for batch in batches(rows):
        prompts = [tokenizer.apply_chat_template(row["prompt"], tokenize=False) for row in batch]
        inputs = tokenizer(
            prompts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        written = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        answers += tokenizer.batch_decode(
            written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
    return answers


def score(model: Any, tokenizer: Any, rows: Sequence[dict], beta: float) -> dict[str, dict]:
    """Scores a model on pairs, per task and for all together.

    Args:
        model (`PreTrainedModel`): A causal language model; its train/eval mode is restored.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        rows (`Sequence[dict]`): Rows of [`~oddsmith.demo.tasks.make_pairs`].
        beta (`float`): Scale of the rewards, as in training.

    Returns:
        `dict[str, dict]`: For `"all"` and each task's name: `accuracy` (share of pairs whose chosen
            completion is more likely, per token), `margin` (mean of beta times the difference) and
        `exact` (share of correct greedy answers).
    """
    was_training = model.training
    model.eval()
    gaps = mean_logps(model, tokenizer, rows, "chosen")
    gaps = gaps - mean_logps(model, tokenizer, rows, "rejected")
    right = torch.tensor(
        [
            is_correct(row["prompt"][0]["content"], text)
            for row, text in zip(rows, answer(model, tokenizer, rows), strict=True)
        ]
    )
    model.train(was_training)
    members = {"all": torch.ones(len(rows), dtype=torch.bool)}
    for task in TASKS:
        members[task.name] = torch.tensor([row["task"] == task.name for row in rows])
    return {
        name: {
            "accuracy": (gaps[member] > 0).double().mean().item(),
            "margin": beta * gaps[member].double().mean().item(),
            "exact": right[member].double().mean().item(),
        }
        for name, member in members.items()
        if member.any()
    }
