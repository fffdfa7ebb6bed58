"""A layer has one label in a run, whoever watches it, with whichever others, and whatever cannot be read."""

import models
import pytest
import torch

from lightning_qk import (
    AttentionMonitor,
    HiddenStateMonitor,
    PositionMonitor,
    QKClip,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
)
from lightning_qk.heads import reader as reading
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.probes import HeadReport

ENCODER = ("encoder_layer_00", "encoder_layer_01")
MONITORS = (QKSpectrumMonitor, AttentionMonitor, TokenMonitor, SinkMonitor, PositionMonitor)


class Translation(models.Job):
    """Blocks of an encoder and a decoder, with cross-attention."""

    def __init__(self):
        super().__init__(models.t5())

    def training_step(self, batch, batch_idx):
        return self.inner["network"](input_ids=batch, labels=batch[:, :9].contiguous()).loss


def fit(callbacks):
    torch.manual_seed(0)
    models.trainer(callbacks, max_steps=1).fit(Translation(), models.tokens())
    return callbacks


def label_of(monitor) -> dict[str, str]:
    return dict(zip(monitor.labels, monitor.history.layers, strict=True))


@pytest.mark.parametrize("kind", MONITORS)
def test_a_label_does_not_depend_on_modules(kind):
    options = {"every_n_steps": 1, "report": False}
    every, encoder, decoder = fit(
        [
            kind(**options),
            kind(modules="*.encoder.*", **options),
            kind(modules="*.decoder.*", **options),
        ]
    )
    assert encoder.history.layers == ENCODER
    assert set(ENCODER).isdisjoint(decoder.history.layers)
    assert label_of(encoder) | label_of(decoder) == label_of(every)


def test_a_label_does_not_depend_on_what_can_be_read(monkeypatch):
    """Attention is captured of layers with weights that cannot be read."""
    read = reading.layer_reader

    def refuse(site, *rest):
        if ".decoder." in site.name:
            raise UnreadLayer("it is of the decoder")
        return read(site, *rest)

    monkeypatch.setattr(reading, "layer_reader", refuse)
    spectrum, attention, hidden = fit(
        [
            kind(every_n_steps=1, report=False)
            for kind in (QKSpectrumMonitor, AttentionMonitor, HiddenStateMonitor)
        ]
    )
    assert spectrum.history.layers == ENCODER
    assert set(ENCODER) < set(attention.history.layers)
    assert set(ENCODER) < set(hidden.history.layers)


def test_interventions_and_head_reports_have_the_monitors_labels():
    clip = QKClip(modules="*.decoder.*", cap=1e-3)
    spectrum, _ = fit([QKSpectrumMonitor(every_n_steps=1, report=False), clip])
    clipped = {sentence.split()[2] for _, sentence in clip.event_log.events}
    assert clipped
    assert clipped <= set(spectrum.history.layers) - set(ENCODER)
    job = Translation()
    ids = next(iter(models.tokens()))
    rows = HeadReport.from_model(
        job.inner["network"], [{"input_ids": ids, "labels": ids[:, :9].contiguous()}]
    ).rows
    assert {row.layer for row in rows} == set(spectrum.history.layers)
