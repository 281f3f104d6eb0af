"""Each function that tch calls, beside the same operator in Python."""

import ctypes
import math
import re
import threading

import pytest
import torch

from support import abi
from support.abi import Scalar, call
from support.paths import ROOT

CPU, INT = ctypes.c_int(-1), ctypes.c_int
SOURCES = sorted((ROOT / "src" / "torch" / "abi").glob("*.rs"))


def random(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator).to(dtype)
    return torch.randint(-9, 9, shape, generator=generator).to(dtype)


X, Y, SQUARE = random(3, 5), random(3, 5) + 1, random(5, 5)
IDS = torch.tensor([[0, 2, 1], [2, 2, 0]])
WHOLE, BYTES = (
    random(4, 3, dtype=torch.int64),
    torch.tensor([[3, 250], [7, 128]], dtype=torch.uint8),
)
FLAGS = X > 0

# Name: arguments as tch passes them, and the expression in Python.
CASES = {
    "atg_abs": ((X,), lambda: X.abs()),
    "atg_add": ((X, Y[0]), lambda: X + Y[0]),
    "atg_add_scalar": ((X, Scalar(1.5)), lambda: X + 1.5),
    "atg_addmm_out": (
        (torch.empty(3, 5), X, X, SQUARE),
        lambda: torch.addmm(X, X, SQUARE),
    ),
    "atg_amax": ((X, [1], INT(1)), lambda: X.amax([1], True)),
    "atg_bitwise_and": ((BYTES, Scalar(15)), lambda: BYTES & 15),
    "atg_bitwise_left_shift_tensor_scalar": ((BYTES, Scalar(4)), lambda: BYTES << 4),
    "atg_bitwise_right_shift_tensor_scalar": ((BYTES, Scalar(4)), lambda: BYTES >> 4),
    "atg_bitwise_or_tensor": ((BYTES, BYTES.T), lambda: BYTES | BYTES.T),
    "atg_bucketize": (
        (X, torch.tensor([-1.0, 0.0, 1.0]), INT(1), INT(0)),
        lambda: torch.bucketize(X, torch.tensor([-1.0, 0.0, 1.0]), out_int32=True),
    ),
    "atg_cat": (([X, Y, X], 1), lambda: torch.cat([X, Y, X], 1)),
    "atg_clamp": ((WHOLE, Scalar(-2), Scalar(3)), lambda: WHOLE.clamp(-2, 3)),
    "atg_clamp_min": ((X, Scalar(0.25)), lambda: X.clamp_min(0.25)),
    "atg_constant_pad_nd": ((X, [0, 1]), lambda: torch.nn.functional.pad(X, [0, 1])),
    "atg_contiguous": ((X.T,), lambda: X.T.contiguous()),
    "atg_detach": ((X.clone().requires_grad_(),), lambda: X),
    "atg_div": ((X, Y), lambda: X / Y),
    "atg_div_scalar": ((X, Scalar(3.0)), lambda: X / 3.0),
    "atg_exp": ((X,), lambda: X.exp()),
    "atg_full": (([2, 3], Scalar(-7), torch.int64, CPU), lambda: torch.full([2, 3], -7)),
    "atg_gather": ((X, 1, IDS, INT(0)), lambda: X.gather(1, IDS)),
    "atg_ge": ((WHOLE, Scalar(1)), lambda: WHOLE >= 1),
    "atg_index_add": (
        (X, 1, torch.tensor([0, 0, 4]), Y[:, :3]),
        lambda: X.index_add(1, torch.tensor([0, 0, 4]), Y[:, :3]),
    ),
    "atg_index_copy": (
        (X, 0, torch.tensor([2, 0]), Y[:2]),
        lambda: X.index_copy(0, torch.tensor([2, 0]), Y[:2]),
    ),
    "atg_index_select": ((X, 1, IDS[0]), lambda: X.index_select(1, IDS[0])),
    "atg_index_select_out": ((torch.empty(0), X, 1, IDS[0]), lambda: X.index_select(1, IDS[0])),
    "atg_log": ((X.abs(),), lambda: X.abs().log()),
    "atg_logical_and": ((FLAGS, ~FLAGS), lambda: FLAGS & ~FLAGS),
    "atg_logical_or": ((FLAGS, ~FLAGS), lambda: FLAGS | ~FLAGS),
    "atg_lt": ((X, Scalar(0.5)), lambda: X < 0.5),
    "atg_matmul": ((X, SQUARE[0]), lambda: X @ SQUARE[0]),
    "atg_max": ((X,), lambda: X.max()),
    "atg_maximum": ((X, Y), lambda: torch.maximum(X, Y)),
    "atg_mean": ((X.bfloat16(), torch.float32), lambda: X.bfloat16().mean(dtype=torch.float32)),
    "atg_mm": ((X, SQUARE), lambda: X @ SQUARE),
    "atg_mm_out": ((torch.empty(3, 5), X, SQUARE), lambda: X @ SQUARE),
    "atg_mul": ((X, Y), lambda: X * Y),
    "atg_mul_scalar": ((X.bfloat16(), Scalar(0.3)), lambda: X.bfloat16() * 0.3),
    "atg_mv": ((X, SQUARE[0]), lambda: X.mv(SQUARE[0])),
    "atg_narrow": ((X, 1, 2, 3), lambda: X.narrow(1, 2, 3)),
    "atg_neg": ((X,), lambda: -X),
    "atg_nonzero": ((FLAGS,), lambda: FLAGS.nonzero()),
    "atg_ones": (([2, 1], torch.bfloat16, CPU), lambda: torch.ones(2, 1, dtype=torch.bfloat16)),
    "atg_reciprocal": ((X,), lambda: X.reciprocal()),
    "atg_repeat_interleave_self_int": (
        (X, 2, 1, ctypes.c_int8(0), 10, ctypes.c_int8(0)),
        lambda: X.repeat_interleave(2, 1, output_size=10),
    ),
    "atg_reshape": ((X.T, [3, -1]), lambda: X.T.reshape(3, -1)),
    "atg_select": ((X, 1, -2), lambda: X.select(1, -2)),
    "atg_square": ((X,), lambda: X.square()),
    "atg_squeeze": ((X[None, :, None],), lambda: X),
    "atg_squeeze_dim": ((X[None, :, None], 0), lambda: X[:, None]),
    "atg_stack": (([X, Y], 1), lambda: torch.stack([X, Y], 1)),
    "atg_sub": ((X, Y), lambda: X - Y),
    "atg_sub_scalar": ((WHOLE, Scalar(5)), lambda: WHOLE - 5),
    "atg_sum": ((X, torch.float64), lambda: X.sum(dtype=torch.float64)),
    "atg_sum_dim_intlist": (
        (X, [0], INT(0), torch.float64),
        lambda: X.sum([0], dtype=torch.float64),
    ),
    "atg_t": ((X,), lambda: X.T),
    "atg_tanh": ((X,), lambda: X.tanh()),
    "atg_to": ((X, CPU), lambda: X),
    "atg_totype": ((X, torch.bfloat16), lambda: X.bfloat16()),
    "atg_unsqueeze": ((X, 1), lambda: X.unsqueeze(1)),
    "atg_view": ((X, [5, -1]), lambda: X.view(5, -1)),
    "atg_view_dtype": ((X, torch.int32), lambda: X.view(torch.int32)),
    "atg_where_self": ((FLAGS, X, Y), lambda: torch.where(FLAGS, X, Y)),
    "atg_zeros": (([2, 0, 3], torch.bool, CPU), lambda: torch.zeros(2, 0, 3, dtype=torch.bool)),
    "atg_zeros_like": ((X.T,), lambda: torch.zeros_like(X.T)),
}

