"""What the engine that spreads a run means for the trainer."""

from typing import Any

from torch import nn

from ..optim.adamw.optimizer import BlockAdamW
from .adamw_names import ADAMW_NAMES, check_adamw_engine
from .engine import Engine, check_engine, engine_of, splits_batches
from .low_rank_names import LOW_RANK_NAMES, check_low_rank_run
from .split_codes import check_codes, check_codes_with_deepspeed
from .trainer_parts import TrainerParts

# accelerate puts DeepSpeed's Adam in place of an optimizer whose moments are offloaded, with 32-bit
# moments and other betas, unless DeepSpeed's configuration says not to.
_FORCED = "zero_force_ds_cpu_optimizer"


class EngineHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: refuses what its engine would do in another way."""

    # Whether layers are gathered from other processes.
    _gathers = False
    # Whether there is an accelerator that Trainer's __init__ has not asked for yet.
    _has_started = False

    def _start_engine(self, model: nn.Module, own_optimizer: bool) -> None:
        """
        Makes the accelerator, which knows the engine, and checks what it is to run: before rows are
        made, which Trainer wants to have first.

        Args:
            model (`nn.Module`): The model, with its adapter.
            own_optimizer (`bool`): Whether the optimizer is made by its name.

        Raises:
            ValueError: If a run would go on differently, or not at all.
            NotImplementedError: For a layer-wise optimizer on several processes.
        """
        # As in Trainer's __init__: DDP's settings depend on it.
        self.model = model if self.model_init is None else None  # pyright: ignore[reportAttributeAccessIssue]
        self.create_accelerator_and_postprocess()
        self._has_started = True
        self._check_engine(model, own_optimizer)

    def create_accelerator_and_postprocess(self) -> None:
        """
        See [`~transformers.Trainer.create_accelerator_and_postprocess`]. Done once for a trainer that is
        created: a second accelerator takes no settings of DeepSpeed.
        """
        if self._has_started:
            self._has_started = False
            return
        super().create_accelerator_and_postprocess()

    def _check_engine(self, model: nn.Module, own_optimizer: bool) -> None:
        engine = engine_of(self.args, model)
        check_engine(engine, model)
        self._gathers = engine.gathers and self.accelerator.num_processes > 1
        if self.aux_loss_enabled and splits_batches(self.args, model):
            raise ValueError(
                "config.output_router_logits is True, and DataParallel cannot join the router logits of "
                f"{self.args.n_gpu} GPUs; start one process per GPU with accelerate launch or torchrun, or "
                "show the process one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            check_codes(model, plugin)
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None:
            check_codes_with_deepspeed(model, plugin.deepspeed_config)
        name = str(getattr(self.args.optim, "value", self.args.optim))
        if not own_optimizer:
            return
        if name in ADAMW_NAMES:
            self._check_adamw(engine, name)
        elif name in LOW_RANK_NAMES:
            check_low_rank_run(self.args, model, name, engine)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        See [`~transformers.Trainer.evaluate`].

        Raises:
            ValueError: Under FSDP2, if the trainer has not trained.
        """
        self._check_split("evaluate")
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """
        See [`~transformers.Trainer.predict`].

        Raises:
            ValueError: Under FSDP2, if the trainer has not trained.
        """
        self._check_split("predict")
        return super().predict(*args, **kwargs)

    def _check_split(self, method: str) -> None:
        # accelerate refuses it too, in the middle and in its own words.
        if getattr(self.accelerator, "is_fsdp2", False) and not self.accelerator._models:
            raise ValueError(
                f"{method} before train under FSDP2, where accelerate splits a model together with its "
                "optimizer only: train first, set eval_on_start=True, or use DDP"
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.create_optimizer`]; oddsmith's optimizers remain under DeepSpeed."""
        optimizer = super().create_optimizer(*args, **kwargs)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and isinstance(optimizer, BlockAdamW):
            self._check_adamw(engine_of(self.args, self.model), type(optimizer).__name__)
        return optimizer

    def _check_adamw(self, engine: Engine, name: str) -> None:
        """Also lets it remain if DeepSpeed offloads its moments."""
        check_adamw_engine(engine, name)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is None or not engine.offload:
            return
        if plugin.deepspeed_config.setdefault(_FORCED, False):
            raise ValueError(
                f"optim is {name!r} and DeepSpeed offloads its moments, but {_FORCED} is true, which puts "
                "DeepSpeed's Adam in its place: remove one of them"
            )
