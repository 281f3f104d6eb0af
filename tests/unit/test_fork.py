"""A process that was forked after the library was loaded: threads of the parent are not there."""

import os
import subprocess
import sys

import pytest

# libtorch's threads run in the parent, and of ours nothing or the same: which process has loaded the
# library has to be known from the import on. What libtorch itself runs on threads comes before the fork.
CHILD = """
import os, sys, tempfile, torch
from pathlib import Path
from safetensors.torch import save_file
from oddsmith import _core
from oddsmith.checkpoint.rules import Factor, TensorRule, MergeUpdate
from oddsmith.optim.adamw import arguments
torch.set_num_threads(2)
{prepare}
torch.ones(4_000_000).exp_()
def run():
    {run}
if {before}:
    run()
child = os.fork()
if child == 0:
    run()
    os._exit(0)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""
# What is made before, and what runs.
RUNS = {
    "quantise": ("values = torch.ones(1_000_000)", "_core.quantize_nf4(values, 64)"),
    "step": (
        """
tensors = [torch.ones(1_000_000) for _ in range(4)]
rule = arguments.Rule(0.9, 0.99, 1e-8, -1e-3, 1.0)
item = arguments.Item(*tensors, None, None, 0, rule, None)
bad = torch.zeros(1, dtype=torch.int64)
""",
        "_core.adamw_step([item], bad)",
    ),
    "merge": (
        """
folder = Path(tempfile.mkdtemp())
base, adapter = folder / "base.safetensors", folder / "adapter.safetensors"
save_file({"w": torch.ones(300, 200)}, base)
save_file({"a": torch.ones(8, 200), "b": torch.ones(300, 8)}, adapter)
rules = [TensorRule("w", "float32", update=MergeUpdate(Factor("b"), Factor("a"), 1.0))]
""",
        "_core.converted_size([base], adapter, rules)",
    ),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
@pytest.mark.parametrize("name", RUNS)
def test_a_forked_process_does_not_wait(name, before):
    prepare, run = RUNS[name]
    code = CHILD.format(prepare=prepare, run=run, before=before)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
