"""Random arguments to every function of the core: an error of Python each time, and never the end of the process."""

import subprocess
import sys

from soak import calls


def test_no_call_ends_the_process(tmp_path):
    last = tmp_path / "last"
    words = [sys.executable, "-W", "ignore", calls.__file__, "1400", "0", last]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=300)
    assert done.returncode == 0, f"call {last.read_text()}: {done.stderr[-2000:]}"
    passed, count = done.stdout.split()
    # Neither are all refused, nor all accepted.
    assert count == "1400" and 200 < int(passed) < 1000
    assert "panic" not in done.stderr
