"""GaLore and APOLLO by themselves: bases, projections, the layer-wise mode, state, errors."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import reference
from oddsmith.optim.low_rank import galore_8bit, projection
from oddsmith.optim.low_rank.apollo import APOLLOAdamW
from oddsmith.optim.low_rank.galore import GaLoreAdafactor, GaLoreAdamW, optimizer_bytes
from oddsmith.optim.low_rank.galore_8bit import GaLoreAdamW8bit
from support.gradients import randn

PROJ_TYPES = ["std", "reverse_std", "left", "right", "full"]
CLASSES = {
    "adamw": (GaLoreAdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}),
    "adamw8bit": (GaLoreAdamW8bit, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}),
    "adafactor": (GaLoreAdafactor, {"lr": 0.02, "relative_step": False, "scale_parameter": False}),
    "apollo": (APOLLOAdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}),
}
# scale is an option of every class, with another default in each.
LOW = {"rank": 5, "update_proj_gap": 3, "scale": 0.6}


@pytest.fixture(autouse=True)
def eight_bits_for_all(monkeypatch):
    """The tensors of these tests are small; blocks and chunks are partial here."""
    monkeypatch.setattr(galore_8bit, "MIN_8BIT_SIZE", 40)


def decaying(rows, columns, seed=0, power=1.0):
    """A matrix with singular values 1, 2^-power, 3^-power, ..."""
    small = min(rows, columns)
    left = torch.linalg.qr(randn(rows, small, seed=seed)).Q
    right = torch.linalg.qr(randn(columns, small, seed=seed + 1)).Q
    return left @ torch.diag(torch.arange(1, small + 1) ** -power) @ right.T


def make_model(dtype=torch.float32):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).to(dtype)


def make_groups(model, **extra):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": vectors}, {"params": matrices, "weight_decay": 0.05, **LOW, **extra}]


def make_optimizer(name, model, extra=None, **options):
    kind, kwargs = CLASSES[name]
    return kind(make_groups(model, **(extra or {})), **{**kwargs, **options})


def backward(model, step, parts=1, part=0):
    x = randn(16, 12, seed=100 + step)[part::parts]
    y = randn(16, 8, seed=200 + step)[part::parts]
    loss = (model(x.to(model[0].weight.dtype)).float() - y).square().mean() / parts
    loss.backward()
    return loss


def train(model, optimizer, steps, start=0, parts=1):
    for step in range(start, start + steps):
        for part in range(parts):
            backward(model, step, parts, part)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


# ---- Bases ----


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (64, 64)])
def test_random_bases_find_what_the_svd_finds(shape):
    grad = decaying(*shape)
    exact = projection.exact_bases(grad, 6)
    found = projection.random_bases(grad, 6, projection.generator_for(grad.device, 1, 2, 3))
    best = (grad - exact[0] @ (exact[0].T @ grad)).norm()
    for right in (False, True):
        basis = found[right]
        gram = basis @ basis.T if right else basis.T @ basis
        torch.testing.assert_close(gram, torch.eye(6), atol=1e-5, rtol=0)
        kept = grad @ basis.T @ basis if right else basis @ (basis.T @ grad)
        assert (grad - kept).norm() < 1.01 * best
        # In the same order, up to sign: the first singular vectors are far apart.
        cosines = (exact[right] * basis).sum(1 if right else 0).abs()
        assert cosines[:3].min() > 0.999


def test_a_warm_start_is_closer():
    """One direction is nearly as strong as what is left out: the old basis already has it."""
    grad = decaying(80, 120, power=0.25)
    exact = projection.exact_bases(grad, 8)
    errors = []
    for start in (None, exact[1]):
        generator = projection.generator_for(grad.device, 4)
        right = projection.random_bases(grad, 8, generator, right=start)[1]
        errors.append(1 - projection.overlap(exact[1], right, True))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_start_may_be_either_basis(side):
    grad = decaying(30, 50, power=0.25)
    left, right = projection.exact_bases(grad, 4)
    start = {"left": left} if side == "left" else {"right": right}
    again = projection.random_bases(grad, 4, projection.generator_for(grad.device, 4), **start)
    assert projection.overlap(left, again[0], False) > 0.99


@pytest.mark.parametrize("rank", [1, 7, 12])
def test_bases_up_to_the_whole_matrix(rank):
    grad = randn(12, 20)
    left, right = projection.random_bases(grad, rank, projection.generator_for(grad.device, 0))
    assert left.shape == (12, rank) and right.shape == (rank, 20)
    if rank == 12:
        torch.testing.assert_close(left @ (left.T @ grad), grad, atol=1e-5, rtol=1e-5)


def test_a_gradient_of_zeros_has_a_basis():
    left, right = projection.random_bases(
        torch.zeros(9, 7), 3, projection.generator_for(torch.device("cpu"), 0)
    )
    torch.testing.assert_close(left.T @ left, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(right @ right.T, torch.eye(3), atol=1e-6, rtol=0)


def test_generators_depend_on_every_number():
    def draw(*numbers):
        generator = projection.generator_for(torch.device("cpu"), *numbers)
        return torch.rand(3, generator=generator)

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    others = [draw(1, 2, 4), draw(1, 3, 2), draw(2, 1, 3), draw(3, 2, 1)]
    assert not any(torch.equal(draw(1, 2, 3), other) for other in others)


def test_overlap():
    basis = torch.linalg.qr(randn(10, 4)).Q
    turned = basis @ torch.linalg.qr(randn(4, 4, seed=1)).Q
    assert projection.overlap(basis, turned, False) == pytest.approx(1.0, abs=1e-5)
    identity = torch.eye(6)
    # One direction of two has stayed.
    assert projection.overlap(identity[:2], identity[1:3], True) == pytest.approx(0.5)
    assert projection.overlap(identity[:2], identity[2:4], True) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_there_and_back(proj_type, dtype, monkeypatch):
    monkeypatch.setattr(projection, "_CHUNK", 100)  # several chunks, the last one partial
    grad, weight = randn(19, 33).to(dtype), randn(19, 33, seed=1).to(dtype)
    left, right = projection.sides(proj_type, 19, 33)
    bases = projection.exact_bases(grad, 4)
    left = bases[0].to(dtype) if left else None
    right = bases[1].to(dtype) if right else None
    low = projection.project(grad, left, right)
    assert low.dtype == torch.float32
    expected = reference.galore_project(grad.double(), left, right)
    torch.testing.assert_close(low.double(), expected, atol=1e-5, rtol=1e-5)
    changed = weight.clone()
    projection.add_back(changed, low, left, right, alpha=-0.7)
    expected = weight.double() - 0.7 * reference.galore_project_back(low.double(), left, right)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(changed.double(), expected, atol=tolerance, rtol=tolerance)


def test_sides():
    assert projection.sides("std", 5, 5) == (False, True)
    assert projection.sides("std", 4, 5) == (True, False)
    assert projection.sides("reverse_std", 5, 5) == (True, False)
    assert projection.sides("reverse_std", 4, 5) == (False, True)
    assert projection.sides("full", 4, 5) == (True, True)


# ---- Steps against the naive forms ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_adamw_is_the_naive_form(proj_type, dtype):
    weight = nn.Parameter(randn(14, 22).to(dtype))
    naive = reference.GaLoreAdamW(weight.detach().double(), 4, 2, 0.6, proj_type)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "scale": 0.6}
    optimizer = GaLoreAdamW(
        [{**group, "proj_type": proj_type, "svd": "exact"}],
        lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1,
    )  # fmt: skip
    for step in range(6):
        weight.grad = (decaying(14, 22, seed=step) + decaying(14, 22, seed=9)).to(dtype)
        naive.step(weight.grad.double(), lr=0.05, betas=(0.8, 0.95), eps=1e-3, decay=0.1)
        optimizer.step()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        weight.detach().double(), naive.weight, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(14, 22), (22, 14)])
def test_apollo_is_the_naive_form(scale_type, shape):
    weight = nn.Parameter(randn(*shape))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "scale": 3.0}
    optimizer = APOLLOAdamW(
        [{**group, "scale_type": scale_type}],
        lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, seed=6,
    )  # fmt: skip
    naive = reference.Apollo(weight.detach().double(), scale_type, 3.0)
    for step in range(6):
        # Some steps are much longer than the last: the limiter has to act.
        weight.grad = decaying(*shape, seed=step) * (50.0 if step in (2, 3) else 1.0)
        generator = projection.generator_for(weight.device, 6, 0, step // 2)
        small = (4, shape[1]) if shape[0] >= shape[1] else (shape[0], 4)
        basis = torch.randn(small, generator=generator).double() / 2.0
        naive.step(weight.grad.double(), basis, 0.05, (0.8, 0.95), 1e-3, 0.1)
        optimizer.step()
        torch.testing.assert_close(weight.detach().double(), naive.weight, atol=1e-5, rtol=1e-5)
    assert naive.limited  # the test has seen both


def test_apollo_moves_at_a_rate_that_starts_from_zero():
    model = make_model()
    optimizer = make_optimizer("apollo", model)
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(map(torch.equal, before, weights(model)))
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    train(model, optimizer, 1, start=1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize("name", list(CLASSES))
def test_it_learns(name):
    model = make_model()
    optimizer = make_optimizer(name, model)
    first = backward(model, 0).item()
    model.zero_grad()
    for _ in range(150):
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    assert backward(model, 0).item() < 0.3 * first


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_gradient_that_is_not_finite_changes_nothing(name, caplog):
    model = make_model()
    optimizer = make_optimizer(name, model)
    train(model, optimizer, 4)
    for bad in (math.nan, math.inf):
        backward(model, 4)
        model[0].weight.grad[3, 2] = bad
        model[2].bias.grad[1] = bad
        before, state = weights(model), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        optimizer.zero_grad()
        after = weights(model)
        for index, parameter in enumerate(model.parameters()):
            same = torch.equal(before[index], after[index])
            assert same == (parameter is model[0].weight or parameter is model[2].bias)
        kept = optimizer.state[model[0].weight]
        old = state["state"][2]
        assert kept["step"] == old["step"] == 4
        assert torch.equal(next(iter(_tensors(kept))), next(iter(_tensors(old))))
    assert optimizer.skipped == 4
    assert caplog.text.count("NaN or infinite") == 1


def _tensors(state):
    return [value for value in state.values() if torch.is_tensor(value)]


def test_the_gap_doubles_where_the_subspace_stays():
    stays, drifts = nn.Parameter(randn(20, 30)), nn.Parameter(randn(20, 30, seed=1))
    optimizer = GaLoreAdamW(
        [{"params": [stays, drifts], "rank": 3, "update_proj_gap": 2, "adaptive_gap": True,
          "overlap_patience": 2, "overlap_threshold": 0.6}],
        lr=0.0,
    )  # fmt: skip
    fixed, refreshes = decaying(20, 30), []
    for step in range(16):
        stays.grad, drifts.grad = fixed.clone(), decaying(20, 30, seed=10 + 2 * step)
        due = optimizer.state[stays].get("next_refresh", 0)
        refreshes += [step] if due == step else []
        optimizer.step()
    # Bases at 0, 2 and 4 agree twice; from then on each refresh doubles the gap.
    assert refreshes == [0, 2, 4, 8]
    assert optimizer.state[stays]["gap"] == 8 and optimizer.state[drifts]["gap"] == 2


# ---- Layer-wise ----


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", list(CLASSES))
def test_layerwise_is_the_same(name, parts):
    model, other = make_model(), make_model()
    plain = make_optimizer(name, model)
    layerwise = make_optimizer(name, other, layerwise=True, accumulation_steps=parts)
    train(model, plain, 8, parts=parts)
    for step in range(8):
        for part in range(parts):
            backward(other, step, parts, part)
        assert all(p.grad is None for p in other.parameters())
        layerwise.step()
    for mine, theirs in zip(weights(model), weights(other)):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_layerwise_frees_projected_gradients_between_micro_batches():
    model = make_model()
    optimizer = make_optimizer("adamw", model, layerwise=True, accumulation_steps=2)
    kept = []
    for step in range(4):
        backward(model, step, 2, 0)
        kept.append([p.grad is not None for p in (model[0].weight, model[2].weight)])
        backward(model, step, 2, 1)
        assert all(p.grad is None for p in model.parameters())
    # A basis of the whole sum, at 0 and 3, needs the gradients.
    assert kept == [[True] * 2, [False] * 2, [False] * 2, [True] * 2]
    first = make_model()
    optimizer = make_optimizer(
        "adamw", first, {"refresh_on": "first"}, layerwise=True, accumulation_steps=2
    )
    backward(first, 0, 2, 0)
    assert first[0].weight.grad is None
    backward(first, 0, 2, 1)
    assert optimizer.state[first[0].weight]["step"] == 1


def test_layerwise_asks_which_backward_is_the_last():
    model, other, last = make_model(), make_model(), [False]
    asked = make_optimizer("adamw", model, layerwise=True, is_last_backward=lambda: last[0])
    for step, parts in enumerate((1, 3, 2)):  # as at the end of an epoch
        for part in range(parts):
            last[0] = part == parts - 1
            backward(model, step, parts, part)
    plain = make_optimizer("adamw", other)
    for step, parts in enumerate((1, 3, 2)):
        train(other, plain, 1, start=step, parts=parts)
    assert all(state["step"] == 3 for state in asked.state.values())
    for mine, theirs in zip(weights(model), weights(other)):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "apollo"])
def test_layerwise_clips_each_parameter_by_itself(name):
    model, other = make_model(), make_model()
    layerwise = make_optimizer(name, model, layerwise=True, max_grad_norm=0.01)
    plain = make_optimizer(name, other, {"svd": "exact"} if name == "adamw" else {})
    norms = []
    for step in range(3):
        backward(model, step)
        backward(other, step)
        for index, p in enumerate(other.parameters()):
            grad = p.grad
            if name == "adamw" and p.dim() == 2:
                # The projected gradient is what is clipped; the rest is not used.
                item = plain.item(p, plain.param_groups[1], index)
                item.state.setdefault("step", 0)
                if plain.refresh_due(item):
                    plain.refresh(item)
                grad = plain.project(item)
            norms.append(grad.norm().item())
            p.grad.mul_(min(1.0, 0.01 / (norms[-1] + 1e-6)))
        expected = math.hypot(*norms)
        norms.clear()
        assert layerwise.pop_grad_norm() == pytest.approx(expected, rel=1e-3)
        plain.step()
        plain.zero_grad()
    assert layerwise.pop_grad_norm() == 0.0
    for mine, theirs in zip(weights(model), weights(other)):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_a_second_layerwise_optimizer_takes_over():
    model, other = make_model(), make_model()
    make_optimizer("adamw", model, layerwise=True)
    first = make_optimizer("adamw", model, layerwise=True)
    second = make_optimizer("adamw", model, layerwise=True)
    alone = make_optimizer("adamw", other, layerwise=True)
    backward(model, 0)
    backward(other, 0)
    assert not first.state and second.state and alone.state
    assert all(map(torch.equal, weights(model), weights(other)))
    second.close()
    backward(model, 1)
    assert model[0].weight.grad is not None


# ---- Saved state ----


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(name, layerwise, dtype):
    model = make_model(dtype)
    optimizer = make_optimizer(name, model, layerwise=layerwise)
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 5, start=4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = make_model(dtype)
    again.load_state_dict(saved["model"])
    resumed = make_optimizer(name, again, layerwise=layerwise)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, start=4)
    assert all(map(torch.equal, weights(model), weights(again)))
    for parameter, other in zip(model.parameters(), again.parameters()):
        mine, theirs = optimizer.state[parameter], resumed.state[other]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert type(value) in (int, float, torch.Tensor), key
            same = torch.equal(value, theirs[key]) if torch.is_tensor(value) else None
            assert value == theirs[key] if same is None else same, key


@pytest.mark.parametrize("name", list(CLASSES))
def test_loading_copies(name):
    model, other = make_model(), make_model()
    optimizer, second = make_optimizer(name, model), make_optimizer(name, other)
    train(model, optimizer, 2)
    second.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    train(other, second, 2)
    after = optimizer.state_dict()["state"]
    for key, state in before.items():
        for mine, theirs in zip(_tensors(state), _tensors(after[key])):
            assert torch.equal(mine, theirs)


def broken(state_dict, change):
    state_dict = copy.deepcopy(state_dict)
    change(state_dict)
    return state_dict


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["param_groups"].pop(), "has 1 parameter groups; must be 2"),
        (lambda s: s["param_groups"][1]["params"].pop(), "group 1 has 1 parameters; must be 2"),
        (lambda s: s["param_groups"][1].update(rank=4), "saved with rank 4; it is 5"),
        (lambda s: s["param_groups"][1].update(proj_type="full"), "saved with proj_type 'full'"),
        (lambda s: s["state"][2].update(exp_avg=torch.zeros(3)), r"exp_avg is \(3,\); must have"),
        (lambda s: s["state"][3].pop("basis_left"), "basis_left is None; must have shape"),
        (lambda s: s["state"][0].pop("exp_avg_sq"), "state of parameter 0: exp_avg_sq is None"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    model, other = make_model(), make_model()
    optimizer, second = make_optimizer("adamw", model), make_optimizer("adamw", other)
    train(model, optimizer, 2)
    train(other, second, 1)
    before = copy.deepcopy(second.state_dict())
    with pytest.raises(ValueError, match=message):
        second.load_state_dict(broken(optimizer.state_dict(), change))
    after = second.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, state in before["state"].items():
        for mine, theirs in zip(_tensors(state), _tensors(after["state"][key])):
            assert torch.equal(mine, theirs)


def test_memory_is_that_of_the_formula():
    rows, columns, rank = 64, 96, 8
    weight = nn.Parameter(randn(rows, columns))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": rank}])
    weight.grad = randn(rows, columns, seed=1)
    optimizer.step()
    assert optimizer_bytes(optimizer) == 4 * (rows * rank + 2 * columns * rank)
    apollo = APOLLOAdamW([{"params": [weight], "rank": rank}])
    apollo.step()
    assert optimizer_bytes(apollo) == 4 * (2 * columns * rank + 1)


# ---- Errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 21}, r"rank is 21, but a parameter has shape \(20, 12\)"),
        ({"rank": 0}, "rank is 0; must be a positive integer"),
        ({"rank": 2.0}, "rank is 2.0; must be a positive integer"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"proj_type": "sideways"}, "proj_type is 'sideways'; must be one of"),
        ({"svd": "fast"}, "svd is 'fast'; must be one of"),
        ({"refresh_on": "last"}, "refresh_on is 'last'"),
        ({"overlap_threshold": 1.5}, "overlap_threshold is 1.5"),
        ({"gap": 3}, "unknown options gap"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_bad_options(options, message):
    model = make_model()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": matrices, "rank": 4, **options}])
    optimizer = GaLoreAdamW([model[0].bias])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": matrices, "rank": 4, **options})
    assert len(optimizer.param_groups) == 1


def test_other_bad_arguments():
    model = make_model()
    for kwargs, message in [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"max_grad_norm": 1.0}, "goes with layerwise"),
        ({"layerwise": True, "accumulation_steps": 0}, "accumulation_steps is 0"),
        ({"seed": 1.5}, "seed is 1.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            GaLoreAdamW(make_groups(model), **kwargs)
    with pytest.raises(ValueError, match="only matrices can be projected"):
        GaLoreAdamW([{"params": list(model.parameters()), "rank": 4}])
    with pytest.raises(ValueError, match="update_proj_gap without rank"):
        GaLoreAdamW([{"params": list(model.parameters()), "update_proj_gap": 4}])
    with pytest.raises(ValueError, match="give lr or relative_step=True"):
        GaLoreAdafactor(make_groups(model), lr=0.1)
    with pytest.raises(ValueError, match="proj_type is 'full'"):
        APOLLOAdamW(make_groups(model, proj_type="full"))
    with pytest.raises(ValueError, match="norm_growth is 0.5"):
        APOLLOAdamW(make_groups(model), norm_growth=0.5)
    model[0].weight.grad = torch.zeros(20, 12).to_sparse()
    with pytest.raises(ValueError, match="is sparse"):
        GaLoreAdamW(make_groups(model)).step()
