"""The check of torch's release."""

import pytest

from oddsmith import _core, torch_version


def test_the_core_was_built_for_the_required_torch():
    torch_version.check(_core.TORCH_BUILD_VERSION)
    torch_version.check("2.11.3+cpu")


@pytest.mark.parametrize("version", ["2.10.1", "2.12.0+cu130", "2.1.11", "3.11.0"])
def test_another_torch_is_named_with_the_way_out(version):
    with pytest.raises(ImportError) as raised:
        torch_version.check(version)
    assert str(raised.value) == (
        f"oddsmith was built for torch 2.11 and found torch {version}; "
        'install it with: pip install "torch==2.11.*"'
    )
