"""The public functions of the head: arguments, edges, autograd and torch.compile."""

import math

import pytest
import torch

import reference
from oddsmith import functional

FIELDS = functional.LinearORPOOutput._fields


def make_batch(
    vocab=301, width=13, sequences=((4, 7), (1, 3), (4, 5), (2, 9)), dtype=torch.float64
):
    """Rows of 2B sequences given as (prompt, answer) lengths, chosen first."""
    torch.manual_seed(11)
    pairs = len(sequences) // 2
    targets, sequence, completion = [], [], []
    for index, (prompt, answer) in enumerate(sequences):
        for position in range(prompt + answer):
            scored = index < pairs or position >= prompt
            targets.append(int(torch.randint(vocab, ())) if scored else -100)
            sequence.append(index)
            completion.append(position >= prompt)
    hidden = torch.randn(len(targets), width, dtype=dtype)
    weight = torch.randn(vocab, width, dtype=dtype)
    rows = torch.tensor(targets), torch.tensor(sequence), torch.tensor(completion)
    return hidden, weight, *rows


OPTIONS = [
    {},
    {"nll_scope": "completion", "odds_ratio_link": "identity"},
    {"softcap": 3.0, "logit_scale": 0.7},
    {"softcap": 2.0, "nll_scope": "completion", "bias": True},
    {"bias": True, "logit_scale": 1.6, "odds_ratio_link": "identity"},
]


def with_bias(options, vocab, dtype=torch.float64):
    options = dict(options)
    if options.get("bias"):
        options["bias"] = torch.randn(vocab, dtype=dtype).requires_grad_()
    return options


@pytest.mark.parametrize("tensor_ops", [False, True], ids=["slices", "tensor_ops"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("budget", [None, 0, 40_000])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_the_reference_in_float64(tensor_ops_switch, tensor_ops, options, budget, trained):
    tensor_ops_switch(tensor_ops)
    hidden, weight, *rows = make_batch()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    options = with_bias(options, len(weight))
    if not trained and "bias" in options:
        options["bias"] = options["bias"].detach()
    out = functional.linear_orpo(hidden, weight, *rows, 0.37, logits_budget=budget, **options)
    loss, parts = reference.linear_orpo(hidden, weight, *rows, 0.37, **options)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    for name, value in parts.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=1e-12, atol=1e-12, msg=name)
    inputs = [x for x in (hidden, weight, options.get("bias")) if x is not None and x.requires_grad]
    ours, truth = (
        torch.autograd.grad(2.5 * out.loss, inputs),
        torch.autograd.grad(2.5 * loss, inputs),
    )
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("tensor_ops", [False, True], ids=["slices", "tensor_ops"])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"bias": True, "logit_scale": 0.6}])
@pytest.mark.parametrize("trained", [True, False])
def test_logps_equal_the_reference(tensor_ops_switch, tensor_ops, options, trained):
    tensor_ops_switch(tensor_ops)
    hidden, weight, targets, *_ = make_batch()
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    options = with_bias(options, len(weight))
    if not trained and "bias" in options:
        options["bias"] = options["bias"].detach()
    ours = functional.linear_logps(hidden, weight, targets, **options)
    truth = reference.linear_logps(hidden, weight, targets, **options)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    inputs = [x for x in (hidden, weight, options.get("bias")) if x is not None and x.requires_grad]
    upstream = torch.randn_like(truth)
    ours, truth = (torch.autograd.grad(x, inputs, upstream) for x in (ours, truth))
    torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.7, "bias": True}])
def test_gradcheck(options):
    hidden, weight, *rows = make_batch(
        vocab=23, width=3, sequences=((2, 3), (1, 2), (2, 2), (1, 4))
    )
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    options = with_bias(options, len(weight))
    if "bias" in options:
        inputs.append(options.pop("bias"))

    def loss(hidden, weight, bias=None):
        return functional.linear_orpo(hidden, weight, *rows, 0.37, bias=bias, **options).loss

    def logps(hidden, weight, bias=None):
        return functional.linear_logps(hidden, weight, rows[0], bias, **options)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(logps, inputs)
    frozen = [x.detach() for x in inputs[1:]]
    assert torch.autograd.gradcheck(lambda hidden: loss(hidden, *frozen), (hidden,))
    assert torch.autograd.gradcheck(lambda hidden: logps(hidden, *frozen), (hidden,))