# What changes its first argument: the arguments after it, and the same in Python.
IN_PLACE = {
    "atg_add_": ((Y,), lambda x: x.add_(Y)),
    "atg_add_scalar_": ((Scalar(2.5),), lambda x: x.add_(2.5)),
    "atg_addmm_": ((X, SQUARE), lambda x: x.addmm_(X, SQUARE)),
    "atg_fill_": ((Scalar(math.pi),), lambda x: x.fill_(math.pi)),
    "atg_logical_and_": ((FLAGS,), lambda x: x.logical_and_(FLAGS)),
    "atg_mul_": ((Y,), lambda x: x.mul_(Y)),
    "atg_scatter_add_": (
        (1, IDS, torch.ones(2, 3)),
        lambda x: x.scatter_add_(1, IDS, torch.ones(2, 3)),
    ),
}

# Tested below by themselves, or by the library's own tests on a machine that has what they need.
OTHERS = {"atg_empty", "atg_mm_dtype", "atg_mm_dtype_out"}


def exported():
    text = "\n".join(path.read_text(encoding="utf-8").split("#[cfg(test)]")[0] for path in SOURCES)
    return set(re.findall(r"\b(atg_\w+)(?:\(| =>)", text))


def test_every_operator_is_tested():
    assert exported() == CASES.keys() | IN_PLACE.keys() | OTHERS
    assert len(exported()) > 70


