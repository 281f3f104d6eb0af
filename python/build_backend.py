"""maturin as the build backend, with the running Python in front of PATH.

torch-sys asks `python` (in a virtual environment) or `python3` of PATH for torch and for Python's
headers. Where pip is called by its path, or belongs to another version than `python3`, that is not
the Python that is built for: torch is not found, or the core is compiled against the wrong headers.
"""

import atexit
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from maturin import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def put_in_front(python: str) -> None:
    """Makes `python` and `python3` of PATH mean this interpreter, and finds what it has installed.

    Args:
        python: The interpreter's path.
    """
    folder = tempfile.mkdtemp(prefix="oddsmith-build-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("python", "python3"):
        # A script, since a link would hide the virtual environment around the interpreter.
        script = Path(folder, name)
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(python)} "$@"\n')
        script.chmod(0o755)
    # maturin's program comes last: an isolated build has its own before it.
    found = [folder, os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")]
    os.environ["PATH"] = os.pathsep.join(found)


put_in_front(sys.executable)
