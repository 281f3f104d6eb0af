"""The arguments of `oddsmith train`: flags, a YAML or JSON file, or both."""

import argparse
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..config import ORPOConfig
from ..legacy_arguments import LegacyArguments
from . import once
from .launch import LaunchArguments
from .near_misses import nearest
from .yaml_switches import load_yaml, meant

FILE_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass
class RunArguments:
    """Model and data. The names are those of TRL's scripts, with short aliases.

    Args:
        model_name_or_path (`str`): Hub id or folder of the model. Alias: `model`.
        dataset_name (`str`): Hub id, file or folder of the pairs. Alias: `dataset`.
        eval_dataset_name (`str`, *optional*): Hub id, file or folder of the evaluation pairs.
            Alias: `eval_dataset`.
        dataset_config (`str`, *optional*): Configuration of a hub dataset.
        dataset_train_split (`str`, *optional*): Split to train on; detected if `None`.
        dataset_test_split (`str`, *optional*): Split to evaluate on; detected if `None`.
        max_line_mb (`int`, *optional*, defaults to 64): Longest row of a JSON file, in megabytes.
        model_revision (`str`, *optional*): Branch, tag or commit of a hub model.
        dtype (`str`, *optional*): Type of the weights. Alias: `torch_dtype`.
        attn_implementation (`str`, *optional*): Attention of transformers.
        chat_template (`str`, *optional*): File with a Jinja chat template.
        load_in_4bit (`bool`, *optional*, defaults to `False`): Keep the base in NF4 (QLoRA).
        bnb_4bit_quant_type (`str`, *optional*, defaults to `"nf4"`): The only supported type.
        use_bnb_nested_quant (`bool`, *optional*, defaults to `False`): Quantise the scales too.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or folder of the model.", "aliases": ["--model"]},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, file or folder of the pairs.", "aliases": ["--dataset"]},
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, file or folder of the pairs for evaluation.",
            "aliases": ["--eval_dataset", "--eval-dataset"],
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset."}
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split to train on. Default: detected."}
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Default: detected, if any."}
    )
    max_line_mb: int = field(
        default=64, metadata={"help": "Longest row of a JSON file, in megabytes."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a hub model."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the weights. Default: as they are stored.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
            "aliases": ["--torch_dtype", "--torch-dtype"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: sdpa, flash_attention_2, eager, ..."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a Jinja chat template."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the base in NF4; needs --use_peft."}
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Type of the 4-bit weights.", "choices": ["nf4"]}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the scales of 4-bit weights too."}
    )

    @property
    def model(self) -> str:
        """Hub id or folder of the model.

        Raises:
            ValueError: If none was given; [`parse_train_arguments`] has checked that before.
        """
        if self.model_name_or_path is None:
            raise ValueError("model_name_or_path is None; must be a hub id or a folder")
        return self.model_name_or_path


@dataclass
class AdapterArguments:
    """The LoRA adapter. The names and defaults are those of TRL's scripts.

    Args:
        use_peft (`bool`, *optional*, defaults to `False`): Train an adapter, not all weights.
        lora_r (`int`, *optional*, defaults to 16): Rank.
        lora_alpha (`int`, *optional*, defaults to 32): Scale; the update is multiplied by alpha /
            r.
        lora_dropout (`float`, *optional*, defaults to 0.05): Dropout. `disable_dropout`, on by
            default as in TRL, sets it to 0.
        lora_target_modules (`list[str]`, *optional*): Modules, or `all-linear`; `None`: PEFT's
            choice for the architecture.
        lora_modules_to_save (`list[str]`, *optional*): Modules to train in full.
        use_rslora (`bool`, *optional*, defaults to `False`): Scale by alpha / sqrt(r).
        use_dora (`bool`, *optional*, defaults to `False`): Weight-decomposed LoRA.
    """

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter, or all-linear."}
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with it."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})

    def changed(self) -> list[str]:
        """Names of the arguments, except `use_peft`, that differ from their defaults."""
        return [
            each.name
            for each in fields(self)
            if each.name != "use_peft" and getattr(self, each.name) != each.default
        ]


def flag_groups() -> dict[str, str]:
    """The group of each flag in the help, by the name of its field, in the order of the help."""
    groups = {
        "model and data": RunArguments,
        "adapter (PEFT)": AdapterArguments,
        "ORPO, data and memory": ORPOConfig,
        "processes": LaunchArguments,
        "run (transformers.TrainingArguments)": TrainingArguments,
        "of older releases": LegacyArguments,
    }
    found: dict[str, str] = {}
    inherited = {each.name for each in fields(TrainingArguments)}
    legacy = {each.name for each in fields(cast(Any, LegacyArguments))} - inherited
    for title, arguments in groups.items():
        for each in fields(cast(Any, arguments)):
            own = each.name not in inherited and each.name not in legacy
            if own or arguments is not ORPOConfig:
                found.setdefault(each.name, title)
    return found


class _OneOrMore(argparse.Action):
    """A value, or the list of several."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


