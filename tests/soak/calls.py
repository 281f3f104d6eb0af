"""Random arguments to every function of the core: an error of Python each time, and never the end of the process.

Tensors of wrong shapes, dtypes, layouts and sizes, numbers that nothing can have, and right ones in between, so
that calls get past the first check.
"""

import random
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from oddsmith import _core
from oddsmith.checkpoint.rules import Factor, MergeUpdate, TensorRule
from oddsmith.head.arguments import HeadArguments, Needs, ObjectiveArguments, PairArguments
from oddsmith.optim.adamw.arguments import Item, Rule
from oddsmith.quant.arguments import NestedScales, PackedWeight

# Of a rule that no caller makes: refused, and no panic.
_OURS = "a rule without its adapter"
# What a user can be expected to catch.
ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    MemoryError,
    OverflowError,
    OSError,
    NotImplementedError,
)
MEMORY = 12 << 30
_WHOLE = [
    0,
    1,
    2,
    3,
    8,
    32,
    64,
    65,
    4096,
    -1,
    2**16,
    10**9,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
]
_WHOLE += [-(2**31), -(2**63), 2**63, 2**64 - 1, 2**64]
_REAL = [
    0.0,
    1.0,
    0.1,
    -1.0,
    0.9,
    1e-320,
    1e-45,
    1e-8,
    1e39,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]
_DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.int8,
    torch.int64,
]
_DTYPES += [torch.int32, torch.bool, torch.complex64]
_SHAPES = [
    (),
    (0,),
    (1,),
    (6,),
    (8,),
    (16,),
    (64,),
    (256,),
    (6, 8),
    (10, 8),
    (0, 8),
    (6, 0),
    (64, 64),
    (2048, 1),
]
_SHAPES += [(3, 64), (2, 3, 64), (32, 1), (1, 1)]
_NAMES = [
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "int8",
    "",
    "x",
    "log_odds",
    "logsigmoid",
    "identity",
    "chosen",
    "all",
]


class Draw(random.Random):
    """Arguments, more often right than wrong."""

    def whole(self, right: int | None = None) -> Any:
        if right is not None and self.random() < 0.75:
            return right
        return (
            self.choice([*_WHOLE, None, 1.5, "x"]) if self.random() < 0.1 else self.choice(_WHOLE)
        )

    def real(self, right: float = 1.0) -> Any:
        return right if self.random() < 0.75 else self.choice(_REAL)

    def name(self, right: str) -> str:
        return right if self.random() < 0.85 else self.choice(_NAMES)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Any:
        if self.random() < 0.03:
            return self.choice([None, 3, "x", [1.0]])
        if self.random() < 0.12:
            shape = self.choice(_SHAPES)
        if self.random() < 0.1:
            dtype = self.choice(_DTYPES)
        made = torch.randint(0, 100, shape).to(dtype)
        if self.random() < 0.1:
            made = made.new_full(shape, self.choice([0, 1]))
        if made.is_floating_point() and self.random() < 0.1 and made.numel():
            made.view(-1)[self.randrange(made.numel())] = self.choice(_REAL)
        if made.dtype in (torch.int64, torch.int32) and self.random() < 0.15 and made.numel():
            limits = torch.iinfo(made.dtype)
            value = self.choice([each for each in _WHOLE if limits.min <= each <= limits.max])
            made.view(-1)[self.randrange(made.numel())] = value
        kind = self.random()
        if kind < 0.05 and made.dim() > 1:
            return made.t() if made.dim() == 2 else made.transpose(0, 1)
        if kind < 0.08 and made.numel():
            return made.reshape(-1)[:1].expand(shape or (1,))
        if kind < 0.1:
            return made.to("meta")
        if kind < 0.11 and made.dim() == 2:
            return made.to_sparse()
        return made


def head(draw: Draw) -> HeadArguments:
    targets = draw.tensor(6, dtype=torch.int64)
    if (
        torch.is_tensor(targets)
        and draw.random() < 0.9
        and targets.dtype == torch.int64
        and not targets.is_meta
    ):
        targets = targets % 10 if targets.layout == torch.strided else targets
    bias = draw.tensor(10) if draw.random() < 0.3 else None
    softcap = draw.real(3.0) if draw.random() < 0.3 else None
    return HeadArguments(draw.tensor(6, 8), draw.tensor(10, 8), bias, targets, softcap, draw.real())


def needs(draw: Draw) -> Needs:
    return Needs(*(draw.random() < 0.5 for _ in range(3)))


def packed(draw: Draw) -> PackedWeight:
    nested = None
    if draw.random() < 0.5:
        nested = NestedScales(draw.tensor(1), code(draw), draw.tensor(), draw.whole(256))
    absmax = draw.tensor(64, dtype=torch.uint8 if nested else torch.float32)
    return PackedWeight(draw.tensor(2048, 1, dtype=torch.uint8), absmax, nested, draw.whole(64))


def code(draw: Draw, size: int = 256) -> Any:
    return torch.linspace(-1, 1, size) if draw.random() < 0.8 else draw.tensor(size)


def shape(draw: Draw) -> Any:
    return tuple(draw.whole(64) for _ in range(2 if draw.random() < 0.9 else draw.randrange(4)))


def adamw(draw: Draw) -> Any:
    eight = draw.random() < 0.5
    state = torch.uint8 if eight else torch.float32
    scales = [draw.tensor(1) if eight or draw.random() < 0.1 else None for _ in range(2)]
    rule = Rule(*(draw.real(value) for value in (0.9, 0.99, 1e-8, -1e-3, 1.0)))
    value = draw.tensor(64)
    states = [draw.tensor(64, dtype=state) for _ in range(2)]
    item = Item(
        value,
        draw.tensor(64),
        states[0],
        states[1],
        scales[0],
        scales[1],
        draw.whole(0),
        rule,
        draw.whole(3) if eight else None,
    )
    return _core.adamw_step([item] * draw.choice((0, 1, 1, 2)), draw.tensor(1, dtype=torch.int64))


