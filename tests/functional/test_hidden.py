"""Statistics of hidden states against dense float64, sequence by sequence."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_qk.functional import hidden, hidden_statistics
from lightning_qk.functional.hidden import HIDDEN_STATISTICS, HiddenSums, finish, hidden_sums


def states(batch: int = 3, n: int = 7, d: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, d, generator=generator, dtype=torch.float64) + 0.5
    x[0, 1, 2] = -2500.0  # massive, when the median is below 2.5
    return x


def dense(x: Tensor) -> dict[str, float]:
    """Of one sequence without padding, from the definitions."""
    x = x.double()
    n, d = x.shape
    unit = x / x.norm(dim=1, keepdim=True)
    cosines = [float(unit[i] @ unit[j]) for i in range(n) for j in range(n) if i != j]
    singular = torch.linalg.svd(x).S
    share = singular / singular.sum()
    numbers = sorted((abs(v) for v in x.flatten().tolist()), reverse=True)
    median = numbers[-1 - (len(numbers) - 1) // 2]
    massive = sum(v > 100 and v >= 1000 * median for v in numbers)
    return {
        "rank_residual": float((x - torch.ones(n, 1, dtype=torch.float64) @ x.mean(0)[None]).norm()),
        "rank_residual_relative": float((x - x.mean(0)).norm() / x.norm()),
        "cosine": sum(cosines) / len(cosines),
        "cosine_abs": sum(abs(c) for c in cosines) / len(cosines),
        "effective_rank": math.exp(-sum(float(p * p.log()) for p in share if p > 0)),
        "singular_min": float(singular.min()),
        "singular_max": float(singular.max()),
        "token_norm": float(x.norm(dim=1).mean()),
        "activation_top_1": numbers[0],
        "activation_top_2": numbers[1],
        "activation_top_3": numbers[2],
        "activation_median": median,
        "massive_count": float(massive),
        "massive_share": massive / (n * d),
        "activation_max": numbers[0],
    }


@pytest.mark.parametrize(("n", "d"), [(7, 5), (4, 9), (2, 3)])
def test_every_statistic_is_that_of_its_definition(n, d):
    x = states(n=n, d=d)
    got = hidden_statistics(x, per_sequence=True)
    assert tuple(got) == HIDDEN_STATISTICS
    want = [dense(sequence) for sequence in x]
    assert want[0]["massive_count"] == 1
    for name in HIDDEN_STATISTICS:
        expected = torch.tensor([one[name] for one in want], dtype=torch.float64)
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-9, msg=name)
    pooled = hidden_statistics(x)
    assert pooled["cosine_abs"].item() == pytest.approx(sum(one["cosine_abs"] for one in want) / 3)
    assert pooled["activation_max"].item() == 2500.0


def test_pairs_in_chunks(monkeypatch):
    x = states(n=11)
    whole = hidden_statistics(x)["cosine_abs"]
    monkeypatch.setattr(hidden, "CHUNK_ELEMENTS", 70)
    torch.testing.assert_close(hidden_statistics(x)["cosine_abs"], whole)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_padding_is_as_if_it_were_not_there(garbage):
    x = states(n=6, d=4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0]])
    padded = torch.where(mask.bool()[..., None], x, garbage)
    got = hidden_statistics(padded, mask=mask, per_sequence=True)
    for index in range(3):
        want = dense(x[index][mask[index].bool()])
        for name, value in want.items():
            assert got[name][index].item() == pytest.approx(value, rel=1e-6, abs=1e-9), name
    # Sampled among the tokens that count, all of them where there are few.
    sampled = hidden_statistics(
        padded, mask=mask, tokens=4, per_sequence=True, generator=torch.Generator().manual_seed(0)
    )
    assert all(value.isfinite().all() for value in sampled.values())
    for name, value in got.items():
        torch.testing.assert_close(sampled[name][1:], value[1:], msg=name)


def test_sequences_without_two_tokens_have_no_rank():
    x = states(n=3)
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
    got = hidden_statistics(x, mask=mask, per_sequence=True)
    for name in ("rank_residual", "cosine", "cosine_abs", "effective_rank", "singular_min"):
        assert got[name].isnan().tolist() == [False, True, True], name
    for name in ("token_norm", "activation_top_1", "activation_max", "massive_share"):
        assert got[name].isnan().tolist() == [False, False, True], name
    pooled = hidden_statistics(x, mask=mask)
    torch.testing.assert_close(pooled["rank_residual"], got["rank_residual"][0])
    assert all(v.isnan() for v in hidden_statistics(x, mask=torch.zeros(3, 3)).values())
    assert all(v.isnan() for v in hidden_statistics(torch.zeros(0, 3, 4)).values())


def test_collapse():
    token = torch.randn(1, 1, 6)
    same = hidden_statistics(token.expand(2, 8, 6))
    assert same["rank_residual_relative"].item() < 1e-6
    assert same["cosine"].item() == pytest.approx(1, abs=1e-6)
    assert same["effective_rank"].item() == pytest.approx(1, abs=1e-5)
    assert same["singular_min"].item() < 1e-5
    zero = hidden_statistics(torch.zeros(1, 4, 3))
    assert zero["rank_residual"].item() == 0
    assert zero["cosine"].isnan()
    # A difference far below the tokens' common part, which a difference of squares would lose.
    offset = 1000 * torch.ones(1, 4, 6, dtype=torch.float64)
    offset[0, 0, 0] += 1e-2
    want = (offset - offset.mean(1, keepdim=True)).norm()
    assert hidden_statistics(offset.float())["rank_residual"].item() == pytest.approx(want.item(), rel=0.02)


def test_what_is_not_finite_is_seen():
    x = states().float()
    x[1, 2, 3] = math.nan
    got = hidden_statistics(x, per_sequence=True)
    for name in ("rank_residual", "cosine", "cosine_abs", "effective_rank", "token_norm"):
        assert got[name].isnan().tolist() == [False, True, False], name
    assert hidden_statistics(x)["rank_residual"].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x = states(n=9, d=6).clamp(-300, 300).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = hidden_statistics(x)
    want = hidden_statistics(x.double())
    for name in HIDDEN_STATISTICS:
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-4, atol=1e-5, msg=name)


def test_sampled_pairs_have_no_bias_and_the_rest_is_of_all_tokens():
    x = states(n=12, d=4)
    whole = hidden_statistics(x)
    generator = torch.Generator().manual_seed(1)
    before = torch.get_rng_state()
    runs = [hidden_statistics(x, tokens=4, generator=generator) for _ in range(400)]
    assert torch.equal(torch.get_rng_state(), before)
    drawn = torch.stack([run["cosine_abs"] for run in runs])
    error = drawn.std() / math.sqrt(len(drawn))
    assert (drawn.mean() - whole["cosine_abs"]).abs() < 4 * error
    assert error < 0.02
    for name in ("rank_residual", "rank_residual_relative", "cosine", "token_norm", "activation_top_3"):
        assert all(torch.equal(run[name], whole[name]) for run in runs)
    assert all(run["effective_rank"] <= 4 for run in runs)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 9), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_laws(n, d, seed, scale):
    x = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got, scaled = hidden_statistics(x), hidden_statistics(scale * x)
    for name in ("rank_residual_relative", "cosine", "cosine_abs", "effective_rank"):
        torch.testing.assert_close(got[name], scaled[name], rtol=1e-6, atol=1e-9)
    for name in ("rank_residual", "singular_max", "token_norm", "activation_top_1"):
        torch.testing.assert_close(scale * got[name], scaled[name], rtol=1e-6, atol=1e-9)
    assert 0 <= got["rank_residual_relative"] <= 1 + 1e-9
    assert 1 - 1e-9 <= got["effective_rank"] <= min(n, d) + 1e-9
    assert abs(got["cosine"]) <= got["cosine_abs"] + 1e-9 <= 1 + 2e-9
    # A turn of the features changes nothing but single numbers.
    turn = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    turned = hidden_statistics(x @ turn)
    for name in ("rank_residual", "cosine_abs", "effective_rank", "token_norm"):
        torch.testing.assert_close(got[name], turned[name], rtol=1e-6, atol=1e-9)


def test_sums_of_parts_are_those_of_the_whole():
    x = states(batch=4)
    parts = [hidden_sums(x[:1]), hidden_sums(x[1:])]
    joined = HiddenSums(
        sum(part.total.sum(1) for part in parts),
        sum(part.weight.sum(1) for part in parts),
        torch.stack([part.maximum.amax(1) for part in parts]).amax(0),
    )
    for name, value in finish(joined).items():
        torch.testing.assert_close(value, hidden_statistics(x)[name], msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": torch.zeros(3, 4)}, r"\(batch, n, d\)"),
        ({"states": torch.zeros(1, 3, 4, dtype=torch.long)}, "floating"),
        ({"states": torch.zeros(1, 3, 4), "mask": torch.ones(1, 4)}, "mask of shape"),
        ({"states": torch.zeros(1, 3, 4), "tokens": 1}, "tokens to be at least 2"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        hidden_statistics(**arguments)


def test_sampled_sequences_stand_for_the_others():
    x = states(batch=9, n=4, d=3)
    whole = hidden_sums(x)
    generator = torch.Generator().manual_seed(2)
    drawn = [hidden_sums(x, sequences=2, generator=generator) for _ in range(600)]
    for name in ("rank_residual", "effective_rank", "massive_share"):
        place = HIDDEN_STATISTICS.index(name)
        totals = torch.stack([sums.total[place].sum() for sums in drawn])
        assert abs(totals.mean() - whole.total[place].sum()) <= 4 * totals.std() / math.sqrt(len(drawn)), name
        weights = torch.stack([sums.weight[place].sum() for sums in drawn])
        torch.testing.assert_close(weights, whole.weight[place].sum().expand_as(weights))
    assert torch.equal(hidden_sums(x, sequences=9).total, whole.total)
    with pytest.raises(ValueError, match="sequences to be at least 1"):
        hidden_sums(x, sequences=0)
