"""Sinks and waivers against whole maps in float64, key by key."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import sinks_of_maps
from torch import Tensor

from lightning_qk.functional import attention_statistics, sink_statistics
from lightning_qk.functional import logits as module
from lightning_qk.functional.sinks import SINK_STATISTICS

BATCH, HEADS, N, D = 3, 4, 14, 6


def dense_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    padding: Tensor | None = None,
    learnt: Tensor | None = None,
    bias: Tensor | float = 0.0,
    threshold: float = 0.2,
) -> dict[str, Tensor]:
    """From whole maps in float64; (heads,)."""
    query, key = query.double(), key.double()
    batch, heads, n, d = query.shape
    m = key.shape[2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    visible = visible.expand(batch, heads, n, m)
    logits = (query @ key.mT * d**-0.5 + bias).masked_fill(~visible, -math.inf)
    if learnt is not None:
        logits = torch.cat([logits, learnt.double()[None, :, None, None].expand(batch, heads, n, 1)], -1)
    p = logits.softmax(-1).nan_to_num(0.0)[..., :m]
    return sinks_of_maps(p, value, visible, padding=padding, threshold=threshold)


def tensors(kv_heads: int = HEADS, n: int = N, m: int = N, d_value: int = D, dtype=torch.float32):
    """With a key that everybody looks at, whose value is short, and short values here and there."""
    query, key = 2 * torch.randn(BATCH, HEADS, n, D), torch.randn(BATCH, kv_heads, m, D)
    value = torch.randn(BATCH, kv_heads, m, d_value)
    key[:, :, 2] = 3 * query[:, :kv_heads].mean(2)
    query[:, 0] += 2 * key[:, 0, 2, None]
    value[:, :, 2] *= 0.05
    value[torch.rand(BATCH, kv_heads, m) < 0.15] *= 0.1
    return query.to(dtype), key.to(dtype), value.to(dtype)


def check(got: dict, want: dict, **tolerance) -> None:
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-5}
    assert tuple(got) == SINK_STATISTICS
    for name, value in got.items():
        torch.testing.assert_close(
            value.double(), want[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def places(n: int = N, m: int = N):
    return torch.arange(n)[:, None], torch.arange(m)[None]


EVERYTHING = torch.ones(1, 1, 1, 1, dtype=torch.bool)


@pytest.fixture(params=[1 << 22, 300], ids=["one chunk", "many chunks"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("_chunks")
class TestAgainstWholeMaps:
    @pytest.mark.parametrize("kv_heads", [4, 2, 1])
    @pytest.mark.parametrize("causal", [True, False])
    def test_causal_and_groups(self, kv_heads, causal):
        given_tensors = tensors(kv_heads)
        i, j = places()
        shown = (j <= i)[None, None] if causal else EVERYTHING
        got = sink_statistics(*given_tensors, is_causal=causal)
        want = dense_sinks(*given_tensors, shown)
        check(got, want)
        assert want["sink_number"].max() > 0
        assert want["sink_output"].max() > 0.01
        assert want["waiver_mass"].max() > 0.05

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("form", ["bool", "additive", "function"])
    def test_padding(self, side, causal, form):
        query, key, value = tensors(2)
        keep = torch.ones(BATCH, N, dtype=torch.bool)
        keep[1, slice(0, 5) if side == "left" else slice(-5, None)] = False
        i, j = places()
        shown = keep[:, None, None, :] & ((j <= i) if causal else torch.ones_like(j <= i))
        want = dense_sinks(query, key, value, shown, padding=keep)
        mask = {
            "bool": shown,
            "additive": torch.zeros(shown.shape).masked_fill(~shown, -1e9),
            "function": lambda b, h, q, k: keep[b, k] & ((k <= q) | (not causal)),
        }[form]
        # Padding may hold anything.
        for tensor in (query, key, value):
            tensor[1, :, ~keep[1]] = torch.nan
        check(sink_statistics(query, key, value, mask=mask), want)

    def test_windows_and_an_offset(self):
        query, key, value = tensors(n=5)
        i, j = places(5)
        ahead = j - (i + N - 5)
        shown = ((ahead <= 0) & (ahead > -4))[None, None]
        got = sink_statistics(query, key, value, is_causal=True, sliding_window=4, query_offset=N - 5)
        check(got, dense_sinks(query, key, value, shown))
        got = sink_statistics(query, key, value, mask=shown, self_attention=False)
        check(got, dense_sinks(query, key, value, shown))

    def test_more_sinks_than_dimensions(self):
        query, key, value = tensors(d_value=3)
        i, j = places()
        shown = ((i - j).abs() < 2)[None, None]
        want = dense_sinks(query, key, value, shown)
        check(sink_statistics(query, key, value, sliding_window=2), want)
        assert want["sink_number"].min() > 3
        assert want["sink_output"].min() > 0.999

    def test_learnt_sinks_are_no_keys(self):
        given_tensors = tensors(2)
        i, j = places()
        learnt = torch.tensor([-2.0, 0.0, 3.0, 60.0])
        got = sink_statistics(*given_tensors, is_causal=True, sinks=learnt)
        check(got, dense_sinks(*given_tensors, (j <= i)[None, None], learnt=learnt))
        assert got["sink_number"][3] == got["sink_share"][3] == 0

    def test_cross_attention_with_a_bias(self):
        query, key, value = tensors(m=9, d_value=11)
        bias = torch.randn(1, HEADS, N, 9)
        check(
            sink_statistics(query, key, value, bias=bias),
            dense_sinks(query, key, value, EVERYTHING, bias=bias),
        )

    def test_masks_of_each_head_and_rows_that_see_nothing(self):
        given_tensors = tensors()
        shown = torch.rand(BATCH, HEADS, N, N) < 0.4
        shown[0, :, 3] = False
        shown[1, 2, 5:8] = False
        shown[2] = False
        got = sink_statistics(*given_tensors, mask=shown, self_attention=False)
        check(got, dense_sinks(*given_tensors, shown))

    def test_counted_rows(self):
        query, key, value = tensors()
        keep = torch.rand(BATCH, N) < 0.5
        keep[2] = False
        query[~keep[:, None].expand(-1, HEADS, -1)] = torch.nan
        got = sink_statistics(query, key, value, query_mask=keep)
        check(
            got, dense_sinks(query.nan_to_num(0.0), key, value, EVERYTHING.expand(1, 1, N, N), padding=keep)
        )

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-4), (torch.float64, 1e-9)])
    def test_dtypes(self, dtype, tolerance):
        given_tensors = tensors(2, dtype=dtype)
        got = sink_statistics(*given_tensors)
        check(got, dense_sinks(*given_tensors, EVERYTHING), rtol=tolerance, atol=tolerance)

    def test_sequences_apart(self):
        query, key, value = tensors()
        i, j = places()
        got = sink_statistics(query, key, value, is_causal=True, per_sequence=True)
        for b in range(BATCH):
            one = slice(b, b + 1)
            want = dense_sinks(query[one], key[one], value[one], (j <= i)[None, None])
            for name in SINK_STATISTICS[:-1]:
                torch.testing.assert_close(
                    got[name][b].double(), want[name], rtol=1e-4, atol=1e-5, equal_nan=True
                )
        assert sink_statistics(query[:1], key[:1], value[:1])["waiver_position"].isnan().all()


def test_equal_values_are_one_direction():
    """The same token twice: two sinks, of which each explains what the other does."""
    query, key, value = tensors()
    key[:, :, 5] = key[:, :, 2]
    value[:, :, 5] = 3 * value[:, :, 2]
    got = sink_statistics(query, key, value)
    want = dense_sinks(query, key, value, EVERYTHING)
    assert want["sink_number"].max() >= 2
    check(got, want)


def test_catch_and_release():
    """What a sink's value is made of is what the head puts out, save for what the other keys add."""
    query, key = torch.ones(1, 1, 20, 4), torch.zeros(1, 1, 20, 4)
    key[..., 0, :] = 2.0
    value = torch.zeros(1, 1, 20, 3)
    value[..., 0, 0] = 1.0
    value[..., 1:, 1] = 1.0
    got = sink_statistics(query, key, value)
    p = math.exp(4) / (math.exp(4) + 19)
    assert got["sink_number"].item() == 1
    assert got["sink_share"].item() == 1
    assert got["sink_output"].item() == pytest.approx(p**2 / (p**2 + (1 - p) ** 2), rel=1e-5)


