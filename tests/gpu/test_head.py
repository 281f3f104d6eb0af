"""The head on a GPU: as accurate as the naive form, and equal to TRL."""

import pytest
import torch

import reference
from oddsmith import functional
from support.gpu_cases import (
    DTYPES,
    assert_no_further,
    loss_and_gradients,
    pairs,
    same,
    to,
    true_loss,
)

CASES = [
    (1009, 67, ((3, 17), (11, 5), (3, 29), (11, 8))),
    (2051, 40, ((40, 60), (1, 23), (40, 50), (1, 47))),
    (20_011, 24, ((2, 9), (1, 4), (2, 7), (1, 6))),  # more tokens than a tile of logits has columns
]
OPTIONS = [
    {},
    {"softcap": 5.0, "logit_scale": 1.3},
    {"nll_scope": "completion", "odds_ratio_link": "identity"},
]


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("vocab", "width", "lengths"), CASES)
def test_loss_and_gradients(gpu, vocab, width, lengths, dtype, options, trained):
    hidden, weight, *rows = pairs(vocab, width, lengths, dtype)
    truth = true_loss(hidden, weight, rows, trained, **options)
    hidden, weight, *rows = to(gpu.device, hidden, weight, *rows)
    naive = loss_and_gradients(reference.linear_orpo, hidden, weight, rows, trained, **options)
    ours = loss_and_gradients(functional.linear_orpo, hidden, weight, rows, trained, **options)
    assert_no_further(ours, naive, truth, dtype)


@pytest.mark.parametrize("budget", [1, 1 << 16, 1 << 30])
def test_any_budget_gives_the_same_gradients(gpu, budget):
    hidden, weight, *rows = pairs(*CASES[1], torch.float32)
    truth = true_loss(hidden, weight, rows, True)
    hidden, weight, *rows = to(gpu.device, hidden, weight, *rows)
    options = {"logits_budget": budget, "num_pairs": 2}
    ours = loss_and_gradients(functional.linear_orpo, hidden, weight, rows, True, **options)
    assert_no_further(ours, truth, truth, torch.float32, floor=64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_statistics_equal_those_of_slices(gpu, dtype, with_bias):
    hidden, weight, *rows = pairs(*CASES[0], dtype)
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = bias if with_bias else None
    with gpu.slices():
        expected = functional.linear_orpo(hidden, weight, *rows, 0.29, bias=bias)
    hidden, weight, bias, *rows = to(gpu.device, hidden, weight, bias, *rows)
    found = functional.linear_orpo(hidden, weight, *rows, 0.29, bias=bias)
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, mine, theirs in zip(found._fields, found, expected):
        scale = max(1.0, theirs.abs().max().item())
        error = (mine.cpu() - theirs).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {mine} against {theirs}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-3, 30.0])
def test_log_probabilities(gpu, dtype, magnitude):
    """Rows of nearly equal logits, and rows where one token has all the probability."""
    hidden, weight, targets, *_ = pairs(*CASES[0], dtype)
    hidden = hidden * magnitude
    true = reference.linear_logps(hidden.double(), weight.double(), targets)
    on_gpu = to(gpu.device, hidden, weight, targets)
    naive = reference.linear_logps(*on_gpu).double().cpu()
    ours = functional.linear_logps(*on_gpu)
    assert ours.dtype == torch.float32 and (ours[on_gpu[2] == -100] == 0).all()
    assert_no_further([ours.double().cpu()], [naive], [true], dtype)


def test_the_same_bits_every_time(gpu):
    hidden, weight, *rows = to(gpu.device, *pairs(*CASES[1], torch.bfloat16))
    runs = [
        loss_and_gradients(functional.linear_orpo, hidden, weight, rows, True) for _ in range(2)
    ]
    assert all(map(same, *runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trl(gpu, dtype):
    """TRL's own helpers on the logits of a padded batch, compared with rows without padding."""
    trl = pytest.importorskip("trl.experimental.orpo")
    vocab, width = 211, 24
    prompt, real = [4, 9, 4, 9], [19, 15, 13, 19]
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(vocab, (4, 19), generator=generator)
    position = torch.arange(19)
    attended = position < torch.tensor(real)[:, None]
    labels = torch.where(attended & (position >= torch.tensor(prompt)[:, None]), tokens, -100)
    hidden = torch.randn(4, 19, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)

    def of_trl(hidden, weight, labels, words):
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
        logps = trl.ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
        flat = logits[:2, :-1].reshape(-1, vocab)
        nll = torch.nn.functional.cross_entropy(flat, words[:2, 1:].reshape(-1))
        ratio = torch.nn.functional.logsigmoid(reference.log_odds(logps[:2], logps[2:]))
        return nll - 0.29 * ratio.mean(), logps

    words = torch.where(attended, tokens, -100)
    truth, true_logps = of_trl(hidden.double(), weight.double(), labels, words)
    theirs, their_logps = of_trl(*to(gpu.device, hidden, weight, labels, words))
    rows = attended[:, 1:].flatten()
    sequence = torch.arange(4)[:, None].expand(4, 18).flatten()[rows]
    completion = (labels[:, 1:] != -100).flatten()[rows]
    targets = tokens[:, 1:].flatten()[rows]
    targets = torch.where((sequence < 2) | completion, targets, -100)
    packed = hidden[:, :-1].reshape(-1, width)[rows]
    inputs = to(gpu.device, packed, weight, targets, sequence, completion)
    out = functional.linear_orpo(*inputs, 0.29)
    ours = out.loss, torch.cat([out.chosen_logps, out.rejected_logps])
    ours, theirs = ([x.double().cpu() for x in each] for each in (ours, (theirs, their_logps)))
    assert_no_further(ours, theirs, (truth, true_logps), dtype)