@pytest.mark.parametrize("name", CASES)
def test_as_in_python(name):
    arguments, expression = CASES[name]
    result, expected = call(name, *arguments), expression()
    assert result.dtype == expected.dtype and result.stride() == expected.stride()
    assert torch.equal(result, expected)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_as_in_python(name):
    arguments, expression = IN_PLACE[name]
    mine, theirs = X.clone(), X.clone()
    result = call(name, mine, *arguments)
    expression(theirs)
    assert result is mine or result.data_ptr() == mine.data_ptr()
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["atg_addmm_out", "atg_mm_out", "atg_index_select_out"])
def test_results_land_where_they_are_told_to(name):
    (to, *arguments), expression = CASES[name]
    to = torch.full_like(to, math.nan)
    assert call(name, to, *arguments).data_ptr() == to.data_ptr()
    assert torch.equal(to, expression())


@pytest.mark.parametrize(
    "name, x, scalar, expected",
    [
        # A number next to a tensor without dimensions takes its dtype.
        ("atg_mul_scalar", torch.tensor(2.0), 0.1, torch.tensor(2.0) * 0.1),
        ("atg_mul_scalar", torch.tensor(2.0), 3, torch.tensor(2.0) * 3),
        (
            "atg_sub_scalar",
            torch.tensor(7, dtype=torch.int32),
            3,
            torch.tensor(4, dtype=torch.int32),
        ),
        # Whole numbers and a real one give torch's default dtype.
        ("atg_mul_scalar", WHOLE, 0.1, WHOLE * 0.1),
        ("atg_div_scalar", WHOLE, 3, WHOLE / 3),
        ("atg_add_scalar", WHOLE, 1.5, WHOLE + 1.5),
        ("atg_sub_scalar", X.half(), 0.1, X.half() - 0.1),
        ("atg_add_scalar", torch.tensor([2**62]), 2**61, torch.tensor([2**62 + 2**61])),
        ("atg_mul_scalar", FLAGS, 3, FLAGS * 3),
        ("atg_clamp_min", torch.tensor([math.nan, -1.0]), 0.0, torch.tensor([math.nan, 0.0])),
    ],
)
def test_scalars_have_no_dtype_of_their_own(name, x, scalar, expected):
    result = call(name, x, Scalar(scalar))
    assert result.dtype == expected.dtype
    assert torch.equal(result.nan_to_num(-9), expected.nan_to_num(-9))


def test_whole_numbers_add_up_exactly():
    large = torch.tensor([[2**62, -(2**61)], [5, 7]])
    assert torch.equal(call("atg_add", large, large[1]), large + large[1])
    assert torch.equal(call("atg_sub", large, large), large - large)
    small = large[1].to(torch.int16)
    assert call("atg_add", small, small).dtype == torch.int16


def test_missing_optional_arguments():
    null = ctypes.c_int8(1)
    repeated = call("atg_repeat_interleave_self_int", X, 2, 0, null, 0, null)
    assert torch.equal(repeated, X.repeat_interleave(2))


def test_itself_where_nothing_changes():
    for result in [
        call("atg_contiguous", X),
        call("atg_totype", X, X.dtype),
        call("atg_to", X, CPU),
    ]:
        assert result.data_ptr() == X.data_ptr()


def test_new_tensors_have_their_form():
    for shape in [[], [0], [3], [2, 0, 4], [2, 3, 4]]:
        for dtype in abi.KINDS:
            new = call("atg_empty", shape, dtype, CPU)
            expected = torch.empty(shape, dtype=dtype)
            assert (new.shape, new.dtype, new.stride()) == (
                expected.shape,
                dtype,
                expected.stride(),
            )


def test_views_share_storage_and_version():
    x = X.clone()
    view = call("atg_narrow", x, 0, 1, 2)
    assert view._base is not None or view.data_ptr() == x[1:].data_ptr()
    before = x._version
    view.zero_()
    assert x._version > before and not x[1:].any()


def test_gradients_are_recorded_unless_switched_off():
    x = X.clone().requires_grad_()
    set_enabled = abi.function("at_grad_set_enabled", INT)
    call("atg_mul", x, Y).sum().backward()
    assert torch.equal(x.grad, Y)
    assert set_enabled(0) == 1
    try:
        assert not call("atg_mul", x, Y).requires_grad and not torch.is_grad_enabled()
    finally:
        assert set_enabled(1) == 0


def test_the_switch_of_gradients_belongs_to_a_thread():
    set_enabled = abi.function("at_grad_set_enabled", INT)
    assert set_enabled(0) == 1
    try:
        found = []
        thread = threading.Thread(target=lambda: found.append(set_enabled(1)))
        thread.start()
        thread.join()
        assert found == [1] and not torch.is_grad_enabled()
    finally:
        set_enabled(1)


