"""What is said of a torch that is old, new or incomplete."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from oddsmith import _core, torch_version
from oddsmith.errors import TorchError


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
    with pytest.raises(TorchError) as raised:
        torch_version.check(version, lambda: "not to be called")
    assert str(raised.value) == (
        f"oddsmith needs torch 2.10 or newer and found torch {version}; "
        "update it with: pip install --upgrade torch"
    )


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'MISSING'", name="MISSING")
sys.meta_path.insert(0, Without())
"""
NO_TORCH = WITHOUT.replace("MISSING", "torch")
NONE = "oddsmith needs torch 2.10 or newer and found none; install it with: pip install torch"


@pytest.mark.parametrize("name", ["ORPOTrainer", "functional", "_core"])
def test_no_torch_at_all(name):
    done = run(NO_TORCH + f"from oddsmith import {name}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"oddsmith.errors.TorchError: {NONE}"
    assert "During handling" not in done.stderr


@pytest.mark.parametrize("arguments", [["demo"], ["train", "--model", "x"]])
def test_a_command_without_torch_prints_one_line(arguments):
    done = run(NO_TORCH + f"from oddsmith.cli import main\nsys.exit(main({arguments}))")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"oddsmith {arguments[0]}: error: {NONE}"]


def test_a_command_under_an_old_torch_prints_one_line():
    old = "import sys, torch\ntorch.__version__ = torch.torch_version.TorchVersion('2.9.1')\n"
    done = run(old + "from oddsmith.cli import main\nsys.exit(main(['demo']))")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "oddsmith demo: error: oddsmith needs torch 2.10 or newer and found torch 2.9.1; "
        "update it with: pip install --upgrade torch"
    ]


def test_a_part_of_torch_that_is_missing_is_named_by_python():
    part = WITHOUT.replace("MISSING", "typing_extensions")
    done = run(part + "from oddsmith import functional")
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'typing_extensions'"
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
        "oddsmith.errors.TorchError: oddsmith was tested up to torch 2.15, and its self-test fails under torch "
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
        "oddsmith.errors.TorchError: oddsmith needs torch 2.10 or newer, complete; "
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


# A torch that is a version and a folder: what is said of its library comes before anything else is used.
IMPORTED = """
import ctypes, sys, types
folder, loaded = sys.argv[1:]
if loaded:
    ctypes.CDLL(loaded)
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.__version__, torch.__path__ = "2.11.0", [folder]
import oddsmith._core
"""
LIBRARY = "libtorch_cpu.so"
linux = pytest.mark.skipif(sys.platform != "linux", reason="names of Linux")


def imported(folder, loaded="") -> str:
    """The last line of what is said of the torch in this folder."""
    command = [sys.executable, "-c", IMPORTED, str(folder), str(loaded)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1].removeprefix("oddsmith.errors.TorchError: ")


@pytest.fixture
def torches(tmp_path):
    """Two folders with a library of the same name; any library will do."""
    for name in ["mine", "other"]:
        (tmp_path / name / "lib").mkdir(parents=True)
        shutil.copy(_core.__file__, tmp_path / name / "lib" / LIBRARY)
    return tmp_path / "mine", tmp_path / "other"


@linux
def test_two_torches_are_named(torches):
    mine, other = torches
    assert imported(mine, other / "lib" / LIBRARY) == (
        f"oddsmith found two torches: Python imports torch 2.11.0 from {mine}, and this process has loaded "
        f"{other / 'lib' / LIBRARY}; remove one, or take the second off LD_PRELOAD"
    )


@linux
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_library_of_the_imported_torch_is_taken(torches, elsewhere):
    """Also where a distribution keeps it outside the package. It lacks all functions, as it is another one."""
    mine, _ = torches
    folder = mine.parent / "package" if elsewhere else mine
    assert imported(folder, mine / "lib" / LIBRARY).startswith(
        "oddsmith needs torch 2.10 or newer, complete; torch 2.11.0 lacks aoti_torch_delete_tensor_object, "
    )


@linux
def test_a_library_that_does_not_open_is_named(torches):
    mine, _ = torches
    library = mine / "lib" / LIBRARY
    start = "oddsmith needs torch 2.10 or newer, complete; torch 2.11.0 has no"
    library.write_bytes(b"cut off")
    assert imported(mine) == f"{start} {library} that opens: {library}: file too short"
    library.unlink()
    assert imported(mine).startswith(f"{start} {library} that opens: {library}: cannot open")


def test_a_layer_stays_whole_where_there_is_no_gpu():
    """torch says in its own words that there is no CUDA."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from oddsmith.nn import Linear4bit

    layer = Linear4bit.from_linear(torch.nn.Linear(64, 8))
    before = layer(torch.ones(1, 64))
    for move in [layer.cuda, lambda: layer.to("cuda")]:
        with pytest.raises(
            (RuntimeError, AssertionError), match="NVIDIA driver|not compiled with CUDA"
        ):
            move()
        assert torch.equal(layer(torch.ones(1, 64)), before)