def test_second_backward_through_a_kept_graph():
    hidden, weight, *rows = make_batch()
    weight.requires_grad_()
    loss = functional.linear_orpo(hidden, weight, *rows, 0.37).loss
    (first,) = torch.autograd.grad(3.0 * loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(0.5 * loss, weight)
    torch.testing.assert_close(first, 6.0 * second)


def test_gradients_accumulate_into_a_leaf():
    hidden, weight, *rows = make_batch()
    weight.requires_grad_()
    for _ in range(2):
        (0.5 * functional.linear_orpo(hidden, weight, *rows, 0.37).loss).backward()
    (truth,) = torch.autograd.grad(reference.linear_orpo(hidden, weight, *rows, 0.37)[0], weight)
    torch.testing.assert_close(weight.grad, truth)


def test_no_gradient_without_grad_mode():
    hidden, weight, *rows = make_batch()
    hidden.requires_grad_()
    with torch.no_grad():
        assert not functional.linear_orpo(hidden, weight, *rows, 0.37).loss.requires_grad
    out = functional.linear_orpo(hidden, weight, *rows, 0.37)
    assert [name for name in FIELDS if getattr(out, name).requires_grad] == ["loss"]


@pytest.mark.parametrize("chosen_bias", [60.0, 0.0])
def test_certain_tokens_and_empty_completions_stay_finite(chosen_bias):
    hidden, weight, targets, sequence, completion = make_batch(
        sequences=((4, 7), (1, 0), (4, 5), (2, 9)), dtype=torch.float32
    )
    # Every chosen token is certain: its log-probability is exactly zero.
    chosen = sequence < 2
    weight = torch.nn.functional.normalize(weight, dim=-1)
    hidden[chosen] = chosen_bias * weight[targets[chosen].clamp(min=0)]
    hidden.requires_grad_()
    weight.requires_grad_()
    out = functional.linear_orpo(hidden, weight, targets, sequence, completion, 0.37)
    out.loss.backward()
    assert all(getattr(out, name).isfinite().all() for name in FIELDS)
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert out.empty_completions == 1
    assert out.chosen_logps[1] == 0 and out.log_odds_chosen[1] == 0


def test_nan_is_not_hidden():
    hidden, weight, *rows = make_batch()
    hidden[3, 2] = math.nan
    assert functional.linear_orpo(hidden, weight, *rows, 0.37).loss.isnan()
    assert functional.linear_logps(hidden, weight, rows[0])[3].isnan()


def test_strided_inputs():
    hidden, weight, *rows = make_batch()
    truth = functional.linear_orpo(hidden, weight, *rows, 0.37)
    strided = [x.repeat_interleave(2, 0)[::2] for x in rows]
    out = functional.linear_orpo(hidden.T.contiguous().T, weight.T.contiguous().T, *strided, 0.37)
    assert out.loss == truth.loss


def test_empty_batch():
    hidden, weight, *rows = make_batch()
    hidden = hidden[:0].requires_grad_()
    out = functional.linear_orpo(hidden, weight, *[x[:0] for x in rows], 0.37, num_pairs=1)
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.shape == (0, 13)
    assert functional.linear_logps(hidden, weight, rows[0][:0]).shape == (0,)


@pytest.mark.parametrize("num_pairs", [2, None])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of dynamo
def test_compiles_without_a_graph_break(num_pairs):
    hidden, weight, *rows = make_batch(dtype=torch.float32)

    def step(hidden, weight):
        out = functional.linear_orpo(2 * hidden, weight, *rows, 0.37, num_pairs=num_pairs)
        logps = functional.linear_logps(hidden, weight, rows[0])
        return out.loss + logps.mean() + out.chosen_logps.sum()

    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    truth = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), truth)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda a: a.update(targets=a["targets"] + 301),
            ValueError,
            "targets is .*tokens in 0..301",
        ),
        (lambda a: a["targets"].fill_(-1), ValueError, "targets is -1"),
        (lambda a: a.update(targets=a["targets"].int()), TypeError, "targets has dtype int32"),
        (lambda a: a.update(targets=a["targets"][1:]), ValueError, "targets has shape"),
        (lambda a: a.update(weight=a["weight"][:, 1:]), ValueError, "weight has shape"),
        (lambda a: a.update(weight=a["weight"].float()), TypeError, "weight has dtype float32"),
        (lambda a: a.update(weight=a["weight"].to("meta")), ValueError, "weight is on"),
        (lambda a: a.update(hidden=a["hidden"][None]), ValueError, "hidden has shape"),
        (lambda a: a.update(hidden=a["hidden"].long()), TypeError, "hidden has dtype int64"),
        (lambda a: a.update(sequence=a["sequence"] - 1), ValueError, "sequence is -1"),
        (lambda a: a.update(num_pairs=1), ValueError, "sequence is 2; must be sequences in 0..2"),
        (lambda a: a.update(num_pairs=0), ValueError, "num_pairs is 0"),
        (
            lambda a: a.update(num_pairs=2**40),
            ValueError,
            "num_pairs is 1099511627776; must be in 1",
        ),
        (
            lambda a: a["sequence"].fill_(2**40),
            ValueError,
            "sequence is 1099511627776; .* two for each row of hidden",
        ),
        (lambda a: a.update(completion=a["completion"].long()), TypeError, "completion has dtype"),
        (
            lambda a: a.update(bias=torch.zeros(7, dtype=torch.float64)),
            ValueError,
            "bias has shape",
        ),
        (lambda a: a.update(beta=-0.5), ValueError, "beta is -0.5"),
        (lambda a: a.update(beta=math.nan), ValueError, "beta is NaN"),
        (lambda a: a.update(softcap=-1.0), ValueError, "softcap is -1"),
        (lambda a: a.update(logit_scale=math.inf), ValueError, "logit_scale is inf"),
        (lambda a: a.update(nll_scope="all"), ValueError, 'nll_scope is "all"; must be "full"'),
        (lambda a: a.update(odds_ratio_link="x"), ValueError, 'odds_ratio_link is "x"'),
        (lambda a: a.update(logits_budget=-1), ValueError, "logits_budget is negative"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    names = ("hidden", "weight", "targets", "sequence", "completion")
    arguments = dict(zip(names, make_batch(), strict=True)) | {"beta": 0.37}
    change(arguments)
    with pytest.raises(error, match=message):
        functional.linear_orpo(**arguments)
