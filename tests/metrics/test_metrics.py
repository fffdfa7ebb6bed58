"""Metrics: pooling over calls, sequences and ranks, against one computation over everything."""

import models
import pytest
import torch
from oracles import dense_moments

from lightning_qk.functional import attention_statistics, qk_eigenvalues, signal_propagation_probability
from lightning_qk.functional.attention import MEAN_STATISTICS, STATISTICS, attention_sums
from lightning_qk.functional.rotary import rotate_between
from lightning_qk.heads.reader import head_projections
from lightning_qk.metrics.attention import AttentionStatistics
from lightning_qk.metrics.spectrum import SPECTRUM_STATISTICS, QKSpectrum


def calls(count: int = 3):
    """Calls of one layer with batches and lengths that differ, padding in some."""
    out = []
    for index in range(count):
        n = 9 + 4 * index
        query, key = torch.randn(index + 1, 4, n, 8), torch.randn(index + 1, 2, n, 8)
        keep = torch.ones(index + 1, n, dtype=torch.bool)
        keep[0, : 2 * index] = False
        out.append((query, key, keep[:, None, None, :] & torch.ones(n, n, dtype=torch.bool).tril()))
    return out


def pooled(batches) -> dict[str, torch.Tensor]:
    """Mean over all rows of all calls, by hand from one sequence at a time."""
    totals = {name: torch.zeros(4) for name in STATISTICS}
    weights = {name: torch.zeros(4) for name in STATISTICS}
    for query, key, mask in batches:
        for b in range(len(query)):
            one = attention_statistics(query[b : b + 1], key[b : b + 1], mask=mask[b : b + 1])
            rows, keys = mask[b, 0].any(-1).sum(), mask[b, 0].any(-2).sum()
            for name, value in one.items():
                weight = {"sink_rate": 1, "entropy_normalized": rows - 1, "key_norm": keys}.get(name, rows)
                if name.startswith("max_") and name != "max_prob":
                    totals[name] = torch.maximum(totals[name], value)
                    weights[name] = torch.ones(4)
                else:
                    totals[name] += value * weight
                    weights[name] += weight
    return {name: totals[name] / weights[name] for name in totals}


def test_attention_metric_pools_rows_over_calls():
    batches = calls()
    metric = AttentionStatistics({"other": 2, "layer": 4})
    sums = [attention_sums(query, key, mask=mask) for query, key, mask in batches]
    metric.update({"layer": sums[:1]})
    metric.update({"layer": sums[1:]})
    got = metric.compute()
    want = pooled(batches)
    for name in STATISTICS:
        assert got[name].shape == (6,)
        assert got[name][:2].isnan().all()  # a layer that was not seen
        if name == "sink_learnt":
            assert got[name].isnan().all()
        else:
            torch.testing.assert_close(got[name][2:], want[name], msg=lambda m, n=name: f"{n}: {m}")
    for name in MEAN_STATISTICS:
        if name != "sink_learnt":
            assert (got[name + "_se"][2:] == 0).all()
    metric.reset()
    assert all(value.isnan().all() for value in metric.compute().values())


def test_attention_metric_merges_ranks_like_one_process():
    batches = calls(4)
    sums = [attention_sums(query, key, mask=mask) for query, key, mask in batches]
    alone = AttentionStatistics({"layer": 4})
    alone.update({"layer": sums})
    ranks = [AttentionStatistics({"layer": 4}) for _ in range(2)]
    ranks[0].update({"layer": sums[:1]})
    ranks[1].update({"layer": sums[1:]})
    merged = AttentionStatistics({"layer": 4})
    # What torchmetrics does with the states of two ranks.
    for name, reduce in merged._reductions.items():
        setattr(merged, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    for name, value in alone.compute().items():
        torch.testing.assert_close(merged.compute()[name], value, equal_nan=True)


def test_sampled_errors_shrink_as_calls_are_pooled():
    query, key = torch.randn(1, 4, 400, 8), torch.randn(1, 4, 400, 8)
    errors = []
    for count in (1, 9):
        metric = AttentionStatistics({"layer": 4})
        metric.update({"layer": [attention_sums(query, key, rows=40) for _ in range(count)]})
        errors.append(metric.compute()["entropy_se"].mean())
    assert (errors[0] / errors[1]).item() == pytest.approx(3, rel=0.25)


def test_attention_metric_refuses_unknown_layers():
    sums = attention_sums(torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8))
    with pytest.raises(ValueError, match="'b' with 4 heads"):
        AttentionStatistics({"a": 4}).update({"b": [sums]})


