"""The head at low precision: truth in float64, the naive form in the same dtype, ours."""

import pytest
import torch

import reference
from oddsmith import functional


def peaked(vocab, width, lengths, dtype):
    """Rows whose softmax is as peaked as a trained model's, rounded to `dtype`."""
    torch.manual_seed(3)
    pairs = len(lengths) // 2
    targets, sequence, completion = [], [], []
    for index, (prompt, answer) in enumerate(lengths):
        scored = [index < pairs] * prompt + [True] * answer
        targets += [int(torch.randint(vocab, ())) if s else -100 for s in scored]
        sequence += [index] * (prompt + answer)
        completion += [False] * prompt + [True] * answer
    targets = torch.tensor(targets)
    weight = torch.randn(vocab, width)
    hint = torch.nn.functional.normalize(weight[targets.clamp(min=0)], dim=-1)
    hidden = 0.3 * torch.randn(len(targets), width) + 0.4 * torch.rand(len(targets), 1) * hint
    rows = targets, torch.tensor(sequence), torch.tensor(completion)
    return hidden.to(dtype), weight.to(dtype), *rows


CASES = [
    (1009, 67, ((3, 17), (11, 5), (3, 29), (11, 8))),
    (5003, 40, ((60, 200), (1, 33), (60, 150), (1, 90))),
]


def losses(function, hidden, weight, rows, **options):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(hidden, weight, *rows, 0.29, **options)
    loss = out[0]
    return loss.detach().double(), [g.double() for g in torch.autograd.grad(loss, (hidden, weight))]


@pytest.mark.parametrize("tensor_ops", [False, True], ids=["slices", "tensor_ops"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocab", "width", "lengths"), CASES)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 1.3}])
def test_as_accurate_as_the_naive_form(
    tensor_ops_switch, tensor_ops, dtype, vocab, width, lengths, options
):
    tensor_ops_switch(tensor_ops)
    hidden, weight, *rows = peaked(vocab, width, lengths, dtype)
    truth, true_grads = losses(
        reference.linear_orpo, hidden.double(), weight.double(), rows, **options
    )
    naive, naive_grads = losses(reference.linear_orpo, hidden, weight, rows, **options)
    ours, our_grads = losses(functional.linear_orpo, hidden, weight, rows, **options)
    assert (ours - truth).abs() <= (naive - truth).abs() + 2e-6 * truth.abs()
    rounding = 4 * torch.finfo(dtype).eps
    for true, theirs, mine in zip(true_grads, naive_grads, our_grads, strict=True):
        scale = true.abs().max()
        error, naive_error = ((x - true).abs().max() / scale for x in (mine, theirs))
        assert error <= naive_error + rounding, f"{error} against {naive_error}"


def test_equals_trl_on_a_padded_batch():
    """TRL's own helpers on the logits of a padded batch, compared with packed rows without
    padding."""
    trl = pytest.importorskip("trl.experimental.orpo")
    torch.manual_seed(5)
    vocab, width, length = 211, 24, 19
    prompt, real = [4, 9, 4, 9], [19, 15, 13, 19]
    tokens = torch.randint(vocab, (4, length))
    position = torch.arange(length)
    attended = position < torch.tensor(real)[:, None]
    labels = torch.where(attended & (position >= torch.tensor(prompt)[:, None]), tokens, -100)
    hidden = torch.randn(4, length, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)

    logits = hidden @ weight.T
    logps = trl.ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    next_tokens = torch.where(attended, tokens, -100)[:2, 1:]
    nll = torch.nn.functional.cross_entropy(
        logits[:2, :-1].reshape(-1, vocab), next_tokens.reshape(-1)
    )
    ratio = torch.nn.functional.logsigmoid(reference.log_odds(logps[:2], logps[2:]))
    truth = nll - 0.29 * ratio.mean()

    rows = (attended[:, 1:]).flatten()
    sequence = torch.arange(4)[:, None].expand(4, length - 1).flatten()[rows]
    completion = (labels[:, 1:] != -100).flatten()[rows]
    targets = tokens[:, 1:].flatten()[rows]
    targets = torch.where((sequence < 2) | completion, targets, -100)
    packed = hidden[:, :-1].reshape(-1, width)[rows]
    out = functional.linear_orpo(packed, weight, targets, sequence, completion, 0.29)
    torch.testing.assert_close(out.loss, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.chosen_logps, logps[:2], rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(x, (hidden, weight)) for x in (out.loss, truth))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
