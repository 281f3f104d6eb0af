"""The console script `oddsmith`: its commands and their flags."""

from .commands import main

__all__ = ["main"]