@pytest.mark.parametrize("support", ["model", "head"])
def test_spectrum_metric(support):
    model = models.llama()
    projections = head_projections(model)
    metric = QKSpectrum({name: head.heads for name, head in projections.items()}, support)
    metric.update(projections)
    got = metric.compute()
    assert tuple(got) == SPECTRUM_STATISTICS
    n = 8 if support == "head" else 32
    for index, (name, head) in enumerate(projections.items()):
        part = slice(4 * index, 4 * index + 4)
        want = dense_moments(head.query, head.key, n=n)
        for statistic, value in want.items():
            torch.testing.assert_close(got[statistic][part].double(), value, rtol=1e-4, atol=1e-6)
        eigenvalues = qk_eigenvalues(head.query, head.key)
        torch.testing.assert_close(got["spectral_radius"][part], eigenvalues.abs().amax(-1))
        torch.testing.assert_close(metric.spectra[name], eigenvalues)
        s = head.scaling
        steps = [
            signal_propagation_probability(
                0.05 + 0.1 * k,
                *(want["trace"] * s, want["trace_sq"] * s**2, want["frobenius_sq"] * s**2),
            )
            for k in range(10)
        ]
        propagation = torch.stack(steps)
        for statistic, want_value in (
            ("propagation", propagation.mean(0)),
            ("localization", propagation[5:].mean(0) - propagation[:5].mean(0)),
        ):
            torch.testing.assert_close(got[statistic][part].double(), want_value, rtol=1e-4, atol=1e-6)
    metric.update(projections)
    torch.testing.assert_close(metric.compute()["trace"], got["trace"])


def test_cross_attention_has_singular_values_alone():
    projections = head_projections(models.t5())
    metric = QKSpectrum({name: head.heads for name, head in projections.items()})
    metric.update(projections)
    got = metric.compute()
    start = 0
    for head in projections.values():
        part = slice(start, start + head.heads)
        start += head.heads
        assert got["trace"][part].isfinite().all() == head.self_attention
        assert got["singular_max"][part].isfinite().all() != head.self_attention
        if not head.self_attention:
            dense = torch.linalg.matrix_norm(head.query.mT.double() @ head.key.double(), ord=2)
            torch.testing.assert_close(got["singular_max"][part].double(), dense, rtol=1e-4, atol=1e-5)


def test_spectrum_metric_at_offsets():
    """Of a model whose layers rotate by different frequencies, and one that does not: NaN there."""
    import transformers

    options = {**models._GROUPED, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    model = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**options))
    projections = {**head_projections(model), **head_projections(models.bert())}
    heads = {name: head.heads for name, head in projections.items()}
    metric = QKSpectrum(heads, offsets=(0, 7, -2))
    metric.update(projections)
    got = metric.compute()
    alone = QKSpectrum(heads)
    alone.update(projections)
    for name, value in alone.compute().items():
        torch.testing.assert_close(got[name], value, equal_nan=True)
    start = 0
    for head in projections.values():
        part = slice(start, start + head.heads)
        start += head.heads
        for offset in (0, 7, -2):
            at = f"offset_{offset}"
            if head.rotary is None:
                assert got[f"{at}/trace"][part].isnan().all()
                assert got[f"{at}/spectral_radius"][part].isnan().all()
                continue
            turn = rotate_between(torch.eye(8), head.rotary, torch.tensor(-offset))
            key = turn @ head.key.repeat_interleave(head.heads // head.kv_heads, 0)
            for statistic, value in dense_moments(head.query, key).items():
                torch.testing.assert_close(
                    got[f"{at}/{statistic}"][part].double(), value, rtol=1e-4, atol=1e-6
                )
            radius = qk_eigenvalues(head.query, head.key, offset=-offset, rotary=head.rotary).abs().amax(-1)
            torch.testing.assert_close(got[f"{at}/spectral_radius"][part], radius)
    # The rotation matters: at distance 7 the traces of the two layers are others, and not by the same factor.
    assert not torch.allclose(got["offset_7/trace"][:8], got["trace"][:8], rtol=1e-2)
    torch.testing.assert_close(got["offset_0/trace"][:8], got["trace"][:8])
