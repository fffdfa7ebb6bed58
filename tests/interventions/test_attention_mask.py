"""Gates by offset: dense oracle, gradients, the callback's order of hooks, and what is learnt on a toy task."""

import math

import lightning as L
import models
import pytest
import torch
from torch import nn

from lightning_qk import DifferentiableAttentionMask
from lightning_qk.heads.sites import attention_sites
from lightning_qk.interventions.attention_mask import GatedAttention, OffsetGates, gated_attention
from lightning_qk.interventions.replaced_attention import soft_capped_attention

B, H, KV, N, D = 2, 4, 2, 7, 5


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, N, D), (B, KV, N, D), (B, KV, N, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def test_gates_against_the_definition():
    query, key, value = inputs()
    generator = torch.Generator().manual_seed(1)
    gates = (torch.rand(H, N, N, generator=generator) > 0.4).double()
    gates[:, :, 0] = 1.0
    gates.requires_grad_()
    sinks = torch.randn(H, generator=generator, dtype=torch.float64)
    for more in ({}, {"sinks": sinks}):
        got = gated_attention(query, key, value, gates, is_causal=True, **more)
        keys, values = (x.repeat_interleave(H // KV, 1) for x in (key, value))
        e = (query @ keys.mT * D**-0.5).exp() * gates * torch.ones(N, N).tril()
        total = e.sum(-1, keepdim=True) + (sinks.exp().view(1, -1, 1, 1) if more else 0.0)
        want = e / total @ values
        torch.testing.assert_close(got, want)
        tensors = [query, key, value, gates]
        for one, other in zip(
            torch.autograd.grad(got.square().sum(), tensors),
            torch.autograd.grad(want.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
        # Closed gates are told, too.
        assert (
            torch.autograd.grad(gated_attention(query, key, value, gates).square().sum(), gates)[0][
                gates == 0
            ]
            .abs()
            .min()
            > 0
        )


def test_open_gates_change_nothing_and_a_closed_row_keeps_its_keys():
    query, key, value = inputs()
    mask = torch.ones(B, 1, 1, N, dtype=torch.bool)
    mask[0, ..., 4:] = False
    want = soft_capped_attention(query, key, value, 1e9, mask=mask)
    for gates in (torch.ones(1, 1), torch.zeros(1, 1)):
        torch.testing.assert_close(gated_attention(query, key, value, gates.expand(N, N), mask=mask), want)


def test_a_closed_key_far_above_the_others_does_not_overflow():
    query = torch.full((1, 1, 2, 1), 100.0, requires_grad=True)
    key = torch.tensor([0.0, 100.0]).view(1, 1, 2, 1)
    value = torch.tensor([1.0, 5.0]).view(1, 1, 2, 1)
    gates = torch.tensor([1.0, 0.0]).expand(2, 2).clone().requires_grad_()
    out = gated_attention(query, key, value, gates)
    assert (out == 1.0).all()
    out.sum().backward()
    assert gates.grad.isfinite().all()
    assert query.grad.isfinite().all()


def test_offsets_of_pairs():
    gates = OffsetGates(1, 3)
    numbers = torch.arange(-2.0, 3.0)[None]
    got = gates.by_pair(numbers, 5, 5)[0]
    want = (torch.arange(5)[:, None] - torch.arange(5)).clamp(-2, 2).float()
    assert torch.equal(got, want)
    assert torch.equal(gates.by_pair(numbers, 1, 5, 4)[0, 0], want[4])


def test_sampling():
    """A gate is open as often as the sigmoid of its logit says, and the gradient is the soft one's."""
    gates = OffsetGates(2, 500)
    with torch.no_grad():
        gates.logits[0] = math.log(0.2 / 0.8)
        gates.logits[1] = math.log(0.9 / 0.1)
    drawn = gates.sample()
    hard = drawn.detach().round()
    torch.testing.assert_close(drawn.detach(), hard)
    torch.testing.assert_close(hard.mean(1), torch.tensor([0.2, 0.9]), atol=0.05, rtol=0)
    drawn.sum().backward()
    assert ((gates.logits.grad > 0) & (gates.logits.grad <= 0.25)).all()
    assert gates.open().float().mean(1).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="temperature"):
        OffsetGates(1, 1, temperature=0.0)


class Start(L.Callback):
    """The gates' logits before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.logits = [gate.logits.detach().clone() for gate in pl_module.attention_gates.values()]


def fit(callback, job=None, *, more=(), **kwargs):
    L.seed_everything(2, verbose=False)
    job = job or models.Job(models.llama(), lr=0.1)
    trainer = models.trainer([callback, *more], **{"max_steps": 3, **kwargs})
    trainer.fit(job, models.tokens())
    return job, trainer


@pytest.mark.parametrize("setup", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_gates_are_trained_logged_and_exported(setup):
    callback = DifferentiableAttentionMask(max_length=16, weight=0.01)
    start = Start()
    job, trainer = fit(callback, more=[start], **setup)
    gates = [gate.logits for gate in job.attention_gates.values()]
    assert [tuple(gate.shape) for gate in gates] == [(4, 31)] * 2
    for gate, before in zip(gates, start.logits, strict=True):
        assert (gate != before)[:, 15:].all()  # offsets that causality shows have moved
        assert torch.equal(gate[:, :15], before[:, :15])  # and others have not
    assert trainer.callback_metrics["attention_mask/l1"] > 0
    assert 0.2 < trainer.callback_metrics["attention_mask/open"] < 0.8
    by_offset, by_pair = callback.export(), callback.export(6)
    assert by_offset.shape == (2, 4, 31)
    assert by_pair.shape == (2, 4, 6, 6)
    assert torch.equal(by_pair[1, 2], gates[1][2][torch.arange(6)[:, None] - torch.arange(6) + 15] > 0)


def test_evaluation_takes_the_exported_mask():
    callback = DifferentiableAttentionMask(max_length=16)
    job, _ = fit(callback)
    model = job.inner["network"].eval()
    batch = next(iter(models.tokens(4)))
    losses = [
        models.trainer([callback]).validate(job, models.tokens(4), verbose=False)[0]["val/loss"]
        for _ in range(2)
    ]
    assert losses[0] == losses[1]
    # The same mask, given to an eager model as an additive one, layer by layer.
    mask = callback.export(16)
    names = [site.module for site in attention_sites(model)]

    class Masked(nn.Module):
        def __init__(self, layer, own):
            super().__init__()
            self.layer, self.own = layer, own

        def forward(self, *args, attention_mask=None, **kwargs):
            seen = self.own[None] & torch.ones(16, 16, dtype=torch.bool).tril()
            # Rows that lost every key keep those that causality shows.
            seen = torch.where(seen.any(-1, keepdim=True), seen, torch.ones(16, 16, dtype=torch.bool).tril())
            return self.layer(*args, attention_mask=seen, **kwargs)

    for index, block in enumerate(model.model.layers):
        assert block.self_attn is names[index]
        block.self_attn = Masked(block.self_attn, mask[index])
    want = float(model(input_ids=batch, labels=batch).loss)
    assert losses[0] == pytest.approx(want, rel=1e-4)


def test_a_resumed_run_goes_on_with_its_gates(tmp_path):
    job, trainer = fit(DifferentiableAttentionMask(max_length=16), enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = DifferentiableAttentionMask(max_length=16)
    other = models.Job(models.llama(), lr=0.1)
    models.trainer([callback], max_steps=3).fit(other, models.tokens(), ckpt_path=tmp_path / "last.ckpt")
    for one, two in zip(job.attention_gates.values(), other.attention_gates.values(), strict=True):
        assert torch.equal(one.logits, two.logits)


def test_the_price_has_the_gradient_of_a_loss_term():
    """Without noise: gates far from the threshold, whose soft gradient is known."""
    model = models.llama().train()
    sites = list(attention_sites(model))
    gates = {site.name: OffsetGates(4, 16, initial=0.0) for site in sites}
    batch = next(iter(models.tokens()))
    results = []
    for weight in (0.0, 0.7):
        torch.manual_seed(3)
        with GatedAttention({site.module: site.name for site in sites}, gates, weight) as gated:
            gated.scale = 0.5
            model(input_ids=batch, labels=batch).loss.backward()
        results.append([gate.logits.grad.clone() for gate in gates.values()])
        for gate in gates.values():
            gate.logits.grad = None
    torch.manual_seed(3)
    counts = torch.zeros(31)
    for i in range(16):
        for j in range(i + 1):
            counts[i - j + 15] += 1
    for index, gate in enumerate(gates.values()):
        uniform = torch.rand(4, 31).clamp(1e-6, 1 - 1e-6)
        soft = (gate.logits.detach() + uniform.logit()).sigmoid()
        want = 0.7 * 0.5 / 2 * counts * soft * (1 - soft)
        torch.testing.assert_close(results[1][index] - results[0][index], want, rtol=1e-3, atol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="max_length"):
        DifferentiableAttentionMask(max_length=0)
    with pytest.raises(ValueError, match="cross-attention alone"):
        fit(DifferentiableAttentionMask(max_length=16, modules="*EncDec*"), models.Job(models.t5()))
    with pytest.raises(ValueError, match="fit first"):
        DifferentiableAttentionMask().export()

    class Chosen(models.Job):
        def configure_optimizers(self):
            return torch.optim.SGD(self.inner.parameters(), lr=0.1)

    with pytest.raises(ValueError, match=r"self\.attention_gates\.parameters"):
        fit(DifferentiableAttentionMask(max_length=16), Chosen(models.llama()))


@pytest.mark.slow
def test_useless_offsets_are_closed():
    """A task that needs the token two places back alone: its gates stay open, and most others close."""

    class Copy(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = models.llama()

        def training_step(self, batch, batch_idx):
            labels = batch.roll(2, 1)
            labels[:, :2] = -100
            logits = self.network(input_ids=batch).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            gates = list(self.attention_gates.parameters())
            return torch.optim.Adam(
                [{"params": self.network.parameters(), "lr": 3e-3}, {"params": gates, "lr": 0.05}]
            )

    found = {}
    for weight in (0.0, 0.03):
        L.seed_everything(0, verbose=False)
        callback = DifferentiableAttentionMask(
            max_length=16, weight=weight, initial=2.0, modules="*layers.0.*"
        )
        job = Copy()
        trainer = models.trainer([callback], max_steps=800, max_epochs=-1)
        trainer.fit(job, models.tokens(512, 16, 32))
        found[weight] = callback.export()[0][:, 15:]
        assert float(trainer.callback_metrics["loss"]) < 0.1
    logits = next(iter(job.attention_gates.values())).logits.detach()[:, 15:].amax(0)
    assert logits.argmax() == 2
    assert found[0.03][:, 2].all()
    assert found[0.0].float().mean() > 0.8
    assert found[0.03].float().mean() < 0.45
