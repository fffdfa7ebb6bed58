"""One number of health: what the verdicts of all heads come to."""

import math
from typing import Any

import pytest
import torch

from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.verdicts import FLAGGED, head_health, healthy_share

LAYERS, HEADS = ["layer_00", "layer_01"], 4


def record(**values: Any) -> RunRecord:
    """A record of two layers of four ordinary heads, but for what is given."""
    ordinary = {
        "entropy": torch.full((8,), 2.0),
        "entropy_normalized": torch.full((8,), 0.6),
        "max_prob": torch.full((8,), 0.4),
        "max_abs_logit": torch.full((8,), 5.0),
        "sink_first": torch.full((8,), 0.1),
    }
    history = History(LAYERS, [HEADS] * 2)
    history.append(0, ordinary | {name: torch.tensor(value) for name, value in values.items()})
    return RunRecord(attention=history)


def test_all_is_well() -> None:
    assert healthy_share(record()) == 1.0


def test_a_head_beyond_clipping_counts() -> None:
    logits = [5.0] * 8
    logits[2] = 150.0
    found = record(max_abs_logit=logits)
    assert healthy_share(found) == 7 / 8
    assert healthy_share(found, ["layer_00"]) == 3 / 4
    assert healthy_share(found, ["layer_01"]) == 1.0


def test_a_layer_of_one_key_counts_as_a_whole() -> None:
    assert healthy_share(record(entropy_normalized=[0.01] * 4 + [0.6] * 4)) == 1 / 2
    # A single sharp head is no fault.
    assert healthy_share(record(entropy_normalized=[0.01] + [0.6] * 7)) == 1.0


def test_nan_is_a_fault_and_no_data_is_none() -> None:
    assert healthy_share(record(max_abs_logit=[math.nan] + [5.0] * 7)) == 7 / 8
    nothing = {name: [math.nan] * 8 for name in record().attention.values}  # type: ignore[union-attr]
    assert math.isnan(healthy_share(record(**nothing)))


def test_weights_alone_say_nothing() -> None:
    spectrum = History(LAYERS, [HEADS] * 2)
    spectrum.append(0, {"frobenius_sq": torch.ones(8), "trace": torch.ones(8)})
    assert math.isnan(healthy_share(RunRecord(spectrum=spectrum)))
    assert math.isnan(healthy_share(RunRecord()))


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_share_of_the_table(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = record(
        entropy_normalized=torch.rand(8, generator=generator).square().tolist(),
        max_abs_logit=(200 * torch.rand(8, generator=generator)).tolist(),
    )
    verdicts = [row.verdict for row in head_health(found)]
    assert healthy_share(found) == sum(verdict not in FLAGGED for verdict in verdicts) / 8
