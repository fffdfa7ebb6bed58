"""Moments and eigenvalues against dense d_model × d_model matrices in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense_forms, dense_moments
from torch.autograd import gradcheck

from lightning_qk.functional import Rotary, qk_eigenvalues, qk_moments, qk_singular_values
from lightning_qk.functional.spectrum import MOMENTS


def weights(heads: int = 4, kv_heads: int = 4, d_head: int = 8, d_model: int = 32, **kwargs):
    query = torch.randn(heads, d_head, d_model, **kwargs) / d_model**0.5
    key = torch.randn(kv_heads, d_head, d_model, **kwargs) / d_model**0.5
    # A mean that is not zero, as trained heads have.
    group = heads // kv_heads
    return query + 0.5 * key.repeat_interleave(group, dim=0), key


@pytest.mark.parametrize("support", ["model", "head"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_agree_with_dense_eigenvalues(dtype, kv_heads, support):
    query, key = (w.to(dtype) for w in weights(kv_heads=kv_heads))
    got = qk_moments(query, key, support=support)
    want = dense_moments(query, key, n=8 if support == "head" else None)
    assert set(got) == set(want) == set(MOMENTS)
    for name in want:
        assert got[name].shape == (4,)
        assert got[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_agree_at_the_size_of_a_real_model(dtype):
    query, key = (w.to(dtype) for w in weights(heads=2, kv_heads=1, d_head=64, d_model=768))
    want = dense_moments(query, key)
    for name, value in qk_moments(query, key).items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-4, atol=0)


def test_variance_does_not_cancel_where_the_spectrum_concentrates():
    # Eigenvalues 1 + 1e-3 on and off the diagonal: variance 1e-6 beside a squared mean of 1.
    query = torch.eye(8)[None]
    key = torch.diag(1 + 1e-3 * torch.tensor([1.0, -1.0] * 4))[None]
    assert qk_moments(query, key, support="head")["eig_var"].item() == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_sigma_is_the_covariance_of_the_tokens(kv_heads):
    query, key = weights(kv_heads=kv_heads, dtype=torch.float64)
    root = torch.randn(32, 32, dtype=torch.float64) / 5
    sigma = root @ root.T
    want = dense_moments(query, key, sigma)
    for name, value in qk_moments(query, key, sigma).items():
        torch.testing.assert_close(value, want[name], rtol=1e-8, atol=1e-12)


def test_layers_of_one_shape_are_one_batch():
    layers = [weights(kv_heads=2) for _ in range(3)]
    query = torch.stack([q for q, _ in layers])
    key = torch.stack([k for _, k in layers])
    batched = qk_moments(query, key)
    for index, layer in enumerate(layers):
        for name, value in qk_moments(*layer).items():
            torch.testing.assert_close(batched[name][index], value, rtol=1e-4, atol=1e-6)
    sigmas = torch.stack([torch.eye(32) * (index + 1) for index in range(3)])
    scaled = qk_moments(query, key, sigmas)["trace"]
    torch.testing.assert_close(scaled, batched["trace"] * torch.tensor([[1.0], [2.0], [3.0]]))


@pytest.mark.parametrize("name", MOMENTS)
def test_gradients_of_moments(name):
    query, key = weights(heads=2, kv_heads=1, d_head=3, d_model=5, dtype=torch.float64)
    query.requires_grad_()
    key.requires_grad_()
    for support in ("model", "head"):
        assert gradcheck(lambda q, k, s=support: qk_moments(q, k, support=s)[name], (query, key))


def test_gradient_of_eigenvalues():
    query, key = weights(heads=1, kv_heads=1, d_head=3, d_model=5, dtype=torch.float64)
    query.requires_grad_()
    assert gradcheck(lambda q: qk_eigenvalues(q, key).abs().sum(-1), (query,))


def test_penalty_under_autocast_is_still_float32():
    query, key = weights()
    plain = qk_moments(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = qk_moments(query, key)
    for name in plain:
        assert torch.equal(plain[name], mixed[name])


def test_reduced_matmul_precision_is_put_back():
    query, key = weights()
    torch.set_float32_matmul_precision("medium")
    try:
        qk_moments(query, key)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(-3, 3))
def test_laws_of_moments(seed, d_head, tilt):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, d_head, 7, dtype=torch.float64, generator=generator)
    key = torch.randn(1, d_head, 7, dtype=torch.float64, generator=generator) + tilt * query
    for support in ("model", "head"):
        moments = {name: value.item() for name, value in qk_moments(query, key, support=support).items()}
        assert abs(moments["trace_sq"]) <= moments["frobenius_sq"] * (1 + 1e-9)
        assert moments["sym_var"] >= -1e-9 * moments["frobenius_sq"]
        assert -1e-9 <= moments["asymmetry"] <= 1 + 1e-9
        assert -1e-9 <= moments["concentration"] <= 1 + 1e-9
    # W_QK does not change when queries and keys are transformed against each other.
    turn = torch.eye(d_head, dtype=torch.float64) + 0.1 * torch.randn(
        d_head, d_head, dtype=torch.float64, generator=generator
    )
    same = qk_moments(turn @ query, torch.linalg.inv(turn).T @ key)
    for name, value in qk_moments(query, key).items():
        torch.testing.assert_close(same[name], value, rtol=1e-5, atol=1e-7)


def test_eigenvalues_are_those_of_the_dense_matrix():
    query, key = weights(kv_heads=2, dtype=torch.float64)
    got = qk_eigenvalues(query, key)
    assert got.shape == (4, 8)
    assert (got.abs().diff(dim=-1) <= 1e-9).all()
    for head, form in enumerate(dense_forms(query, key)):
        dense = torch.linalg.eigvals(form)
        dense = dense[dense.abs().argsort(descending=True)]
        assert dense[8:].abs().max() < 1e-6
        for value in got[head]:
            assert (dense[:8] - value).abs().min() < 1e-8


def dense_turn(rotary: Rotary, offset: int, d_head: int = 8) -> torch.Tensor:
    """The rotation between two positions, entry by entry, with the scales of q and of k."""
    turn = torch.eye(d_head, dtype=torch.float64)
    pairs = len(rotary.inv_freq)
    for pair, angle in enumerate(rotary.inv_freq * offset):
        i, j = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + pairs)
        i, j = i + rotary.start, j + rotary.start
        turn[i, i] = turn[j, j] = angle.cos() * rotary.scale**2
        turn[i, j], turn[j, i] = -angle.sin() * rotary.scale**2, angle.sin() * rotary.scale**2
    return turn


FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
ROTATIONS = {
    f"{pairs} pairs{', interleaved' * interleaved} from {start}, scale {scale}": Rotary(
        FREQUENCIES[:pairs], interleaved, start, scale
    )
    for interleaved in (False, True)
    for pairs, start, scale in ((4, 0, 1.0), (2, 0, 1.0), (2, 4, 1.0), (1, 3, 1.0), (2, 4, 1.25), (4, 0, 0.8))
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_eigenvalues_at_a_rotary_offset(name):
    query, key = weights(kv_heads=2, dtype=torch.float64)
    rotary = ROTATIONS[name]
    offsets = torch.tensor([0, -3, 5])
    got = qk_eigenvalues(query, key, offset=offsets, rotary=rotary)
    assert got.shape == (3, 4, 8)
    for index, offset in enumerate(offsets.tolist()):
        forms = query.mT @ dense_turn(rotary, offset) @ key.repeat_interleave(2, dim=0)
        for head, form in enumerate(forms):
            dense = torch.linalg.eigvals(form)
            for value in got[index, head]:
                assert (dense - value).abs().min() < 1e-8
    single = qk_eigenvalues(query, key, offset=-3, rotary=rotary)
    torch.testing.assert_close(single, got[1])


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("support", ["model", "head"])
def test_moments_at_a_rotary_offset(name, support):
    query, key = weights(kv_heads=2, dtype=torch.float64)
    rotary = ROTATIONS[name]
    offsets = torch.tensor([0, -3, 5])
    got = qk_moments(query, key, support=support, offset=offsets, rotary=rotary)
    assert set(got) == set(MOMENTS)
    for index, offset in enumerate(offsets.tolist()):
        turned = dense_turn(rotary, offset) @ key.repeat_interleave(2, dim=0)
        want = dense_moments(query, turned, n=8 if support == "head" else None)
        single = qk_moments(query, key, support=support, offset=offset, rotary=rotary)
        for moment, value in want.items():
            torch.testing.assert_close(got[moment][index], value, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(single[moment], value, rtol=1e-8, atol=1e-10)


def test_moments_at_an_offset_under_a_covariance():
    query, key = weights(dtype=torch.float64)
    root = torch.randn(32, 32, dtype=torch.float64) / 32**0.5
    sigma = root @ root.T + 0.1 * torch.eye(32, dtype=torch.float64)
    rotary = Rotary(FREQUENCIES)
    got = qk_moments(query, key, sigma, offset=-2, rotary=rotary)
    want = dense_moments(query, dense_turn(rotary, -2) @ key, sigma)
    for moment, value in want.items():
        torch.testing.assert_close(got[moment], value, rtol=1e-8, atol=1e-10)


def test_moments_at_no_offset_are_those_without_a_rotation():
    query, key = weights(kv_heads=2)
    plain, turned = (qk_moments(query, key), qk_moments(query, key, offset=0, rotary=Rotary(FREQUENCIES)))
    for name in MOMENTS:
        torch.testing.assert_close(plain[name], turned[name])


def test_singular_values_of_cross_attention():
    query, key = torch.randn(4, 8, 32, dtype=torch.float64), torch.randn(2, 8, 20, dtype=torch.float64)
    dense = torch.linalg.svdvals(query.mT @ key.repeat_interleave(2, dim=0))
    torch.testing.assert_close(qk_singular_values(query, key), dense[:, :8])


def test_a_head_that_is_not_finite_does_not_harm_the_others():
    query, key = weights()
    clean = qk_eigenvalues(query, key)
    query[1, 0, 0] = torch.nan
    got = qk_eigenvalues(query, key)
    assert got[1].isnan().all()
    torch.testing.assert_close(got[[0, 2, 3]], clean[[0, 2, 3]])
    assert qk_moments(query, key)["trace"].isnan().tolist() == [False, True, False, False]
    assert qk_singular_values(query, key).isnan().all(-1).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        ((8, 32), (8, 32), "split the weights into heads"),
        ((4, 8, 32), (3, 8, 32), "kv_heads divides"),
        ((4, 8, 32), (4, 6, 32), "one d_head"),
        ((4, 8, 32), (4, 8, 20), "qk_singular_values"),
    ],
)
def test_shapes_that_do_not_fit(query, key, message):
    with pytest.raises(ValueError, match=message):
        qk_moments(torch.zeros(query), torch.zeros(key))


def test_other_bad_arguments():
    query, key = weights()
    with pytest.raises(ValueError, match="support to be 'model' or 'head', got 'all'"):
        qk_moments(query, key, support="all")
    with pytest.raises(ValueError, match="sigma of shape"):
        qk_moments(query, key, torch.eye(8))
    with pytest.raises(ValueError, match="rotary=None"):
        qk_eigenvalues(query, key, offset=2)
    with pytest.raises(ValueError, match="rotary=None"):
        qk_moments(query, key, offset=2)
    with pytest.raises(ValueError, match="from 6 to 10"):
        qk_eigenvalues(query, key, offset=2, rotary=Rotary(torch.ones(2), start=6))
    with pytest.raises(ValueError, match="at most d_head = 8"):
        qk_eigenvalues(query, key, offset=2, rotary=Rotary(torch.ones(5)))
