"""Means of heads as a metric: pooled over calls and ranks as over one call of everything."""

import pytest
import torch

from lightning_qk.functional import sink_statistics
from lightning_qk.functional.attention import MeanSums
from lightning_qk.functional.sinks import SINK_STATISTICS, sink_sums
from lightning_qk.metrics.collector import SumAccumulator
from lightning_qk.metrics.means import HeadMeans


def calls() -> list[tuple[torch.Tensor, ...]]:
    return [tuple(torch.randn(3, batch, 4, 11, 8).unbind()) for batch in (1, 3, 2)]


def pooled(batches) -> dict[str, torch.Tensor]:
    everything = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    return sink_statistics(*everything, is_causal=True)


def check(got, want, heads=slice(None)):
    for name in SINK_STATISTICS[:-1]:
        torch.testing.assert_close(got[name][heads].double(), want[name], rtol=1e-5, atol=1e-6, msg=name)


def test_pools_calls_and_ranks():
    batches = calls()
    sums = [sink_sums(*one, is_causal=True) for one in batches]
    metric = HeadMeans({"other": 2, "layer": 4}, SINK_STATISTICS)
    metric.update({"layer": sums[:1]})
    metric.update({"layer": sums[1:]})
    got = metric.compute()
    check(got, pooled(batches), slice(2, None))
    assert all(value[:2].isnan().all() for value in got.values())
    assert [part.shape for part in metric.split(got["sink_number"]).values()] == [(2,), (4,)]
    ranks = [HeadMeans({"layer": 4}, SINK_STATISTICS) for _ in range(2)]
    ranks[0].update({"layer": sums[:2]})
    ranks[1].update({"layer": sums[2:]})
    merged = HeadMeans({"layer": 4}, SINK_STATISTICS)
    for name, reduce in merged._reductions.items():
        setattr(merged, name, reduce(torch.stack([getattr(rank, name) for rank in ranks])))
    merged._update_count = 1
    check(merged.compute(), pooled(batches))


def test_heads_of_other_processes():
    """Each process has some of a layer's heads, as under tensor parallelism."""
    batches = calls()
    metric = HeadMeans({"layer": 4}, SINK_STATISTICS)
    for where in (slice(0, 1), slice(1, 4)):
        pool = SumAccumulator()
        for one in batches:
            sums = sink_sums(*(tensor[:, where] for tensor in one), is_causal=True)
            pool.add("layer", sums, heads=4, where=where)
            pool.add("left out", sums, heads=4, where=where)
        pool.leave_out(["left out"])
        pool.into(metric)
    check(metric.compute(), pooled(batches))


def test_leaves_out_layers_that_it_never_knew():
    """A layer that calls show to be no attention over tokens has no heads here, and is left out as others are."""
    batches = calls()
    metric = HeadMeans({"layer": 4, "other": 4}, SINK_STATISTICS)
    metric.update({name: [sink_sums(*one, is_causal=True) for one in batches] for name in metric.heads})
    metric.leave_out({"other", "unknown"})
    got = metric.compute()
    check(got, pooled(batches), slice(4))
    assert got["sink_number"][4:].isnan().all()


def test_refuses_unknown_layers():
    sums = MeanSums(torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    for heads in ({"a": 4}, {"b": 3}):
        with pytest.raises(ValueError, match="'b' with 4 heads"):
            HeadMeans(heads, ["x"]).update({"b": [sums]})
