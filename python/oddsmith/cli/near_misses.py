"""The right name for a flag or setting that is not ours. Standard library only, so that help is fast."""

import argparse
import difflib
from collections.abc import Iterable
from typing import Any

# Names of other trainers (axolotl, LLaMA-Factory, torchtune, PEFT, TRL's scripts) and short forms.
# difflib would find none of these names, or a wrong one, such as local_rank for lora_rank.
ALIASES = {
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "batch_size": "per_device_train_batch_size",
    "bs": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "optimizer": "optim",
    "clip_grad": "max_grad_norm",
    "wd": "weight_decay",
    "lora": "use_peft",
    "adapter": "use_peft",
    "peft": "use_peft",
    "lora_rank": "lora_r",
    "rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "r": "lora_r",
    "qlora": "load_in_4bit",
    "quantize": "load_in_4bit",
    "double_quant": "use_bnb_nested_quant",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "base_model": "model",
    "model_name": "model",
    "model_id": "model",
    "precision": "dtype",
    "revision": "model_revision",
    "data": "dataset",
    "datasets": "dataset",
    "train_file": "dataset",
    "eval_file": "eval_dataset",
    "split": "dataset_train_split",
    "template": "chat_template",
    "orpo_beta": "beta",
    "orpo_alpha": "beta",
    "pref_beta": "beta",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "output": "output_dir",
    "out": "output_dir",
    "eval_interval": "eval_steps",
    "save_interval": "save_steps",
    "log_interval": "logging_steps",
    "resume": "resume_from_checkpoint",
    "nproc_per_node": "num_processes",
    "nproc": "num_processes",
    "gpus": "num_processes",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """
    The known name that was probably meant.

    Args:
        name (`str`): A flag or a setting, dashes as typed.
        known (`Iterable[str]`): The names that there are, without dashes in front.

    Returns:
        `str` or `None`: One of `known`; None if nothing is near.
    """
    known = [each.lstrip("-").replace("-", "_") for each in known]
    plain = name.lstrip("-").replace("-", "_")
    for each in (plain, plain.lower(), ALIASES.get(plain.lower())):
        if each in known:
            return each
    close = difflib.get_close_matches(plain.lower(), known, n=1)
    return close[0] if close else None


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest flag for one that it does not know."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self._given: list[str] = []

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # its overloads
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """See [`argparse.ArgumentParser`]."""
        self._given = list(args or [])
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> Any:
        """See [`argparse.ArgumentParser`]."""
        begins = ("unrecognized arguments", "the following arguments are required")
        if message.startswith(begins):
            message += self._unknown()
        super().error(message)

    def _unknown(self) -> str:
        for given in self._given:
            flag = given.partition("=")[0]
            # A part of a flag's name is accepted, as argparse does.
            if not flag.startswith("--") or any(
                each.startswith(flag) for each in self._option_string_actions
            ):
                continue
            near = nearest(flag, (each for each in self._option_string_actions if each[:2] == "--"))
            return f"; for {flag}, did you mean --{near}?" if near else ""
        return ""