def waiving(places_of: list[int]) -> dict[str, Tensor]:
    value = torch.ones(len(places_of), 1, 24, 4)
    for sequence, place in enumerate(places_of):
        value[sequence, :, place] = 0.01
    query, key = torch.zeros(2, len(places_of), 1, 24, 4).unbind()
    return sink_statistics(query, key, value)


def test_waivers_by_position_and_by_features():
    assert waiving([0] * 6)["waiver_position"].item() == pytest.approx(1)
    # Never at the same place: as far below 0 as can be.
    assert waiving(list(range(6)))["waiver_position"].item() == pytest.approx(-1 / 23)
    assert 0.3 < waiving([0, 0, 0, 0, 7, 9])["waiver_position"].item() < 0.5
    assert waiving([0] * 6)["waiver_rate"].item() == pytest.approx(1 / 24)
    assert waiving([0] * 6)["waiver_mass"].item() == pytest.approx(1 / 24)
    # Unbiased by chance, however few the sequences are.
    drawn = [waiving(torch.randint(0, 24, (3,)).tolist())["waiver_position"].item() for _ in range(600)]
    assert sum(drawn) / 600 == pytest.approx(0, abs=0.02)


def test_padding_on_the_left_shifts_no_position():
    value = torch.ones(2, 1, 12, 4)
    value[0, :, 0] = value[1, :, 5] = 0.01
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[1, :5] = False
    query, key = torch.zeros(2, 2, 1, 12, 4).unbind()
    got = sink_statistics(query, key, value, mask=keep[:, None, None, :])
    assert got["waiver_position"].item() > 0.9


