"""What one layer's weights say, in units of logits: statistics of its heads, and what is left to solve."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_qk.functional.precision import full_precision
from lightning_qk.functional.singular import effective_rank
from lightning_qk.functional.spectrum import (
    MOMENTS,
    Support,
    circle_law_radius,
    qk_products,
    qk_singular_core,
    support_size,
)
from lightning_qk.functional.structure import (
    directionality,
    positivity,
    row_column_norms,
    squared_singular_values,
    summed_form,
)
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.metrics.eigenvalues import Cores

TRACE_STATISTICS = (
    *MOMENTS,
    "logit_eig_mean",
    "logit_eig_var",
    "logit_sym_var",
    "symmetry",
    "directionality",
    "participation_rank",
)
"""Statistics of self-attention that follow from traces and norms."""
SOLVED_STATISTICS = (
    "spectral_radius",
    "circle_ratio",
    "positivity",
    "singular_max",
    "stable_rank",
    "effective_rank_energy",
)
"""Statistics that take an eigenproblem."""
OF_ANY_ATTENTION = ("singular_max", "stable_rank", "effective_rank_energy")
"""The only statistics of cross-attention."""
SUMMED_STATISTICS = ("symmetry_summed", "directionality_summed")
"""Statistics of a layer's heads summed: one number a layer."""

# Multiplications of the sum over heads up to which it is made without being asked for: about 0.2 s on one core.
_CHEAP = 10_000_000_000


def trace_values(
    heads: HeadProjections, support: Support, *, directions: bool = True
) -> tuple[dict[str, Tensor], Cores, Tensor]:
    """Statistics of a layer of self-attention that need no eigenproblem.

    Args:
        heads: projections of the layer.
        support: what spectra are averaged over.
        directions: also directionality, which takes as long as all else.

    Returns:
        Each of :data:`TRACE_STATISTICS` → ``(heads,)``; the core to solve for eigenvalues; σ² of each head in
        descending order, ``(heads, d_head)``.
    """
    n = support_size(heads.query, support)
    with full_precision(heads.query.device):
        products = qk_products(heads.query, heads.key)
        values = products.moments(n)
        scale = heads.scaling
        square = products.gram_query @ products.gram_key
        frobenius_sq = values["frobenius_sq"]
        values |= {
            "logit_eig_mean": scale * values["eig_mean"],
            "logit_eig_var": scale**2 * values["eig_var"],
            "logit_sym_var": scale**2 * values["sym_var"],
            "symmetry": values["trace_sq"] / frobenius_sq,
            # tr (W Wᵀ)² = tr (G_q G_k)²; each over F, so that fourth powers stay in range.
            "participation_rank": 1
            / ((square * square.mT) / frobenius_sq[:, None, None].square()).sum((-2, -1)),
        }
        if directions:
            values["directionality"] = directionality(*row_column_norms(heads.query, heads.key))
        energies = squared_singular_values(products.gram_query, products.gram_key)
    return values, Cores(("",), products.core[None], bilinear=True), energies


def cross_core(heads: HeadProjections) -> Cores:
    """The core of a layer of cross-attention, to solve for its singular values."""
    return Cores(("",), qk_singular_core(heads.query, heads.key)[None], bilinear=False)


def solved_values(
    spectrum: Tensor, moments: Mapping[str, Tensor], energies: Tensor, width: int
) -> dict[str, Tensor]:
    """Statistics that follow from a layer's eigenvalues, or, of cross-attention, from its singular values.

    Args:
        spectrum: complex eigenvalues or real singular values, ``(heads, d_head)``, the largest first.
        moments: from :func:`trace_values`; empty for cross-attention.
        energies: σ², the largest first.
        width: of what the projections read.
    """
    unknown = torch.full((len(spectrum),), torch.nan)
    out = dict.fromkeys(SOLVED_STATISTICS, unknown)
    out["singular_max"] = energies[:, 0].sqrt()
    out["stable_rank"] = energies.sum(-1) / energies[:, 0]
    out["effective_rank_energy"] = effective_rank(energies)
    if spectrum.is_complex():
        radius = spectrum[:, 0].abs()
        out["spectral_radius"] = radius
        out["circle_ratio"] = radius / circle_law_radius(moments["frobenius_sq"], width)
        out["positivity"] = positivity(spectrum)
    return {name: value.to("cpu", torch.float32) for name, value in out.items()}


def is_wide(heads: HeadProjections) -> bool:
    """Whether directions and the sum over heads take long."""
    return heads.query.shape[-1] ** 2 * heads.key.shape[0] * heads.key.shape[1] > _CHEAP


def summed_values(heads: HeadProjections, *, always: bool = False) -> dict[str, float] | None:
    """:data:`SUMMED_STATISTICS` of the layer's heads summed, or None where that costs much.

    Args:
        heads: projections of a layer of self-attention.
        always: whatever it costs.
    """
    if not always and is_wide(heads):
        return None
    found = summed_form(heads.query, heads.key)
    return {
        "symmetry_summed": float(found["trace_sq"] / found["frobenius_sq"]),
        "directionality_summed": float(found["directionality"]),
    }
