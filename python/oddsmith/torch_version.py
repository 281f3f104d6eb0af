"""Checks that torch is the release that the compiled core was built for."""

# tch 0.24 is bound to this C++ ABI. With another torch the core fails on a missing symbol, or
# crashes later, so the check comes before it is loaded.
REQUIRED = "2.11"


def check(found: str) -> None:
    """Refuses a torch of another release.

    Args:
        found (`str`): torch's version, such as "2.11.0+cu130".

    Raises:
        ImportError: If its first two numbers are not the required ones.
    """
    if found.split("+")[0].split(".")[:2] != REQUIRED.split("."):
        raise ImportError(
            f"oddsmith was built for torch {REQUIRED} and found torch {found}; "
            f'install it with: pip install "torch=={REQUIRED}.*"'
        )