class TestSampling:
    def test_all_rows_are_no_sample(self):
        given_tensors = tensors()
        i, j = places()
        want = dense_sinks(*given_tensors, (j <= i)[None, None])
        check(sink_statistics(*given_tensors, is_causal=True, rows=N), want)

    def test_is_near_and_leaves_the_global_generator_alone(self):
        torch.manual_seed(4)
        query, key, value = (
            0.5 * torch.randn(2, 2, 400, 8),
            torch.randn(2, 1, 400, 8),
            torch.randn(2, 1, 400, 8),
        )
        query[..., 0] = key[:, :, 0, 0] = 4.5
        value[:, :, 0] *= 0.1
        want = sink_statistics(query, key, value, is_causal=True)
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(1)
        draws = [
            sink_statistics(query, key, value, is_causal=True, rows=64, generator=generator)
            for _ in range(40)
        ]
        assert torch.equal(torch.get_rng_state(), before)
        for name in SINK_STATISTICS:
            mean = torch.stack([draw[name] for draw in draws]).mean(0)
            torch.testing.assert_close(mean, want[name], rtol=0.05, atol=0.01, msg=name)
        assert want["sink_number"].min() >= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 20), st.floats(0.05, 0.9))
def test_laws(seed, n, m, scale, threshold):
    generator = torch.Generator().manual_seed(seed)
    query = scale * torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 1, m, 4, generator=generator, dtype=torch.float64).unbind()
    got = sink_statistics(query, key, value, threshold=threshold)
    for name in ("sink_share", "sink_output", "waiver_rate", "waiver_mass"):
        assert ((got[name] >= -1e-9) & (got[name] <= 1 + 1e-9)).all()
    assert (got["sink_number"] <= 1 / threshold).all()  # a row's attention is 1
    # Neither the values' scale nor a rotation of them changes anything.
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    again = sink_statistics(query, key, 7 * value @ turn, threshold=threshold)
    for name, expected in got.items():
        torch.testing.assert_close(again[name], expected, equal_nan=True, rtol=1e-6, atol=1e-7, msg=name)
    # The threshold of sink_rate.
    rate = attention_statistics(query, key)["sink_rate"]
    number = sink_statistics(query, key, value, threshold=0.3)["sink_number"]
    torch.testing.assert_close(number / m, rate)


def test_memory_is_linear(monkeypatch):
    query, key, value = torch.randn(3, 1, 2, 700, 4).unbind()
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 2 * 700 * 5)
    largest = []
    chunk = module.ProductLogits.chunk
    monkeypatch.setattr(module.ProductLogits, "chunk", lambda *a: largest.append(chunk(*a)) or largest[-1])
    sink_statistics(query, key, value, is_causal=True)
    assert max(one.logits.shape[2] for one in largest) <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "rows to be at least 1"),
        ({"threshold": 1.0}, "threshold between 0 and 1"),
        ({"value": torch.zeros(BATCH, 3, N, D)}, "value_heads dividing 4"),
        ({"value": torch.zeros(BATCH, HEADS, N + 1, D)}, "expected a value"),
        ({"query_mask": torch.ones(BATCH, 3)}, "query_mask of shape"),
    ],
)
def test_bad_arguments(arguments, message):
    query, key, value = tensors()
    with pytest.raises(ValueError, match=message):
        sink_statistics(**{"query": query, "key": key, "value": value, **arguments})
