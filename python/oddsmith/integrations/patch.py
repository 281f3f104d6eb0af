"""One change to another library: how it is applied, undone, checked, and skipped if it does not
fit.
"""

from __future__ import annotations

import importlib
import logging
from contextlib import suppress
from threading import RLock
from typing import Any, ClassVar

__all__ = ["Patch", "Unsupported"]

logger = logging.getLogger(__name__)

# One lock for all, because a patch can apply another one. Reentrant, because the garbage collector
# can undo a patch at any time.
_lock = RLock()
_said: set[tuple[type, str]] = set()


class Unsupported(Exception):
    """A patch does not fit the installed version of its target. The message is the reason."""


class Patch:
    """
    One change to another library, to a model or to the process.

    Calls are counted: as many calls of [`undo`] as of [`apply`] restore the original. `with patch:`
    is one of each. A patch that does not fit the installed library changes nothing, logs one line,
    and never raises.

    Subclasses have `_change` and `_restore`; `_check`, which raises [`Unsupported`] before anything is
    changed; and `_try_out`, which raises it with the change in place.
    """

    #: What is changed.
    target: ClassVar[str]
    #: Why.
    purpose: ClassVar[str]
    #: The versions with which the tests have run.
    tested: ClassVar[str]
    #: What happens without the change, as the end of a sentence.
    fallback: ClassVar[str]
    #: Names that the change relies on, as `"module:attribute"`. Their absence is [`Unsupported`].
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._users = 0
        self._entered: list[bool] = []

    def apply(self) -> bool:
        """
        Makes the change, or counts one more user.

        Returns:
            `bool`: Whether the change is in place.
        """
        self._import_needs()
        with _lock:
            self.is_applied()  # forgets the users of a module that was reloaded
            # Counted first: an undo by the garbage collector, which can run between any two lines,
            # would otherwise restore what this call has found in place.
            self._users += 1
            if self._users == 1:
                try:
                    self._put_in_place()
                except BaseException as error:
                    self._users = 0
                    if not isinstance(error, Exception):
                        raise
                    self._say(error)  # the code of other libraries can raise anything
                    return False
            return True

    def ensure(self) -> bool:
        """[`apply`], unless it is already applied."""
        self._import_needs()
        with _lock:
            return self.is_applied() or self.apply()

    def undo(self) -> None:
        """Restores the original after the last user; does nothing without users."""
        with _lock:
            if self._users == 0:
                return
            self._users -= 1
            if self._users == 0:
                self._restore()

    def is_applied(self) -> bool:
        """Whether the change is in place."""
        with _lock:
            if self._users and not self._is_there():
                self._users = 0
            return self._users > 0

    def __enter__(self) -> bool:
        self._entered.append(self.apply())
        return self._entered[-1]

    def __exit__(self, *error: Any) -> None:
        if self._entered.pop():  # else this block is none of its users
            self.undo()

    def _import_needs(self) -> None:
        # Without the lock: a thread that is importing a module can wait for the lock to change it
        # (see ImportHook), and must not be waited for by a thread that has the lock.
        if not self.is_applied():
            for name in self.needs:
                with suppress(Exception):  # reported when it is applied
                    find(name)

    def _put_in_place(self) -> None:
        for name in self.needs:
            find(name)
        self._check()
        try:
            self._change()
            self._try_out()
        except BaseException:
            with suppress(Exception):  # the change may be incomplete
                self._restore()
            raise

    def _say(self, error: Exception) -> None:
        reason = (
            str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}"
        )
        if (type(self), reason) not in _said:
            _said.add((type(self), reason))
            logger.warning(f"{self.target} is not changed ({reason}): {self.fallback}.")

    def _check(self) -> None:
        """Raises [`Unsupported`] if the change cannot be made."""

    def _change(self) -> None:
        raise NotImplementedError

    def _restore(self) -> None:
        raise NotImplementedError

    def _try_out(self) -> None:
        """Raises [`Unsupported`] if the change is in place but does not work."""

    def _is_there(self) -> bool:
        """Whether the changed object is still in use; not after its module was reloaded."""
        return True


def find(name: str) -> Any:
    """
    The object that `"module:attribute"` names.

    Raises:
        [`Unsupported`]: If it does not exist.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise Unsupported(f"{name.replace(':', '.')} does not exist") from error
    return found
