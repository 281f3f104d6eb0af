"""The head's kernels on the emulated GPU, compared with float64 and with the CPU."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from oddsmith import _core, functional
from oddsmith.head.arguments import HeadArguments, Needs, ObjectiveArguments, PairArguments

FIELDS = functional.LinearORPOOutput._fields
PAIRS = ((4, 7), (1, 3), (4, 5), (2, 9))
OPTIONS = [
    {},
    {"nll_scope": "completion", "odds_ratio_link": "identity"},
    {"softcap": 3.0, "logit_scale": 0.7},
    {"softcap": 2.0, "nll_scope": "completion", "bias": True},
    {"bias": True, "logit_scale": 1.6, "odds_ratio_link": "identity"},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_batch(lengths=PAIRS, vocab=301, width=13, dtype=torch.float32, sharp=1.0):
    """Rows of 2B sequences given as (prompt, answer) lengths, chosen first, in a mixed order."""
    torch.manual_seed(7)
    pairs = len(lengths) // 2
    rows = [
        (index, position >= prompt)
        for index, (prompt, answer) in enumerate(lengths)
        for position in range(prompt + answer)
    ]
    rows = [rows[i] for i in torch.randperm(len(rows))]
    sequence = torch.tensor([index for index, _ in rows], dtype=torch.int64)
    completion = torch.tensor([answer for _, answer in rows], dtype=torch.bool)
    targets = torch.randint(vocab, (len(rows),))
    targets[(sequence >= pairs) & ~completion] = -100
    weight = torch.randn(vocab, width)
    hint = torch.nn.functional.normalize(weight[targets.clamp(min=0)], dim=-1)
    hidden = 0.5 * torch.randn(len(rows), width) + sharp * torch.rand(len(rows), 1) * hint
    return hidden.to(dtype), weight.to(dtype), targets, sequence, completion


def with_bias(options, vocab, dtype=torch.float32):
    options = dict(options)
    if options.get("bias"):
        options["bias"] = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).to(dtype)
    return options


def losses(function, hidden, weight, rows, trained, **options):
    """The output and the gradients."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
    if trained and options.get("bias") is not None:
        options["bias"] = options["bias"].clone().requires_grad_()
    out = function(hidden, weight, *rows, 0.29, **options)
    inputs = [hidden, weight, options.get("bias")]
    inputs = [x for x in inputs if x is not None and x.requires_grad]
    return out, [x.double() for x in torch.autograd.grad(out[0], inputs)]


def converted(options, dtype):
    return {name: x.to(dtype) if torch.is_tensor(x) else x for name, x in options.items()}


def doubled(options):
    return converted(options, torch.float64)


def assert_equals_the_reference(hidden, weight, rows, trained, tolerance=3e-6, **options):
    budget = options.pop("logits_budget", None)
    num_scored = options.pop("num_scored", None)
    out, ours = losses(
        functional.linear_orpo,
        *(hidden, weight, rows, trained),
        **options,
        logits_budget=budget,
        num_scored=num_scored,
    )
    (loss, parts), truth = losses(
        reference.linear_orpo, hidden.double(), weight.double(), rows, trained, **doubled(options)
    )
    torch.testing.assert_close(out.loss.double(), loss, rtol=tolerance, atol=tolerance)
    for name, value in parts.items():
        got = getattr(out, name).to(value.dtype)
        torch.testing.assert_close(got, value, rtol=tolerance, atol=tolerance, msg=name)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=tolerance * float(true.abs().max()))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("trained", "budget"), [(False, None), (True, None), (True, 0)])
def test_equals_the_reference(emulated_driver, options, trained, budget):
    hidden, weight, *rows = make_batch()
    options = with_bias(options, len(weight))
    assert_equals_the_reference(hidden, weight, rows, trained, logits_budget=budget, **options)
    kernels = [launch.kernel for launch in emulated_driver.launches()]
    sweeps = 1 + ("softcap" in options)  # of the rows without a target, for the mean logits
    assert kernels.count("head_expectation_f32") == (not trained)
    assert kernels.count("head_forward") == sweeps - (not trained)
    assert kernels.count("head_gradient_f32") == trained


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("width", [1, 7, 24])
@pytest.mark.parametrize("vocab", [2, 8, 513, 1000])
def test_odd_shapes(emulated_driver, vocab, width, trained):
    lengths = ((0, 1), (0, 1)) if vocab == 2 else ((1, 2), (2, 2))
    hidden, weight, *rows = make_batch(lengths, vocab, width)
    assert len(hidden) == (2 if vocab == 2 else 7)
    options = with_bias({"bias": True, "softcap": 4.0 if width == 7 else None}, vocab)
    assert_equals_the_reference(hidden, weight, rows, trained, **options)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("budget", [None, 0, 1_500_000])
