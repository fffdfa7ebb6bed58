"""Attention statistics against dense softmax, row by row in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import dense_attention

from lightning_qk.functional import attention_statistics
from lightning_qk.functional import logits as module
from lightning_qk.functional.attention import EXTREMES, MEAN_STATISTICS, STATISTICS

BATCH, HEADS, N, D = 2, 4, 13, 8


def tensors(kv_heads: int = HEADS, n: int = N, m: int = N, dtype=torch.float32):
    query = 2 * torch.randn(BATCH, HEADS, n, D)
    key = torch.randn(BATCH, kv_heads, m, D)
    # A key that everybody looks at, so that sinks are among what is compared.
    key[:, 0, 2] = 3 * query[:, 0].mean(1)
    return query.to(dtype), key.to(dtype)


def check(got: dict, want: dict, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    assert set(got) == set(want)
    for name, value in got.items():
        torch.testing.assert_close(value.double(), want[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def positions(n: int = N, m: int = N):
    return torch.arange(n)[:, None], torch.arange(m)[None]


def padding_mask(side: str) -> torch.Tensor:
    """True for real tokens, (batch, n): the second sequence has four of padding."""
    keep = torch.ones(BATCH, N, dtype=torch.bool)
    if side == "left":
        keep[1, :4] = False
    else:
        keep[1, -4:] = False
    return keep


@pytest.fixture(params=[1 << 22, 300], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunks")
class TestMasks:
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    def test_bidirectional(self, kv_heads):
        query, key = tensors(kv_heads)
        check(attention_statistics(query, key), dense_attention(query, key))

    @pytest.mark.parametrize("how", ["flag", "bool", "additive", "additive min"])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_causal(self, how, kv_heads):
        query, key = tensors(kv_heads)
        i, j = positions()
        visible = (j <= i)[None, None]
        low = torch.finfo(torch.float32).min if how == "additive min" else -torch.inf
        mask = {
            "flag": None,
            "bool": visible,
            "additive": torch.zeros(visible.shape).masked_fill(~visible, low),
        }[how.removesuffix(" min")]
        got = attention_statistics(query, key, mask=mask, is_causal=how == "flag")
        check(got, dense_attention(query, key, visible))

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("additive", [True, False])
    def test_padding(self, side, causal, additive):
        query, key = tensors()
        keep = padding_mask(side)
        i, j = positions()
        # As models build it: padding keys are hidden, padding queries still look at the others.
        visible = keep[:, None, None, :] & ((j <= i) if causal else torch.ones_like(j <= i))
        mask = torch.zeros(visible.shape).masked_fill(~visible, -1e4) if additive else visible
        got = attention_statistics(query, key, mask=mask)
        check(got, dense_attention(query, key, visible, padding=keep))

    @pytest.mark.parametrize("rows", [None, 6])
    def test_padding_may_hold_anything(self, rows):
        query, key = tensors()
        keep = padding_mask("left")
        mask = keep[:, None, None, :] & torch.ones(N, N, dtype=torch.bool).tril()
        want = attention_statistics(
            query, key, mask=mask, rows=rows, generator=torch.Generator().manual_seed(1)
        )
        query[1, :, :4] = torch.nan
        key[1, :, :4] = torch.inf
        got = attention_statistics(
            query, key, mask=mask, rows=rows, generator=torch.Generator().manual_seed(1)
        )
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, msg=name)
            assert value.isfinite().all()

    def test_sliding_window(self):
        query, key = tensors()
        i, j = positions()
        visible = ((j <= i) & (i - j < 4))[None, None]
        check(attention_statistics(query, key, mask=visible), dense_attention(query, key, visible))
        got = attention_statistics(query, key, is_causal=True, sliding_window=4)
        check(got, dense_attention(query, key, visible))
        both = ((i - j).abs() < 3)[None, None]
        check(attention_statistics(query, key, sliding_window=3), dense_attention(query, key, both))

    def test_packed_sequences(self):
        query, key = tensors()
        i, j = positions()
        visible = ((j <= i) & ((i < 6) == (j < 6)))[None, None]
        check(attention_statistics(query, key, mask=visible), dense_attention(query, key, visible))

    def test_mask_of_each_head(self):
        query, key = tensors()
        visible = torch.rand(BATCH, HEADS, N, N) < 0.5
        check(attention_statistics(query, key, mask=visible), dense_attention(query, key, visible))

    @pytest.mark.parametrize("kind", ["causal", "padding", "documents", "heads", "keys"])
    def test_functions(self, kind):
        query, key = tensors(2)
        i, j = positions()
        keep = padding_mask("left")
        document = torch.tensor([[0] * 6 + [1] * 7, [0] * 2 + [1] * 11])
        function, visible = {
            "causal": (lambda b, h, q, k: k <= q, (j <= i)[None, None]),
            "padding": (
                lambda b, h, q, k: keep[b, k] & (k <= q),
                keep[:, None, None, :] & (j <= i),
            ),
            "documents": (
                lambda b, h, q, k: document[b, q] == document[b, k],
                (document[:, :, None] == document[:, None, :])[:, None],
            ),
            "heads": (
                lambda b, h, q, k: (q - k).abs() <= h + 1,
                ((i - j).abs() <= torch.arange(HEADS)[:, None, None] + 1)[None],
            ),
            "keys": (lambda b, h, q, k: k < 9, (j < 9)[None, None].expand(1, 1, N, N)),
        }[kind]
        padding = keep if kind == "padding" else None
        if kind == "keys":
            padding = (torch.arange(N) < 9).expand(BATCH, -1)
        got = attention_statistics(query, key, mask=function)
        check(got, dense_attention(query, key, visible, padding=padding))
        # The same rows of each sequence are sampled, and the same keys shown to them.
        draws = [
            attention_statistics(query, key, mask=mask, rows=5, generator=torch.Generator().manual_seed(3))
            for mask in (function, visible)
        ]
        check(draws[0], {name: value.double() for name, value in draws[1].items()})

    def test_a_function_with_causality_and_a_window(self):
        query, key = tensors(n=5)
        i, j = positions(5)
        keep = padding_mask("left")
        offset = N - 5
        ahead = j - i - offset
        visible = keep[:, None, None, :] & (ahead <= 0) & (ahead > -4)
        got = attention_statistics(
            query,
            key,
            mask=lambda b, h, q, k: keep[b, k],
            is_causal=True,
            sliding_window=4,
            query_offset=offset,
            self_attention=True,
        )
        check(got, dense_attention(query, key, visible, offset=offset))

    def test_a_function_sees_few_rows_at_a_time(self, monkeypatch):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", BATCH * HEADS * N * 2)
        seen = []

        def function(batch, head, query, key):
            seen.append(torch.broadcast_shapes(batch.shape, head.shape, query.shape, key.shape))
            return key <= query

        attention_statistics(*tensors(), mask=function)
        assert {shape[2] for shape in seen} <= {1, 2}
        assert all(shape[:2] == (BATCH, HEADS) for shape in seen)

    @pytest.mark.parametrize("offset", [4 - N, 0])
    @pytest.mark.parametrize("causal", [True, False])
    def test_windows_that_some_queries_are_beyond(self, causal, offset):
        query, key = tensors(n=N, m=4)
        i, j = positions(N, 4)
        ahead = j - (i + offset)
        visible = (ahead.abs() < 3) & ((ahead <= 0) | (not causal))
        want = dense_attention(query, key, visible[None, None], offset=offset)
        options = {"is_causal": causal, "sliding_window": 3, "query_offset": offset}
        check(attention_statistics(query, key, **options), want)
        # As many rows as there are of those that see a key: all of them are drawn, and no other.
        draw = attention_statistics(query, key, rows=int(visible.any(1).sum()), **options)
        check({name: draw[name] for name in want}, want)

    def test_cross_attention(self):
        query, key = tensors(m=9)
        check(attention_statistics(query, key), dense_attention(query, key))
        # As long as the keys by chance: hidden keys say nothing about the queries.
        query, key = tensors()
        keep = padding_mask("right")
        got = attention_statistics(query, key, mask=keep[:, None, None, :], self_attention=False)
        check(got, dense_attention(query, key, keep[:, None, None, :]))

    def test_newest_queries_of_a_cache(self):
        query, key = tensors(n=5)
        i, j = positions(5)
        visible = (j <= i + N - 5)[None, None]
        want = dense_attention(query, key, visible, offset=N - 5)
        check(attention_statistics(query, key, is_causal=True, query_offset=N - 5), want)
        check(attention_statistics(query, key, mask=visible, query_offset=N - 5), want)

    @pytest.mark.parametrize("causal", [True, False])
    def test_learnt_sinks(self, causal):
        query, key = tensors(2)
        i, j = positions()
        visible = (j <= i)[None, None] if causal else None
        sinks = torch.tensor([-1.0, 0.0, 2.0, 30.0])
        got = attention_statistics(query, key, is_causal=causal, sinks=sinks)
        check(got, dense_attention(query, key, visible, sinks=sinks))
        assert got["sink_learnt"][3] > 0.99

    def test_fully_masked_rows(self):
        query, key = tensors()
        visible = torch.ones(BATCH, 1, N, N, dtype=torch.bool)
        visible[0, :, 3:6] = False
        visible[1] = False
        got = attention_statistics(query, key, mask=visible)
        check(got, dense_attention(query, key, visible))
        minimum = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        check(attention_statistics(query, key, mask=minimum), dense_attention(query, key, visible))
        nothing = attention_statistics(query, key, mask=torch.zeros_like(visible))
        assert all(value.isnan().all() for value in nothing.values())

    def test_bias_softcap_and_scaling(self):
        query, key = tensors()
        bias = torch.randn(1, HEADS, N, N)
        i, j = positions()
        visible = (j <= i)[None, None]
        got = attention_statistics(query, key, is_causal=True, bias=bias, softcap=1.5, scaling=0.7)
        check(got, dense_attention(query, key, visible, bias=bias, softcap=1.5, scaling=0.7))
        # An additive mask may carry the bias.
        mask = bias.masked_fill(~visible, -torch.inf)
        check(attention_statistics(query, key, mask=mask), dense_attention(query, key, visible, bias=bias))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype):
        query, key = tensors(2, dtype=dtype)
        i, j = positions()
        got = attention_statistics(query, key, is_causal=True)
        assert got["entropy"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check(got, dense_attention(query, key, (j <= i)[None, None]))

    def test_large_logits_do_not_overflow_or_cancel(self):
        query, key = tensors()
        got = attention_statistics(1e3 * query, 1e3 * key)
        want = dense_attention(1e3 * query, 1e3 * key)
        check(got, want, rtol=1e-4, atol=1e-4)

    def test_per_sequence(self):
        query, key = tensors()
        got = attention_statistics(query, key, is_causal=True, per_sequence=True)
        for b in range(BATCH):
            one = attention_statistics(query[b : b + 1], key[b : b + 1], is_causal=True)
            check({name: value[b] for name, value in got.items()}, {n: v.double() for n, v in one.items()})


def test_query_mask_and_one_visible_key():
    query, key = tensors()
    keep = torch.rand(BATCH, N) < 0.5
    got = attention_statistics(query, key, query_mask=keep)
    check(got, dense_attention(query, key, padding=keep))
    # Every row sees itself alone: entropy 0, and no row has a normalized one.
    alone = attention_statistics(query, key, mask=torch.eye(N, dtype=torch.bool))
    assert alone["entropy"].abs().max() == 0
    assert alone["diagonal"].min() == 1
    assert alone["entropy_normalized"].isnan().all()


class TestSampling:
    def big(self):
        query, key = torch.randn(2, 2, 200, 8), torch.randn(2, 1, 200, 8)
        keep = torch.ones(2, 200, dtype=torch.bool)
        keep[1, 120:] = False
        return query, key, keep[:, None, None, :] & torch.ones(200, 200, dtype=torch.bool).tril()

    def test_is_unbiased_with_honest_errors(self):
        query, key, mask = self.big()
        truth = attention_statistics(query, key, mask=mask)
        draws = [attention_statistics(query, key, mask=mask, rows=24) for _ in range(400)]
        for name in MEAN_STATISTICS:
            if name in ("sink_learnt", "sink_rate"):
                continue
            values = torch.stack([draw[name] for draw in draws])
            errors = torch.stack([draw[name + "_se"] for draw in draws])
            spread = values.std(0)
            # The mean of 400 draws is within 4 of its own standard errors of the truth.
            assert ((values.mean(0) - truth[name]).abs() < 4 * spread / 400**0.5 + 1e-6).all(), name
            torch.testing.assert_close(errors.square().mean(0).sqrt(), spread, rtol=0.15, atol=1e-4)

    def test_samples_only_valid_rows_and_bounds_maxima(self):
        query, key, mask = self.big()
        query[1, :, 120:] = 1e6  # padding queries: they would dominate everything
        truth = attention_statistics(query, key, mask=mask)
        draw = attention_statistics(query, key, mask=mask, rows=50)
        for name in EXTREMES:
            assert (draw[name] <= truth[name]).all()
            assert name + "_se" not in draw
        assert (draw["max_logit"] < 1e3).all()

    def test_all_rows_have_no_error(self):
        query, key, mask = self.big()
        want = attention_statistics(query, key, mask=mask)
        got = attention_statistics(query, key, mask=mask, rows=200)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value)
        assert (got["entropy_se"] == 0).all()
        # One sequence is shorter than the sample: it is used whole, the other is sampled.
        both = attention_statistics(query, key, mask=mask, rows=150, per_sequence=True)
        assert (both["entropy_se"][1] == 0).all()
        assert (both["entropy_se"][0] > 0).all()

    def test_own_generator_leaves_the_global_one_alone(self):
        query, key, mask = self.big()
        before = torch.get_rng_state()
        first = attention_statistics(
            query, key, mask=mask, rows=9, generator=torch.Generator().manual_seed(3)
        )
        again = attention_statistics(
            query, key, mask=mask, rows=9, generator=torch.Generator().manual_seed(3)
        )
        assert torch.equal(torch.get_rng_state(), before)
        for name in first:
            torch.testing.assert_close(first[name], again[name], rtol=0, atol=0, equal_nan=True)

    def test_sink_rate_of_a_clear_sink(self):
        query, key = torch.randn(1, 2, 256, 8), 0.1 * torch.randn(1, 2, 256, 8)
        query[..., 0] = 6
        key[:, :, 0, 0] = 6
        truth = attention_statistics(query, key, is_causal=True)["sink_rate"]
        draw = attention_statistics(query, key, is_causal=True, rows=64)["sink_rate"]
        assert (truth > 0).all()
        torch.testing.assert_close(draw, truth, rtol=0.2, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.floats(0.01, 30))
def test_laws(seed, n, m, causal, scale):
    generator = torch.Generator().manual_seed(seed)
    query = scale * torch.randn(1, 2, n, 4, generator=generator, dtype=torch.float64)
    key = torch.randn(1, 2, m, 4, generator=generator, dtype=torch.float64)
    got = attention_statistics(query, key, is_causal=causal and n == m)
    eps = 1e-9
    assert set(got) == {name for name in STATISTICS if name != "sink_learnt"}
    for name in ("max_prob", "diagonal", "sink_first", "sink_rate", "linear_share"):
        assert ((got[name] >= -eps) & (got[name] <= 1 + eps)).all()
    assert ((got["entropy"] >= 0) & (got["entropy"] <= torch.tensor(float(m)).log() + 1e-6)).all()
    assert ((got["participation"] >= 1 - eps) & (got["participation"] <= m + 1e-6)).all()
    assert (got["max_logit"] <= got["max_abs_logit"] + eps).all()
    # A constant added to all logits of a row changes no probability.
    shifted = attention_statistics(
        query, key, is_causal=causal and n == m, bias=torch.full((1, 1, 1, 1), 5.0).expand(1, 1, n, m)
    )
    for name in ("entropy", "participation", "logit_std", "distance", "linear_share"):
        torch.testing.assert_close(shifted[name], got[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.ones(BATCH, N, dtype=torch.bool)}, r"\[:, None, None, :\]"),
        ({"mask": torch.ones(BATCH, 1, N, N, dtype=torch.long)}, r"\.bool\(\)"),
        ({"mask": "causal"}, "tensor or a function"),
        ({"mask": lambda b, h, q, k: (k <= q).float()}, "to return a boolean tensor"),
        (
            {"mask": lambda b, h, q, k: torch.ones(3, 3, dtype=torch.bool)},
            r"got torch.bool of shape \(3, 3\)",
        ),
        ({"mask": lambda b, h, q, k: True}, "got bool"),
        ({"rows": 0}, "rows to be at least 1"),
        ({"sinks": torch.zeros(3)}, "one learnt sink a head"),
        ({"query_mask": torch.ones(BATCH, 3)}, "query_mask of shape"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        attention_statistics(*tensors(), **arguments)


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="kv_heads dividing heads"):
        attention_statistics(torch.zeros(1, 4, 5, 8), torch.zeros(1, 3, 5, 8))
    with pytest.raises(ValueError, match="expected query"):
        attention_statistics(torch.zeros(4, 5, 8), torch.zeros(4, 5, 8))
