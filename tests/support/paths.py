"""Folders of the checkout that tests read."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BENCHES = ROOT / "benches"
# Real preference data, which is not part of the repository; tests of it are skipped where it is absent.
SHARED = Path(os.environ.get("ODDSMITH_SHARED", ROOT.parent / "shared"))