@pytest.mark.parametrize("trained", [False, True])
def test_tiles_of_a_large_vocabulary(emulated_driver, trained, budget, softcap):
    # Three tiles of 8192; the budget is none of them, one, or all. Logits grow from tile to tile,
    # so that maxima change and accumulated sums are scaled.
    hidden, weight, *rows = make_batch(vocab=2 * 8192 + 77, width=6)
    weight *= torch.linspace(0.3, 1.5, len(weight))[:, None]
    options = with_bias({"bias": True, "softcap": softcap, "logit_scale": 0.8}, len(weight))
    assert_equals_the_reference(
        hidden, weight, rows, trained, 5e-6, logits_budget=budget, **options
    )


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("trained", [False, True])
def test_blocks_of_many_rows(emulated_driver, trained, softcap):
    lengths = ((30, 1400), (2, 700), (2100, 10), (30, 40))
    hidden, weight, *rows = make_batch(lengths, vocab=40, width=5)
    assert_equals_the_reference(hidden, weight, rows, trained, 1e-5, softcap=softcap)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2], OPTIONS[4]])
def test_as_accurate_as_the_naive_form(emulated_driver, dtype, options, trained):
    hidden, weight, *rows = make_batch(
        ((3, 17), (11, 5), (3, 29), (11, 8)), vocab=8192 + 900, width=67, dtype=dtype, sharp=4.0
    )
    options = with_bias(options, len(weight), dtype)
    arguments = hidden, weight, rows, trained
    wide = hidden.double(), weight.double(), rows, trained
    (truth, _), true_grads = losses(reference.linear_orpo, *wide, **doubled(options))
    (naive, _), naive_grads = losses(reference.linear_orpo, *arguments, **options)
    (ours, *_), our_grads = losses(functional.linear_orpo, *arguments, **options)
    assert (ours - truth).abs() <= (naive - truth).abs() + 2e-6 * truth.abs()
    rounding = 4 * torch.finfo(dtype).eps
    for true, theirs, mine in zip(true_grads, naive_grads, our_grads, strict=True):
        scale = true.abs().max()
        error, naive_error = ((x - true).abs().max() / scale for x in (mine, theirs))
        assert error <= naive_error + rounding, f"{error} against {naive_error}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_accurate_with_16_bit_inputs(emulated_driver, dtype):
    hidden, weight, *rows = make_batch(vocab=700, width=40, dtype=dtype)
    options = with_bias({"bias": True, "logit_scale": 1.3}, len(weight), dtype)
    out = functional.linear_orpo(hidden, weight, *rows, 0.29, **options)
    loss, parts = reference.linear_orpo(
        hidden.double(), weight.double(), *rows, 0.29, **doubled(options)
    )
    for name, value in {"loss": loss, **parts}.items():
        got = getattr(out, name).to(value.dtype)
        torch.testing.assert_close(got, value, rtol=2e-5, atol=1e-6, msg=name)


def both_paths(function):
    """The results of a function on the CPU and on the emulated GPU."""
    _core.emulate_cuda(False)
    slices = function()
    _core.emulate_cuda(True)
    return slices, function()


def all_results(hidden, weight, rows, trained, **options):
    out, gradients = losses(functional.linear_orpo, hidden, weight, rows, trained, **options)
    return {**out._asdict(), **{f"gradient {i}": x for i, x in enumerate(gradients)}}


def assert_same(slices, gpu, rtol=1e-5, atol=1e-6):
    assert slices.keys() == gpu.keys()
    for name, value in slices.items():
        torch.testing.assert_close(gpu[name], value, rtol=rtol, atol=atol, equal_nan=True, msg=name)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("certain", [True, False])
def test_certain_tokens_and_empty_completions(emulated_driver, certain, trained):
    hidden, weight, targets, sequence, completion = make_batch(((4, 7), (1, 0), (4, 5), (2, 9)))
    weight = torch.nn.functional.normalize(weight, dim=-1)
    if certain:  # every chosen token, up to 1e-6
        chosen = sequence < 2
        hidden[chosen] = 60.0 * weight[targets[chosen].clamp(min=0)]
    rows = targets, sequence, completion
    slices, gpu = both_paths(lambda: all_results(hidden, weight, rows, trained))
    assert all(value.isfinite().all() for value in gpu.values())
    assert gpu["empty_completions"] == 1 and gpu["log_odds_chosen"][1] == 0
    if certain:
        assert gpu["chosen_logps"][0].abs() < 1e-6
    wide = hidden.double(), weight.double(), rows, trained
    (loss, parts), gradients = losses(reference.linear_orpo, *wide)
    truth = {"loss": loss, **parts, **{f"gradient {i}": x for i, x in enumerate(gradients)}}
    for name, true in truth.items():  # the slices resolve one minus a probability in float32
        error, slice_error = ((x[name].double() - true).abs().max() for x in (gpu, slices))
        assert error <= slice_error + 1e-8 + 1e-6 * true.double().abs().max(), name


