"""Every tensor of every op on one device, contiguous where kernels need it: checked by the core itself.

The functions of Python check too, but torch's own operators can be called without them.
"""

import pytest
import torch

from oddsmith import _core, functional
from oddsmith.head.arguments import HeadArguments, Needs, ObjectiveArguments, PairArguments
from oddsmith.optim.adamw.arguments import Item, Rule
from oddsmith.quant.arguments import NestedScales, PackedWeight

ROWS, WIDTH, VOCAB = 6, 64, 32


def head_tensors():
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(ROWS)
    return {
        "hidden": torch.randn(ROWS, WIDTH, generator=generator),
        "weight": torch.randn(VOCAB, WIDTH, generator=generator),
        "bias": torch.randn(VOCAB, generator=generator),
        "targets": rows * 5,
        "sequence": rows // 3,
        "completion": rows % 3 > 0,
        "lse": torch.randn(ROWS, generator=generator),
        "upstream": torch.randn(ROWS, generator=generator),
    }


def quant_tensors():
    values = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1))
    packed, state = functional.quantize_nf4(values, 64, double_quant=True)
    tokens = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    return {
        "x": tokens,
        "grad": tokens[:, :VOCAB].contiguous(),
        "packed": packed,
        "absmax": state.absmax,
        "nested absmax": state.state2.absmax,
        "nested code": state.state2.code,
        "offset": state.offset.reshape(1),
        "bias": torch.ones(VOCAB),
    }


def moment_tensors():
    return {
        "value": torch.ones(600),
        "grad": torch.linspace(-1, 1, 600),
        "state1": torch.full((600,), 128, dtype=torch.uint8),
        "state2": torch.zeros(600, dtype=torch.uint8),
        "absmax1": torch.zeros(3),
        "absmax2": torch.zeros(3),
        "bad": torch.zeros(1, dtype=torch.int64),
    }


def block_tensors():
    code = torch.linspace(-1, 1, 256)
    codes, absmax = _core.quantize_blockwise(torch.randn(300), code, 64)
    return {"tensor": torch.randn(300), "codes": codes, "absmax": absmax, "code": code}


def head_of(t):
    return HeadArguments(t["hidden"], t["weight"], t["bias"], t["targets"], None, 1.0)


def weight_of(t):
    nested = NestedScales(t["nested absmax"], t["nested code"], t["offset"], 256)
    return PackedWeight(t["packed"], t["absmax"], nested, 64)


def orpo(t):
    pairs = PairArguments(t["sequence"], t["completion"], 1, None)
    loss = ObjectiveArguments(0.3, "full", "logsigmoid", None)
    report = _core.linear_orpo(head_of(t), pairs, loss, Needs(True, True, True))
    return [report["loss"], *report["gradients"].values()]


def backward(t):
    needs = Needs(True, True, True)
    return [*_core.linear_logps_backward(head_of(t), t["lse"], t["upstream"], needs).values()]


def adamw(t):
    t = {name: tensor.clone() if tensor.is_contiguous() else tensor for name, tensor in t.items()}
    names = ("value", "grad", "state1", "state2", "absmax1", "absmax2")
    rule = Rule(0.9, 0.99, 1e-8, -1e-3, 1.0)
    _core.adamw_step([Item(*(t[name] for name in names), 0, rule, None)], t["bad"])
    return [t["value"], t["state1"]]


