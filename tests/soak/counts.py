"""What has been run so far, in a file: an interrupted soak goes on where it was."""

import json
import time
from pathlib import Path
from typing import Any

from oddsmith.stage import staged_file


class Counts:
    """
    Numbers by part and name, on disk after each change.

    Args:
        path (`Path`): A JSON file, which may be there already.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def get(self, part: str, name: str) -> dict[str, Any]:
        """What is known of a name: `done`, and what the part adds."""
        return self.found.setdefault(part, {}).setdefault(
            name, {"done": 0, "seconds": 0.0, "faults": []}
        )

    def add(self, part: str, name: str, done: int, seconds: float, faults: list[str]) -> None:
        """Adds to a name, and writes the file."""
        entry = self.get(part, name)
        entry["done"] += done
        entry["seconds"] = round(entry["seconds"] + seconds, 1)
        entry["faults"] += faults
        self.write()

    def write(self) -> None:
        """Writes the file, in one piece."""
        with staged_file(self.path) as file:
            file.write(json.dumps(self.found, indent=1).encode())

    def say(self, part: str, name: str, wanted: int) -> None:
        """A line of progress."""
        entry = self.get(part, name)
        faults = f", {len(entry['faults'])} FAULTS" if entry["faults"] else ""
        print(
            f"{time.strftime('%H:%M:%S')} {part} {name}: {entry['done']:,} of {wanted:,}{faults}",
            flush=True,
        )

    def faults(self) -> list[str]:
        """All that went wrong."""
        return [
            f"{part} {name}: {fault}"
            for part, entries in self.found.items()
            for name, entry in entries.items()
            for fault in entry["faults"]
        ]
