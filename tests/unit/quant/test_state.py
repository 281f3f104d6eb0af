"""QuantState: its names in a checkpoint, equality, moves, and errors."""

import copy
import json
import pickle

import pytest
import torch

from oddsmith import functional
from oddsmith.quant.state import PACKED_KEY, QuantState
from support.quantized import heavy_tailed, spoilt


def test_json_is_byte_for_byte_that_of_the_format():
    values = heavy_tailed(8, 64, dtype=torch.bfloat16)
    _, state = functional.quantize_nf4(values)
    parts = state.as_dict(packed=True)
    assert list(parts) == ["absmax", "quant_map", PACKED_KEY]
    text = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]}'
    assert bytes(parts[PACKED_KEY].tolist()) == text.encode()
    _, state = functional.quantize_nf4(values, double_quant=True)
    parts = state.as_dict(packed=True)
    names = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", PACKED_KEY]
    assert list(parts) == names
    rest = ', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": '
    rest += f"{state.offset.item()!r}}}"
    assert bytes(parts[PACKED_KEY].tolist()) == (text[:-1] + rest).encode()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.layers.0.q_proj.weight."])
def test_round_trip(packed, double_quant, prefix):
    _, state = functional.quantize_nf4(heavy_tailed(8, 70), double_quant=double_quant)
    parts = {prefix + name: value for name, value in state.as_dict(packed).items()}
    before = dict(parts)
    again = QuantState.from_dict(parts, "cpu")
    assert again == state and parts == before
    assert again.as_dict(packed=True).keys() == state.as_dict(packed=True).keys()


def test_equality_sees_every_part():
    _, state = functional.quantize_nf4(heavy_tailed(5, 128), double_quant=True)
    assert state == copy.deepcopy(state) and state == pickle.loads(pickle.dumps(state))
    assert state != functional.quantize_nf4(heavy_tailed(5, 128))[1]
    assert state != "nf4"
    changes = {
        "shape": torch.Size([640]),
        "blocksize": 128,
        "quant_type": "fp4",
        "dtype": torch.float16,
        "absmax": state.absmax + 1,
        "code": -state.code,
        "offset": state.offset + 1,
        "nested_absmax": state.state2.absmax + 1,
        "nested_code": -state.state2.code,
        "nested_blocksize": 64,
    }
    for name, value in changes.items():
        assert state != spoilt(state, **{name: value}), name


def test_to_the_same_device_is_nothing():
    _, state = functional.quantize_nf4(heavy_tailed(5, 128), double_quant=True)
    assert state.to("cpu") is state
    moved = state.to("meta")
    parts = moved.absmax, moved.code, moved.offset, moved.state2.absmax, moved.state2.code
    assert all(part.device.type == "meta" for part in parts)
    assert moved.shape == state.shape and state.absmax.device.type == "cpu"


def parts_of(**changes):
    _, state = functional.quantize_nf4(heavy_tailed(5, 128), double_quant=True)
    parts = {**state.as_dict(), **changes}
    return {name: value for name, value in parts.items() if value is not ...}


WRONG = [
    ({"absmax": ...}, "absmax missing"),
    ({"nested_offset": ..., "nested_dtype": ...}, "nested_dtype, nested_offset missing"),
    ({"nested_absmax": ...}, "nested_absmax missing"),
    ({"colour": 3}, "colour unknown"),
    ({"quant_type": "fp4"}, "quant_type is 'fp4'; must be \"nf4\""),
    ({"quant_type": "int8"}, "quant_type is 'int8'; must be \"nf4\""),
    ({"dtype": "float64"}, "dtype is 'float64'; must be one of"),
    ({"dtype": 16}, "dtype is 16; must be one of"),
    ({"shape": None}, "shape is None; must be a list of sizes"),
    ({"shape": [5, -128]}, r"shape is \[5, -128\]; must be a list of sizes"),
    ({"shape": [5, 128.0]}, "shape is .*; must be a list of sizes"),
    ({"shape": [1 << 40, 1 << 40]}, "shape is .*; must be the shape of a tensor"),
    ({"blocksize": 48}, "blocksize is 48; must be one of 32, 64"),
    ({"blocksize": "64"}, "blocksize is '64'; must be one of 32, 64"),
    ({"blocksize": True}, "blocksize is True; must be one of 32, 64"),
    ({"nested_blocksize": 0}, "nested_blocksize is 0; must be a positive number"),
    ({"nested_offset": "much"}, "nested_offset is 'much'; must be a finite number"),
    ({"nested_offset": float("nan")}, "nested_offset is nan; must be a finite number"),
    ({"nested_offset": 10**400}, "nested_offset is 1000.*; must be a finite number"),
    ({"quant_map": torch.linspace(-1, 1, 16)}, "quant_map does not have the values of NF4"),
    ({"quant_map": torch.zeros(15)}, r"quant_map has shape \(15,\); must be \(16,\)"),
    ({"nested_quant_map": torch.zeros(2)}, r"nested_quant_map has shape \(2,\)"),
    ({"absmax": [1.0]}, "absmax is not a tensor"),
    ({"absmax": torch.ones(10)}, "absmax has dtype float32; must be uint8"),
    ({"nested_absmax": torch.ones(1).double()}, "nested_absmax has dtype float64"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"quant_state: {message}"):
        QuantState.from_dict(parts_of(**changes), "cpu")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe", "not JSON"),
        (b'{"quant_type": "nf4", ', "not JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"", "not JSON"),
        (b"{}", "blocksize, dtype, quant_type, shape missing"),
    ],
)
def test_invalid_json_is_refused(data, message):
    _, state = functional.quantize_nf4(heavy_tailed(5, 128))
    parts = state.as_dict(packed=True)
    parts[PACKED_KEY] = torch.tensor(list(data), dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"quant_state: .*{message}"):
        QuantState.from_dict(parts)


def test_other_types_are_refused_by_name():
    _, state = functional.quantize_nf4(heavy_tailed(5, 128))
    parts = state.as_dict(packed=True)
    parts["quant_state.bitsandbytes__fp4"] = parts.pop(PACKED_KEY)
    with pytest.raises(ValueError, match='quant_type is "fp4"; must be "nf4"'):
        QuantState.from_dict(parts)
    text = json.dumps({"quant_type": "nf4"})
    parts = {PACKED_KEY: text}
    with pytest.raises(ValueError, match="not a tensor of bytes"):
        QuantState.from_dict(parts)
