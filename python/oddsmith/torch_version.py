"""The torch that the package runs on: 2.10 or newer.

The compiled core reaches libtorch by functions that stay from release to release, so it serves releases
that came after it. One that nobody has tested it with is tried before it is trusted.
"""

import logging
import re
from collections.abc import Callable

from .errors import TorchError

# The first release whose stable functions take lists.
OLDEST: tuple[int, int] = (2, 10)
# The newest release that the tests of this package have run with.
NEWEST_TESTED: tuple[int, int] = (2, 15)

logger = logging.getLogger(__name__)

_checked: set[str] = set()


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def missing() -> TorchError:
    """The error where there is no torch at all."""
    return TorchError(
        f"oddsmith needs torch {_dotted(OLDEST)} or newer and found none; install it with: pip install torch"
    )


def require(self_test: Callable[[], str | None]) -> None:
    """Imports torch and checks its version.

    Raises:
        TorchError: If there is none, and as [`check`].
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # a torch that lacks a part of itself says which
            raise
        raise missing() from None
    check(torch.__version__, self_test)


def check(found: str, self_test: Callable[[], str | None]) -> None:
    """Refuses a torch that is too old, and tries one that is newer than those tested.

    Args:
        found (`str`): torch's version, such as "2.11.0+cu130".
        self_test (`Callable`): Tries the core and returns what fails, or None.

    Raises:
        TorchError: If it is older than 2.10, or newer than tested and the self-test fails.
    """
    if found in _checked:
        return
    numbers = re.match(r"(\d+)\.(\d+)", found)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    if release < OLDEST:
        raise TorchError(
            f"oddsmith needs torch {_dotted(OLDEST)} or newer and found torch {found}; "
            "update it with: pip install --upgrade torch"
        )
    _checked.add(found)  # first, as the self-test imports the core
    if release <= NEWEST_TESTED:
        return
    newest = _dotted(NEWEST_TESTED)
    fault = self_test()
    if fault:
        _checked.discard(found)
        raise TorchError(
            f"oddsmith was tested up to torch {newest}, and its self-test fails under torch {found}: {fault}"
        )
    logger.warning(
        "oddsmith was tested up to torch %s; its self-test passes under torch %s.", newest, found
    )
