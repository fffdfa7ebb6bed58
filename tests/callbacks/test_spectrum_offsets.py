"""QKSpectrumMonitor at relative offsets, and what it says of positions that add to the logits."""

import csv
import warnings

import models
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger

from lightning_qk import QKSpectrumMonitor, head_projections
from lightning_qk.functional import qk_eigenvalues, qk_moments


def fit(model, folder, **kwargs):
    monitor = QKSpectrumMonitor(every_n_steps=1, figures_every=0, report=False, **kwargs)
    job = models.Job(model)
    trainer = models.trainer([monitor], max_steps=2, logger=CSVLogger(folder, name="", version=""))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(job, models.tokens())
    return monitor, job, [str(warning.message) for warning in caught]


def logged(folder) -> set[str]:
    with open(folder / "metrics.csv", newline="") as file:
        return set(csv.DictReader(file).fieldnames or ())


def test_offsets_are_logged_and_are_those_of_the_weights(tmp_path):
    monitor, job, _ = fit(models.llama(), tmp_path, offsets=(0, 16))
    keys = logged(tmp_path)
    for name in ("eig_mean", "sym_var", "trace", "spectral_radius"):
        assert {f"qk/offset_{offset}/{name}/mean" for offset in (0, 16)} <= keys
    assert "qk/layer_01/offset_16/eig_var" in keys
    assert "qk/layer_01/offset_16/asymmetry" not in keys
    history = monitor.history
    read = head_projections(job).values()
    for statistic in ("trace", "eig_var", "frobenius_sq"):
        want = [
            qk_moments(head.query, head.key, offset=-16, rotary=head.rotary)[statistic].detach()
            for head in read
        ]
        torch.testing.assert_close(history.grid(f"offset_16/{statistic}", -1), torch.stack(want))
    radii = [
        qk_eigenvalues(head.query, head.key, offset=-16, rotary=head.rotary).abs().amax(-1).detach()
        for head in read
    ]
    torch.testing.assert_close(history.grid("offset_16/spectral_radius", -1), torch.stack(radii))
    assert monitor.notes == []


def test_nothing_is_logged_or_solved_at_offsets_unasked(tmp_path):
    monitor, _, _ = fit(models.llama(), tmp_path)
    assert not any("offset" in key for key in logged(tmp_path))
    assert all(
        not name.startswith("offset") for cores in monitor.weight_layers.metric.cores for name in cores.names
    )


def test_histograms_and_the_report_have_the_eigenvalues_without_rotation(tmp_path):
    monitor, _, _ = fit(models.llama(), tmp_path, offsets=(3,))
    assert set(monitor._eigenvalues) == set(monitor.weight_layers.metric.heads)


def test_layers_without_rotation_are_named_once(tmp_path):
    monitor, _, caught = fit(models.gpt2(), tmp_path, offsets=(1,))
    (note,) = monitor.notes
    assert "no rotation of queries and keys by position" in note
    assert "transformer.h.0.attn" in note
    assert sum(note in message for message in caught) == 1
    assert not any("offset" in key for key in logged(tmp_path))


def test_what_is_added_to_the_logits_is_said_once(tmp_path):
    monitor, _, caught = fit(models.t5(), tmp_path)
    (note,) = (note for note in monitor.notes if "content part" in note)
    assert "a bias for each relative position" in note
    assert sum(note in message for message in caught) == 1
    assert "EncDec" not in note


def test_alibi_is_named(tmp_path):
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=models.VOCABULARY)
    monitor, _, _ = fit(transformers.BloomForCausalLM(config), tmp_path)
    assert any("linear biases (ALiBi)" in note for note in monitor.notes)


def test_training_does_not_notice_offsets():
    def run(callbacks):
        torch.manual_seed(3)
        job = models.Job(models.llama())
        models.trainer(callbacks, max_steps=3).fit(job, models.tokens())
        return job, torch.get_rng_state()

    plain, rng = run([])
    watched, rng_watched = run([QKSpectrumMonitor(every_n_steps=1, offsets=(1, 5), report=False)])
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(rng, rng_watched)


@pytest.mark.parametrize("offsets", [(1.5,), ("a",), (True,)])
def test_offsets_must_be_integers(offsets):
    with pytest.raises(ValueError, match="integers"):
        QKSpectrumMonitor(offsets=offsets)