def test_questions_about_a_tensor():
    x = X.T.clone(memory_format=torch.preserve_format)
    lent = abi.Lent(x)
    pointer = ctypes.c_void_p(lent.pointer)
    numbers = (ctypes.c_int64 * 2)()
    assert abi.function("at_dim", ctypes.c_size_t)(pointer) == 2
    abi.function("at_shape")(pointer, numbers)
    assert list(numbers) == [5, 3]
    abi.function("at_stride")(pointer, numbers)
    assert tuple(numbers) == x.stride()
    assert abi.function("at_data_ptr", ctypes.c_void_p)(pointer) == x.data_ptr()
    assert abi.function("at_scalar_type", INT)(pointer) == abi.KINDS[x.dtype]
    assert abi.function("at_device", INT)(pointer) == -1
    assert abi.function("at_defined", INT)(pointer) == 1
    assert abi.function("at_is_contiguous", INT)(pointer) == 0
    assert abi.function("at_get_num_threads", INT)() == torch.get_num_threads()
    text = abi.function("at_to_string", ctypes.c_void_p)(pointer, INT(80))
    assert ctypes.string_at(text) == b"values of [5, 3]"
    abi.free(text)
    empty = abi.function("at_new_tensor", ctypes.c_void_p)()
    assert abi.function("at_defined", INT)(ctypes.c_void_p(empty)) == 0
    abi.LIBRARY.at_free(empty)
    clone = abi.tensor(abi.function("at_shallow_clone", ctypes.c_void_p)(pointer))
    assert clone.data_ptr() == x.data_ptr()
    index = (ctypes.c_int64 * 2)(4, 1)
    double = abi.function("at_double_value_at_indexes", ctypes.c_double)
    assert double(pointer, index, INT(2)) == x[4, 1].item()
    whole = abi.function("at_int64_value_at_indexes", ctypes.c_int64)
    lent = abi.Lent(WHOLE)
    pointer = ctypes.c_void_p(lent.pointer)
    assert whole(pointer, (ctypes.c_int64 * 2)(3, 1), INT(2)) == WHOLE[3, 1].item()
    assert whole(pointer, index, INT(0)) == 0
    assert abi.last_error().startswith("item: ")
    assert whole(pointer, index, INT(2)) == 0
    assert abi.last_error().startswith("aten::select.int: ")
    assert abi.last_error() is None


def test_values_of_a_slice():
    data = (ctypes.c_float * 6)(*range(6))
    shape, steps = (ctypes.c_int64 * 2)(2, 3), (ctypes.c_int64 * 2)(1, 2)
    size = ctypes.c_size_t
    new = abi.function("at_tensor_of_data", ctypes.c_void_p)
    copied = abi.tensor(new(data, shape, size(2), size(4), INT(6)))
    assert torch.equal(copied, torch.arange(6.0).view(2, 3))
    assert not new(data, shape, size(2), size(4), INT(7))
    assert abi.last_error() == "elements of 4 bytes for dtype 7"
    blob = abi.function("at_tensor_of_blob", ctypes.c_void_p)
    lent = abi.tensor(blob(data, shape, size(2), steps, size(2), INT(6), CPU))
    data[2] = -1.0
    assert torch.equal(lent, torch.tensor([[0.0, -1.0, 4.0], [1.0, 3.0, 5.0]]))
    to = torch.zeros(2, 3)
    handles = [abi.Lent(to), abi.Lent(lent)]
    out = (ctypes.c_float * 4)()
    abi.function("at_copy_data")(ctypes.c_void_p(handles[1].pointer), out, size(4), size(4))
    assert list(out) == [0.0, -1.0, 4.0, 1.0] and abi.last_error() is None
    abi.function("at_copy_data")(ctypes.c_void_p(handles[1].pointer), out, size(7), size(4))
    assert abi.last_error() == "7 values of a tensor that has 6"
    abi.function("at_copy_")(*[ctypes.c_void_p(each.pointer) for each in handles])
    assert torch.equal(to, lent) and abi.last_error() is None


@pytest.mark.skipif(not abi.COUNTS, reason="glibc from 2.33 on counts")
@pytest.mark.parametrize("name", sorted(CASES | IN_PLACE))
def test_nothing_is_left_behind(name):
    if name in CASES:
        arguments, _ = CASES[name]
    else:
        arguments = (X.clone(), *IN_PLACE[name][0])
    assert abi.growth(lambda: call(name, *arguments)) < abi.LEAK
