"""Bases, projection and back-projection."""

import pytest
import torch

import reference
from oddsmith.optim.low_rank import projection
from support.gradients import randn
from support.low_rank import decaying

PROJ_TYPES = ["std", "reverse_std", "left", "right", "full"]


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
    """One direction is nearly as strong as those outside the basis; the old basis already has
    it."""
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
    # One direction of two is unchanged.
    assert projection.overlap(identity[:2], identity[1:3], True) == pytest.approx(0.5)
    assert projection.overlap(identity[:2], identity[2:4], True) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_projecting_and_back(proj_type, dtype, monkeypatch):
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
