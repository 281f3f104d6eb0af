"""Every small batch, budget and set of gradients gives the results of the naive form, and never a panic."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from oddsmith import functional

VOCAB, WIDTH = 11, 5
# From nothing to more than the logits of any of these batches, with the sizes of a row and around it.
BUDGETS = [0, 1, 8 * VOCAB - 1, 8 * VOCAB, 8 * VOCAB + 1, 40 * VOCAB, 600 * VOCAB, 1 << 62, None]


@st.composite
def batches(draw):
    """Rows of one to three pairs: any of them may lack rows, completions, or all targets."""
    pairs = draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(0, 5), min_size=2 * pairs, max_size=2 * pairs))
    sequence = [index for index, count in enumerate(counts) for _ in range(count)]
    sequence += [2 * pairs - 1] if len(sequence) < pairs else []
    sequence = draw(st.permutations([*sequence, *range(max(0, pairs - len(sequence)))]))
    rows = len(sequence)
    completion = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    targets = draw(st.lists(st.sampled_from([-100, 0, 3, VOCAB - 1]), min_size=rows, max_size=rows))
    return pairs, torch.tensor(sequence), torch.tensor(completion), torch.tensor(targets)


def naive(hidden, weight, targets, sequence, completion, pairs, beta):
    """Of a batch that may lack anything, which the reference is not for: no row, no term."""
    logps = reference.linear_logps(hidden, weight, targets)
    scored = targets != -100
    nll = -(logps * (scored & (sequence < pairs))).sum() / (
        scored & (sequence < pairs)
    ).sum().clamp(min=1)
    ratios = []
    for pair in range(pairs):
        sides = [scored & completion & (sequence == s) for s in (pair, pairs + pair)]
        if all(side.any() for side in sides):
            c, r = (logps[side].mean() for side in sides)
            ratios.append(torch.nn.functional.logsigmoid(reference.log_odds(c, r)))
    return nll - beta * sum(ratios, hidden.new_zeros(())) / pairs


def check(batch, budget, wants, seed):
    pairs, sequence, completion, targets = batch
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(sequence), WIDTH, generator=draw, dtype=torch.float64)
    weight = torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64)
    results = []
    for ours in (True, False):
        leaves = [
            x.clone().requires_grad_(want) for x, want in zip((hidden, weight), wants, strict=True)
        ]
        if ours:
            options = {"num_pairs": pairs, "logits_budget": budget}
            loss = functional.linear_orpo(
                *leaves, targets, sequence, completion, 0.3, **options
            ).loss
        else:
            loss = naive(*leaves, targets, sequence, completion, pairs, 0.3)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(loss, wanted) if wanted else ()
        results.append([loss.detach(), *gradients])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


given_any = given(
    batches(), st.sampled_from(BUDGETS), st.tuples(st.booleans(), st.booleans()), st.integers(0, 99)
)
patiently = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=150, **patiently)
@given_any
def test_any_batch(batch, budget, wants, seed):
    check(batch, budget, wants, seed)


@pytest.mark.slow
@settings(max_examples=100_000, **patiently)
@given_any
def test_very_many_batches(batch, budget, wants, seed):
    check(batch, budget, wants, seed)


def test_a_budget_below_a_row_without_completions():
    """The prompt was cut into pieces of no rows."""
    batch = 1, torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.bool), torch.tensor([0, 3, 3])
    for budget in BUDGETS:
        check(batch, budget, (True, True), 0)
