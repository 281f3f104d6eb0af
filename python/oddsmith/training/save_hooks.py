"""What a run saves: whole weights, whatever has split them, never none, and never a part of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..quant.sharded import without_entries
from ..replace import complete, replace_model
from ..stage import new_folder, staged_file
from .saved_weights import check_written, stale_weights, weight_files
from .trainer_parts import TrainerParts


class SaveHooks(TrainerParts):
    """
    Part of [`~oddsmith.ORPOTrainer`]: `save_model` gathers weights that are split, and puts a model in its
    place when it is whole and on disk.
    """

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

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.push_to_hub`]. What is uploaded is whole, as in [`save_model`]."""
        with _gathered(self):
            return super().push_to_hub(*args, **kwargs)

    def _zero_adapter(self) -> bool:
        """Whether DeepSpeed trains an adapter."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and bool(getattr(self.model, "peft_config", None))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.train`]."""
        if self.args.should_save:
            complete(Path(self.args.output_dir or "."))
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # Of all processes the one that writes; a checkpoint has a stage of its own.
        if self._staging or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as stage:
            readme = folder / "README.md"
            if readme.is_file():  # peft adds to it
                shutil.copyfile(readme, stage / readme.name)
            super()._save(str(stage), state_dict)
            replace_model(stage, folder, stale_weights(stage, folder))

    def save_state(self) -> None:
        """See [`~transformers.Trainer.save_state`]."""
        if self.is_world_process_zero():
            text = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
            _write(self._output_file("trainer_state.json"), text)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """See [`~transformers.Trainer.save_metrics`]."""
        if not self.is_world_process_zero():
            return
        _write(
            self._output_file(f"{split}_results.json"),
            json.dumps(metrics, indent=4, sort_keys=True),
        )
        if combined:
            path = self._output_file("all_results.json")
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            _write(path, json.dumps({**before, **metrics}, indent=4, sort_keys=True))

    def _output_file(self, name: str) -> Path:
        return Path(self.args.output_dir or ".") / name

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        adapter = fsdp and getattr(self.model, "peft_config", None)
        with without_entries() if adapter else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)


def _write(path: Path, text: str) -> None:
    with staged_file(path) as file:
        file.write(text.encode())


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
