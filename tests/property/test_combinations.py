"""No accepted combination differs silently: random ones, on the path that oddsmith picks and on the plain path.

Losses and gradients of two steps are compared in `float32` and `float64`, and in `bfloat16` by distance from the
truth. A combination may be refused, with one sentence. A few run in CI, all of them with `pytest -m slow`.
"""

import math
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

import oddsmith
from support.combinations import combination, make_model, make_rows, make_tokenizer
from support.double import stay_in_double
from support.steps import distance, steps

# transformers, peft and their models warn of their own matters.
pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = 500
SAMPLE = range(12)
# Weights and data that a combination in 16 bits is tried with, too, if its own leave doubt.
OTHERS = 4
PACKAGE = Path(oddsmith.__file__).parent

BOUNDS = {"float32": 1e-5, "float64": 1e-9}
# Optimizers that divide by the size of a gradient make steps of its rounding where it is zero.
AFTER_A_STEP = {"sgd": 1.0, "adamw_torch": 1e3}


def trained(case, true=False, **changed):
    arguments = {**case.arguments, "bf16": case.dtype == "autocast" and not true, **changed}
    if true and arguments.get("optim", "sgd") not in AFTER_A_STEP:  # they take no float64
        own = {"optim", "optim_args", "optim_target_modules"}
        arguments = {key: each for key, each in arguments.items() if key not in own}
    model = make_model(case, true)
    wide = any(p.dtype == torch.float64 for p in model.parameters())
    around = stay_in_double if wide else nullcontext
    return steps(model, make_rows(case), make_tokenizer(), around, **arguments)


def is_refusal(error):
    """Whether oddsmith has raised an error that the user can understand."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(PACKAGE)
    message = str(error)
    return ours and isinstance(error, (ValueError, TypeError)) and message and "\n" not in message


def apart(one, other):
    """For each step, the distances of losses and gradients."""
    count = len(other.gradients)
    assert len(one.losses) == len(other.losses) and len(one.gradients) == count
    for step, (grads, theirs) in enumerate(zip(one.gradients, other.gradients)):
        batches = slice(step * len(one.losses) // count, (step + 1) * len(one.losses) // count)
        losses = zip(one.losses[batches], other.losses[batches], strict=True)
        loss = max(abs(mine - their) / max(abs(their), 1e-3) for mine, their in losses)
        yield loss, distance(grads, theirs)


def compare(seed):
    """The path of a combination; None if it is refused."""
    case = combination(seed)
    try:
        ours = trained(case)
    except Exception as error:
        if not is_refusal(error):
            raise
        return None
    plain = trained(case, use_fused_head=False)
    assert any(each.abs().max() > 0 for each in plain.gradients[0].values())
    later = AFTER_A_STEP.get(case.arguments.get("optim", "sgd"), math.inf)
    rooms = (1.0, later)
    if case.is_exact:
        double = all(p.dtype == torch.float64 for p in ours.weights.values())
        bound = BOUNDS["float64" if double else "float32"]
        for (loss, grads), room in zip(apart(ours, plain), rooms):
            assert loss <= room * bound and grads <= room * bound, (case, loss, grads)
    else:
        errors = [*from_truth(case, ours, plain)]
        if any(is_far(*each) for each in errors):
            # Rounding is random: it may give a token to another expert, on either path.
            others = (replace(case, seed=seed) for seed in range(COUNT, COUNT + OTHERS))
            draws = [errors, *(list(from_truth(other)) for other in others)]
            errors = [tuple(map(median, zip(*each))) for each in zip(*draws, strict=True)]
        assert not any(is_far(*each) for each in errors), (case, errors)
    return ours.path


def from_truth(case, ours=None, plain=None):
    """For each step's loss and gradients, our distance from the truth, the plain path's, and the room."""
    truth = trained(case, true=True, use_fused_head=False)
    ours = ours or trained(case)
    plain = plain or trained(case, use_fused_head=False)
    later = AFTER_A_STEP.get(case.arguments.get("optim", "sgd"), math.inf)
    for mine, theirs, room in zip(apart(ours, truth), apart(plain, truth), (1.0, later)):
        for our, their in zip(mine, theirs, strict=True):
            yield our, their, room


def is_far(our, their, room):
    """Whether one path is farther from the truth than the rounding of the other."""
    return not our <= room * (2.0 * their + 1e-2)


# Of the sample; all others are packed.
PADDED = {0: "padding_free is False", 3: "recurrence", 4: "recurrence"}


@pytest.mark.parametrize("seed", SAMPLE)
def test_sample(seed):
    path = compare(seed)
    assert path is not None and path.plain_because is None
    if seed in PADDED:
        assert PADDED[seed] in path.padded_because
    else:
        assert path.padded_because is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", [seed for seed in range(COUNT) if seed not in SAMPLE])
def test_others(seed):
    compare(seed)


def test_combinations_are_of_all_kinds():
    cases = [combination(seed) for seed in range(COUNT)]
    assert all(combination(seed) == cases[seed] for seed in SAMPLE)
    assert len({case.family for case in cases}) > 25
    for name in ("dtype", "adapter", "four_bit", "attention", "implicit"):
        assert len({getattr(case, name) for case in cases}) > 1, name
