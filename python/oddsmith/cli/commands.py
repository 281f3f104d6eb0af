"""The console script `oddsmith`.

Imports only the standard library at the top, so that `oddsmith --help`, `oddsmith train --help` and
a mistyped command answer at once, without torch and transformers.
"""

import argparse
import os
import shlex
import sys
import traceback
from importlib.metadata import version

from ..errors import UserError
from ..torch_version import missing
from . import once, signals
from .flags import positive
from .near_misses import Parser, nearest

USAGE = """\
oddsmith: ORPO preference tuning, a drop-in for TRL's ORPOTrainer.

  oddsmith demo                            train a small model offline, in about two minutes
  oddsmith train --model M --dataset D     train a model on preference pairs
  oddsmith train run.yaml [--flag value]   settings from a file; flags override them
  oddsmith prepare DATASET --output FILE   make curated preference pairs from other data
  oddsmith inspect DATASET --model M       check a dataset: lengths, padding, likely mistakes
  oddsmith quantize MODEL OUT              write an NF4 checkpoint in the format of bitsandbytes
  oddsmith merge BASE ADAPTER OUT          merge a LoRA adapter into its base, 4-bit or not
  oddsmith check                           whether what is installed can train, and what to do if not
  oddsmith COMMAND --help                  the flags of a command
  oddsmith --version                       or -V
"""

TRAIN_USAGE = """\
usage: oddsmith train [SETTINGS.yaml|.json] [--flag value ...]

Trains a model with ORPO and saves it, tokenizer included, to --output_dir.

model
  --model ID_OR_DIR            hub id or folder (also --model_name_or_path)
  --model_revision REV         branch, tag or commit of a hub model
  --dtype TYPE                 weights as float32, bfloat16, float16 or auto (default: auto)
  --attn_implementation NAME   sdpa, flash_attention_2, eager, ...
  --chat_template FILE         Jinja chat template to use for conversations
  --load_in_4bit               keep the base in NF4; needs --use_peft (QLoRA)
  --use_bnb_nested_quant       quantise the scales of 4-bit weights too (--bnb_4bit_quant_type nf4)
  --model_init_kwargs JSON     more arguments of from_pretrained
  --trust_remote_code          allow models with Python code in their repository
data
  --dataset ID_OR_PATH         hub id, .jsonl/.json/.parquet file (.gz too), or folder of such files
                               or of datasets.save_to_disk (also --dataset_name); the rows have
                               chosen, rejected and usually prompt: strings or message lists
  --dataset_config NAME        configuration of a hub dataset
  --dataset_train_split NAME   default: train_prefs or train, or the only split
  --dataset_test_split NAME    default: test_prefs, test, validation, eval or dev, if any
  --eval_dataset ID_OR_PATH    evaluation rows from another dataset
  --prompt_column NAME         the prompt, if its column has no usual name
  --column_mapping JSON        names of other columns, such as '{"good": "chosen", "bad": "rejected"}'
  --max_line_mb 64             longest row of a JSON file, in megabytes
  --dataset_num_proc N         processes that prepare the data
  --max_length 1024 --max_prompt_length 512 --max_completion_length N
  --overlength drop            leave out pairs that are too long (default: truncate them)
  --truncation_mode keep_end   which end of a prompt that is too long is kept (or keep_start)
  --padding_value ID --label_pad_token_id -100 --is_encoder_decoder
adapter (PEFT)
  --use_peft                   train a LoRA adapter instead of all weights
  --lora_r 16 --lora_alpha 32 --lora_dropout 0.05 --lora_target_modules q_proj v_proj ...
  --lora_modules_to_save NAME ...  --use_rslora  --use_dora
ORPO
  --beta 0.1                   weight of the odds ratio term
  --beta_schedule linear --beta_end 0.05 --beta_anneal_start 0.8     anneal it
  --nll_scope completion       likelihood of the completion only (default: full, as TRL)
  --odds_ratio_link logsigmoid what the odds ratio goes through (or identity)
  --no_disable_dropout         keep the model's dropout
  --generate_during_eval       log completions of the model with each evaluation
batches and memory
  --max_tokens_per_batch N     most tokens of a batch, instead of a number of pairs
  --no_padding_free            batches with padding
  --share_prompt auto          compute each prompt once: auto (if it saves time), true or false
  --activation_budget auto     memory for activations that are not recomputed: auto, 4GB, .. or none
  --no_gradient_checkpointing  recompute nothing
  --logits_budget BYTES        most bytes of logits that the fused head may hold
  --no_use_fused_head          the loss from whole logits
optimizer
  --optim NAME                 adamw_torch_fused (default), adamw_8bit, paged_adamw_8bit,
                               galore_adamw, apollo_adamw, ...
  --optim_args LIST --optim_target_modules NAME ...    options, and modules of GaLore and APOLLO
  --learning_rate 8e-6 --lr_scheduler_type linear --warmup_ratio 0.1 --weight_decay 0 --max_grad_norm 1
run (every argument of transformers.TrainingArguments is a flag, and those of older releases)
  --output_dir DIR  --max_steps 500  --num_train_epochs 1  --seed 42  --bf16
  --per_device_train_batch_size 2  --gradient_accumulation_steps 4
  --logging_steps 10  --eval_strategy steps --eval_steps 50
  --save_strategy steps --save_steps 100  --report_to tensorboard
  --resume_from_checkpoint true   continue from the newest checkpoint in --output_dir
  --resume_from_checkpoint auto   the same if there is one, else start from the beginning
  --push_to_hub  --hub_model_id ID  --hub_strategy every_save  --hub_private_repo true
processes (names of accelerate launch and torchrun)
  --num_processes N            start N processes, as a rule one for each GPU
  --accelerate_config NAME     ddp (default), fsdp2, zero2, zero3, or a file of accelerate config
  --num_machines M --machine_rank I --main_process_ip HOST --main_process_port PORT
                               the same command on each of M machines; N is the sum
  --gpu_ids 0,1                GPUs of this machine
  --max_restarts K             start again from the last checkpoint after a process has failed

  --help_all                   every flag with its default, by group
Errors are shown in one line; set ODDSMITH_TRACEBACK=1 for the traceback.
"""


