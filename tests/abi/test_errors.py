"""What each function that tch calls says where the same operator fails in Python."""

import ctypes
import re
import threading

import pytest
import torch

from support import abi
from support.abi import Scalar, call
from support.paths import ROOT

CPU, INT = ctypes.c_int(-1), ctypes.c_int
# From torch 2.13 on libtorch keeps the reason of an error; before it only prints it.
KEEPS = hasattr(ctypes.CDLL(torch._C.__file__), "torch_exception_get_what_without_backtrace")
UNKNOWN = "failed; torch before 2.13 prints the reason to standard error and keeps no text"

X = torch.arange(15.0).view(3, 5)
IDS = torch.tensor([[0, 2, 1], [2, 2, 0]])
FLAGS = X > 3
F = torch.nn.functional

# Name: arguments as tch passes them, the operator that the text names, and the expression in Python.
WRONG = {
    "atg_abs": ((FLAGS,), "aten::abs", lambda: FLAGS.abs()),
    "atg_add": ((X, X[:, :3]), "aten::subtract.Tensor", lambda: torch.subtract(X, X[:, :3])),
    "atg_addmm_": ((X.clone(), X, X), "aten::addmm.out", lambda: X.clone().addmm_(X, X)),
    "atg_addmm_out": ((X.clone(), X, X, X), "aten::addmm.out", lambda: torch.addmm(X, X, X)),
    "atg_amax": ((X, [7], INT(0)), "aten::amax", lambda: X.amax([7])),
    "atg_bitwise_and": ((X, Scalar(1)), "aten::bitwise_and.Tensor", lambda: X & torch.tensor(1)),
    "atg_bitwise_or_tensor": ((X, X), "aten::bitwise_or.Tensor", lambda: X | X),
    "atg_bucketize": (
        (X, X, INT(0), INT(0)),
        "aten::bucketize.Tensor",
        lambda: torch.bucketize(X, X),
    ),
    "atg_cat": (([X, X[0]], 0), "aten::cat", lambda: torch.cat([X, X[0]])),
    "atg_constant_pad_nd": ((X, [1, 2, 3]), "aten::pad", lambda: F.pad(X, [1, 2, 3])),
    "atg_div": ((X, X[:, :3]), "aten::div.Tensor", lambda: X / X[:, :3]),
    "atg_gather": ((X, 1, IDS + 5, INT(0)), "aten::gather", lambda: X.gather(1, IDS + 5)),
    "atg_index_copy": (
        (X, 0, IDS[0], X[:2]),
        "aten::index_copy",
        lambda: X.index_copy(0, IDS[0], X[:2]),
    ),
    "atg_index_select": (
        (X, 0, IDS[0] + 5),
        "aten::index_select",
        lambda: X.index_select(0, IDS[0] + 5),
    ),
    "atg_index_select_out": (
        (torch.empty(0, dtype=torch.int64), X, 0, IDS[0]),
        "aten::index_select.out",
        lambda: torch.index_select(X, 0, IDS[0], out=torch.empty(0, dtype=torch.int64)),
    ),
    "atg_linear": ((X, X[:, :3], None), "aten::linear", lambda: F.linear(X, X[:, :3])),
    "atg_logical_and": (
        (FLAGS, FLAGS[:, :3]),
        "aten::logical_and",
        lambda: torch.logical_and(FLAGS, FLAGS[:, :3]),
    ),
    "atg_logical_or": (
        (FLAGS, FLAGS[:, :3]),
        "aten::logical_or",
        lambda: torch.logical_or(FLAGS, FLAGS[:, :3]),
    ),
    "atg_matmul": ((X, X), "aten::matmul", lambda: X @ X),
    "atg_max": ((X[:0],), "aten::max", lambda: X[:0].max()),
    "atg_maximum": ((X, X[:, :3]), "aten::maximum", lambda: torch.maximum(X, X[:, :3])),
    "atg_mean": ((IDS, torch.int64), "aten::mean", lambda: IDS.mean(dtype=torch.int64)),
    "atg_mm": ((X, X), "aten::mm", lambda: X.mm(X)),
    "atg_mm_out": ((X.clone(), X, X), "aten::mm.out", lambda: torch.mm(X, X, out=X.clone())),
    "atg_mul": ((X, X[:, :3]), "aten::mul.Tensor", lambda: X * X[:, :3]),
    "atg_mul_": ((X[:1].clone(), X), "aten::mul_.Tensor", lambda: X[:1].clone().mul_(X)),
    "atg_mv": ((X, X[0, :3]), "aten::mv", lambda: X.mv(X[0, :3])),
    "atg_narrow": ((X, 0, 2, 5), "aten::narrow", lambda: X.narrow(0, 2, 5)),
    "atg_neg": ((FLAGS,), "aten::neg", lambda: -FLAGS),
    "atg_repeat_interleave_self_int": (
        (X, 2, 9, ctypes.c_int8(0), 0, ctypes.c_int8(1)),
        "aten::repeat_interleave.self_int",
        lambda: X.repeat_interleave(2, 9),
    ),
    "atg_reshape": ((X, [4]), "aten::reshape", lambda: X.reshape(4)),
    "atg_scatter_add_": (
        (X.clone(), 1, IDS, X.double()),
        "aten::scatter_add_",
        lambda: X.clone().scatter_add_(1, IDS, X.double()),
    ),
    "atg_select": ((X, 1, 5), "aten::select.int", lambda: X.select(1, 5)),
    "atg_squeeze_dim": ((X, 2), "aten::squeeze.dim", lambda: X.squeeze(2)),
    "atg_stack": (([X, X[0]], 0), "aten::stack", lambda: torch.stack([X, X[0]])),
    "atg_sub": ((X, X[:, :3]), "aten::subtract.Tensor", lambda: torch.subtract(X, X[:, :3])),
    "atg_sum_dim_intlist": (
        (X, [2], INT(0), torch.float32),
        "aten::sum.dim_IntList",
        lambda: X.sum([2]),
    ),
    "atg_t": ((X[None],), "aten::t", lambda: X[None].t()),
    "atg_unsqueeze": ((X, 4), "aten::unsqueeze", lambda: X.unsqueeze(4)),
    "atg_view": ((X, [4]), "aten::view", lambda: X.view(4)),
    "atg_view_dtype": (
        (X[:, :3], torch.float64),
        "aten::view.dtype",
        lambda: X[:, :3].view(torch.float64),
    ),
    "atg_where_self": (
        (FLAGS, X, X[:, :3]),
        "aten::where.self",
        lambda: torch.where(FLAGS, X, X[:, :3]),
    ),
}

