"""Verdicts on single heads, and their order."""

import math

import models
import pytest
import torch

from lightning_qk import AttentionMonitor, HeadReport
from lightning_qk.functional import qk_moments
from lightning_qk.functional.attention import SINK_ATTENTION
from lightning_qk.guard import CollapseDetector, Place, Reading
from lightning_qk.guard.detectors import Sensitivity
from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.record.verdicts import (
    COLLAPSED_ENTROPY,
    QK_CLIP_LOGIT,
    VERDICTS,
    extreme_heads,
    head_health,
    is_sink,
    layer_health,
)


def record_of(
    attention: dict[str, list[float]] | None, spectrum: dict[str, list[float]] | None = None
) -> RunRecord:
    record = RunRecord()
    for name, values in (("attention", attention), ("spectrum", spectrum)):
        if values:
            history = History(["layer_00"], [len(next(iter(values.values())))])
            history.append(0, {key: torch.tensor(value) for key, value in values.items()})
            setattr(record, name, history)
    return record


@pytest.mark.parametrize(
    ("values", "verdict", "words"),
    [
        ({"entropy_normalized": 0.5, "max_abs_logit": 150.0}, "saturated", "100, where Kimi K2 clips"),
        ({"entropy_normalized": 0.5, "max_abs_logit": 2e4}, "saturated", "1e4"),
        ({"entropy_normalized": 0.02, "max_abs_logit": 9.0}, "saturated", "0.020"),
        ({"entropy_normalized": 0.99, "max_abs_logit": 1.0}, "uniform", "0.990"),
        ({"entropy_normalized": 0.5, "max_abs_logit": 1.0, "sink_first": 0.6}, "sink", "0.60"),
        ({"entropy_normalized": 0.5, "max_abs_logit": 1.0, "sink_first": 0.1}, "ok", ""),
        ({"entropy_normalized": 0.5, "max_abs_logit": math.nan}, "non-finite", "logits hold NaN"),
        ({"entropy_normalized": math.inf}, "non-finite", "entropy_normalized is infinite"),
        ({"entropy_normalized": math.nan}, "no data", "nothing is known"),
    ],
)
def test_measured(values: dict[str, float], verdict: str, words: str) -> None:
    (row,) = head_health(record_of({name: [value] for name, value in values.items()}))
    assert row.verdict == verdict
    assert words in row.reason
    assert (row.label, row.head) == ("layer_00", 0)


def test_weights_alone_flag_nothing_but_what_is_not_finite() -> None:
    spectrum = {
        "frobenius_sq": [1.0, 1.0, 1.0, math.nan],
        "propagation": [0.01, 0.5, 0.5, 0.5],
        "localization": [0.0, 0.01, 0.9, 0.0],
    }
    verdicts = {row.head: row.verdict for row in head_health(record_of(None, spectrum))}
    assert verdicts == {0: "not judged", 1: "not judged", 2: "not judged", 3: "non-finite"}
    (layer,) = layer_health(record_of(None, {name: value[:3] for name, value in spectrum.items()}))
    assert (layer.verdict, layer.reason) == ("not judged", "attention was not measured")
    attention = {"entropy_normalized": [0.5] * 4, "max_abs_logit": [1.0] * 4}
    measured = {row.head: row.verdict for row in head_health(record_of(attention, spectrum))}
    assert measured == {0: "ok", 1: "ok", 2: "ok", 3: "non-finite"}


def test_growing_logits() -> None:
    """As the guard sees it: large, and on the way beyond its limit within its horizon."""
    history = History(["layer_00"], [3])
    for step in range(12):
        logits = torch.tensor([15.0, 4.0 * 1.1**step, 30.0 * 1.08**step])
        history.append(step, {"max_abs_logit": logits, "entropy_normalized": torch.full((3,), 0.5)})
    rows = {row.head: row for row in head_health(RunRecord(attention=history))}
    assert rows[0].verdict == rows[1].verdict == "ok"  # steady; growing, and small
    assert rows[2].verdict == "ok"  # 70, and 103 in five steps
    for step in range(12, 14):
        logits = torch.tensor([15.0, 12.0, 30.0 * 1.08**step])
        history.append(step, {"max_abs_logit": logits, "entropy_normalized": torch.full((3,), 0.5)})
    (worst, *_) = head_health(RunRecord(attention=history))
    assert (worst.head, worst.verdict) == (2, "growing")
    assert "to 81.6" in worst.reason


def test_the_worst_come_first() -> None:
    rows = head_health(
        record_of(
            {
                "entropy_normalized": [0.5, 0.01, 0.5, 0.5, 0.995],
                "max_abs_logit": [1.0, 2.0, 120.0, 900.0, 0.1],
            }
        )
    )
    assert [row.head for row in rows] == [3, 2, 4, 1, 0]
    assert [row.verdict for row in rows] == ["saturated", "saturated", "uniform", "sharp", "ok"]
    order = [list(VERDICTS).index(row.verdict) for row in rows]
    assert order == sorted(order)


def test_of_nothing_there_is_nothing() -> None:
    assert head_health(RunRecord()) == []


