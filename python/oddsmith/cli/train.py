"""`oddsmith train`: trains a model from checked arguments and saves it."""

import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from accelerate.utils import broadcast_object_list
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..config import ORPOConfig
from ..data.layouts import parse_column_mapping
from ..data.processor import load_processor, template_source, tokenizer_of
from ..data.tokenizer import ensure_chat_template, ensure_pad_token
from ..errors import UserError, user_errors
from ..inspection.report import FIGURES
from ..sources.find import load_pairs
from ..trainer import ORPOTrainer
from ..training.checkpoint_hooks import is_of_the_disk
from ..training.checkpoints import newest_whole
from ..training.curves import save_curves
from .launch import STARTED
from .train_flags import AdapterArguments, RunArguments

logger = logging.getLogger("oddsmith")


def load_tokenizer(run: RunArguments, config: ORPOConfig) -> Any:
    """Loads the model's tokenizer, or the processor of an image-text model, with a pad token and,
    if asked for, another chat template.

    Raises:
        UserError: If there is no such model, tokenizer or template.
    """
    name = run.model
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith(("/", "./", "../", "~")) or name.count("/") > 1):
        raise UserError(f"--model {name}: no such folder")
    with user_errors(f"--model {name}"):
        tokenizer = load_processor(name, run.model_revision, config.trust_remote_code)
        ensure_pad_token(tokenizer_of(tokenizer))
    if run.chat_template is not None:
        with user_errors("--chat_template"):
            template = Path(run.chat_template).expanduser()
            tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def model_init_kwargs(run: RunArguments, config: ORPOConfig) -> dict[str, Any]:
    """Arguments for `from_pretrained`: those of `--model_init_kwargs`, overridden by flags."""
    flags = {
        "dtype": run.dtype,
        "attn_implementation": run.attn_implementation,
        "revision": run.model_revision,
        "quantization_config": quantization(run),
    }
    return {
        **config.model_kwargs(),
        **{name: value for name, value in flags.items() if value is not None},
    }


def quantization(run: RunArguments) -> Any:
    """The configuration of 4-bit weights, or `None` without `--load_in_4bit`."""
    if not run.load_in_4bit:
        return None
    from ..integrations.nf4_config import NF4Config

    return NF4Config(
        compute_dtype=None if run.dtype in (None, "auto") else run.dtype,
        double_quant=run.use_bnb_nested_quant,
        bnb_4bit_quant_type=run.bnb_4bit_quant_type,
    )


def make_adapter(adapter: AdapterArguments) -> Any:
    """The PEFT configuration, or `None` without `--use_peft`."""
    if not adapter.use_peft:
        return None
    from peft import LoraConfig

    targets = adapter.lora_target_modules
    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        # PEFT takes "all-linear" only as a string; in a list it would be a module's name.
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=adapter.lora_modules_to_save,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        bias="none",
        task_type="CAUSAL_LM",
    )


def checkpoint_to_resume(config: ORPOConfig) -> str | bool | None:
    """`--resume_from_checkpoint`: a folder, or true for the newest in the output folder."""
    wanted, folder = config.resume_from_checkpoint, output_folder(config)
    if isinstance(wanted, str) and wanted.lower() in ("true", "false", "auto"):
        wanted = {"true": True, "false": False}.get(wanted.lower(), "auto")
    if wanted == "auto":
        return _chosen_by_one(config, newest_whole(folder))
    if isinstance(wanted, str) and not Path(wanted).is_dir():
        raise UserError(f"--resume_from_checkpoint {wanted}: no such folder")
    if wanted is True:
        found = newest_whole(folder)
        if found is None:
            raise UserError(
                f"--resume_from_checkpoint true: {config.output_dir} has no checkpoint; remove the "
                "flag to start from the beginning"
            )
        return _chosen_by_one(config, found)
    if wanted is None and (started := restarted_since()) is not None:
        return _chosen_by_one(config, newest_whole(folder, started))
    return wanted or None


def restarted_since() -> float | None:
    """
    When the launcher has started the run, in seconds since the epoch, if this is not its first
    start: only checkpoints from then on are of this run.
    """
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return None
    if STARTED in os.environ:
        return float(os.environ[STARTED])
    return psutil.Process(os.getppid()).create_time()


def _chosen_by_one(config: ORPOConfig, found: Path | None) -> str | None:
    """The checkpoint that the first process has found, on all processes."""
    chosen = found
    if config.world_size > 1:  # which has set up the processes
        (chosen,) = broadcast_object_list([found], from_process=0)
    if chosen is not None and not chosen.is_dir():
        raise UserError(
            f"checkpoint {chosen} is not on machine {platform.node()}; --output_dir must be a folder "
            "that all machines share"
        )
    if config.process_index == 0:
        where = "the beginning" if chosen is None else chosen
        print(f"Goes on from {where}", file=sys.stderr)
    return None if chosen is None else str(chosen)


def output_folder(config: ORPOConfig) -> Path:
    """`--output_dir`; `TrainingArguments` sets it if it is not given."""
    return Path(config.output_dir or "trainer_output")


