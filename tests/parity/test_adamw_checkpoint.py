"""A trainer's run that moves between bitsandbytes and AdamW8bit at a checkpoint."""

import pytest
from transformers import Trainer

from oddsmith import ORPOTrainer
from oddsmith.optim import AdamW8bit
from support.optim_runs import SAVED, checkpoint, losses, run

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

OPTIONS = {"optim": "adamw_bnb_8bit", "learning_rate": 3e-3}


@pytest.fixture
def with_bitsandbytes(monkeypatch):
    """Runs with the optimiser that transformers makes."""

    def with_bitsandbytes(*args, **kwargs):
        with monkeypatch.context() as patch:
            found = staticmethod(Trainer.get_optimizer_cls_and_kwargs)
            patch.setattr(ORPOTrainer, "get_optimizer_cls_and_kwargs", found)
            return run(*args, **kwargs, **OPTIONS)

    return with_bitsandbytes


def with_ours(*args, **kwargs):
    return run(*args, **kwargs, **OPTIONS)


@pytest.mark.parametrize("back", [False, True])
def test_a_run_switches_at_a_checkpoint(back, with_bitsandbytes, tmp_path):
    first, second = (with_ours, with_bitsandbytes) if back else (with_bitsandbytes, with_ours)
    through = first(tmp_path / "through")
    resumed = second(tmp_path / "resumed", resume=checkpoint(tmp_path / "through"))
    kinds = [type(trainer.optimizer.optimizer) for trainer in (through, resumed)]
    assert [kind is AdamW8bit for kind in kinds] == [back, not back]
    assert any(issubclass(kind, bnb.optim.AdamW) for kind in kinds)
    mine, theirs = losses(resumed), losses(through)
    gain = theirs[1][0] - theirs[max(theirs)][0]
    assert gain > 0.5
    # The first loss after the checkpoint is that of equal weights, the next after one step of each.
    assert mine[SAVED + 1] == theirs[SAVED + 1]
    assert mine[SAVED + 2][0] == pytest.approx(theirs[SAVED + 2][0], abs=0.02 * gain)
    states = resumed.optimizer.optimizer.state
    assert {state["step"] for state in states.values()} == {max(theirs)}
    assert len({state["state1"].dtype for state in states.values()}) == 2
