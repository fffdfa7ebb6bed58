r"""What a head's form is like, whatever its size: positivity, symmetry, direction, ranks.

``W_QK = W_q^T W_k`` is never formed: row and column norms come from the Gram matrices. Only the sum over a layer's
heads, whose rank is that of the model, is multiplied out, block by block.
"""

import torch
from torch import Tensor

from lightning_qk.functional.checks import floating, one_device
from lightning_qk.functional.precision import at_least_float32, full_precision

_BLOCK = 1024
_DEVIATIONS = 2.0


def positivity(eigenvalues: Tensor) -> Tensor:
    r"""``Σ λ / Σ |λ|``: how far eigenvalues are positive, in [−1, 1].

    1 where all are real and positive: every direction attends to itself. About 0 for random weights. As copying
    heads are identified by in the analysis of transformer circuits (Elhage et al. 2021), there of another matrix.

    Args:
        eigenvalues: shape ``(..., d_head)``, complex, in conjugate pairs, or real.

    Returns:
        Shape ``(...)``. NaN where all are zero or one is not finite.

    Example:
        >>> positivity(torch.tensor([3.0, -1.0]))
        tensor(0.5000)
    """
    values = eigenvalues / eigenvalues.abs().amax(-1, keepdim=True)
    return values.real.sum(-1) / values.abs().sum(-1)


def directionality(rows: Tensor, columns: Tensor) -> Tensor:
    r"""Whether a few columns or a few rows of a form stand out, in [−1, 1].

    After Saponati et al. 2025 (arXiv 2502.10927; as in their released code [V]): the excess of norms over their
    mean plus two standard deviations, ``(columns − rows) / (columns + rows)``. Positive where some coordinates of
    the keys count more than others (their finding for autoregressive training), negative for those of queries,
    0 where neither has an excess.

    Args:
        rows: norms of the rows, the coordinates of a query's token, shape ``(..., d_query)``.
        columns: of the columns, those of a key's token, ``(..., d_key)``.

    Returns:
        Shape ``(...)``; NaN where a norm is not finite.

    Example:
        >>> one = torch.ones(64)
        >>> large = one.clone()
        >>> large[5] = 9
        >>> directionality(one, large)
        tensor(1.)
    """
    row, column = (_excess(at_least_float32(floating(part, "norms"))) for part in (rows, columns))
    both = row + column
    return torch.where(both == 0, torch.zeros_like(both), (column - row) / both)


def _excess(norms: Tensor) -> Tensor:
    threshold = norms.mean(-1, keepdim=True) + _DEVIATIONS * norms.std(-1, keepdim=True)
    # Equal norms have no excess; what rounding leaves of it counts for none.
    slack = 1e-6 * norms.amax(-1, keepdim=True)
    over = norms - threshold
    return torch.where((over > slack) | over.isnan(), over, 0.0).sum(-1)


def row_column_norms(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    r"""Norms of the rows and of the columns of ``W_QK``, per head.

    Args:
        query: query weights, shape ``(heads, d_head, d_query)``.
        key: key weights, shape ``(kv_heads, d_head, d_key)``.

    Returns:
        Shapes ``(heads, d_query)`` and ``(heads, d_key)``, in float32 at least.
    """
    one_device(query=query, key=key)
    rows, columns = [], []
    with full_precision(query.device):
        # One key head after the other: no copy of the keys that queries share.
        for own, shared in zip(query.chunk(len(key)), key, strict=True):
            left, right = at_least_float32(own), at_least_float32(shared)
            rows.append(((right @ right.mT @ left) * left).sum(-2))
            columns.append(((left @ left.mT @ right) * right).sum(-2))
    return torch.cat(rows).clamp_min(0).sqrt(), torch.cat(columns).clamp_min(0).sqrt()


def summed_form(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    r"""Symmetry and direction of ``Σ_h W_QK^h``, the sum over a layer's heads.

    As Saponati et al. 2025 (arXiv 2502.10927) give them for a layer; their symmetry score is ``(1 + η/F) / 2``.
    Costs ``d_query · d_key`` times the number K of key rows, and two blocks of memory. By Gram matrices of
    all rows it would be five products of ``K² · d_model``, which is less where ``K < d_model / 5`` alone.
    Random probes do not serve: of m of them each squared norm has a relative error of ``√(2 / m)``, and
    directionality is of what exceeds two standard deviations of the norms.

    Args:
        query: query weights, shape ``(heads, d_head, d_model)``.
        key: key weights, shape ``(kv_heads, d_head, d_model)``.

    Returns:
        ``trace_sq``, ``frobenius_sq`` and ``directionality`` of the sum, each a scalar.
    """
    with full_precision(query.device):
        # Heads that share keys add up before the product.
        left = at_least_float32(query).unflatten(0, (len(key), -1)).sum(1).flatten(0, 1)
        right = at_least_float32(key).flatten(0, 1)
        width = left.shape[-1]
        rows, columns = left.new_zeros(width), left.new_zeros(width)
        trace_sq = left.new_zeros((), dtype=torch.float64 if left.device.type != "mps" else left.dtype)
        parts = [slice(start, min(start + _BLOCK, width)) for start in range(0, width, _BLOCK)]
        for index, one in enumerate(parts):
            for other in parts[index:]:
                upper = left[:, one].mT @ right[:, other]
                lower = upper if other == one else left[:, other].mT @ right[:, one]
                trace_sq += (upper * lower.mT).sum() * (1 if other == one else 2)
                for block, row, column in ((upper, one, other), (lower, other, one)):
                    rows[row] += block.square().sum(1)
                    columns[column] += block.square().sum(0)
                    if other == one:
                        break
    return {
        "trace_sq": trace_sq.to(left.dtype),
        "frobenius_sq": rows.sum(),
        "directionality": directionality(rows.sqrt(), columns.sqrt()),
    }


def squared_singular_values(gram_query: Tensor, gram_key: Tensor) -> Tensor:
    r"""``σ²`` of ``W_QK``, in descending order, from the Gram matrices of query and key weights.

    The eigenvalues of ``Lᵀ G_k L`` with ``G_q = L Lᵀ``. Good to about 1e-6 of the largest in float32, which ranks
    by energy need no more than; small singular values on their own want
    :func:`~lightning_qk.functional.qk_singular_values`. Derived.

    Args:
        gram_query: ``W_q W_q^T``, shape ``(..., d_head, d_head)``.
        gram_key: ``W_k W_k^T``, the same shape.

    Returns:
        Shape ``(..., d_head)``, not negative. NaN for a head that is not finite.
    """
    both = torch.stack([gram_query, gram_key])
    # Each over its trace: products of two stay in range.
    trace = both.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    fine = (trace.isfinite() & (trace > 0)).all(0) & both.isfinite().all(0).all(-1).all(-1)[..., None, None]
    eye = torch.eye(both.shape[-1], dtype=both.dtype, device=both.device)
    unit = torch.where(fine, both / trace, eye)
    # A tiny ridge, so that heads of low rank have a factor too.
    ridge = torch.finfo(both.dtype).eps * eye
    factor, failed = torch.linalg.cholesky_ex(unit[0] + ridge)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(unit[0])
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
        factor = torch.where((failed > 0)[..., None, None], root, factor)
    values = torch.linalg.eigvalsh(factor.mT @ unit[1] @ factor).flip(-1).clamp_min(0)
    zero = (both == 0).all(-1).all(-1).any(0)[..., None]
    values = torch.where(fine[..., 0], values * trace[0][..., 0] * trace[1][..., 0], torch.nan)
    return torch.where(zero, torch.zeros_like(values), values)