class TrainParser(HfArgumentParser):
    """HfArgumentParser with short errors: its usage line would list two hundred flags."""

    def __init__(self) -> None:
        super().__init__(
            cast(Any, (LaunchArguments, RunArguments, AdapterArguments, ORPOConfig)),
            prog="oddsmith train",
            usage="oddsmith train [SETTINGS.yaml|.json] [--flag value ...]",
            # Accepting "--lora" for "--lora_r" would hide a mistyped flag.
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument("--help_all", "--help-all", action="help", help="Show this and exit.")
        # A command has nothing of its own to do when it is to end; a script may.
        self.set_defaults(enable_jit_checkpoint=True)
        for action in self._actions:
            # A string or a list; HfArgumentParser takes the first of the two.
            if action.dest == "optim_target_modules":
                action.__class__, action.nargs = _OneOrMore, "+"
        self._group()

    def _group(self) -> None:
        """Puts the flags, which HfArgumentParser has made in one list, under a title each."""
        group_of = flag_groups()
        groups = {
            title: self.add_argument_group(title) for title in dict.fromkeys(group_of.values())
        }
        for action in list(self._optionals._group_actions):
            title = group_of.get(action.dest)
            if title is not None:
                self._optionals._group_actions.remove(action)
                groups[title]._group_actions.append(action)

    def error(self, message: str) -> NoReturn:
        once.say(f"oddsmith train: error: {message}\nSee oddsmith train --help")
        self.exit(2)

    def names(self) -> dict[str, str]:
        """All names that a settings file can use, aliases included, with their field names."""
        names = {}
        for arguments in self.dataclass_types:
            for each in fields(arguments):
                if each.init:
                    names[each.name] = each.name
                    for alias in each.metadata.get("aliases", []):
                        names[alias.lstrip("-").replace("-", "_")] = each.name
        return names

    def suggest(self, name: str) -> str:
        dashes = "--" if name.startswith("-") else ""
        if name.lstrip("-") in ("config", "settings", "config_file", "yaml"):
            return "; a settings file comes first and without a flag: oddsmith train run.yaml --flag value"
        near = nearest(name, self.names())
        return f"; did you mean {dashes}{near}?" if near else ""


def read_settings(path: Path) -> dict[str, Any]:
    """Reads a settings file.

    Raises:
        ValueError: If it cannot be read.
        TypeError: If it is not a mapping of names to values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"settings file {path} cannot be parsed: {error}") from error
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"settings file {path}: {reason}") from error
    try:
        settings = json.loads(text) if path.suffix == ".json" else load_yaml(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"settings file {path} cannot be parsed: {error}") from error
    if not isinstance(settings, dict):
        raise TypeError(f"settings file {path}: must be a mapping such as 'beta: 0.1'")
    return settings


def settings_to_flags(parser: TrainParser, settings: dict[str, Any]) -> list[str]:
    """Turns settings into flags, or into the parser's defaults if a flag cannot express them.

    Flags get argparse's conversions and error messages; lists, mappings and null cannot be written
    as flags of every type, and YAML has already typed them.

    Raises:
        ValueError: If a name is unknown.
    """
    names = parser.names()
    flags = []
    for key, value in settings.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            raise ValueError(f"unknown setting {key!r}{parser.suggest(str(key))}")
        value = meant(parser._option_string_actions[f"--{name}"], value)
        if value is None or isinstance(value, (list, dict)):
            parser.set_defaults(**{name: value})
        else:
            flags.append(f"--{name}={value}")
    return flags


def parse_launch_arguments(argv: list[str]) -> LaunchArguments:
    """
    Parses the part of the command line that is about processes, and checks the names in the rest.

    Nothing that needs a device is made, as in the process that only starts others.

    Args:
        argv (`list[str]`): As for [`parse_train_arguments`].

    Raises:
        SystemExit: With code 2, after a message on stderr, if an argument is wrong.
    """
    parser = TrainParser()
    given = vars(parser.parse_args(checked_flags(parser, argv)))
    if not given["model_name_or_path"] or not given["dataset_name"]:
        return LaunchArguments()  # said by the other function
    return LaunchArguments(**{each.name: given[each.name] for each in fields(LaunchArguments)})


def checked_flags(parser: TrainParser, argv: list[str]) -> list[str]:
    """The flags of a command line, with those of its settings file first; their names are known."""
    try:
        if argv and not argv[0].startswith("-"):
            path = Path(argv[0]).expanduser()
            if path.suffix not in FILE_SUFFIXES:
                raise ValueError(
                    f"{argv[0]!r} is neither a flag nor a settings file "
                    f"({', '.join(FILE_SUFFIXES)})"
                )
            argv = settings_to_flags(parser, read_settings(path)) + argv[1:]
        # Report unknown flags before errors of the config's checks.
        _, unknown = parser.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            parser.error(f"unknown argument {name}{parser.suggest(name)}")
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return argv


def parse_train_arguments(
    argv: list[str],
) -> tuple[RunArguments, AdapterArguments, ORPOConfig]:
    """Parses the command line of `oddsmith train`.

    Args:
        argv (`list[str]`): Flags; the first argument can be a settings file, which the flags
            override.

    Raises:
        SystemExit: With code 2, after a message on stderr, if an argument is wrong.
    """
    parser = TrainParser()
    flags = checked_flags(parser, argv)
    if os.environ.get("WORLD_SIZE", "1") != "1" and parser.parse_args(flags).use_cpu:
        parser.set_defaults(ddp_backend="gloo")  # the only one for CPUs that torch always has
    try:
        _, run, adapter, config = parser.parse_args_into_dataclasses(
            flags, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if not run.model_name_or_path:
        parser.error("--model is missing: a hub id, or a folder with a model")
    if not run.dataset_name:
        parser.error("--dataset is missing: a hub id, a file or a folder with preference pairs")
    ignored = adapter.changed()
    if ignored and not adapter.use_peft:
        once.say(
            f"oddsmith train: {', '.join(ignored)} without use_peft: no adapter, all weights are trained"
        )
    return run, adapter, config
