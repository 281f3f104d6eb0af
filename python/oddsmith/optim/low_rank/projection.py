"""Low-rank projections of gradients: bases, projection and back-projection.

A matrix `(rows, columns)` is projected by a left basis `(rows, rank)`, a right basis
`(rank, columns)` or both, each orthonormal along `rank`.
"""

from __future__ import annotations

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")

# Extra columns of the randomised range finder, and iterations of its power method
# (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, sections 4.4 and 4.5).
OVERSAMPLING = 8
POWER_STEPS = 2

# Elements of a gradient that are converted to fp32 at a time.
_CHUNK = 1 << 21


def sides(proj_type: str, rows: int, columns: int) -> tuple[bool, bool]:
    """Which bases project a matrix: left, right.

    Args:
        proj_type (`str`): `"std"` keeps the smaller basis: right if there are at least as many rows
            as columns, else left. `"reverse_std"` is the opposite; `"left"`, `"right"` and `"full"`
            (both) are explicit.
        rows (`int`): Rows of the matrix.
        columns (`int`): Columns of the matrix.
    """
    if proj_type == "full":
        return True, True
    if proj_type in ("left", "right"):
        return proj_type == "left", proj_type == "right"
    right = (rows >= columns) == (proj_type == "std")
    return not right, right


def generator_for(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator that depends only on `numbers`, so that a resumed run draws the same values."""
    seed = 0x9E3779B97F4A7C15
    for number in numbers:
        # The mixing step of splitmix64: consecutive numbers give unrelated seeds.
        seed = (seed + number + 0x9E3779B97F4A7C15) % (1 << 64)
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % (1 << 64)
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) % (1 << 64)
        seed ^= seed >> 31
    return torch.Generator(device).manual_seed(seed >> 1)


def exact_bases(grad: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both bases from a thin SVD, `fp32`.

    These are the first `rank` columns of `U` and rows of `Vh` of `torch.linalg.svd`, which takes
    minutes for the matrices of large models; see [`random_bases`].

    Args:
        grad (`Tensor`): `(rows, columns)`, any float dtype.
        rank (`int`): At most the smaller side.
    """
    left, _, right = torch.linalg.svd(grad.float(), full_matrices=False)
    return left[:, :rank].contiguous(), right[:rank].contiguous()


def random_bases(
    grad: Tensor,
    rank: int,
    generator: torch.Generator,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both bases from a randomised range finder (Halko et al. 2011, algorithm 4.4), `fp32`.

    Four matrix products of `rank + 8` columns and four thin QR decompositions, instead of an SVD of
    the matrix. Loss-neutral in GaLore 2 (arXiv 2504.20437).

    Args:
        grad (`Tensor`): `(rows, columns)`, any float dtype.
        rank (`int`): At most the smaller side.
        generator (`torch.Generator`): Draws the columns without a start value.
        left (`Tensor`, *optional*): `(rows, rank)`, the last basis, to start from.
        right (`Tensor`, *optional*): `(rank, columns)`, the last basis; used if there is no `left`.
    """
    grad = grad.float()
    rows, columns = grad.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    if left is not None:
        start = grad.T @ left.float()
    elif right is not None:
        start = right.float().T
    else:
        start = grad.new_empty((columns, 0))
    fresh = (columns, width - start.shape[1])
    noise = torch.randn(fresh, generator=generator, device=grad.device)
    # If the old basis hardly fits the matrix, its products can be tiny; orthonormal columns give
    # them and the random columns the same weight.
    tall = torch.linalg.qr(torch.cat([start, noise], dim=1)).Q
    for _ in range(POWER_STEPS - 1):
        wide = torch.linalg.qr(grad @ tall).Q
        tall = torch.linalg.qr(grad.T @ wide).Q
    wide = torch.linalg.qr(grad @ tall).Q
    tall, small = torch.linalg.qr(grad.T @ wide)
    # grad is close to wide @ small.T @ tall.T: the SVD of the middle factor orders the columns.
    middle_left, _, middle_right = torch.linalg.svd(small.T)
    return wide @ middle_left[:, :rank], (tall @ middle_right[:rank].T).T.contiguous()


def random_matrix(grad: Tensor, rank: int, right: bool, generator: torch.Generator) -> Tensor:
    """A random basis, not orthonormal: entries of variance `1 / rank` (APOLLO).

    Args:
        grad (`Tensor`): `(rows, columns)`; gives sizes and device.
        rank (`int`): Rows of a right basis, columns of a left one.
        right (`bool`): Which basis: `(rank, columns)` or `(rows, rank)`.
        generator (`torch.Generator`): Draws the basis.
    """
    shape = (rank, grad.shape[1]) if right else (grad.shape[0], rank)
    matrix = torch.randn(shape, generator=generator, device=grad.device)
    return matrix.mul_(rank**-0.5)


def overlap(old: Tensor, new: Tensor, right: bool) -> float:
    """Overlap of two subspaces: the mean squared cosine of the angles between their bases.

    Between 0 and 1; `rank / size` on average for independent subspaces. Unlike the cosine of the
    matrices it does not depend on signs or order.
    """
    old, new = old.float(), new.float()
    product = old @ new.T if right else old.T @ new
    return float(product.square().sum()) / product.shape[0]


def _converts(tensor: Tensor) -> bool:
    # On a CPU without half-precision instructions, such products take a hundred times as long as
    # fp32.
    return tensor.device.type == "cpu" and tensor.dtype != torch.float32


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """`left.T @ grad @ right.T`, where a basis can be `None`; `fp32`.

    Args:
        grad (`Tensor`): `(rows, columns)`, any float dtype.
        left (`Tensor`, *optional*): `(rows, rank)`.
        right (`Tensor`, *optional*): `(rank, columns)`.
    """
    if not _converts(grad):
        if left is not None:
            grad = left.to(grad.dtype).T @ grad
        if right is not None:
            grad = grad @ right.to(grad.dtype).T
        return grad.float()
    left = None if left is None else left.float()
    right = None if right is None else right.float()
    parts = []
    for start in range(0, len(grad), step := max(1, _CHUNK // grad.shape[1])):
        rows = slice(start, start + step)
        part = grad[rows].float()
        if right is not None:
            part = part @ right.T
        parts.append(part if left is None else left[rows].T @ part)
    return torch.cat(parts) if left is None else torch.stack(parts).sum(0)


def add_back(
    weight: Tensor, low: Tensor, left: Tensor | None, right: Tensor | None, alpha: float
) -> None:
    """`weight += alpha * (left @ low @ right)`, in place, without a temporary of the size of
    `weight`.

    Args:
        weight (`Tensor`): `(rows, columns)`, any float dtype.
        low (`Tensor`): Of the shape of [`project`]'s result.
        left (`Tensor`, *optional*): `(rows, rank)`.
        right (`Tensor`, *optional*): `(rank, columns)`.
        alpha (`float`): Factor.
    """
    if not _converts(weight):
        low = low.to(weight.dtype)
        left = None if left is None else left.to(weight.dtype)
        right = None if right is None else right.to(weight.dtype)
        if right is not None:
            weight.addmm_(low if left is None else left @ low, right, alpha=alpha)
        elif left is not None:
            weight.addmm_(left, low, alpha=alpha)
        else:
            weight.add_(low, alpha=alpha)
        return
    right = None if right is None else right.float()
    for start in range(0, len(weight), step := max(1, _CHUNK // weight.shape[1])):
        rows = slice(start, start + step)
        part = low[rows] if left is None else left[rows].float() @ low
        weight[rows].add_(part if right is None else part @ right, alpha=alpha)
