"""What a run saves: whole weights, whatever has split them, and never none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..quant.sharded import without_entries
from .saved_weights import check_written, weight_files
from .trainer_parts import TrainerParts


class SaveHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: `save_model` gathers weights that are split."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        See [`~transformers.Trainer.save_model`]. Weights that FSDP or ZeRO-3 have split are gathered,
        also if checkpoints are saved in parts.

        Raises:
            RuntimeError: If no weights were written.
        """
        if _internal_call:  # into a checkpoint, which is in parts if that is asked for
            # ZeRO-3 would write an adapter without weights beside the parts.
            with _gathered(self) if self._zero_adapter() else nullcontext():
                super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        before = weight_files(folder, before=True)
        with _gathered(self):
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            check_written(folder, before)

    def _zero_adapter(self) -> bool:
        """Whether DeepSpeed trains an adapter."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and bool(getattr(self.model, "peft_config", None))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        adapter = fsdp and getattr(self.model, "peft_config", None)
        with without_entries() if adapter else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)


@contextmanager
def _gathered(trainer: Any) -> Iterator[None]:
    """A context in which a model is saved in whole."""
    state = trainer.accelerator.state
    engine = getattr(trainer, "deepspeed", None)
    if getattr(state, "fsdp_plugin", None) is not None:
        from torch.distributed.fsdp import StateDictType

        place, name, whole = state.fsdp_plugin, "state_dict_type", StateDictType.FULL_STATE_DICT
    elif getattr(state, "deepspeed_plugin", None) is not None and engine is not None:
        # What ZeRO-3 asks before it gathers; the other stages do not.
        place = engine._config.zero_config
        name, whole = "gather_16bit_weights_on_model_save", True
    else:
        yield
        return
    before = getattr(place, name)
    setattr(place, name, whole)
    try:
        yield
    finally:
        setattr(place, name, before)
