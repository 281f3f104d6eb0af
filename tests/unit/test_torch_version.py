"""What is said of a torch that is old, new or incomplete."""

import os
import subprocess
import sys

import pytest
import torch

from oddsmith import torch_version


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=os.environ | environment, check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize("version", ["2.10.0", "2.11.3+cpu", "2.15.0a0+git1234567"])
def test_tested_versions_pass_without_a_word(version, caplog):
    torch_version.check(version, lambda: "not to be called")
    assert not caplog.records


@pytest.mark.parametrize("version", ["2.9.1", "2.1.11+cu121", "1.13.0", "unknown"])
def test_an_old_torch_is_named_with_the_way_out(version):
    with pytest.raises(ImportError) as raised:
        torch_version.check(version, lambda: "not to be called")
    assert str(raised.value) == (
        f"oddsmith needs torch 2.10 or newer and found torch {version}; "
        "update it with: pip install --upgrade torch"
    )


NEWER = "import torch; torch.__version__ = '2.99.0'\n"


def test_a_torch_that_is_newer_than_tested_is_tried_and_named_once():
    done = run(NEWER + "from oddsmith import _core, functional\nimport oddsmith.optim")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "oddsmith was tested up to torch 2.15; its self-test passes under torch 2.99.0."
    ]


def test_a_torch_that_fails_the_self_test_is_refused():
    wrong = "import oddsmith.self_test as s\ns.CHECKS = {'sums': lambda: False}\n"
    done = run("import torch, oddsmith\n" + wrong + NEWER + "from oddsmith import functional")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: oddsmith was tested up to torch 2.15, and its self-test fails under torch "
        "2.99.0: sums differ"
    )


@pytest.mark.parametrize(
    "name", ["torch_call_dispatcher", "aoti_torch_get_sizes,torch_delete_list"]
)
def test_a_function_that_is_missing_is_named(name):
    done = run("from oddsmith import functional", ODDSMITH_HIDE_TORCH_FUNCTIONS=name)
    assert done.returncode == 1
    missing = name.replace(",", ", ")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: oddsmith needs torch 2.10 or newer, complete; "
        f"torch {torch.__version__} lacks {missing}"
    )


OPTIONAL = [
    "torch_exception_get_what_without_backtrace",
    "torch_new_stable_ivalue",
    "torch_new_stable_ivalue,_Znwm",
    "torch_tensor_from_pyobject",
    "torch_tensor_to_pyobject",
    "GOMP_parallel",
]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_function_that_not_every_torch_has_can_be_missing(name):
    code = "from oddsmith import self_test\nassert self_test.run() is None, self_test.run()"
    done = run(code, ODDSMITH_HIDE_TORCH_FUNCTIONS=name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name", ["_ZTVN3c109AllocatorE", "_ZN3c1015SetCPUAllocatorEPNS_9AllocatorEh"]
)
def test_there_is_no_pool_where_libtorch_has_another_allocator(name):
    code = "from oddsmith import _core\nassert _core.install_pool() is False"
    assert run(code, ODDSMITH_HIDE_TORCH_FUNCTIONS=name).returncode == 0
    assert run(code.replace("False", "True")).returncode == 0