def demo_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="oddsmith demo",
        description="Train a small model with ORPO from scratch, offline, in about two minutes.",
    )
    parser.add_argument(
        "--output-dir",
        "--output_dir",
        default="oddsmith-demo",
        metavar="DIR",
        help="folder for the model, the pairs, metrics.json and curves.png (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="optimizer steps (default: about two minutes' worth)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of pairs, weights and data order; the same seed gives the same result on the "
        "same machine (default: %(default)s)",
    )
    return parser


def _look_at_torch() -> None:
    """Says what is wrong with torch before transformers warns of it in its own way."""
    from .. import _core  # noqa: F401  # importing it is the look


def demo(argv: list[str]) -> int:
    options = demo_parser().parse_args(argv)
    _look_at_torch()
    from ..demo.run import STEPS, run_demo

    try:
        run_demo(options.output_dir, options.steps or STEPS, options.seed)
    except OSError as error:
        raise UserError(f"--output-dir {options.output_dir}: {error}") from error
    return 0


def train(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(TRAIN_USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    once.quieten()  # what libraries say when they are imported
    _look_at_torch()
    from . import launch
    from .train_flags import parse_launch_arguments, parse_train_arguments

    processes = parse_launch_arguments(argv)
    if launch.wants_processes(processes):
        return launch.start(processes, argv)
    once.quieten()
    arguments = parse_train_arguments(argv)
    from .train import run_train  # PEFT and datasets are slow to import: check the arguments first

    once.quieten()  # what these have of loggers
    run_train(*arguments, how_to_go_on=_again(argv))
    return 0


def _again(argv: list[str]) -> str:
    """The command that goes on with a stopped run."""
    resume = ["--resume_from_checkpoint", "auto"]
    # Of two values of a flag the last one counts.
    given = argv[-2:] == resume
    return shlex.join(["oddsmith", "train", *argv, *([] if given else resume)])


def prepare(argv: list[str]) -> int:
    from .data_flags import run_prepare

    return run_prepare(argv)


def inspect(argv: list[str]) -> int:
    from .data_flags import run_inspect

    return run_inspect(argv)


def quantize(argv: list[str]) -> int:
    from .checkpoint_flags import run_quantize

    return run_quantize(argv)


def merge(argv: list[str]) -> int:
    from .checkpoint_flags import run_merge

    return run_merge(argv)


def check_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="oddsmith check",
        description="Look at the packages, the processor, the GPUs and the folders that a run needs, "
        "and try out every family of operations beside torch's.",
        epilog="The exit code is 0 if what is installed can train, and 1 if not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    parser.add_argument(
        "--train",
        action="store_true",
        help="also train a small model for a few steps in float32, bfloat16 and with QLoRA, packed "
        "and padded, and compare",
    )
    return parser


def check(argv: list[str]) -> int:
    options = check_parser().parse_args(argv)
    from ..check.run import run_check

    return run_check(options.json, options.train)


COMMANDS = {
    "demo": demo,
    "train": train,
    "prepare": prepare,
    "inspect": inspect,
    "quantize": quantize,
    "merge": merge,
    "check": check,
}


def main(argv: list[str] | None = None) -> int:
    """
    Runs `oddsmith` and returns its exit code: 0, 1 (failed run), 2 (bad arguments), 130 (^C), 143
    (SIGTERM).
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    if argv[:1] in (["-V"], ["--version"]):
        print(f"oddsmith {version('oddsmith')}")
        return 0
    if not argv or argv[0] not in COMMANDS:
        if argv:
            near = nearest(argv[0], COMMANDS)
            hint = f"; did you mean oddsmith {near}?" if near else ""
            print(f"oddsmith: error: no command {argv[0]!r}{hint}\n", file=sys.stderr)
        print(USAGE, end="", file=sys.stderr)
        return 2
    name, arguments = argv[0], argv[1:]
    try:
        with signals.ended_by_sigterm():
            return COMMANDS[name](arguments)
    except signals.Ended:
        once.say(f"oddsmith {name}: ended by SIGTERM")
        return signals.CODE
    except SystemExit as request:  # argparse, after its error message or --help
        return request.code if isinstance(request.code, int) else 2
    except (UserError, ModuleNotFoundError) as error:
        no_torch = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        if os.environ.get("ODDSMITH_TRACEBACK") or not (no_torch or isinstance(error, UserError)):
            raise
        once.say(f"oddsmith {name}: error: {missing() if no_torch else error}")
        return 1
    except Exception as error:
        if once.shared_folder() is None or os.environ.get("ODDSMITH_TRACEBACK"):
            raise
        if once.is_ours(f"{type(error).__name__}: {error}"):
            traceback.print_exc()
        return 1
    except KeyboardInterrupt as stop:
        once.say(f"\noddsmith {name}: interrupted" + (f"; {stop}" if stop.args else ""))
        return 130
