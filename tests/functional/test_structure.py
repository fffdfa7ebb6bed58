"""Positivity, symmetry, direction and ranks, against the dense form in float64."""

import pytest
import torch
from torch import Tensor

from lightning_qk.functional.structure import (
    directionality,
    positivity,
    row_column_norms,
    squared_singular_values,
    summed_form,
)


def weights(heads: int, kv_heads: int, d_head: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads, d_head, width, generator=generator, dtype=torch.float64)
    key = torch.randn(kv_heads, d_head, width, generator=generator, dtype=torch.float64)
    key[..., 3] *= 8  # a coordinate that stands out
    return query, key


def dense(query: Tensor, key: Tensor) -> Tensor:
    return query.mT @ key.repeat_interleave(len(query) // len(key), 0)


def direction_of(form: Tensor) -> Tensor:
    """As the paper's code has it, of one dense matrix."""
    rows, columns = form.norm(dim=1), form.norm(dim=0)
    excess = [
        (norms[norms > (bound := norms.mean() + 2 * norms.std())] - bound).sum() for norms in (rows, columns)
    ]
    return (excess[1] - excess[0]) / (excess[0] + excess[1])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_norms_and_direction_of_heads(kv_heads: int) -> None:
    query, key = weights(4, kv_heads, 5, 40)
    form = dense(query, key)
    rows, columns = row_column_norms(query, key)
    torch.testing.assert_close(rows, form.norm(dim=2))
    torch.testing.assert_close(columns, form.norm(dim=1))
    found = directionality(rows, columns)
    torch.testing.assert_close(found, torch.stack([direction_of(one) for one in form]))
    assert bool((found > 0).all())
    torch.testing.assert_close(directionality(columns, rows), -found)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_sum_over_heads_by_blocks(kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_qk.functional.structure._BLOCK", 16)
    query, key = weights(4, kv_heads, 5, 40)
    form = dense(query, key).sum(0)
    found = summed_form(query, key)
    torch.testing.assert_close(found["trace_sq"], (form * form.mT).sum())
    torch.testing.assert_close(found["frobenius_sq"], form.square().sum())
    torch.testing.assert_close(found["directionality"], direction_of(form))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("rank", [2, 5])
def test_squared_singular_values(rank: int, scale: float) -> None:
    query, key = (weight.float() * scale for weight in weights(3, 3, 5, 40))
    query[:, rank:] = query[:, :1]  # of low rank
    want = torch.linalg.svdvals(dense(query.double(), key.double()))[:, :5].square()
    found = squared_singular_values(query @ query.mT, key @ key.mT)
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.double() / want[:, :1], want / want[:, :1], rtol=1e-4, atol=1e-5)


def test_heads_of_zeros_and_of_nan() -> None:
    query, key = weights(3, 3, 5, 40)
    query[0], key[1, 0, 0] = 0, torch.nan
    found = squared_singular_values(query @ query.mT, key @ key.mT)
    assert bool((found[0] == 0).all())
    assert bool(found[1].isnan().all())
    assert bool(found[2].isfinite().all())
    rows, columns = row_column_norms(query, key)
    both = directionality(rows, columns)
    assert both[0] == 0
    assert both[1].isnan()


def test_positivity() -> None:
    query, key = weights(4, 4, 5, 40)
    eigenvalues = torch.linalg.eigvals(dense(query, key))
    want = eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1)
    torch.testing.assert_close(positivity(eigenvalues), want)
    assert float(positivity(torch.linalg.eigvals(query[0] @ query[0].mT))) == pytest.approx(1.0)
    assert positivity(torch.zeros(5)).isnan()