def orpo(draw: Draw) -> Any:
    sequence = draw.choice([torch.arange(6) // 3, draw.tensor(6, dtype=torch.int64)])
    completion = draw.tensor(6, dtype=torch.bool)
    pairs = PairArguments(sequence, completion, draw.whole(1), draw.whole(3))
    scope, link = (
        draw.name(draw.choice(["full", "completion"])),
        draw.name(draw.choice(["logsigmoid", "identity"])),
    )
    return _core.linear_orpo(
        head(draw),
        pairs,
        ObjectiveArguments(draw.real(), scope, link, draw.whole(900)),
        needs(draw),
    )


def convert(draw: Draw, place: Path) -> Any:
    base, adapter = place / "base.safetensors", place / "adapter.safetensors"
    if not base.exists():
        save_file({"w": torch.ones(64, 32), "b": torch.ones(64)}, base)
        save_file({"l": torch.ones(64, 4), "r": torch.ones(4, 32), "n": torch.ones(64)}, adapter)
    names = ["w", "b", "l", "r", "n", "none"]
    update = None
    if draw.random() < 0.7:
        factors = [
            Factor(right if draw.random() < 0.8 else draw.choice(names), draw.random() < 0.1)
            for right in "lr"
        ]
        magnitude = draw.choice([None, "n", "b"])
        update = MergeUpdate(factors[0], draw.choice([factors[1], None]), draw.real(), magnitude)
    flags = [draw.random() < 0.3 for _ in range(3)]
    replacement = draw.choice([None, None, None, "l"])
    name = draw.choice(["w", "w", "b", "none"])
    rule = TensorRule(
        name,
        draw.name("float32"),
        replacement,
        update,
        flags[0],
        flags[1],
        draw.whole(64),
        flags[2],
    )
    files = (
        [base]
        if draw.random() < 0.9
        else draw.choice([[], [base, base], [place], [place / "none"]])
    )
    given = adapter if draw.random() < 0.9 else None
    if draw.random() < 0.5:
        return _core.converted_size(files, given, [rule])
    return _core.convert_checkpoint(
        files, given, [rule], [place / "out"], code(draw, 16), lambda done: None
    )


def kernels(draw: Draw, place: Path) -> Any:
    gpu = draw.whole(0)
    return draw.choice([
        lambda: _core.kernel_identity(gpu), lambda: _core.load_kernels(gpu, draw.name("nf4")),
        lambda: _core.trusted_kernels(gpu), lambda: _core.adamw_serves(draw.tensor(3), True),
        lambda: _core.trust_kernels(gpu, draw.choice([None, [], ["x"], ["adamw8"]])),
        lambda: _core.read_private(place / draw.choice(["base.safetensors", "none", "."]), draw.whole(9)),
        lambda: _core.kernel_folder_fault(draw.choice(["", "\0", str(place), "/proc/self/fd"])),
        lambda: _core.checkpoint_tensors(place / draw.choice(["base.safetensors", "none", "."])),
        lambda: _core.checkpoint_states([place / "base.safetensors"], draw.choice([[], ["w"], ["none"]])),
    ])()  # fmt: skip


def calls(place: Path) -> list[Callable[[Draw], Any]]:
    """One for each function."""
    return [
        orpo,
        orpo,
        adamw,
        lambda draw: _core.linear_logps(head(draw), draw.random() < 0.5),
        lambda draw: _core.linear_logps_backward(
            head(draw), draw.tensor(6), draw.tensor(6), needs(draw)
        ),
        lambda draw: _core.scale_gradient(draw.tensor(6), draw.tensor()),
        lambda draw: _core.quantize_nf4(draw.tensor(64, 64), draw.whole(64)),
        lambda draw: _core.dequantize_nf4(packed(draw), list(shape(draw)), draw.name("float32")),
        lambda draw: _core.linear_nf4(
            draw.tensor(3, 64), packed(draw), shape(draw), draw.choice([None, draw.tensor(64)])
        ),
        lambda draw: _core.linear_nf4_input_gradient(
            draw.tensor(3, 64), packed(draw), shape(draw), draw.name("float32")
        ),
        lambda draw: _core.quantize_blockwise(draw.tensor(64), code(draw), draw.whole(64)),
        lambda draw: _core.dequantize_blockwise(
            draw.tensor(64, dtype=torch.uint8),
            draw.tensor(1),
            draw.tensor(256),
            draw.whole(64),
            draw.name("float32"),
        ),
        lambda draw: convert(draw, place),
        lambda draw: kernels(draw, place),
    ]


def main(count: str, start: str, log: str) -> None:
    """Makes calls that their numbers decide; the last number in the log is that of a call that ended the process."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    passed = 0
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as last:
        every = calls(Path(folder))
        for number in range(int(start), int(start) + int(count)):
            last.seek(0)
            last.write(f"{number}\n")
            last.flush()
            torch.manual_seed(number)
            try:
                every[number % len(every)](Draw(number))
                passed += 1
            except ERRORS as error:
                # A panic that was caught; an assertion of libtorch about itself.
                if (
                    "internal error" in str(error).lower() and _OURS not in str(error)
                ) or "INTERNAL ASSERT" in str(error):
                    sys.exit(f"call {number}: {error}")
            except BaseException as error:
                sys.exit(f"call {number}: {type(error).__name__}: {error}")
    print(passed)
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
