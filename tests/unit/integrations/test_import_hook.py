"""The import hook: transformers imported before, after, at the same time, again, or without its table."""

import subprocess
import sys

import pytest

# Small modules in the place of transformers', which takes seconds to import.
FAKE = """
import importlib, logging, pathlib, sys, tempfile, threading
sys.modules["bitsandbytes"] = None  # as if it were not installed
folder = pathlib.Path(tempfile.mkdtemp())
package = folder / "transformers" / "quantizers"
package.mkdir(parents=True)
(folder / "transformers" / "__init__.py").write_text("")
(package / "__init__.py").write_text("")
(package / "auto.py").write_text({table!r})
sys.path.insert(0, str(folder))
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("oddsmith").addHandler(Keep())
def table():
    return importlib.import_module("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING
def is_ours(table):
    return table["bitsandbytes_4bit"].__module__.startswith("oddsmith.")
"""
TABLE = "class Theirs: pass\nAUTO_QUANTIZER_MAPPING = {'bitsandbytes_4bit': Theirs}\n"


def run(script, table=TABLE):
    code = FAKE.format(table=table) + script
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_before_and_after():
    run("import oddsmith\nassert is_ours(table()) and not lines")
    run("assert not is_ours(table())\nimport oddsmith\nassert is_ours(table()) and not lines")


def test_the_module_is_as_it_would_be():
    run(
        """
import oddsmith
table()
module = sys.modules["transformers.quantizers.auto"]
assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
import inspect
assert "class Theirs" in inspect.getsource(module)
"""
    )


def test_reloading():
    run(
        """
import oddsmith
first = table()
for _ in range(2):
    importlib.reload(sys.modules["transformers.quantizers.auto"])
    assert table() is not first and is_ours(table())
importlib.reload(oddsmith)
importlib.reload(sys.modules["oddsmith.integrations.import_hook"]).install()
assert is_ours(table()) and not lines
"""
    )


SLOW = "import time\ntime.sleep(0.5)\n" + TABLE


@pytest.mark.parametrize("ours_first", [True, False])
def test_threads_that_import_at_the_same_time(ours_first):
    """One of them may find transformers' module half made."""
    run(
        f"""
import time
def ours():
    time.sleep({0.0 if ours_first else 0.2})
    import oddsmith
errors = []
def guarded(f):
    try:
        f()
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=guarded, args=(f,)) for f in [table] * 8 + [ours] * 8]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
assert is_ours(table()) and not lines, lines
import oddsmith.integrations.import_hook as hook
assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
hook.HOOK.undo()
assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)
""",
        SLOW,
    )


def test_an_import_and_a_configuration_in_two_threads():
    """The first has the lock of the module and waits for that of the table, the second wants both."""
    run(
        """
import oddsmith
from oddsmith.integrations.quantizer_table import TABLE
executed = threading.Event()
threading.executed = executed  # the module sets it when it has run, and then takes a while
threads = [threading.Thread(target=table, daemon=True)]
threads[0].start()
assert executed.wait(20)
threads.append(threading.Thread(target=TABLE.ensure, daemon=True))
threads[1].start()
for thread in threads:
    thread.join(20)
assert not any(thread.is_alive() for thread in threads), "each waits for the other"
assert is_ours(table()) and not lines, lines
""",
        TABLE + "import threading, time\nthreading.executed.set()\ntime.sleep(0.5)\n",
    )


def test_a_spawned_process():
    run(
        """
import subprocess
code = "import sys; sys.modules['bitsandbytes'] = None; import oddsmith; "
code += "from transformers.quantizers import auto; "
code += "print(auto.AUTO_QUANTIZER_MAPPING['bitsandbytes_4bit'].__module__)"
import os
os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
assert done.stdout.startswith("oddsmith."), done.stderr
"""
    )


@pytest.mark.parametrize(
    "table",
    ["", "AUTO_QUANTIZER_MAPPING = {}\n", "AUTO_QUANTIZER_MAPPING = None\n"],
    ids=["absent", "empty", "none"],
)
@pytest.mark.parametrize("first", ["import oddsmith", "import transformers.quantizers.auto"])
def test_another_table_is_left_alone_with_one_line(table, first):
    run(
        f"""
{first}
import oddsmith
module = importlib.import_module("transformers.quantizers.auto")
before = dict(vars(module))
importlib.reload(module)
(line,) = lines
assert "AUTO_QUANTIZER_MAPPING" in line and "loaded by bitsandbytes" in line, line
assert getattr(module, "AUTO_QUANTIZER_MAPPING", None) == before.get("AUTO_QUANTIZER_MAPPING")
""",
        table,
    )


def test_a_failing_import_raises_its_own_error():
    run(
        """
import oddsmith
try:
    table()
except ZeroDivisionError:
    pass
else:
    sys.exit(1)
assert "transformers.quantizers.auto" not in sys.modules and not lines
(package / "auto.py").write_text("AUTO_QUANTIZER_MAPPING = {'bitsandbytes_4bit': type}")
importlib.invalidate_caches()
assert is_ours(table())
""",
        "1 / 0\n",
    )


def test_no_module_of_that_name():
    run(
        """
(package / "auto.py").unlink()
import oddsmith
try:
    table()
except ModuleNotFoundError as error:
    assert error.name == "transformers.quantizers.auto"
else:
    sys.exit(1)
"""
    )


def test_a_stand_in_for_bitsandbytes_counts_as_one():
    """A module without a specification, as tests of other libraries have."""
    run(
        """
import types
sys.modules["bitsandbytes"] = types.ModuleType("bitsandbytes")
import oddsmith
assert not is_ours(table())
"""
    )