HEAD = ["hidden", "weight", "bias", "targets"]
WEIGHT = ["packed", "absmax", "nested absmax", "nested code", "offset"]
# Call, its tensors, and the names of those that it takes.
OPS = {
    "linear_logps": (
        lambda t: [*_core.linear_logps(head_of(t), True).values()],
        head_tensors,
        HEAD,
    ),
    "linear_logps_backward": (backward, head_tensors, [*HEAD, "lse", "upstream"]),
    "linear_orpo": (orpo, head_tensors, [*HEAD, "sequence", "completion"]),
    "dequantize_nf4": (
        lambda t: [_core.dequantize_nf4(weight_of(t), [VOCAB, WIDTH], "float32")],
        quant_tensors,
        WEIGHT,
    ),
    "linear_nf4": (
        lambda t: [_core.linear_nf4(t["x"], weight_of(t), (VOCAB, WIDTH), t["bias"])],
        quant_tensors,
        ["x", "bias", *WEIGHT],
    ),
    "linear_nf4_input_gradient": (
        lambda t: [
            _core.linear_nf4_input_gradient(t["grad"], weight_of(t), (VOCAB, WIDTH), "float32")
        ],
        quant_tensors,
        ["grad", *WEIGHT],
    ),
    "quantize_blockwise": (
        lambda t: [*_core.quantize_blockwise(t["tensor"], t["code"], 64)],
        block_tensors,
        ["tensor", "code"],
    ),
    "dequantize_blockwise": (
        lambda t: [_core.dequantize_blockwise(t["codes"], t["absmax"], t["code"], 64, "float32")],
        block_tensors,
        ["codes", "absmax", "code"],
    ),
    "adamw_step": (adamw, moment_tensors, list(moment_tensors())),
}
CASES = [(op, name) for op, (_, _, names) in OPS.items() for name in names]
# The one that the others have to be with: what is reported then is the next.
FIRST = {"hidden", "x", "packed", "grad", "tensor", "codes", "value"}


@pytest.fixture(params=["cpu", "emulated"])
def driver(request):
    """The emulated driver, or nothing."""
    return request.getfixturevalue("emulated_driver") if request.param == "emulated" else None


def launches(driver):
    return [] if driver is None else driver.launches()


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_tensor_elsewhere_is_named(driver, op, name):
    call, make, _ = OPS[op]
    tensors = make()
    call(tensors)  # as it should be
    before = len(launches(driver))
    tensors[name] = tensors[name].to("meta")
    named = r"\w[\w ]*" if name in FIRST else name
    with pytest.raises(ValueError, match=rf"^\w+: {named} is on .*; must be on the device of \w+"):
        call(tensors)
    assert len(launches(driver)) == before


@pytest.mark.parametrize(("op", "name"), CASES)
def test_strided_tensors_are_read_in_their_order(driver, op, name):
    call, make, _ = OPS[op]
    tensors = make()
    expected = call(tensors)
    spread = tensors[name].repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(spread, tensors[name])
    tensors[name] = spread
    if op == "adamw_step" and spread.numel() > 1:
        # Changed in place: a copy would be lost.
        with pytest.raises(ValueError, match=f"{name} is strided; must be contiguous"):
            call(tensors)
        return
    for ours, theirs in zip(call(tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["lse", "upstream"])
def test_a_backward_pass_takes_a_number_a_row(driver, name):
    tensors = head_tensors()
    good, before = tensors[name], len(launches(driver))
    for wrong, error, message in (
        (good[1:], ValueError, rf"{name} has shape \[5\]; must be \(6,\)"),
        (good.half(), TypeError, f"{name} has dtype float16; must be float32, float64"),
    ):
        with pytest.raises(error, match=message):
            backward({**tensors, name: wrong})
    assert len(launches(driver)) == before


def test_torch_s_own_operators_are_checked_too(driver):
    """They come without the check of `oddsmith.functional`."""
    t = head_tensors()
    rest = (0.3, None, 1.0, "full", "logsigmoid", 1, None, None, True, True, True)
    head = (t["hidden"], t["weight"], t["bias"])
    run = torch.ops.oddsmith.linear_orpo
    assert len(run(*head, t["targets"], t["sequence"], t["completion"], *rest)) == 12
    q = quant_tensors()
    before = len(launches(driver))
    for rows in ((t["targets"][1:], t["sequence"]), (t["targets"], t["sequence"][1:])):
        with pytest.raises(ValueError, match=r"has shape \[5\]; must be \(6,\)"):
            run(*head, *rows, t["completion"], *rest)
    with pytest.raises(TypeError, match="targets has dtype int32; must be int64"):
        run(*head, t["targets"].int(), t["sequence"], t["completion"], *rest)
    scales = [q[name] for name in WEIGHT[1:]]
    with pytest.raises(TypeError, match="absmax has dtype float32; must be uint8"):
        torch.ops.oddsmith.linear_nf4(
            q["x"], q["bias"], q["packed"], scales[0].float(), *scales[1:], 256, 64, VOCAB, WIDTH
        )
    assert len(launches(driver)) == before
