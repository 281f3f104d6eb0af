"""ORPOConfig: every argument of a training run."""

import math
import numbers
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import convert_file_size_to_int
from transformers import TrainingArguments
from transformers.utils import logging
from transformers.utils.import_utils import (
    is_torch_bf16_gpu_available,
    is_torch_xla_available,
)

from .bf16_products import cpu_has_bf16
from .legacy_arguments import LEGACY_NAMES, LegacyArguments, flag, resolve_legacy

logger = logging.get_logger(__name__)

TRUNCATION_MODES = ("keep_end", "keep_start")
BETA_SCHEDULES = ("constant", "linear", "cosine")
NLL_SCOPES = ("full", "completion")
ODDS_RATIO_LINKS = ("logsigmoid", "identity")
OVERLENGTH_POLICIES = ("truncate", "drop")
# The values as text, and as JSON or YAML types.
_SHARE_PROMPT: dict[str, bool | Literal["auto"]] = {"auto": "auto", "true": True, "false": False}

if TYPE_CHECKING:
    SharePrompt = bool | Literal["auto"]
    ByteBudget = int | str | None
else:
    # HfArgumentParser cannot make a flag of such a union, so it passes the text, which is parsed
    # here.
    SharePrompt = str
    ByteBudget = str

# What TRL assumed when max_length was None.
_MAX_LENGTH_OF_NONE = 512


