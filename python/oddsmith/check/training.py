"""A few steps of the demo's model, packed and padded, which have to agree."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)

from ..config import ORPOConfig
from ..demo.model import build_model, train_tokenizer
from ..demo.tasks import make_pairs
from ..integrations.nf4_config import NF4Config
from ..integrations.progress_bars import NoProgressBars
from ..trainer import ORPOTrainer
from .findings import Run

__all__ = ["KINDS", "runs"]

_STEPS = 3
_ROWS = 16


@dataclass(frozen=True)
class _Kind:
    """A way to train; `allowed` is how far the losses of two paths may be apart after the steps."""

    name: str
    dtype: torch.dtype
    allowed: float
    four_bit: bool = False


KINDS = (
    _Kind("float32", torch.float32, 1e-4),
    _Kind("bfloat16", torch.bfloat16, 0.05),
    _Kind("QLoRA", torch.float32, 1e-4, four_bit=True),
)


def runs(device: torch.device) -> Iterator[Run]:
    """
    Trains in float32, in bfloat16 and with a LoRA adapter on 4-bit weights.

    Args:
        device (`torch.device`): A CPU or a GPU; about ten seconds on a CPU.

    Returns:
        `Iterator[Run]`: The losses of the last step, packed and padded.
    """
    rows = make_pairs(_ROWS, seed=0)
    columns = ("prompt", "chosen", "rejected")
    tokenizer = train_tokenizer(
        message["content"] for row in rows for name in columns for message in row[name]
    )
    data = Dataset.from_list([{name: row[name] for name in columns} for row in rows])
    with tempfile.TemporaryDirectory() as folder, _silent():
        set_seed(0)
        build_model(tokenizer).save_pretrained(folder)
        for kind in KINDS:
            yield _run(kind, device, folder, tokenizer, data)


def _run(
    kind: _Kind,
    device: torch.device,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
) -> Run:
    losses: list[float] = []
    path = ""
    try:
        for packed in (True, False):
            trainer = _trainer(kind, device, folder, tokenizer, data, packed)
            trainer.train()
            losses.append(trainer.state.log_history[_STEPS - 1]["loss"])
            path = path or str(trainer.path)
    except Exception as error:  # whatever a device does
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Run(str(device), kind.name, None, None, kind.allowed, path, reason)
    return Run(str(device), kind.name, losses[0], losses[1], kind.allowed, path)


def _trainer(
    kind: _Kind,
    device: torch.device,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    packed: bool,
) -> ORPOTrainer:
    set_seed(0)
    four_bit: dict[str, Any] = {"quantization_config": NF4Config()} if kind.four_bit else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind.dtype, **four_bit)
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    args = ORPOConfig(
        output_dir=f"{folder}/run",
        max_steps=_STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        max_length=64,
        bf16=kind.dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        padding_free=packed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ORPOTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter if kind.four_bit else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines and bars of a run, which are not what is asked for."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with NoProgressBars():
            yield
    finally:
        logging.disable(disabled)
