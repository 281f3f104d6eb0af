"""Maps names in a checkpoint to those in its model, which is built on the meta device without
weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..errors import UserError

_LAYERS = re.compile(r"n_layers?|num_layers|num_hidden_layers|(encoder|decoder)_layers")


def empty_model(folder: Path, trust_remote_code: bool, tensors: int) -> PreTrainedModel:
    """
    The model of a folder without its weights.

    Args:
        folder (`Path`): Has its configuration.
        trust_remote_code (`bool`): Allow code from the model's repository.
        tensors (`int`): Number of tensors in the folder; there is at least one in each layer.

    Raises:
        UserError: If transformers cannot build it.
    """
    try:
        config: Any = cast(
            Any, AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        )
        _check_layers(config.to_dict(), tensors)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        names = config.architectures or [""]
        kind = getattr(transformers, names[0], None)
        with torch.device("meta"):
            if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
                return kind._from_config(config)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration can be wrong in every way
        plain = isinstance(error, (ImportError, OSError, ValueError))
        what = str(error) if plain else repr(error)
        raise UserError(f"{folder}: transformers cannot build the model: {what}") from error


def _check_layers(config: dict[Any, Any], tensors: int) -> None:
    """Before a module is built for each of a number of layers that nothing has checked."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_layers(value, tensors)
        elif isinstance(value, int) and value > tensors and _LAYERS.fullmatch(str(name)):
            raise ValueError(f"{name} is {value}, and there are {tensors} tensors")


class Names:
    """
    Maps tensors of a checkpoint to parameters of the model.

    Args:
        model (`PreTrainedModel`): The model, as from [`empty_model`].
        keys (`Iterable[str]`): Names of the checkpoint.

    Attributes:
        parameter (`dict[str, str]`): The parameter, or buffer, of each name.
        key (`dict[str, str]`): The name of each parameter that one tensor is loaded into unchanged.
    """

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]):
        self.model = model
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        known = model.state_dict()
        self.parameter: dict[str, str] = {}
        self.key: dict[str, str] = {}
        self.converted: set[str] = set()
        for key in keys:
            name, pattern = rename_source_key(
                key, renamings, converters, model.base_model_prefix, known
            )
            self.parameter[key] = name
            if pattern is not None:  # made from several tensors, or changed on loading
                self.converted.add(name)
            else:
                self.key[name] = key
        for name in self.converted:
            self.key.pop(name, None)

    def find(self, parameter: str) -> str | None:
        """The name of a parameter in the checkpoint, `None` if missing."""
        return self.key.get(parameter)

    def tied(self) -> dict[str, str]:
        """Parameters that share their values, in both directions."""
        pairs = dict(self.model.all_tied_weights_keys)
        return pairs | {source: target for target, source in pairs.items()}

    def _linear(self) -> dict[str, nn.Module]:
        modules = self.model.named_modules()
        return {
            name: module
            for name, module in modules
            if isinstance(module, Conv1D) or type(module) is nn.Linear
        }

    def check_skip(self, skip: Iterable[str]) -> None:
        """
        Finds mistyped names.

        Raises:
            UserError: If an entry of `skip` matches no linear layer.
        """
        linear = self._linear()
        for pattern in skip:
            try:
                used = any(not should_convert_module(name, [pattern]) for name in linear)
            except re.error as error:
                raise UserError(f"--skip {pattern}: {error}") from error
            if not used:
                raise UserError(f"--skip {pattern}: matches no linear layer")

    def quantized(self, skip: Iterable[str] = ()) -> tuple[dict[str, bool], list[str] | None]:
        """
        The weights that transformers would quantise, and the modules to list as not quantised.

        Args:
            skip (`Iterable[str]`, *optional*): More modules not to quantise: ends of names, or
                patterns of their beginnings, as in `BitsAndBytesConfig.llm_int8_skip_modules`.

        Returns:
            `(dict[str, bool], list[str] | None)`: Names in the checkpoint, each with whether it is
            stored transposed; and `llm_int8_skip_modules`.
        """
        skip, model = list(skip), self.model
        kept = HfQuantizer.get_modules_to_not_convert(
            model, skip or None, list(model._keep_in_fp32_modules or ()), add_default_skips=True
        )
        weights, left = {}, []
        for name, module in self._linear().items():
            if not should_convert_module(name, kept):
                continue
            key = self.find(f"{name}.weight")
            if key is None:
                left.append(name)
            else:
                weights[key] = isinstance(module, Conv1D)
        if not weights:
            raise UserError("no linear layer is left to quantise")
        if not skip and not left:
            return weights, None
        # A given list replaces that of transformers, and a name in it can match more modules.
        told = sorted({*get_keys_to_not_convert(model), *skip, *left})
        return {
            key: transposed
            for key, transposed in weights.items()
            if should_convert_module(self.parameter[key].removesuffix(".weight"), told)
        }, told
