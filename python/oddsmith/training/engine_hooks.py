"""What the engine that spreads a run means for the trainer."""

from typing import Any

from ..optim.adamw.optimizer import BlockAdamW
from .adamw_names import ADAMW_NAMES, check_adamw_engine
from .engine import check_engine, engine_of, splits_batches
from .low_rank_names import LOW_RANK_NAMES, check_low_rank_engine
from .trainer_parts import TrainerParts

# accelerate puts DeepSpeed's Adam in place of an optimizer whose moments are offloaded, with 32-bit
# moments and other betas, unless DeepSpeed's configuration says not to.
_FORCED = "zero_force_ds_cpu_optimizer"


class EngineHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: refuses what its engine would do in another way."""

    def _check_engine(self) -> None:
        """
        Checks the engine and the optimizer's name, before anything starts.

        Raises:
            ValueError: If a run would go on differently, or not at all.
        """
        engine = engine_of(self.args, self.model)
        check_engine(engine, self.model)
        if self.aux_loss_enabled and splits_batches(self.args, self.model):
            raise ValueError(
                "config.output_router_logits is True, and DataParallel cannot join the router logits of "
                f"{self.args.n_gpu} GPUs; start one process per GPU with accelerate launch or torchrun, or "
                "show the process one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        if self.optimizer is None:
            name = str(getattr(self.args.optim, "value", self.args.optim))
            if name in ADAMW_NAMES:
                check_adamw_engine(engine, name)
            elif name in LOW_RANK_NAMES:
                check_low_rank_engine(engine, name)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.create_optimizer`]; oddsmith's optimizers remain under DeepSpeed."""
        optimizer = super().create_optimizer(*args, **kwargs)
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and isinstance(optimizer, BlockAdamW):
            engine = engine_of(self.args, self.model)
            check_adamw_engine(engine, type(optimizer).__name__)
            if engine.offload and plugin.deepspeed_config.setdefault(_FORCED, False):
                raise ValueError(
                    f"optim is {type(optimizer).__name__!r} and DeepSpeed offloads its moments, but "
                    f"{_FORCED} is true, which puts DeepSpeed's Adam in its place: remove one of them"
                )
        return optimizer
