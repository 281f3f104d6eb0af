"""What the self-test of all families costs, counted: launches, torch's operators and bytes are what a GPU's time is made of."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oddsmith.check import trials
from support.operators import called


class Cost(TorchDispatchMode):
    """Operators, bytes of their results, and multiplications and additions of products."""

    def __init__(self):
        super().__init__()
        self.operators = self.bytes = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = called(self, func, args, kwargs)
        self.operators += 1
        if isinstance(result, torch.Tensor):
            self.bytes += result.nbytes
        if func.name() in ("aten::mm", "aten::bmm"):
            a, b = args[:2]
            self.products += 2 * a.numel() * b.shape[-1]
        return result


def test_the_self_test_is_small(emulated_driver):
    device = torch.device("cpu")
    with Cost() as cost:
        for case in trials.CASES:
            for dtype in trials.dtypes(device):
                assert trials.outcome(case, device, dtype).passed
    launches = len(emulated_driver.launches())
    print(
        f"\n{launches} launches, {cost.operators} operators, {cost.bytes} bytes, {cost.products} FLOP"
    )
    # At 20 us for each of the host's calls, 100 GB/s and 100 GFLOP/s in float64, which is a slow GPU's.
    seconds = 20e-6 * (launches + cost.operators) + cost.bytes / 100e9 + cost.products / 100e9
    assert seconds < 0.5