@dataclass
class ORPOConfig(LegacyArguments, TrainingArguments):
    r"""
    Arguments of [`ORPOTrainer`]: those of [`~transformers.TrainingArguments`] and those below.

    Takes the arguments of every TRL release, and the names of older releases of transformers
    ([`~oddsmith.legacy_arguments.LegacyArguments`]). [`~transformers.HfArgumentParser`] makes flags.

    Args:
        learning_rate (`float`, *optional*, defaults to `1e-6`):
            Initial learning rate.
        logging_steps (`float`, *optional*, defaults to `10`):
            Steps between two logs; below 1 a fraction of all steps.
        gradient_checkpointing (`bool`, *optional*, defaults to `True`):
            Recompute activations. `activation_checkpointing`, its newer name, is used if given.
        activation_budget (`int` or `str`, *optional*, defaults to `"auto"`):
            Memory for activations that are kept, not recomputed: bytes, a size such as `"4GB"`, or
            `"auto"`, what is free. `None` or `"none"`: none.
        bf16 (`bool`, *optional*):
            bfloat16 mixed precision. `None` means yes unless `fp16` is set. Falls back to fp32,
            with a log message, if the hardware has no bfloat16.
        beta (`float`, *optional*, defaults to `0.1`):
            Weight of the odds ratio term (lambda in the paper). 0 trains on the chosen answers
            alone. With a `beta_schedule`, the value at the start.
        beta_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`, or how beta changes to `beta_end`: `"linear"` or `"cosine"`.
        beta_end (`float`, *optional*):
            Value of beta at the end of training; required by, and only allowed with, a schedule.
        beta_anneal_start (`float`, *optional*, defaults to `0.0`):
            Fraction of training, in [0, 1), during which beta is constant before it changes to
            `beta_end`.
        nll_scope (`str`, *optional*, defaults to `"full"`):
            Tokens of the chosen sequence in the likelihood term: `"full"` (prompt and completion,
            as TRL) or `"completion"`.
        odds_ratio_link (`str`, *optional*, defaults to `"logsigmoid"`):
            Function of the log odds ratio: `"logsigmoid"` (the paper and TRL) or
            `"identity"` (the raw log odds ratio, which has no bound).
        max_length (`int`, *optional*, defaults to `1024`):
            Most tokens of prompt and completion together. `None` means 512.
        max_prompt_length (`int`, *optional*):
            If given, a pair that is too long has its prompt cut to this length first, then its
            answers to the rest (the rule of TRL up to 0.27). If not, only answers are cut (TRL
            today). If it is `max_length`, each answer is cut to what its prompt leaves.
        max_completion_length (`int`, *optional*):
            Most tokens of a completion; encoder-decoder models only.
        truncation_mode (`str`, *optional*, defaults to `"keep_end"`):
            Which end of a prompt `max_prompt_length` keeps: `"keep_end"` or `"keep_start"`.
        overlength (`str`, *optional*, defaults to `"truncate"`):
            What happens to a pair that is too long: `"truncate"` or `"drop"`.
        label_pad_token_id (`int`, *optional*, defaults to `-100`):
            Label of the positions that are not trained on.
        padding_value (`int`, *optional*):
            Token id that pads the inputs. `None`: that of the tokenizer.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Set every dropout of the model, the adapter's included, to 0.
        generate_during_eval (`bool`, *optional*, defaults to `False`):
            Log completions of the model with each evaluation.
        is_encoder_decoder (`bool`, *optional*):
            Whether `model_init` returns an encoder-decoder model.
        model_init_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments, or a JSON object of them, for `from_pretrained` if the model is a
            string.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Allow models with Python code in their repository.
        prompt_column (`str`, *optional*):
            Column of the dataset that is the prompt. `None`: `prompt`, or one of the usual names.
        column_mapping (`dict[str, str]` or `str`, *optional*):
            Columns of the dataset, or a JSON object of them, that become `prompt`, `chosen`,
            `rejected`, `system`, `tools` or `chat_template_kwargs`.
        dataset_num_proc (`int`, *optional*):
            Processes that prepare the data. The tokenizer uses all cores even with one process.
        padding_free (`bool`, *optional*, defaults to `True`):
            Run the model on one packed row of the batch's tokens without padding, if its attention
            allows it; otherwise the log says why not. Needs the fused head.
        share_prompt (`bool` or `"auto"`, *optional*, defaults to `"auto"`):
            Compute the common beginning of a pair's sequences once, in a packed row, with the same
            results. `"auto"`: if that saves at least 5 % of a pair's tokens.
        max_tokens_per_batch (`int`, *optional*):
            Most tokens of a training batch, both sequences of a pair counted in full, instead of
            `per_device_train_batch_size` pairs. An epoch has every pair once.
        use_fused_head (`bool`, *optional*, defaults to `True`):
            Compute the loss in the fused head, without the logits of a batch. `False`: from logits.
        logits_budget (`int`, *optional*):
            Most bytes of logits that the fused head may hold. `None`: the head chooses.
    """

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "column_mapping",
    ]

    learning_rate: float = field(
        default=1e-6, metadata={"help": "The initial learning rate for the optimizer."}
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Steps between two logs; below 1 a fraction of all training steps."},
    )
    # Never None here, so that the command line has --no_gradient_checkpointing.
    gradient_checkpointing: bool = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=True,
        metadata={"help": "Recompute activations in the backward pass to save memory."},
    )
    activation_budget: ByteBudget = field(
        default="auto",
        metadata={
            "help": "Memory for activations that are kept: auto (what is free), 4GB, .., or none."
        },
    )
    bf16: bool | None = flag(
        None,
        "bfloat16 mixed precision. Default: yes unless fp16 is set, where the hardware has it.",
    )

    beta: float = field(default=0.1, metadata={"help": "Weight of the odds ratio term."})
    beta_schedule: str = field(
        default="constant",
        metadata={"help": "How beta changes to beta_end.", "choices": list(BETA_SCHEDULES)},
    )
    beta_end: float | None = field(
        default=None, metadata={"help": "Beta at the end of training, for a schedule."}
    )
    beta_anneal_start: float = field(
        default=0.0, metadata={"help": "Fraction of training before beta starts to change."}
    )
    nll_scope: str = field(
        default="full",
        metadata={
            "help": "Tokens in the likelihood term: prompt and completion, or completion only.",
            "choices": list(NLL_SCOPES),
        },
    )
    odds_ratio_link: str = field(
        default="logsigmoid",
        metadata={
            "help": "Function of the log odds ratio in the loss.",
            "choices": list(ODDS_RATIO_LINKS),
        },
    )

    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of prompt and completion together."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Cut the prompts of pairs that are too long to this first."}
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a completion; encoder-decoder models only."}
    )
    truncation_mode: str = field(
        default="keep_end",
        metadata={
            "help": "Which end of a prompt max_prompt_length keeps.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    overlength: str = field(
        default="truncate",
        metadata={
            "help": "What happens to a pair that is too long.",
            "choices": list(OVERLENGTH_POLICIES),
        },
    )
    label_pad_token_id: int = field(
        default=-100, metadata={"help": "Label of positions that are not trained on."}
    )
    padding_value: int | None = field(
        default=None, metadata={"help": "Token id that pads the inputs. Default: the tokenizer's."}
    )

    disable_dropout: bool = field(default=True, metadata={"help": "Set every dropout to 0."})
    generate_during_eval: bool = field(
        default=False, metadata={"help": "Log completions of the model with each evaluation."}
    )
    is_encoder_decoder: bool | None = flag(None, "`model_init` returns an encoder-decoder model.")
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments (JSON on the command line) to load the model with."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow models with Python code in their repository."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the dataset that is the prompt."}
    )
    column_mapping: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Columns (JSON on the command line), such as {"question": "prompt"}.'},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare the data."}
    )

    padding_free: bool = field(
        default=True, metadata={"help": "Run the model without padding, if it allows it."}
    )
    share_prompt: SharePrompt = field(
        default="auto",
        metadata={"help": "Compute each prompt once: auto (if it saves time), true or false."},
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Most tokens of a training batch, instead of pairs."}
    )
    use_fused_head: bool = field(
        default=True, metadata={"help": "Compute the loss in the fused head, without the logits."}
    )
    logits_budget: int | None = field(
        default=None, metadata={"help": "Most bytes of logits that the fused head may hold."}
    )

    def __post_init__(self) -> None:
        self._read_numbers()
        resolve_legacy(self)
        self._resolve_checkpointing()
        self._resolve_precision()
        if self.max_length is None:
            logger.warning_once(f"`max_length` is None: using {_MAX_LENGTH_OF_NONE}.")
            self.max_length = _MAX_LENGTH_OF_NONE
        self._check(self.max_length)
        super().__post_init__()
        self._resolve_model_init_kwargs()

    def _read_numbers(self) -> None:
        """Read floats that arrive as strings: YAML reads 8e-6, which has no dot, as a string."""
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str) and each.type in (float, float | None):
                try:
                    setattr(self, each.name, float(value))
                except ValueError:
                    raise ValueError(f"{each.name} is {value!r}; must be a number") from None

    def _resolve_checkpointing(self) -> None:
        # transformers 5.2x warns about the old name even if it only has this class's default.
        # Earlier releases have no new name.
        for old, new in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if hasattr(type(self), new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))

    def _resolve_precision(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("fp16 and bf16 are both True; at most one can be")
        wanted = not self.fp16 if self.bf16 is None else self.bf16
        if self.use_cpu:
            # By default only if the CPU has the instructions: without them torch emulates bfloat16,
            # about a hundred times slower than fp32. An explicit bf16=True is kept.
            missing = wanted and self.bf16 is None and not cpu_has_bf16()
        else:
            missing = (wanted or self.bf16_full_eval) and not (
                is_torch_bf16_gpu_available() or is_torch_xla_available()
            )
        if missing:
            logger.warning_once("This hardware has no bfloat16: falling back to fp32.")
            wanted = False
            self.bf16_full_eval: bool = self.bf16_full_eval and self.use_cpu
        # `bool` in the base class; here None means not given.
        self.bf16 = wanted  # pyright: ignore[reportIncompatibleVariableOverride]

    def _resolve_model_init_kwargs(self) -> None:
        # TrainingArguments.__post_init__ has parsed JSON text.
        kwargs = self.model_init_kwargs
        if kwargs is None:
            return
        if not isinstance(kwargs, dict):
            raise ValueError(f"model_init_kwargs is {kwargs!r}; must be a dict or a JSON object")
        if "torch_dtype" in kwargs:
            # The older name of dtype; to_dict converts only the newer one.
            kwargs = dict(kwargs)
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
            self.model_init_kwargs = kwargs

    def _check(self, max_length: int) -> None:
        _check_weight("beta", self.beta)
        self.beta = float(self.beta)
        _check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        if self.beta_end is not None:
            _check_weight("beta_end", self.beta_end)
            self.beta_end = float(self.beta_end)
        if self.beta_schedule != "constant" and self.beta_end is None:
            raise ValueError(f"beta_schedule is {self.beta_schedule!r}; needs beta_end")
        if self.beta_schedule == "constant" and self.beta_end is not None:
            raise ValueError(
                f"beta_end is {self.beta_end} with beta_schedule 'constant'; "
                "set beta_schedule to 'linear' or 'cosine'"
            )
        if not 0.0 <= self.beta_anneal_start < 1.0:
            raise ValueError(f"beta_anneal_start is {self.beta_anneal_start}; must be in [0, 1)")
        _check_choice("nll_scope", self.nll_scope, NLL_SCOPES)
        _check_choice("odds_ratio_link", self.odds_ratio_link, ODDS_RATIO_LINKS)
        _check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        _check_choice("overlength", self.overlength, OVERLENGTH_POLICIES)
        share_prompt = _SHARE_PROMPT.get(str(self.share_prompt).lower())
        if share_prompt is None:
            raise ValueError(
                f"share_prompt is {self.share_prompt!r}; must be True, False or 'auto'"
            )
        self.share_prompt = share_prompt
        self.activation_budget = _read_budget(self.activation_budget)
        for name in (
            "max_length",
            "max_prompt_length",
            "max_completion_length",
            "dataset_num_proc",
            "max_tokens_per_batch",
            "logits_budget",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; must be positive")
        if self.label_pad_token_id >= 0:
            raise ValueError(
                f"label_pad_token_id is {self.label_pad_token_id}; must be negative, so that it "
                "is not a token id"
            )
        if self.max_prompt_length is not None and self.max_prompt_length > max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}; must be at most max_length "
                f"{max_length}"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; must be 0: the loss of "
                "ORPO has no smoothed labels"
            )

    def check(self) -> None:
        """
        Check the values again after some were changed.

        Raises:
            ValueError: For a value that is not allowed.
        """
        if self.max_length is None:
            self.max_length = _MAX_LENGTH_OF_NONE
        self._check(self.max_length)

    def beta_at(self, step: int, max_steps: int) -> float:
        """
        Beta of a training step.

        `beta` for the first `beta_anneal_start` of training; then linearly or by half a cosine to
        `beta_end` at `max_steps`.

        Args:
            step (`int`): Optimiser steps so far.
            max_steps (`int`): Optimiser steps of the training.

        Raises:
            ValueError: If there is a schedule and `max_steps` is not positive.
        """
        if self.beta_schedule == "constant" or self.beta_end is None:
            return self.beta
        if max_steps <= 0:
            raise ValueError(f"max_steps is {max_steps}; must be positive for a beta_schedule")
        start = self.beta_anneal_start
        done = min(max((step / max_steps - start) / (1.0 - start), 0.0), 1.0)
        if self.beta_schedule == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return self.beta + (self.beta_end - self.beta) * done

    def model_kwargs(self) -> dict[str, Any]:
        """`model_init_kwargs`, empty if there are none."""
        return self.model_init_kwargs if isinstance(self.model_init_kwargs, dict) else {}

    def to_dict(self) -> dict[str, Any]:
        """All arguments as JSON values, without the older names, which are None here."""
        kept = self.model_init_kwargs
        try:
            # TrainingArguments.to_dict changes dtypes to strings inside the nested dict.
            self.model_init_kwargs = dict(kept) if isinstance(kept, dict) else kept
            all_values = super().to_dict()
        finally:
            self.model_init_kwargs = kept
        return {name: value for name, value in all_values.items() if name not in LEGACY_NAMES}


def _check_weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} is {value!r}; must be a number")
    if not (math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} is {value}; must be at least 0 and finite")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; must be one of {', '.join(map(repr, allowed))}")


def _read_budget(value: Any) -> int | str | None:
    """`activation_budget` as bytes, `"auto"` or None."""
    if value is None or value in ("auto", "none"):
        return None if value == "none" else value
    size = 0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str):
        with suppress(ValueError):
            size = int(value) if value.isdigit() else convert_file_size_to_int(value)
    if size <= 0:
        raise ValueError(
            f"activation_budget is {value!r}; must be a positive number of bytes, a size such as "
            "'4GB' or '512MiB', 'auto' or 'none'"
        )
    return size
