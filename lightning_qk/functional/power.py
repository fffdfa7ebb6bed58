"""Largest singular values: exact ones, and estimates that follow a matrix as it changes."""

import torch
from torch import Tensor

from lightning_qk.functional.precision import at_least_float32, full_precision


def leading_singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest singular value of a matrix and its vectors, from the smaller of its Gram matrices in float64.

    Args:
        matrix: shape ``(rows, columns)``.

    Returns:
        ``sigma ()``, ``u (rows,)``, ``v (columns,)`` with ``sigma = u @ matrix @ v``, float32 at least.
    """
    with torch.no_grad(), full_precision(matrix.device):
        # Apple's devices have no float64.
        device = "cpu" if matrix.device.type == "mps" else matrix.device
        wide = matrix.detach().to(device, torch.float64)
        is_tall = wide.shape[0] > wide.shape[1]
        gram = wide.mT @ wide if is_tall else wide @ wide.mT
        first = torch.linalg.eigh(gram).eigenvectors[:, -1]
        second = wide @ first if is_tall else wide.mT @ first
        sigma = second.norm()
        second = second / sigma.clamp_min(torch.finfo(torch.float64).tiny)
        left, right = (second, first) if is_tall else (first, second)
        dtype = at_least_float32(matrix).dtype
        found = (part.to(matrix.device, dtype) for part in (sigma, left, right))
        return next(found), next(found), next(found)


def starting_subspace(columns: int, size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthonormal vectors to start :func:`subspace_iteration` from, the same on every process.

    Returns:
        Shape ``(columns, min(size, columns))``.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, min(size, columns), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(start).Q.to(device, dtype)


def subspace_iteration(matrix: Tensor, subspace: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Estimate the largest singular value by power iterations of several vectors at once.

    The estimate is never above the true value, but for rounding, and its relative error falls as
    ``(sigma_k+1 / sigma_1) ** (4 iterations)`` with the number k of vectors. Started from the vectors of a
    similar matrix, few iterations do.

    Args:
        matrix: shape ``(rows, columns)``, float32 at least.
        subspace: orthonormal columns, ``(columns, k)``.
        iterations: how often the matrix and its transpose are applied, at least 1.

    Returns:
        The estimate, ``()``, and the new subspace. A matrix of zeros has the value 0, one that is not finite NaN;
        both leave the subspace.
    """
    with torch.no_grad(), full_precision(matrix.device):
        is_finite = matrix.isfinite().all()
        matrix = torch.where(is_finite, matrix, 0.0)  # decompositions raise for others
        for _ in range(iterations):
            applied = matrix.mT @ (matrix @ subspace)
            # Far from 1, products of the vectors would leave the range of the type.
            scale = applied.abs().amax()
            applied = torch.where(scale > 0, applied / scale, subspace)
            subspace = torch.linalg.qr(applied).Q
        image = matrix @ subspace
        # Far from 1, squares would leave the range of the type.
        size = image.abs().amax().clamp_min(torch.finfo(image.dtype).tiny)
        largest = torch.linalg.svdvals(image / size)[0] * size
        return torch.where(is_finite, largest, torch.nan), subspace
