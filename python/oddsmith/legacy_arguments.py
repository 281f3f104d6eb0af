"""Names of older training scripts that transformers 5 no longer knows.

One table has the names with a successor, the other those without. Both become dataclass fields of
[`LegacyArguments`], so that `ORPOConfig(...)`, `HfArgumentParser`, YAML files and `--flag` accept
them; [`resolve_legacy`] then moves the values to the new names.
"""

import math
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

# name -> (type, new name)
RENAMED: dict[str, tuple[Any, str]] = {
    "evaluation_strategy": (str, "eval_strategy"),
    "no_cuda": (bool, "use_cpu"),
    "warmup_ratio": (float, "warmup_steps"),
    "group_by_length": (bool, "train_sampling_strategy"),
    "include_inputs_for_metrics": (bool, "include_for_metrics"),
}

# name -> (type, what to do instead; empty if nothing)
IGNORED: dict[str, tuple[Any, str]] = {
    "overwrite_output_dir": (bool, ""),
    "logging_dir": (str, "set the environment variable TENSORBOARD_LOGGING_DIR"),
    "save_safetensors": (bool, "checkpoints are always safetensors"),
    "per_gpu_train_batch_size": (int, "use per_device_train_batch_size"),
    "per_gpu_eval_batch_size": (int, "use per_device_eval_batch_size"),
    "fp16_backend": (str, ""),
    "half_precision_backend": (str, ""),
    "fp16_opt_level": (str, ""),
    "include_tokens_per_second": (bool, "use include_num_input_tokens_seen"),
    "push_to_hub_model_id": (str, "use hub_model_id"),
    "push_to_hub_organization": (str, "use hub_model_id='organization/name'"),
    "push_to_hub_token": (str, "use hub_token"),
    "use_mps_device": (bool, "MPS is used where it is available"),
    "ray_scope": (str, ""),
    "past_index": (int, ""),
    "jit_mode_eval": (bool, ""),
    "tpu_num_cores": (int, ""),
    "tpu_metrics_debug": (bool, "use debug='tpu_metrics_debug'"),
    "fsdp_min_num_params": (int, "use fsdp_config={'min_num_params': ...}"),
    "fsdp_transformer_layer_cls_to_wrap": (
        str,
        "use fsdp_config={'transformer_layer_cls_to_wrap': ...}",
    ),
    "dispatch_batches": (bool, "use accelerator_config={'dispatch_batches': ...}"),
    "split_batches": (bool, "use accelerator_config={'split_batches': ...}"),
    "use_ipex": (bool, ""),
    "torchdynamo": (str, "use torch_compile_backend"),
    "adafactor": (bool, "use optim='adafactor'"),
    "mp_parameters": (str, ""),
    "use_legacy_prediction_loop": (bool, ""),
}

# Renamed optimisers; every other name is passed to transformers unchanged.
RENAMED_OPTIM = {
    "adamw_hf": "adamw_torch",
    "galore_adamw_8bit_bnb": "galore_adamw_8bit",
    # transformers has this name in its list, but not as a value.
    "paged_adamw": "paged_adamw_32bit",
}


def flag(default: bool | None, help: str) -> Any:
    """
    A dataclass field for a boolean that may also be None, with `--name` alone meaning True.

    `HfArgumentParser` requires a value after the flag of such a field unless this is set.
    """
    return field(default=default, metadata={"help": help, "nargs": "?", "const": True})


def _legacy_field(name: str, kind: Any, help: str) -> tuple[str, Any, Any]:
    made = flag(None, help) if kind is bool else field(default=None, metadata={"help": help})
    return name, kind | None, made