def test_a_likely_answer_is_accurate(emulated_driver):
    # Two tokens, 20 apart: the log-probability is -log1p(exp(-20)), below the resolution of float32
    # near one, 6e-8.
    hidden, weight = torch.tensor([[20.0], [-1.0]]), torch.tensor([[1.0], [0.0]])
    rows = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([True, True])
    _, gpu = both_paths(lambda: all_results(hidden, weight, rows, False))
    assert gpu["chosen_logps"][0].item() == pytest.approx(-math.exp(-20.0), rel=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("place", ["scored", "unscored", "weight", "infinite", "masked word"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_nan_and_infinity_as_on_the_cpu(emulated_driver, place, trained, softcap):
    hidden, weight, targets, sequence, completion = make_batch(vocab=8192 + 40, width=5)
    bias = torch.zeros(len(weight))
    row = int((targets >= 0).nonzero()[3])
    if place == "scored":
        hidden[row, 2] = math.nan
    elif place == "unscored":
        hidden[int((targets < 0).nonzero()[0]), 2] = math.nan
    elif place == "weight":
        weight[8200, 1] = math.nan
    elif place == "infinite":
        hidden[row] = math.inf
    else:  # valid: a masked token, and a tile of them
        bias[:8192] = -math.inf
        targets[targets >= 0] %= 40
        targets[targets >= 0] += 8192
        if softcap is not None:
            pytest.skip("a softcap makes the smallest logit of -inf")
    rows = targets, sequence, completion
    run = lambda: functional.linear_orpo(hidden, weight, *rows, 0.29, bias=bias, softcap=softcap)  # noqa: E731
    slices, gpu = both_paths(lambda: run()._asdict())
    if place == "masked word":  # whose mean logit is -inf
        assert gpu["chosen_logits"] == -math.inf
        for results in (slices, gpu):
            del results["chosen_logits"], results["rejected_logits"]
    assert gpu["loss"].isnan() == (place in ("scored", "weight", "infinite"))
    if place == "unscored":
        assert gpu["rejected_logits"].isnan() and not gpu["chosen_logits"].isnan()
    assert_same(slices, gpu)
    _, gradients = losses(functional.linear_orpo, hidden, weight, rows, trained, bias=bias)
    if place in ("unscored", "masked word"):
        assert gradients[0][targets >= 0].isfinite().all()
    elif place == "scored":
        assert gradients[0][row].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"bias": True, "logit_scale": 0.6}])
@pytest.mark.parametrize("trained", [True, False])
def test_logps(emulated_driver, options, trained, dtype):
    hidden, weight, targets, *_ = make_batch(vocab=8192 + 300, dtype=dtype)
    options = with_bias(options, len(weight), dtype)
    upstream = torch.linspace(-1.5, 2, len(targets), dtype=torch.float64)

    def run(function, hidden, weight, **options):
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logps = function(hidden, weight, targets, **options)
        inputs = [hidden, weight] if trained else [hidden]
        return logps.double(), torch.autograd.grad((logps * upstream).sum(), inputs)

    ours, our_grads = run(functional.linear_logps, hidden, weight, **options)
    truth, true_grads = run(
        reference.linear_logps, hidden.double(), weight.double(), **doubled(options)
    )
    _, naive_grads = run(
        reference.linear_logps, hidden.float(), weight.float(), **converted(options, torch.float32)
    )
    torch.testing.assert_close(ours, truth, rtol=3e-6, atol=3e-6)
    assert (ours[targets < 0] == 0).all()
    for mine, naive, true in zip(our_grads, naive_grads, true_grads, strict=True):
        rounding = 3 * torch.finfo(dtype).eps * float(true.abs().max())
        # The sums over the vocabulary, whose order depends on the processor.
        tolerance = max(rounding, 2 * float((naive - true).abs().max()))
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(
            functional.linear_logps(hidden, weight, targets, **options).double(), truth,
            rtol=3e-6, atol=3e-6,
        )  # fmt: skip


def test_without_gradients_there_is_one_sweep(emulated_driver):
    hidden, weight, *rows = make_batch()
    with torch.no_grad():
        out = functional.linear_orpo(hidden.requires_grad_(), weight, *rows, 0.29)
    kernels = [launch.kernel for launch in emulated_driver.launches()]
    assert kernels == ["head_layout", "head_side_means_f32", "head_forward", "head_scores"]
    loss, _ = reference.linear_orpo(hidden.double(), weight.double(), *rows, 0.29)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
