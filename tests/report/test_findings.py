"""The first screen: like heads are one finding with what to do, and what the guard named is named."""

import torch
from simulated_run import simulated_record

from lightning_qk.record.advice import ADVICE, guard_alarms
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.verdicts import VERDICTS, head_health
from lightning_qk.report.findings import first_screen


def screen(record: RunRecord) -> dict:
    return first_screen(record, head_health(record))


def with_attention(**values: list[float]) -> RunRecord:
    count = len(next(iter(values.values())))
    history = History([f"layer_{i:02d}" for i in range(count // 4)], [4] * (count // 4))
    history.append(3, {name: torch.tensor(value) for name, value in values.items()})
    return RunRecord(attention=history)


def test_every_verdict_has_advice() -> None:
    assert set(ADVICE) == set(VERDICTS) - {"ok"}


def test_many_sinks_are_one_finding() -> None:
    record = with_attention(
        entropy_normalized=[0.5] * 40,
        entropy=[2.5] * 40,
        sink_first=[0.9] * 36 + [0.0] * 4,
        max_abs_logit=[5.0] * 39 + [150.0],
    )
    fault, sinks = screen(record)["groups"]
    assert (fault.verdict, fault.title, fault.is_open) == ("saturated", "head 3 of layer_09", True)
    assert (sinks.verdict, sinks.title, sinks.is_open) == ("sink", "36 heads in 9 of 10 layers", False)
    assert len(sinks.rows) == 36
    assert screen(record)["headline"] == "1 of 40 heads is at fault now."


def test_few_layers_are_named() -> None:
    record = with_attention(
        entropy_normalized=[0.5] * 20, max_abs_logit=[150.0] * 5 + [5.0] * 15, entropy=[2.5] * 20
    )
    (fault,) = screen(record)["groups"]
    assert fault.title == "5 heads: all 4 of layer_00, 1 of layer_01"
    assert fault.why == "layer_00, head 0: its largest |logit| is 150, above 100, where Kimi K2 clips"


def test_alarms_name_layer_and_head() -> None:
    record = simulated_record(layers=12)
    record.events = [
        (3, "CollapseGuard: the largest logit of head 2 of net.h.1.attn (layer_01) has gone from 1 to 40"),
        (4, "QKClip: layer_02 was clipped"),
        (9, "CollapseGuard: the tokens before net.h.11.attn (layer_11) have a mean cosine of 0.99"),
        (9, "CollapseGuard: the largest logit of head 7 of layer_03 has gone up"),
        (11, "CollapseGuard: the loss has risen by 20 %"),
    ]
    assert [(one.step, one.label, one.head) for one in guard_alarms(record)] == [
        (3, "layer_01", 2),
        (9, "layer_11", None),
        (9, "layer_03", None),  # which has four heads
        (11, "", None),
    ]
    assert screen(record)["headline"] == "No head of 48 is at fault now; the guard gave 4 alarms."


def test_a_label_within_another_is_not_meant() -> None:
    record = RunRecord(attention=History(["attn", "block.attn", "attn.1"], [1, 1, 1]))
    record.events = [(1, "CollapseGuard: the logits of head 0 of block.attn are not finite")]
    assert guard_alarms(record)[0].label == "block.attn"


def test_the_state_of_the_run() -> None:
    record = simulated_record()
    kinds = {}
    for state in (
        "",
        "finished at step 5",
        "running at step 3 of 5",
        "interrupted at step 2",
        "failed with X",
    ):
        record.info = {"State": state} if state else {}
        kinds[state.split(" ")[0]] = screen(record)["state_kind"]
    assert kinds == {"": "", "finished": "good", "running": "live", "interrupted": "bad", "failed": "bad"}


def test_the_loss_is_drawn_first_and_the_guard_next() -> None:
    record = simulated_record()
    assert screen(record)["loss"] is None
    record.scalars["guard/score"] = ([0, 1], [0.1, 0.2])
    assert screen(record)["loss"] == 2
    record.scalars = {"empty": ([], []), "train/loss": ([0, 1], [3.0, 2.0]), **record.scalars}
    assert screen(record)["loss"] == 0
