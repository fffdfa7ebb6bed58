"""Spectra of updates against dense matrices in float64."""

import math

import pytest
import torch
from oracles import dense_forms
from torch import Tensor

from lightning_qk.functional import effective_rank, stable_rank, update_spectra

FORMS = ("delta2", "delta3")


def weights(seed: int, heads: int = 4, kv_heads: int = 2, d_head: int = 3, d_model: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, count, d_head, d_model, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads)
    ]


def forms(query: Tensor, key: Tensor) -> Tensor:
    """Those of both layers."""
    return torch.stack([dense_forms(*pair) for pair in zip(query, key, strict=True)])


def dense(form: Tensor) -> dict[str, Tensor]:
    """All four statistics of large matrices."""
    values = torch.linalg.svdvals(form)
    share = values.square() / values.square().sum(-1, keepdim=True)
    norm = torch.linalg.matrix_norm(form)
    return {
        "norm": norm,
        "sigma_1": values[..., 0],
        "stable_rank": (norm / values[..., 0]) ** 2,
        "effective_rank": torch.special.entr(share).sum(-1).exp(),
    }


def oracle(before: list[Tensor], change: list[Tensor]) -> dict[str, Tensor]:
    first = forms(change[0], before[1]) + forms(before[0], change[1])
    both = {"delta2": first, "delta3": forms(*change)}
    return {f"{form}_{name}": value for form in FORMS for name, value in dense(both[form]).items()}


@pytest.mark.parametrize("d_head", [3, 8], ids=["narrow", "twice d_head above d_model"])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_against_dense(size, d_head):
    before = weights(0, d_head=d_head)
    after = [old + size * new for old, new in zip(before, weights(1, d_head=d_head), strict=True)]
    want = oracle(before, [new - old for new, old in zip(after, before, strict=True)])
    got = update_spectra(*after, *before)
    assert got.keys() == want.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], rtol=1e-9, atol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_changes_of_single_and_half_precision_keep_their_digits(dtype):
    """The change of rounded weights, not the rounded change."""
    before = [old.to(dtype) for old in weights(2, d_model=48)]
    after = [old + 2**-6 * new.to(dtype) for old, new in zip(before, weights(3, d_model=48), strict=True)]
    change = [new.double() - old.double() for new, old in zip(after, before, strict=True)]
    want = oracle([old.double() for old in before], change)
    for name, value in update_spectra(*after, *before).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), want[name], rtol=2e-5, atol=0, msg=name)


def test_both_orders_are_the_whole_change():
    """Where one of the two weights stays, the first order is the change; else the second adds the rest."""
    before, change = weights(4), weights(5)
    query = [before[0] + change[0], before[1]]
    found = update_spectra(*query, *before)
    whole = dense(forms(*query) - forms(*before))
    for name, value in whole.items():
        torch.testing.assert_close(found[f"delta2_{name}"], value)
    assert (found["delta3_norm"] == 0).all()
    both = [old + new for old, new in zip(before, change, strict=True)]
    parts = oracle(before, change)
    gap = dense(forms(*both) - forms(*before))["norm"]
    assert (gap <= parts["delta2_norm"] + parts["delta3_norm"]).all()
    assert (gap >= (parts["delta2_norm"] - parts["delta3_norm"]).abs()).all()


@pytest.mark.parametrize("size", [1e-15, 1e12])
def test_ranks_do_not_depend_on_the_scale(size):
    before, change = ([w.float() for w in weights(seed)] for seed in (6, 7))
    after = [old + new for old, new in zip(before, change, strict=True)]
    plain = update_spectra(*after, *before)
    scaled = update_spectra(*(size * w for w in after), *(size * w for w in before))
    for name, value in plain.items():
        if name.endswith("rank"):
            torch.testing.assert_close(scaled[name], value, rtol=1e-4, atol=0)


def test_what_has_no_update():
    query, key = weights(8)
    same = update_spectra(query, key, query, key)
    for name, value in same.items():
        assert value.isnan().all() if name.endswith("rank") else (value == 0).all()
    broken = query.clone()
    broken[0, 2, 0, 0] = math.inf
    for value in update_spectra(broken, key * 2, query, key).values():
        assert value.isnan()[0].tolist() == [False, False, True, False] or value.isnan()[0].all()
    with pytest.raises(ValueError, match="one shape before and after"):
        update_spectra(query, key, query[:, :2], key)


def test_stable_rank():
    values = torch.tensor([[3e20, 3e20, 0.0], [1e-30, 1e-30, 1e-30], [2.0, 0.0, 0.0]])
    torch.testing.assert_close(stable_rank(values), torch.tensor([2.0, 3.0, 1.0]))
    assert stable_rank(torch.zeros(3)).isnan()
    assert stable_rank(torch.tensor([1.0, -1.0])).isnan()
    drawn = torch.rand(50, 6, dtype=torch.float64)
    # The Rényi entropy of order infinity is below that of Shannon.
    assert (stable_rank(drawn) <= effective_rank(drawn.square()) + 1e-12).all()
