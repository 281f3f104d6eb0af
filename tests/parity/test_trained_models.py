"""Every causal architecture, trained for two steps on the path that oddsmith picks and on the plain path.

In `float32` and `bfloat16`, all weights and a LoRA adapter. The sample runs in CI, all of them with
`pytest -m slow`; `make models` writes the same comparison into docs/models.md.
"""

import pytest

from support.architectures import SAMPLE, configurations
from support.model_trial import differs, trial

pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {"full", "LoRA"}


def check(name):
    """The records of an architecture that were trained."""
    found = [each for each in trial(name) if each["path"] != "not built"]
    for record in found:
        assert not differs(record), record
    return [each for each in found if each["path"] != "refused" and "untried" not in each]


@pytest.mark.parametrize("name", [name for name in SAMPLE if name in configurations()])
def test_sample(name):
    records = check(name)
    assert records
    for record in records:
        # What was not compared proves nothing.
        assert record["float32"].keys() == record["bfloat16"].keys() == KINDS, record
        assert "failed" not in record, record


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in configurations() if name not in SAMPLE])
def test_others(name):
    if not check(name):
        pytest.skip("no small model of it was trained")
