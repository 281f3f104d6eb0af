"""LoRA adapters saved by peft, as updates of the tensors of a model."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from peft import LoraConfig, PeftConfig
from pyarrow import compute

from ..errors import UserError
from .folder import Tensor, read_tensors, refuse_links
from .rules import Factor, MergeUpdate

_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"

# Options that this module supports.
_USED = frozenset({
    "alpha_pattern", "bias", "fan_in_fan_out", "lora_alpha", "lora_bias", "modules_to_save", "r",
    "rank_pattern", "target_modules", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip

# Why options that this module does not support cannot be merged tensor by tensor.
_WHY_NOT = {
    "alora_invocation_tokens": "it is active behind certain tokens only, which no weight can express",
    "layer_replication": "it makes a model with more layers than the base has",
    "target_parameters": (
        "it changes parameters that transformers may build from other tensors than those in the "
        "checkpoint"
    ),
}

# Options that do not affect the merged weights. Initialisations are checked separately.
_IRRELEVANT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip

# Initialisations that change the base weights, which is not visible in a checkpoint.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|"
    r"lora_embedding_B|lora_magnitude_vector(?:\.weight)?)"
)


class Adapter:
    """
    A LoRA adapter that peft has saved.

    Args:
        folder (`Path`): With `adapter_config.json` and `adapter_model.safetensors`.

    Attributes:
        file (`Path`): The file with its tensors.
        modules (`dict[str, dict[str, str]]`): The names of the parts of each adapted module.
        replacements (`dict[str, str]`): Names of tensors that replace parameters.
        token_rows (`dict[str, str]`): Names of tensors that replace rows of embeddings, by module.

    Raises:
        UserError: If a file is missing or damaged, or the adapter is of an unsupported kind.
    """

    def __init__(self, folder: Path):
        if not (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder}: has no adapter_config.json")
        refuse_links(folder)
        self.folder: Path = folder
        self.file: Path = folder / _FILE
        self.config: LoraConfig = self._read_config()
        if not self.file.is_file():
            pickled = (folder / "adapter_model.bin").is_file()
            hint = "; adapter_model.bin is not a safetensors file" if pickled else ""
            raise UserError(f"{folder}: has no {_FILE}{hint}")
        self.tensors: dict[str, Tensor] = read_tensors(self.file)
        self.modules: dict[str, dict[str, str]] = {}
        self.replacements: dict[str, str] = {}
        self.token_rows: dict[str, str] = {}
        for key in self.tensors:
            self._sort_in(key)

    def _read_config(self) -> LoraConfig:
        try:
            config = PeftConfig.from_pretrained(str(self.folder))
        except Exception as error:  # a configuration can be wrong in every way
            raise UserError(f"{self.folder / 'adapter_config.json'}: {error}") from error
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA" or not isinstance(config, LoraConfig):
            raise UserError(f"{self.folder}: is a {kind} adapter; only LORA can be merged")
        for field in dataclasses.fields(config):
            known = field.name in _USED or field.name in _IRRELEVANT
            if not known and getattr(config, field.name):
                why = _WHY_NOT.get(field.name)
                raise UserError(
                    f"{self.folder}: uses {field.name}, which cannot be merged here"
                    f"{f' ({why})' if why else ''}; peft's merge_and_unload may support it"
                )
        self._check_numbers(config)
        start = config.init_lora_weights
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise UserError(
                f"{self.folder}: init_lora_weights is {start!r}, which changed the base weights; save "
                "the adapter with path_initial_model_for_weight_conversion first"
            )
        return config

    def _check_numbers(self, config: LoraConfig) -> None:
        """What a factor is computed from; peft takes any value."""
        given: dict[str, Any] = {"r": config.r, "lora_alpha": config.lora_alpha}
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(config, name) or {}
            if not isinstance(pattern, dict):
                raise UserError(f"{self.folder}: {name} is {pattern!r}; must be a JSON object")
            given |= {f"{name}, {key}": value for key, value in pattern.items()}
        for name, value in given.items():
            rank = name.startswith("r")
            if not _is_number(value, int if rank else (int, float)) or (rank and value < 1):
                what = "a whole number above 0" if rank else "a finite number"
                raise UserError(f"{self.folder}: {name} is {_short(value)}; must be {what}")

    def _sort_in(self, key: str) -> None:
        if not key.startswith(_PREFIX):
            raise UserError(f"{self.file}: {key} must begin with {_PREFIX}")
        name = key.removeprefix(_PREFIX)
        if match := _PART.fullmatch(name):
            part = match["part"].removesuffix(".weight")
            self.modules.setdefault(match["module"], {})[part] = key
            return
        if name.endswith(_ROWS):
            self.token_rows[name.removesuffix(_ROWS)] = key
            return
        if "lora_" in name or ".token_adapter." in name:
            raise UserError(f"{self.file}: {key} is of a kind that cannot be merged here")
        for wrapper in (".base_layer.", ".modules_to_save."):
            name = name.replace(wrapper, ".")
        self.replacements[name] = key

    def token_indices(self, module: str) -> list[int]:
        """
        The tokens whose rows in a module of `token_rows` are replaced.

        Raises:
            UserError: If `adapter_config.json` has none for the module.
        """
        # peft's annotation has only the list.
        given: Any = self.config.trainable_token_indices
        if isinstance(given, dict):
            suffixes = [name for name in given if f".{module}".endswith(f".{name}")]
            given = given[suffixes[0]] if suffixes else None
        if not given:
            raise UserError(
                f"{self.file}: {module} has trained rows but no trainable_token_indices"
            )
        if not isinstance(given, list) or not all(_is_number(each, int) for each in given):
            raise UserError(
                f"{self.folder}: trainable_token_indices of {module} is {_short(given)}; must be a list of "
                "numbers of tokens"
            )
        return given

    def scale(self, module: str) -> float:
        """
        The factor on the product of a module's matrices.

        Raises:
            UserError: If the rank is not the one in `adapter_config.json`.
        """
        config, parts = self.config, self.modules[module]
        rank = self._by_pattern(config.rank_pattern or {}, module, config.r)
        alpha = self._by_pattern(config.alpha_pattern or {}, module, config.lora_alpha)
        key = parts.get("lora_A") or parts.get("lora_embedding_A")
        if key is not None and self.tensors[key].shape[:1] != (rank,):
            shape = self.tensors[key].shape
            raise UserError(f"{self.file}: {key} has shape {shape}; the rank must be {rank}")
        return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank

    def _by_pattern(self, values: dict[str, Any], module: str, default: Any) -> Any:
        """
        The value of the first pattern that a module's name ends with, as peft finds it.

        By RE2, whose time is linear in the name: the patterns are those of whoever made the adapter,
        and Python's engine can be made to need years.
        """
        for pattern, value in values.items():
            try:
                options = compute.MatchSubstringOptions(rf"^(.*\.)?({pattern})$")
                match = compute.call_function("match_substring_regex", [pa.scalar(module)], options)
            except pa.ArrowInvalid as error:
                raise UserError(
                    f"{self.folder}: {pattern!r} of rank_pattern or alpha_pattern is no pattern that can be "
                    f"used here: {error}"
                ) from error
            if match.as_py():
                return value
        return values.get(module, default)

    def updates(self, module: str, kind: str, stored: str) -> Iterator[tuple[str, MergeUpdate]]:
        """
        The updates of the parameters of a module.

        Args:
            module (`str`): Name of the module.
            kind (`str`): `"linear"`, `"conv1d"` or `"embedding"`.
            stored (`str`): As `kind`, but `"linear"` for a quantised `Conv1D`, which is stored
                transposed.

        Returns:
            Names of parameters and their updates.

        Raises:
            UserError: If parts are missing, or cannot be merged in a module of this kind.
        """
        parts = self.modules[module]
        pair = (
            ("lora_embedding_A", "lora_embedding_B")
            if kind == "embedding"
            else ("lora_A", "lora_B")
        )
        if missing := [part for part in pair if part not in parts]:
            raise UserError(f"{self.file}: {module} has no {' and no '.join(missing)}")
        allowed = {*pair, "lora_magnitude_vector"} | (
            {"lora_B.bias"} if kind != "embedding" else set()
        )
        if surplus := sorted(parts.keys() - allowed):
            raise UserError(f"{self.file}: {module} is of kind {kind} but has {', '.join(surplus)}")
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is None) == self.config.use_dora:
            what = (
                "has no lora_magnitude_vector" if magnitude is None else "has lora_magnitude_vector"
            )
            raise UserError(f"{self.file}: {module} {what}; use_dora is {self.config.use_dora}")
        if magnitude is not None and stored != "linear":
            raise UserError(
                f"{self.file}: {module} is of kind {kind}; DoRA is merged in linear layers"
            )
        scale = self.scale(module)
        a, b = parts[pair[0]], parts[pair[1]]
        # Embeddings and Conv1D store the transpose of a linear layer's weight.
        turned = stored != "linear"
        left, right = (Factor(a, True), Factor(b, True)) if turned else (Factor(b), Factor(a))
        yield f"{module}.weight", MergeUpdate(left, right, scale, magnitude)
        if "lora_B.bias" in parts:
            yield f"{module}.bias", MergeUpdate(Factor(parts["lora_B.bias"]), None, scale)


def _is_number(value: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether it is a number of these kinds that a float can hold; JSON has whole ones of any length."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}.. ({len(text)} characters)"
