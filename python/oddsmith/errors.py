"""Errors that the user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A failure that the command line shows as one line, without a traceback."""


class CheckpointError(UserError, OSError):
    """A checkpoint could not be written; those before it are as they were."""


class TorchError(UserError, ImportError):
    """The torch that is installed is missing, too old, incomplete or one of two."""


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """Turns exceptions about the user's input into a [`UserError`]."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"{what}: {error}" if what else str(error)) from error
