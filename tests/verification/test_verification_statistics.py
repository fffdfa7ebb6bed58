"""The check of statistics: it passes what is right, and fails what is off by little."""

import pytest
import torch
from coverage_toys import toy

from lightning_qk.heads.reader import find_attention
from lightning_qk.verification.statistics import CapturedCalls, dense, dense_statistics, verify_statistics
from lightning_qk.verification.trace import Trace
from tools.coverage.feed import feeds


def run(model_type: str, implementation: str) -> tuple[CapturedCalls, Trace, str]:
    model = toy(model_type)
    model.set_attn_implementation(implementation)
    sites = find_attention(model)
    trace = Trace(model)
    captured = CapturedCalls(model, sites, trace, {})
    with captured, torch.no_grad(), trace:
        model(**next(iter(feeds(model, model_type))))
    return captured, trace, next(iter(sites))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["bert", "llama", "t5"])
def test_right_statistics_pass_and_wrong_ones_fail(model_type: str, implementation: str) -> None:
    captured, trace, name = run(model_type, implementation)
    events = [event for event in trace.events if any(frame.name == name for frame in event.frames)]
    assert (
        events and all(event.fused == (implementation == "sdpa") for event in events)
    ) or model_type == "t5"
    right_now = verify_statistics(captured, name, events)
    assert right_now.ok
    assert right_now.error < 1e-5
    for statistic in ("entropy", "participation", "max_prob", "sink_first", "distance", "diagonal"):
        right = captured.calls[name][0][statistic]
        wrong = right.clone()
        wrong[-1] += 1e-3 * max(float(wrong[-1].abs()), 1)
        captured.calls[name][0][statistic] = wrong
        assert statistic in verify_statistics(captured, name, events).reason
        captured.calls[name][0][statistic] = right
    assert "calls were captured" in verify_statistics(captured, name, []).reason
    captured.calls.clear()
    assert "no attention call" in verify_statistics(captured, name, events).reason


def test_fused_and_plain_softmax_are_the_same() -> None:
    maps = []
    for implementation in ("eager", "sdpa"):
        _, trace, _ = run("llama", implementation)
        maps.append(dense(trace.events[0]))
    assert maps[0] is not None
    assert maps[1] is not None
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-5, atol=1e-6)


def test_dense_statistics_of_known_maps() -> None:
    uniform = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64)
    found = {name: float(value) for name, value in dense_statistics(uniform, 4).items()}
    assert found["entropy"] == pytest.approx(1.3862943611)
    assert found["participation"] == pytest.approx(4)
    assert found["max_prob"] == pytest.approx(0.25)
    assert found["distance"] == pytest.approx(1.25)
    assert found["diagonal"] == pytest.approx(0.25)
    padded = uniform.clone()
    padded[..., 3] = 0
    padded[..., :3] = 1 / 3
    # The last token is seen by none: its row is padding too.
    assert float(dense_statistics(padded, 4)["distance"]) == pytest.approx((1 + 2 / 3 + 1) / 3)
    sink = torch.cat([uniform[..., :3, :3], torch.full((1, 1, 3, 1), 0.25, dtype=torch.float64)], -1)
    found = {name: float(value) for name, value in dense_statistics(sink, 3).items()}
    assert found["participation"] == pytest.approx(4)
    assert found["distance"] == pytest.approx(8 / 9 * 0.75)
