"""What monitors measure of attention that is steered, against a dense softmax with the same gates or cap."""

import lightning as L
import models
import pytest
import torch
from torch import nn

from lightning_qk import AttentionMonitor, AttentionPrior, DifferentiableAttentionMask, HardAttention, SoftCap
from lightning_qk.heads.sites import attention_sites
from lightning_qk.interventions.attention_mask import GatedAttention, OffsetGates

KINDS = ("gpt2", "llama", "mistral", "bert")


class Padded(models.Job):
    """Two sequences of each batch are padded, at one side or the other."""

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.step(batch))

    def step(self, batch):
        mask = torch.ones_like(batch)
        mask[0, -5:] = 0
        mask[1, :3] = 0
        return self.inner["network"](input_ids=batch, attention_mask=mask, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def fit(callbacks, kind="gpt2", job=None, **kwargs):
    L.seed_everything(3, verbose=False)
    job = Padded(getattr(models, kind)()) if job is None else job
    trainer = models.trainer(callbacks, **{"max_steps": 3, "log_every_n_steps": 1, **kwargs})
    trainer.fit(job, models.tokens(), models.tokens(4))
    return job, trainer


def monitor(**kwargs):
    return AttentionMonitor(rows=None, every_n_eval_batches=1, report=False, figures_every=0, **kwargs)


REMEDIES = {
    "mask": lambda: DifferentiableAttentionMask(max_length=32, initial=0.3),
    "closed mask": lambda: DifferentiableAttentionMask(max_length=32, initial=-6.0),
    "prior": lambda: AttentionPrior(weight=0.1, prior="window", window=3),
    "cap": lambda: SoftCap(0.7),
}


def spied(monkeypatch, oracle):
    """Let an oracle see what is multiplied with the values in the layers."""
    import lightning_qk.interventions.attention_mask as gated
    import lightning_qk.interventions.replaced_attention as capped

    for place in (gated, capped):
        weighted = place.weighted

        def spy(weights, value, dropout, training, weighted=weighted):
            oracle.append(weights.detach().double())
            return weighted(weights, value, dropout, training)

        monkeypatch.setattr(place, "weighted", spy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("remedy", ["mask", "closed mask", "cap"])
def test_the_softmax_in_the_output_is_measured(kind, remedy, monkeypatch):
    seen = []
    spied(monkeypatch, seen)
    watch = monitor()
    _, trainer = fit([REMEDIES[remedy](), watch], kind, max_steps=1, val_check_interval=1)
    assert not [note for note in watch.notes if "left out" in note]
    layers = 2
    assert len(seen) >= 2 * layers
    for weights, prefix in ((seen[-2 * layers : -layers], "attn"), (seen[-layers:], "attn/val")):
        shares = torch.stack([torch.special.entr(one).sum(-1) for one in weights])
        largest = torch.stack([one.amax(-1) for one in weights])
        # Rows of padding have no statistics.
        rows = _rows(kind, weights[0])
        for values, name in ((shares, "entropy"), (largest, "max_prob")):
            want = _mean(values, rows)
            got = float(trainer.callback_metrics[f"{prefix}/{name}/mean"])
            assert got == pytest.approx(want, rel=1e-5, abs=1e-5), (prefix, name)


def _rows(kind, weights):
    """Which query rows count: those of tokens."""
    rows = torch.ones(weights.shape[0], weights.shape[2], dtype=torch.bool)
    rows[0, -5:] = False
    rows[1, :3] = False
    return rows


def _mean(values, rows):
    """Over rows of all sequences, then over heads and layers."""
    return float((values * rows[None, :, None]).sum((1, 3)).mean() / rows.sum())


@pytest.mark.parametrize("remedy", REMEDIES)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_monitor_changes_nothing(kind, remedy):
    with_it, _ = fit([REMEDIES[remedy](), watch := monitor()], kind, val_check_interval=2)
    without, _ = fit([REMEDIES[remedy]()], kind, val_check_interval=2)
    assert all(torch.equal(a, b) for a, b in zip(with_it.losses, without.losses, strict=True))
    for (name, a), b in zip(with_it.named_parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(watch.history) == 3
    assert bool(watch.history.series("entropy").isfinite().all())


def test_hard_attention_is_named_with_the_true_reason():
    watch = monitor()
    fit([HardAttention(), watch], max_steps=1)
    assert any("without a softmax" in note for note in watch.notes), watch.notes


def test_a_penalty_sees_the_gates_too():
    model = models.llama().eval()
    sites = list(attention_sites(model))
    names = {site.module: site.name for site in sites}
    gates = {site.name: OffsetGates(4, 32, initial=-5.0) for site in sites}
    seen = []
    from lightning_qk.functional import attention_statistics
    from lightning_qk.interventions.penalties import AttentionPenalty

    def measure(name, given):
        seen.append(attention_statistics(given)["max_prob"])

    with GatedAttention(names, gates, model=model), AttentionPenalty(names, measure, 1.0, model=model):
        for one in gates.values():
            nn.init.constant_(one.logits, -5.0)
            one.logits.data[:, one.max_length - 1] = 5.0  # itself alone
        model(input_ids=next(iter(models.tokens())))
    assert len(seen) == 2
    for largest in seen:
        torch.testing.assert_close(largest.mean(), torch.ones(()))
