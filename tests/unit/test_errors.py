"""Errors that the user can fix."""

import pytest

from oddsmith.errors import UserError, user_errors


@pytest.mark.parametrize("kind", [ValueError, TypeError, OSError, ImportError])
def test_errors_of_input_are_user_errors(kind):
    cause = kind("gone")
    with pytest.raises(UserError, match="^--model x: gone$") as raised, user_errors("--model x"):
        raise cause
    assert raised.value.__cause__ is cause
    with pytest.raises(UserError, match="^gone$"), user_errors(""):
        raise cause


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyError, RuntimeError, KeyboardInterrupt])
def test_a_bug_stays_a_bug(kind):
    with pytest.raises(kind), user_errors("--model x"):
        raise kind


def test_nothing_wrong():
    with user_errors("--model x"):
        pass