# A mixin made from the tables. None means "not given", whatever the old default was.
if TYPE_CHECKING:
    # For the type checker, which cannot read tables; a test compares them.
    @dataclass
    class LegacyArguments:
        """Arguments of older releases of transformers, all None unless given."""

        evaluation_strategy: str | None = None
        no_cuda: bool | None = None
        warmup_ratio: float | None = None
        group_by_length: bool | None = None
        include_inputs_for_metrics: bool | None = None
        overwrite_output_dir: bool | None = None
        logging_dir: str | None = None
        save_safetensors: bool | None = None
        per_gpu_train_batch_size: int | None = None
        per_gpu_eval_batch_size: int | None = None
        fp16_backend: str | None = None
        half_precision_backend: str | None = None
        fp16_opt_level: str | None = None
        include_tokens_per_second: bool | None = None
        push_to_hub_model_id: str | None = None
        push_to_hub_organization: str | None = None
        push_to_hub_token: str | None = None
        use_mps_device: bool | None = None
        ray_scope: str | None = None
        past_index: int | None = None
        jit_mode_eval: bool | None = None
        tpu_num_cores: int | None = None
        tpu_metrics_debug: bool | None = None
        fsdp_min_num_params: int | None = None
        fsdp_transformer_layer_cls_to_wrap: str | None = None
        dispatch_batches: bool | None = None
        split_batches: bool | None = None
        use_ipex: bool | None = None
        torchdynamo: str | None = None
        adafactor: bool | None = None
        mp_parameters: str | None = None
        use_legacy_prediction_loop: bool | None = None

else:
    LegacyArguments = make_dataclass(
        "LegacyArguments",
        [
            _legacy_field(name, kind, f"Older name; sets `{successor}`.")
            for name, (kind, successor) in RENAMED.items()
        ]
        + [
            _legacy_field(
                name, kind, "Older name; accepted without effect" + (f": {hint}." if hint else ".")
            )
            for name, (kind, hint) in IGNORED.items()
        ],
    )
    LegacyArguments.__module__ = __name__  # before Python 3.12 it is "types"
    LegacyArguments.__doc__ = "Arguments of older releases of transformers, all None unless given."

LEGACY_NAMES = frozenset(RENAMED) | frozenset(IGNORED)


def resolve_legacy(args: Any) -> None:
    """
    Move the values of older names to the new names, in place, and clear the older names.

    They are cleared so that `dataclasses.replace`, `to_dict` and pickling neither move a value
    twice nor undo a later change of the new name. Each old name is reported once in the log.

    Args:
        args ([`LegacyArguments`] mixed into `transformers.TrainingArguments`):
            The arguments, before `TrainingArguments.__post_init__` has run.

    Raises:
        ValueError: If `warmup_ratio` is outside [0, 1].
    """
    for name, (_, successor) in RENAMED.items():
        value = getattr(args, name)
        if value is None:
            continue
        logger.warning_once(f"`{name}` is an older name: its value is used for `{successor}`.")
        setattr(args, name, None)
        _RENAME[name](args, value)

    for name, (_, hint) in IGNORED.items():
        if getattr(args, name) is not None:
            logger.warning_once(
                f"`{name}` was removed from transformers and has no effect"
                + (f": {hint}." if hint else ".")
            )
            setattr(args, name, None)

    renamed = RENAMED_OPTIM.get(getattr(args.optim, "value", args.optim))
    if renamed is not None:
        logger.warning_once(f"optim={args.optim!r} is now called {renamed!r}: using that.")
        args.optim = renamed


def _set_eval_strategy(args: Any, value: str) -> None:
    args.eval_strategy = value


def _set_use_cpu(args: Any, value: bool) -> None:
    args.use_cpu = args.use_cpu or value


def _set_warmup_steps(args: Any, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"warmup_ratio is {value}; must be in [0, 1]")
    if args.warmup_steps == 0:
        # transformers reads 1.0 as one step; the largest float below 1 is rounded up to all steps.
        args.warmup_steps = min(float(value), math.nextafter(1.0, 0.0))


def _set_sampling(args: Any, value: bool) -> None:
    if value:
        args.train_sampling_strategy = "group_by_length"


def _set_include_inputs(args: Any, value: bool) -> None:
    if value and "inputs" not in args.include_for_metrics:
        args.include_for_metrics = [*args.include_for_metrics, "inputs"]


_RENAME = {
    "evaluation_strategy": _set_eval_strategy,
    "no_cuda": _set_use_cpu,
    "warmup_ratio": _set_warmup_steps,
    "group_by_length": _set_sampling,
    "include_inputs_for_metrics": _set_include_inputs,
}