def test_the_first_in_something() -> None:
    record = record_of(
        {"max_abs_logit": [1.0, 7.0, math.nan], "entropy_normalized": [0.5, 0.3, 0.9]},
        {"spectral_radius": [3.0, 1.0, math.inf]},
    )
    rows = {row.head: row.reason for row in extreme_heads(record)}
    assert rows == {
        1: "the largest |logit| of all heads, 7.00; the sharpest of all heads: normalized entropy 0.300",
        0: "the largest |eigenvalue| of all heads, 3.00",
    }
    assert extreme_heads(RunRecord()) == []


@pytest.mark.parametrize("own_init", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_fresh_model_of_seven_tokens_has_no_sink(name: str, own_init: bool) -> None:
    """Uniform causal attention over 7 tokens gives the first key 0.37, and a fresh T5 is not nearly uniform."""
    torch.manual_seed(1)
    network = getattr(models, name)()
    if own_init:
        network = type(network)(network.config)
    ids = torch.randint(3, models.VOCABULARY, (8, 7))
    given = {"input_ids": ids, "labels": ids} if name == "t5" else {"input_ids": ids}

    class SevenTokens(models.Job):
        def training_step(self, batch, batch_idx):
            return self.inner["network"](**given).logits.float().square().mean()

    monitor = AttentionMonitor(rows=None, report=False, figures_every=0)
    models.trainer([monitor], max_steps=1).fit(SevenTokens(network), models.tokens())
    record = RunRecord()
    monitor.contribute(record)
    assert (record.attention.values["sink_first"][-1] > SINK_ATTENTION).any()
    assert "sink" not in {row.verdict for row in layer_health(record)}
    if own_init:
        assert "sink" not in {row.verdict for row in head_health(record)}
        assert "sink" not in {row.kind for row in HeadReport.from_model(network, [given]).rows}


@pytest.mark.parametrize("tokens", [3, 7, 64, 1000])
def test_a_sink_takes_more_than_uniform_attention_gives(tokens: int) -> None:
    visible = torch.arange(1.0, tokens + 1)
    uniform = float((1 / visible).mean())
    entropy = float(visible.log().mean())
    assert not is_sink(uniform, entropy, 1.0)
    assert not is_sink(uniform + 0.15 * (1 - uniform), entropy, 1.0)
    assert is_sink(max(0.31, uniform + 0.3 * (1 - uniform)), entropy, 1.0)
    assert is_sink(0.31)  # of an older record
    assert not is_sink(math.nan, entropy, 1.0)


def test_judges_do_not_contradict_each_other() -> None:
    """Layer, heads and HeadReport on the same numbers, around every threshold."""
    for entropy in (0.01, 0.049, 0.051, 0.5, 0.97, 0.981, 1.0):
        for logit in (5.0, 99.0, 101.0):
            for top in (0.2, 0.96):
                values = {"entropy_normalized": entropy, "max_abs_logit": logit, "max_prob": top}
                record = record_of({name: [value] * 2 for name, value in values.items()})
                (layer,), (head, _) = layer_health(record), head_health(record)
                assert layer.verdict == head.verdict
                kind = HeadReport.from_history(record).rows[0].kind
                assert (kind == "saturated") == (head.verdict == "saturated")
                assert (kind == "diffuse") == (head.verdict == "uniform")
                assert (entropy > 0.98) == (kind == "diffuse") or kind == "saturated"


@pytest.mark.parametrize("falls", [False, True])
def test_what_the_guard_warns_of_the_table_names_within_its_horizon(falls: bool) -> None:
    history, detector = History(["layer_00"], [2]), CollapseDetector()
    alarm = None
    for step in range(40):
        values = {
            "entropy_normalized": torch.full((2,), 0.6 * 0.8**step if falls else 0.5),
            "max_abs_logit": torch.full((2,), 5.0 if falls else 4.0 * 1.15**step),
        }
        history.append(step, values)
        places = {"attn": [Place("layer_00", head) for head in range(2)]}
        reading = Reading(step, [1.0], {f"attn/{name}": value for name, value in values.items()}, places)
        if alarm is None and detector.observe(reading).fired:
            alarm = step
        if alarm is not None and step - alarm >= detector.sensitivity.horizon:
            break
    (row,) = layer_health(RunRecord(attention=history))
    assert alarm is not None
    assert row.verdict == "saturated"
    assert Sensitivity().entropy == COLLAPSED_ENTROPY
    assert Sensitivity().logit >= QK_CLIP_LOGIT


@pytest.mark.parametrize(("cosines", "verdict"), [([0.5, 0.9], "collapsed"), ([0.99, 0.99], "fresh")])
def test_a_model_that_collapses_before_it_learns_is_no_fresh_one(cosines: list[float], verdict: str) -> None:
    torch.manual_seed(0)
    heads, d_head, width = 8, 16, 64
    query, key = (torch.randn(heads, d_head, width) * width**-0.5 for _ in range(2))
    spectrum = {name: value.tolist() for name, value in qk_moments(query, key).items()}
    record = record_of({"entropy_normalized": [0.999] * heads}, spectrum)
    record.shapes = {"layer_00": LayerShape(d_head, width, d_head**-0.5)}
    hidden = History(["layer_00"], [1], 16)
    for step, value in enumerate([*cosines, *[0.99] * Sensitivity.window]):
        hidden.append(step, {"cosine": torch.tensor([value])})
    record.hidden = hidden
    assert {row.verdict for row in head_health(record)} == {verdict}
    (layer,) = layer_health(record)
    assert layer.verdict == verdict
