"""NF4 models through transformers: `BitsAndBytesConfig` without bitsandbytes.

```python
import oddsmith
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=config)
```

Checkpoints have the format of bitsandbytes, in both directions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
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

# Entries of a weight in a checkpoint, besides its codes.
_ENTRIES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", PACKED_KEY)


class NF4Quantizer(Bnb4BitHfQuantizer):
    """The quantizer with which transformers loads a model with 4-bit weights."""

    def __init__(self, quantization_config: BitsAndBytesConfig, **kwargs: Any) -> None:
        _check(quantization_config)
        super().__init__(quantization_config, **kwargs)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses other types than NF4, and devices on which weights would be offloaded."""
        _check(self.quantization_config)
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if places & {"cpu", "disk"} and places != {"cpu"}:
            raise ValueError(
                "device_map puts some layers on the CPU or the disk and others elsewhere; 4-bit weights "
                'must be on a device that computes with them: device_map={"": 0} or {"": "cpu"}'
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
        spread = getattr(model.config, "distributed_config", None)
        if spread is not None and max(spread.fsdp_size or 1, spread.tp_size or 1) > 1:
            raise ValueError(
                "distributed_config splits weights while they are loaded, before they can be quantised to 4 "
                "bits: load the model without it and use FSDP2 (fsdp=True, or accelerate's configuration)"
            )
        config = self.quantization_config
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, config.llm_int8_skip_modules, list(model._keep_in_fp32_modules or ())
        )
        replaced = 0
        for name, module in list(model.named_modules()):
            plain = type(module) is nn.Linear or isinstance(module, Conv1D)
            if plain and should_convert_module(name, self.modules_to_not_convert):
                model.set_submodule(name, _empty_layer(module, config, self.pre_quantized))
                replaced += 1
        if not replaced:
            raise ValueError(
                f"{type(model).__name__} has no linear layers to quantise; skipped layers: "
                f"{', '.join(sorted(self.modules_to_not_convert)) or 'none'}"
            )

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        left = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, Linear4bit) and layer.quant_state is None
            if layer.weight.device.type != "meta"
        ]
        if left:
            raise RuntimeError(
                f"{type(model).__name__}: {len(left)} layers were loaded without being quantised, the "
                f"first is {left[0]}; load the model with bitsandbytes, or with the transformers that "
                "oddsmith was tested with"
            )
        cast(Any, model).is_loaded_in_4bit = True
        COUNT.ensure()
        serve_peft()
        return model

    # The base class names the operations of bitsandbytes.
    def get_quantize_ops(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
    ) -> ConversionOps:
        """The conversion of a weight in full precision."""
        return Quantize(self)

    def get_load_operations(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
    ) -> dict[str, type[ConversionOps]]:
        """The conversion of the entries of a quantised checkpoint."""
        return {"deserialize": Deserialize}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The conversion in older transformers; 5.20 still has it, 5.24 asks for operations."""
        if hasattr(HfQuantizer, "get_load_operations"):
            return super().get_weight_conversions()
        names = [f"weight.{entry}" for entry in _ENTRIES]
        converter = _LoadOnly([*names, "weight"], "weight", [Deserialize(self)])
        return [converter] if self.pre_quantized else []

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> Any:
        wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(model.named_modules()):
            state = layer.quant_state if isinstance(layer, Linear4bit) else None
            if isinstance(layer, Linear4bit) and state is not None:
                weight = dequantize_nf4(layer.weight, state, wanted)
                size = layer.in_features, layer.out_features
                plain = nn.Linear(*size, bias=False, device="meta")
                plain.weight, plain.bias = nn.Parameter(weight), layer.bias
                model.set_submodule(name, plain.train(layer.training))
        cast(Any, model).is_loaded_in_4bit = False
        return model


# Overridden methods of the base class; each is used in one of the tested releases.
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
    Checks that transformers still uses the methods of [`NF4Quantizer`].

    Raises:
        [`Unsupported`]: If it does not.
    """
    missing = [name for name in _HOOKS if not hasattr(Bnb4BitHfQuantizer, name)]
    if missing:
        raise Unsupported(f"its quantizers have no {', '.join(missing)}")


class Quantize(ConversionOps):
    """Quantises a weight in full precision while it is loaded."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    # transformers gives by name what it has, and takes tensors without a list around them.
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Convert `{name: tensor}`."""
        result = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module: Any = get_module_from_name(model, name)[0]
            if module.is_transposed:
                value = value.T.contiguous()
            try:
                result[name] = module.weight.with_data(value, None).quantize_()
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}: {error}") from error
            module._is_hf_initialized = True
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        """Codes are saved unchanged."""
        return _Same(self.hf_quantizer)


class Deserialize(ConversionOps):
    """Makes a weight from its entries in a quantised checkpoint."""

    def __init__(self, hf_quantizer: NF4Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    # As in [`Quantize`].
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Convert `{"weight": codes, "weight.absmax": ..}`; a plain weight is returned
        unchanged.
        """
        entries = {
            name: value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        if set(entries) == {"weight"}:
            return entries
        codes = entries.pop("weight")
        module: Any = get_module_from_name(model, full_layer_name)[0]
        try:
            weight = Params4bit.from_prequantized(codes, entries, device=codes.device)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{full_layer_name}: {error}") from error
        module._is_hf_initialized = True
        return {"weight": weight}

    @property
    def reverse_op(self) -> ConversionOps:
        """Codes are saved unchanged."""
        return _Same(self.hf_quantizer)


class _LoadOnly(WeightConverter):
    """A conversion that saving does not turn round: the weights name their entries themselves."""

    def reverse_transform(self) -> WeightRenaming:
        """The names as they are. transformers would rename each weight to the first of the entries."""
        return WeightRenaming("weight.absmax", "weight.absmax")


class _Same(Deserialize):
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any]:
        return input_dict


def _check(config: BitsAndBytesConfig) -> None:
    if config.load_in_8bit:
        raise ValueError(
            "quantization_config: load_in_8bit (LLM.int8) is not supported by oddsmith; set load_in_4bit=True "
            'and bnb_4bit_quant_type="nf4", or install bitsandbytes'
        )
    if config.bnb_4bit_quant_type != "nf4":
        raise ValueError(
            f"quantization_config: bnb_4bit_quant_type is {config.bnb_4bit_quant_type!r}; oddsmith serves "
            '"nf4"'
        )


def _empty_layer(module: Any, config: BitsAndBytesConfig, pre_quantized: bool) -> Linear4bit:
    """A 4-bit layer on the meta device instead of a plain one."""
    transposed = isinstance(module, Conv1D)
    shape = module.weight.shape if transposed else module.weight.shape[::-1]
    in_features, out_features = shape
    layer: Any = Linear4bit(
        in_features,
        out_features,
        bias=module.bias is not None,
        compute_dtype=config.bnb_4bit_compute_dtype,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_storage=config.bnb_4bit_quant_storage,
        device="meta",
    )
    if pre_quantized:
        # transformers casts loaded values to this dtype.
        layer.weight.data = layer.weight.data.to(config.bnb_4bit_quant_storage)
    layer.is_transposed = transposed
    return layer.requires_grad_(False)
