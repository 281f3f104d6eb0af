"""`make soak`: kills, damaged inputs and long runs.

`python -m soak SHARE PARTS...`, with `tests` on the path. SHARE is of the counts of all parts; without
parts, all are run.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from . import fuzz, kills, steps
from .counts import Counts

PARTS = {"kills": kills.soak, "fuzz": fuzz.soak, "steps": steps.soak}


def main() -> int:
    """Runs the parts that are asked for; 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument(
        "share", type=float, nargs="?", default=1.0, help="of the counts: 0.01 takes minutes"
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="kills, fuzz, steps")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - set(PARTS):
        parser.error(f"no part is named {sorted(unknown)}; there are {', '.join(PARTS)}")
    cache = os.environ.get("ODDSMITH_CACHE") or Path.home() / ".cache" / "oddsmith"
    folder = Path(os.environ.get("SOAK_DIR") or Path(cache) / "soak")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    # One thread: children are forked, and results have to be the same.
    torch.set_num_threads(1)
    for part in asked.parts or PARTS:
        counts = Counts(folder / f"{part}.json")
        PARTS[part](counts, asked.share)
        for fault in counts.faults():
            print(fault, file=sys.stderr)
        total = {name: entry["done"] for name, entry in counts.found.get(part, {}).items()}
        print(json.dumps({part: {"done": sum(total.values()), "faults": len(counts.faults())}}))
    return int(any(Counts(folder / f"{part}.json").faults() for part in asked.parts or PARTS))


if __name__ == "__main__":
    from support.forked import import_all

    import_all()
    sys.exit(main())
