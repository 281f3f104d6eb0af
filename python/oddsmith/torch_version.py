"""The torch that the compiled core fits."""

# tch 0.24 is bound to this C++ ABI. Under another torch the core dies on a missing symbol, or worse,
# runs; so the check comes before it is loaded.
REQUIRED = "2.11"


def check(found: str) -> None:
    """
    Raises:
        ImportError: If the version `found` is not the required one.
    """
    if found.split("+")[0].split(".")[:2] != REQUIRED.split("."):
        raise ImportError(
            f"this oddsmith was built for torch {REQUIRED} and found torch {found}: "
            f'pip install "torch=={REQUIRED}.*", or build oddsmith from source for yours'
        )