def check_reporting(config: ORPOConfig) -> None:
    """Checks that the packages in `--report_to` are installed.

    Raises:
        UserError: If one is missing; transformers would raise a RuntimeError after loading the
            model.
    """
    installed = get_available_reporting_integrations()
    names = config.report_to if isinstance(config.report_to, list) else []  # parsed already
    for name in names:
        if name in INTEGRATION_TO_CALLBACK and name not in installed:
            raise UserError(f"--report_to {name}: needs the package {name}, which is not installed")


def run_train(
    run: RunArguments,
    adapter: AdapterArguments,
    config: ORPOConfig,
    how_to_go_on: str | None = None,
) -> None:
    """Trains a model and saves it.

    Writes the model and its tokenizer, `trainer_state.json`, the metrics as JSON and, if matplotlib
    is installed, `curves.png` to `config.output_dir`, and prints the folder.

    Args:
        run (`RunArguments`): Model and data.
        adapter (`AdapterArguments`): The LoRA adapter.
        config (`ORPOConfig`): Everything else.
        how_to_go_on (`str`, *optional*): The command for a run that was stopped, for its message.

    Raises:
        UserError: If the model, the data or the arguments are wrong; nothing is trained then.
        Stopped: After SIGTERM, with a checkpoint.
    """
    if run.load_in_4bit and not adapter.use_peft:
        raise UserError("--load_in_4bit needs --use_peft: 4-bit weights cannot be trained")
    check_reporting(config)
    checkpoint = checkpoint_to_resume(config)
    evaluates = config.eval_strategy != "no" or config.do_eval
    tokenizer = load_tokenizer(run, config)
    # One of several processes reads and caches the data, while the others wait for the library's
    # lock: not for a collective, whose timeout would end the run.
    train_dataset, eval_dataset = load_pairs(run, evaluates)
    FIGURES.setLevel(logging.INFO)  # the report of the data is part of the command's output
    with user_errors(""):
        mapping = parse_column_mapping(config.column_mapping, config.prompt_column)
        ensure_chat_template(template_source(tokenizer), train_dataset, mapping)
    config.model_init_kwargs = model_init_kwargs(run, config)
    with user_errors(""):
        trainer = _Trainer(
            model=run.model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=make_adapter(adapter),
        )
    trainer.how_to_go_on = how_to_go_on or trainer.how_to_go_on
    with _ends(config, trainer.how_to_go_on):
        result = trainer.train(resume_from_checkpoint=checkpoint)
        metrics = {"train": result.metrics}
        if eval_dataset is not None:
            metrics["eval"] = last_evaluation(trainer.state) or trainer.evaluate()
            trainer.log_metrics("eval", metrics["eval"])
        save_run(trainer, metrics)
        if trainer.is_world_process_zero():
            what = "adapter" if adapter.use_peft else "model"
            print(f"Saved the {what} and its tokenizer to {config.output_dir}")


def save_run(trainer: ORPOTrainer, metrics: dict[str, dict[str, float]]) -> None:
    """
    Saves the model first: if that fails, the folder keeps the model, the metrics and the state of the run before.
    All of it is uploaded at the end.

    Args:
        trainer ([`~oddsmith.ORPOTrainer`]): Of a run that has ended.
        metrics (`dict`): Those of `"train"` and, if there is one, of `"eval"`.
    """
    args = trainer.args
    uploads, args.push_to_hub = args.push_to_hub, False
    try:
        trainer.save_model()
    finally:
        args.push_to_hub = uploads
    trainer.save_state()
    for split, values in metrics.items():
        trainer.save_metrics(split, values)
    if trainer.is_world_process_zero():
        draw_curves(trainer.state.log_history, output_folder(args))
    if uploads:
        trainer.push_to_hub(commit_message="Model save", revision=args.hub_revision)


class _Trainer(ORPOTrainer):
    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """See [`~transformers.Trainer`]: here `optim` and its arguments are the user's flags."""
        with user_errors("--optim and its arguments"):
            return super().create_optimizer(*args, **options)


@contextmanager
def _ends(config: ORPOConfig, how_to_go_on: str) -> Iterator[None]:
    """Says what there is, when a run ends before it should."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left(config, how_to_go_on)) from None
    except UserError:
        raise
    except Exception as error:
        if not is_of_the_disk(error):
            raise
        left = _left(config, how_to_go_on)
        raise UserError(f"{error}. {left[0].upper()}{left[1:]}") from error


def _left(config: ORPOConfig, how_to_go_on: str) -> str:
    """What an interrupted run has left."""
    whole = newest_whole(output_folder(config))
    return f"{whole} is whole. To go on: {how_to_go_on}" if whole else "there is no checkpoint yet"


def last_evaluation(state: Any) -> dict[str, Any] | None:
    """The final evaluation, if training ended with one."""
    for entry in reversed(state.log_history):
        if entry["step"] == state.global_step and "eval_loss" in entry:
            return {name: value for name, value in entry.items() if name != "step"}
    return None


def draw_curves(history: list[dict[str, Any]], folder: Path) -> None:
    try:
        save_curves(history, folder / "curves.png", folder.name)
    except (ModuleNotFoundError, ValueError) as error:
        # No matplotlib, or a run too short to log anything: the model is still saved.
        logger.warning(f"No curves: {error}")
