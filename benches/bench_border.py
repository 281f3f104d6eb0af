"""What it costs to pass tensors into the core and back, by whatever the installed torch offers for it.

    python benches/bench_border.py [--repeats 21] [--record]

`argument` is `_core.scale_gradient`, which on a CPU only looks at its two tensors; `result` is `_core.nf4_code`, which
makes a tensor of 16 values; `item` is `_core.adamw_step` of 100 parameters with one element, which takes 401 tensors.
So each figure has some work of the call in it and is an upper bound. `detach` is an operator of torch called from
Python, for comparison. Microseconds for a tensor, on one thread; the ids have torch's version in them, because a
torch before 2.14 passes tensors in capsules, a newer one by functions in C.
"""

from __future__ import annotations

import contextlib
import io
import statistics

import torch

from oddsmith import _core
from oddsmith.optim.adamw.arguments import Item, Rule
from side_by_side import Report, flags, interleave

# Microseconds for a tensor at most.
MOST = 3.0


def item() -> Item:
    value, grad, first, second = torch.zeros(4, 1)
    rule = Rule(beta1=0.9, beta2=0.999, eps=1e-8, step_size=1e-3, keep=1.0)
    return Item(value, grad, first, second, None, None, 0, rule, None)


def calls() -> dict:
    """Name: what is called, and how many tensors cross in it."""
    x, factor = torch.ones(64), torch.ones(())
    items, bad = [item() for _ in range(100)], torch.zeros(1, dtype=torch.int64)
    return {
        "argument": (lambda: _core.scale_gradient(x, factor), 2),
        "result": (_core.nf4_code, 1),
        "item": (lambda: _core.adamw_step(items, bad), 401),
        "detach": (x.detach, 1),
    }


def main() -> None:
    parser = flags(__doc__, repeats=21)
    args = parser.parse_args()
    args.threads = 1
    torch.set_num_threads(1)
    report = Report("bench_border", args, ())
    release = ".".join(torch.__version__.split(".")[:2])
    print(f"torch {torch.__version__}; microseconds for a tensor (at most {MOST:.0f})")
    for name, (call, tensors) in calls().items():
        times = max(1, (40 if args.tiny else 20_000) // tensors)

        def run(call=call, times=times):
            for _ in range(times):
                call()

        with contextlib.redirect_stdout(io.StringIO()):
            seconds = interleave({name: run}, args.repeats)[name]
        micro = [each / times / tensors * 1e6 for each in seconds]
        print(f"  {name:12}{statistics.median(micro):8.2f}")
        case = f"crossing the border of the core, torch {release}: {name}"
        implementation = "torch" if name == "detach" else "oddsmith"
        report.add(f"border_torch_{release}_{name}_time", case, implementation, "time", "us", micro)


if __name__ == "__main__":
    main()