def test_batches_without_rows(emulated_driver, trained):
    hidden, weight, *rows = make_batch()
    for kept in (0, len(hidden)):
        some = [x[:kept] for x in rows]
        some[0] = torch.full_like(some[0], -100)
        hidden = hidden[:kept] if kept == 0 else make_batch()[0]
        pairs = 2 if kept else 1
        slices, gpu = both_paths(
            lambda: all_results(hidden, weight, some, trained, num_pairs=pairs)  # noqa: B023
        )
        assert gpu["loss"] == 0 and gpu["empty_completions"] == pairs
        assert_same(slices, gpu)


def test_order_of_threads_does_not_matter(emulated_driver):
    hidden, weight, *rows = make_batch(vocab=2000, dtype=torch.bfloat16)
    for trained in (False, True):
        forward = all_results(hidden, weight, rows, trained)
        with emulated_driver.reversed():
            backward = all_results(hidden, weight, rows, trained)
        assert all(torch.equal(forward[name], backward[name]) for name in forward)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_backward_scales_in_place(emulated_driver, dtype, factor):
    hidden, weight, *rows = make_batch(vocab=301, width=5, dtype=dtype)
    _, (_, whole) = losses(functional.linear_orpo, hidden, weight, rows, True)
    weight.requires_grad_()
    loss = functional.linear_orpo(hidden, weight, *rows, 0.29).loss
    emulated_driver.reset()
    (scaled,) = torch.autograd.grad(loss * factor, weight)
    name = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    assert [launch.kernel for launch in emulated_driver.launches()] == [f"head_scale_{name}"]
    # 1505 elements are not a multiple of 8.
    expected = (whole.float() * torch.tensor(factor)).to(dtype)
    assert torch.equal(scaled, expected)


# ---- synchronisation with the host ----


class Recorder(TorchDispatchMode):
    """Names of the operators that libtorch runs, called from Python or Rust."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# They read values or a size off the device.
WAITS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_to_copy",
}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("needs", [(True, False, False), (True, True, True), (False,) * 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_does_not_wait(emulated_driver, dtype, needs, softcap):
    hidden, weight, targets, sequence, completion = make_batch(dtype=dtype)

    def operators(num_scored):
        with Recorder() as recorder:
            _core.linear_orpo(
                HeadArguments(hidden, weight, None, targets, softcap, 1.0),
                PairArguments(sequence, completion, 2, num_scored),
                ObjectiveArguments(0.29, "full", "logsigmoid", None),
                Needs(*needs),
            )
        return set(recorder.names)

    told, counted = operators(int((targets >= 0).sum())), operators(None)
    assert "mm" in told
    if dtype == torch.bfloat16:  # 16-bit products on the CPU begin with a conversion
        told, counted = told - {"_to_copy"}, counted - {"_to_copy"}
    assert not WAITS & told
    assert "_local_scalar_dense" in counted


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("wrong", ["targets", "sequence", "num_scored"])
def test_wrong_values_that_the_host_does_not_read_give_nan(
    emulated_driver, wrong, softcap, trained
):
    hidden, weight, targets, sequence, completion = make_batch()
    num_scored = int((targets >= 0).sum())
    if wrong == "targets":
        targets[int((targets >= 0).nonzero()[2])] = len(weight)
    elif wrong == "sequence":
        sequence[3] = 1 << 40
    else:
        num_scored -= 1
    rows = targets, sequence, completion
    counts = {"num_pairs": 2, "num_scored": num_scored}
    results = all_results(hidden, weight, rows, trained, softcap=softcap, **counts)
    assert results["loss"].isnan() and results["gradient 0"].isnan().any()


@pytest.mark.parametrize(("number", "must"), [(-1, "in 0"), (36, "in 0..=35"), (28, "29, the")])
def test_a_wrong_number_is_named_on_the_cpu(number, must):
    hidden, weight, *rows = make_batch()
    assert len(hidden) == 35 and (rows[0] >= 0).sum() == 29
    with pytest.raises(ValueError, match=f"num_scored is {number}; must be {must}"):
        functional.linear_orpo(hidden, weight, *rows, 0.29, num_scored=number)


@pytest.mark.parametrize(("scope", "number"), [("full", 29), ("completion", 24)])
@pytest.mark.parametrize("emulated", [False, True])
def test_the_right_number_changes_nothing(emulated_driver, emulated, scope, number):
    _core.emulate_cuda(emulated)
    hidden, weight, *rows = make_batch()
    assert_equals_the_reference(hidden, weight, rows, True, num_scored=number, nll_scope=scope)
