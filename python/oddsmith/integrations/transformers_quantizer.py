"""NF4 models through transformers: `BitsAndBytesConfig` served without bitsandbytes.

```python
import oddsmith
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
```

Checkpoints are those of bitsandbytes, and move both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from ..quant.modules import Linear4bit, Params4bit
from ..quant.nf4 import dequantize_nf4
from ..quant.state import PACKED_KEY
from .parameter_count import COUNT
from .patch import Unsupported
from .peft_dispatch import serve_peft

__all__ = ["NF4Quantizer", "check_base"]

# Entries of a weight in a checkpoint, beside its codes.
_ENTRIES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", PACKED_KEY)


class NF4Quantizer(Bnb4BitHfQuantizer):
    """What transformers asks while it loads a model with 4-bit weights."""

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        _check(quantization_config)
        super().__init__(quantization_config, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what is no NF4, and devices on which weights would be offloaded."""
        _check(self.quantization_config)
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if places & {"cpu", "disk"} and places != {"cpu"}:
            raise ValueError(
                "device_map puts some layers on the CPU or the disk and others elsewhere; 4-bit weights "
                'must be on devices that compute with them: device_map={"": 0} or {"": "cpu"}'
            )

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """True for the weights of 4-bit layers."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, Linear4bit) and name == "weight"

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, device_map: Any = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, model._keep_in_fp32_modules
        )
        replaced = 0
        for name, module in list(model.named_modules()):
            plain = type(module) is nn.Linear or isinstance(module, Conv1D)
            if plain and should_convert_module(name, self.modules_to_not_convert):
                model.set_submodule(name, _empty_layer(module, config, self.pre_quantized))
                replaced += 1
        if not replaced:
            raise ValueError(
                f"{type(model).__name__} has no linear layer left to quantise; layers that are skipped: "
                f"{', '.join(sorted(self.modules_to_not_convert)) or 'none'}"
            )

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        left = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, Linear4bit) and layer.weight.quant_state is None
            if layer.weight.device.type != "meta"
        ]
        if left:
            raise RuntimeError(
                f"{type(model).__name__}: {len(left)} layers were loaded without being quantised, the "
                f"first is {left[0]}; load the model with bitsandbytes, or with the transformers that "
                "oddsmith was tested with"
            )
        model.is_loaded_in_4bit = True
        COUNT.ensure()
        serve_peft()
        return model

    def get_quantize_ops(self) -> ConversionOps:
        """What a weight in full precision goes through."""
        return Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """What the entries of a quantised checkpoint go through."""
        return {"deserialize": Deserialize}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The same for transformers before 5.20, which asks here."""
        if hasattr(HfQuantizer, "get_load_operations"):
            return super().get_weight_conversions()
        names = [f"weight.{entry}" for entry in _ENTRIES]
        converter = WeightConverter([*names, "weight"], "weight", [Deserialize(self)])
        return [converter] if self.pre_quantized else []

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Linear4bit):
                weight = dequantize_nf4(layer.weight, layer.weight.quant_state, dtype)
                size = layer.in_features, layer.out_features
                plain = nn.Linear(*size, bias=False, device="meta")
                plain.weight, plain.bias = nn.Parameter(weight), layer.bias
                model.set_submodule(name, plain.train(layer.training))
        model.is_loaded_in_4bit = False
        return model


# What of the base class is filled in here; each is asked for in one of the releases that are known.
_HOOKS = (
    "validate_environment",
    "param_needs_quantization",
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
    "get_quantize_ops",
    "get_weight_conversions",
    "_dequantize",
)


def check_base() -> None:
    """
    Whether transformers still asks a quantizer what [`NF4Quantizer`] answers.

    Raises:
        [`Unsupported`]: If it does not.
    """
    missing = [name for name in _HOOKS if not hasattr(Bnb4BitHfQuantizer, name)]
    if missing:
        raise Unsupported(f"its quantizers have no {', '.join(missing)}")


class Quantize(ConversionOps):
    """A weight in full precision to codes, as it is loaded."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Of `{name: tensor}`."""
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            if module.is_transposed:
                value = value.T.contiguous()
            try:
                result[name] = module.weight._with(value, None).quantize_()
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
            module._is_hf_initialized = True
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        """Codes are saved as they are."""
        return _Same(self.hf_quantizer)


class Deserialize(ConversionOps):
    """The entries of a weight in a quantised checkpoint to a weight."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Of `{"weight": codes, "weight.absmax": ..}`; of a weight alone, itself."""
        entries = {
            name: value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        if set(entries) == {"weight"}:
            return entries
        codes = entries.pop("weight")
        module, _ = get_module_from_name(model, full_layer_name)
        try:
            weight = Params4bit.from_prequantized(codes, entries, device=codes.device)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{full_layer_name}: {error}") from error
        module._is_hf_initialized = True
        return {"weight": weight}

    @property
    def reverse_op(self) -> ConversionOps:
        """Codes are saved as they are."""
        return _Same(self.hf_quantizer)


class _Same(Deserialize):
    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict


def _check(config: BitsAndBytesConfig) -> None:
    if config.load_in_8bit:
        raise ValueError(
            "quantization_config: load_in_8bit (LLM.int8) is not served by oddsmith; set load_in_4bit=True "
            'and bnb_4bit_quant_type="nf4", or install bitsandbytes'
        )
    if config.bnb_4bit_quant_type != "nf4":
        raise ValueError(
            f"quantization_config: bnb_4bit_quant_type is {config.bnb_4bit_quant_type!r}; oddsmith serves "
            '"nf4"'
        )


def _empty_layer(module: nn.Module, config: BitsAndBytesConfig, pre_quantized: bool) -> Linear4bit:
    """A 4-bit layer on the meta device in place of a plain one."""
    transposed = isinstance(module, Conv1D)
    shape = module.weight.shape if transposed else module.weight.shape[::-1]
    layer = Linear4bit(
        *shape,
        bias=module.bias is not None,
        compute_dtype=config.bnb_4bit_compute_dtype,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_storage=config.bnb_4bit_quant_storage,
        device="meta",
    )
    if pre_quantized:
        # transformers casts what it reads to the dtype that is here.
        layer.weight.data = layer.weight.data.to(config.bnb_4bit_quant_storage)
    layer.is_transposed = transposed
    return layer.requires_grad_(False)