# What is refused before libtorch is asked, with a text of our own whatever torch there is.
OURS = {
    "atg_index_add": (
        (X, 3, IDS[0], X),
        "aten::index_add: the index must have one dimension, and the dimension exist",
    ),
    "atg_zeros": (([2, -1], torch.float32, CPU), "aten::empty: a negative dimension in [2, -1]"),
    "atg_ones": (
        ([1 << 40, 1 << 40], torch.float32, CPU),
        "aten::empty: [1099511627776, 1099511627776] has more elements than there are numbers",
    ),
    "atg_to": ((X, INT(-9)), "device -9 of tch is not supported"),
}


def message(name, arguments):
    with pytest.raises(RuntimeError) as raised:
        call(name, *arguments)
    assert abi.last_error() is None
    return str(raised.value)


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_operator_and_say_what_python_says(name, capfd):
    arguments, operator, expression = WRONG[name]
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        expression()
    reason = str(theirs.value).strip()
    if KEEPS:
        assert message(name, arguments) == f"{operator}: {reason}"
    else:
        assert message(name, arguments) == f"{operator}: {UNKNOWN}"
        assert reason.splitlines()[0] in capfd.readouterr().err


@pytest.mark.parametrize("name", OURS)
def test_what_is_checked_first_has_a_text_under_every_torch(name):
    arguments, text = OURS[name]
    assert message(name, arguments) == text


def test_no_memory_says_how_much_was_asked_for():
    text = message("atg_empty", ([1 << 50], torch.float32, CPU))
    start = "aten::empty: 4503599627370496 bytes for a tensor of shape [1125899906842624]: "
    assert text.startswith(start) and (KEEPS or text == start + UNKNOWN)


def test_errors_belong_to_their_thread():
    out = ctypes.c_void_p()
    lent = abi.Lent(X)
    pointer = ctypes.c_void_p(lent.pointer)
    abi.function("atg_mm")(ctypes.byref(out), pointer, pointer)
    found = []
    thread = threading.Thread(target=lambda: found.append(abi.last_error()))
    thread.start()
    thread.join()
    assert found == [None]
    assert abi.last_error().startswith("aten::mm: ")


def test_the_last_error_is_kept_alone():
    """The one before it, which nobody has asked for, is freed."""
    out = ctypes.c_void_p()
    lent = abi.Lent(X)
    pointer = ctypes.c_void_p(lent.pointer)
    for name in ("atg_mm", "atg_matmul"):
        abi.function(name)(ctypes.byref(out), pointer, pointer)
    assert abi.last_error().startswith("aten::matmul: ")
    assert abi.last_error() is None


@pytest.mark.skipif(not abi.COUNTS, reason="glibc from 2.33 on counts")
@pytest.mark.parametrize("name", ["atg_mm", "atg_narrow", "atg_empty"])
def test_errors_leave_nothing_behind(name, capfd):
    arguments = WRONG[name][0] if name in WRONG else ([1 << 50], torch.float32, CPU)
    # Few calls: libtorch looks up the names of all frames for each.
    assert abi.growth(lambda: message(name, arguments), calls=100) < abi.LEAK


def test_every_other_function_is_called_in_a_test():
    sources = (ROOT / "src" / "torch" / "abi").glob("*.rs")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    exported = set(re.findall(r'extern "C" fn ((?:at|ats)_\w+|get_and_\w+)\(', text))
    assert len(exported) > 20
    tests = [*(ROOT / "tests" / "abi").glob("*.py"), ROOT / "tests" / "support" / "abi.py"]
    called = "\n".join(path.read_text(encoding="utf-8") for path in tests)
    assert not {name for name in exported if not re.search(rf"\b{name}\b", called)}
