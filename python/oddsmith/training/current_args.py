"""The arguments of a run as the only source of its settings, also after they were changed."""

from __future__ import annotations

from typing import Any, cast

from transformers.utils import logging

from ..data.collator import PreferenceCollator
from ..data.rows import RowBuilder
from .models import vocabulary_size
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)

# Arguments that the prepared rows depend on.
ROW_ARGUMENTS = (
    "column_mapping",
    "label_pad_token_id",
    "max_completion_length",
    "max_length",
    "max_prompt_length",
    "overlength",
    "padding_value",
    "prompt_column",
    "truncation_mode",
)
# Arguments that decide how the model is run and what is changed in it.
MODEL_ARGUMENTS = (
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "disable_dropout",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "neftune_noise_alpha",
    "padding_free",
    "torch_compile",
    "use_fused_head",
    "use_liger_kernel",
)
# Two names of one argument, of which transformers reads the second.
_TWO_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# Arguments that the process has taken over.
_FIXED = ("bf16", "fp16")


class _Argument:
    """An attribute of the trainer that is read from and written to its arguments."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        return self if trainer is None else getattr(trainer.args, self._name)

    def __set__(self, trainer: Any, value: Any) -> None:
        setattr(trainer.args, self._name, value)


class CurrentArgs(TrainerParts):
    """
    Part of [`~oddsmith.ORPOTrainer`]: arguments that were changed after the trainer was created, by
    a hyperparameter search or a script, hold for the next run.

    The attributes that TRL's trainer copies from its arguments are read from them. What was made
    from arguments, such as the rows, is made again at the start of `train`, `evaluate` and
    `predict` if one of these arguments has changed.
    """

    max_length = cast(int, _Argument())
    max_prompt_length = cast("int | None", _Argument())
    truncation_mode = cast(str, _Argument())
    label_pad_token_id = cast(int, _Argument())
    generate_during_eval = cast(bool, _Argument())

    # The collator, if it is ours.
    _own_collator: PreferenceCollator | None = None
    # The arguments that the trainer runs with, once it is created.
    _run_with: dict[str, Any] = {}
    # Beta of the last batch, if there is a schedule.
    _scheduled_beta: float | None = None

    @property
    def beta(self) -> float:
        """Weight of the odds ratio term: that of the last batch, if there is a schedule."""
        scheduled = self._scheduled_beta
        if scheduled is None or self.args.beta_schedule == "constant":
            return self.args.beta
        return scheduled

    @beta.setter
    def beta(self, value: float) -> None:
        self.args.beta = value

    @property
    def padding_value(self) -> int:
        """Token id that pads the inputs."""
        given = self.args.padding_value
        return self.tokenizer.pad_token_id if given is None else given

    @padding_value.setter
    def padding_value(self, value: int) -> None:
        self.args.padding_value = value

    @property
    def max_completion_length(self) -> int | None:
        """Most tokens of a completion, for encoder-decoder models."""
        return self._rows.max_completion_length

    def train(
        self,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """See [`~transformers.Trainer.train`]."""
        if trial is not None:
            # Trainer does this only after it has made the model of the trial.
            self._hp_search_setup(trial)
        self._follow_args()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See [`~transformers.Trainer.evaluate`]."""
        self._follow_args()
        return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.predict`]."""
        self._follow_args()
        return super().predict(*args, **kwargs)

    # ---- What is made from arguments ----

    def _row_builder(self) -> RowBuilder:
        args = self.args
        return RowBuilder(
            self.tokenizer,
            max_length=cast(int, args.max_length),
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            label_pad_token_id=args.label_pad_token_id,
            is_encoder_decoder=self.is_encoder_decoder,
            max_completion_length=args.max_completion_length,
            padding_value=self.padding_value,
        )

    def _prepare_given(self, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
        """The prepared rows of the given datasets, which are kept for other arguments."""
        self._given = (train_dataset, eval_dataset)
        train_dataset = self._prepare_rows(train_dataset, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = self._prepare_rows(eval_dataset, "eval_dataset")
        self._made = (train_dataset, eval_dataset)
        self._made_with = self._values(ROW_ARGUMENTS)
        return self._made

    def _values(self, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(self.args, name, None) for name in names}

    def _start_following(self) -> None:
        """Remembers the arguments that the trainer was created with."""
        self._leave_out_loss_kernels()
        self._run_with = self._values((*MODEL_ARGUMENTS, *_FIXED))

    def _leave_out_loss_kernels(self) -> None:
        """Keeps Liger, which changes the model when training starts, from replacing its forward."""
        args, losses = self.args, ("cross_entropy", "fused_linear_cross_entropy")
        if not args.use_liger_kernel:
            return
        given = args.liger_kernel_config or {}
        if any(given.get(name) for name in losses):
            logger.warning(
                "liger_kernel_config: the loss kernels are left out, because the loss is computed by "
                "oddsmith."
            )
        args.liger_kernel_config = {**given, **dict.fromkeys(losses, False)}

    def _follow_args(self) -> None:
        """
        Makes again what was made with other arguments.

        Raises:
            ValueError: For arguments that are not allowed, or cannot be changed any more.
        """
        self.args.check()
        if self._values(ROW_ARGUMENTS) != self._made_with:
            self._prepare_again()
        if self._values((*MODEL_ARGUMENTS, *_FIXED)) != self._run_with:
            self._choose_again()
        collator = self._own_collator
        if collator is not None:
            collator.label_pad_token_id = self.args.label_pad_token_id
            collator.share_prompt = self.args.share_prompt
            collator.packing = self._packs()

    def _choose_again(self) -> None:
        before, args = self._run_with, self.args
        for name in _FIXED:
            if getattr(args, name) != before[name]:
                raise ValueError(
                    f"{name} was {before[name]} when the trainer was created and is "
                    f"{getattr(args, name)}; create another trainer"
                )
        for old, new in _TWO_NAMES.items():
            if getattr(args, old) != before[old] and hasattr(args, new):
                setattr(args, new, getattr(args, old))
            elif hasattr(args, new):
                setattr(args, old, getattr(args, new))
        self.neftune_noise_alpha: float | None = args.neftune_noise_alpha
        self._start_following()
        if self.model_init is None:  # else the next run makes another model
            self._lend(self.model)
            self._choose_path(self.model)
            self._announce_path()

    def _prepare_again(self) -> None:
        changed = [
            name for name, value in self._made_with.items() if getattr(self.args, name) != value
        ]
        logger.warning(f"{', '.join(changed)} changed: the rows are prepared again.")
        # In place, because other objects refer to it.
        vars(self._rows).update(vars(self._row_builder()))
        self._last_given = None  # rows that evaluate or predict was given
        before = self._made
        made = self._prepare_given(*self._given)
        for name, old, new in zip(("train_dataset", "eval_dataset"), before, made, strict=True):
            if getattr(self, name) is old:  # not replaced by the user
                setattr(self, name, new)
        self._check_rows(self.train_dataset, self.eval_dataset, vocabulary_size(self.model))

    # ---- Set by the trainer ----

    _given: tuple[Any, Any]
    _made_with: dict[str, Any]
