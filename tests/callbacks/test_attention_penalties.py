"""EntropyBand and AttentionPrior: gradients against those of dense terms of the loss, logs, errors."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import models
import penalty_oracle
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from penalty_oracle import Term, band, build, divergence
from torch.utils.data import DataLoader

from lightning_qk import AttentionMonitor, AttentionPrior, EntropyBand, LocAteR

WEIGHT = 3.0
N = 16
WINDOW = ((torch.arange(N)[:, None] - torch.arange(N)).abs() < 3).float()
PENALTIES = {
    "band": (lambda: EntropyBand(weight=WEIGHT, low=0.5, high=0.6), band(0.5, 0.6, "head")),
    "rows": (lambda: EntropyBand(weight=WEIGHT, low=0.5, high=0.6, per="row"), band(0.5, 0.6, "row")),
    "diagonal": (lambda: AttentionPrior(weight=WEIGHT, prior="diagonal"), divergence(torch.eye(N))),
    "window": (lambda: AttentionPrior(weight=WEIGHT, prior="window", window=3), divergence(WINDOW)),
    "uniform": (
        lambda: AttentionPrior(weight=WEIGHT, prior="uniform", heads=[0, 3]),
        divergence(torch.ones(1), [0, 3]),
    ),
}


class Keep(L.Callback):
    """Gradients of each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.keep(pl_module))

    def keep(self, pl_module: L.LightningModule) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        )


def fit(kind, loss=None, callbacks=(), data=None, checkpointing=None, **kwargs):
    keep = Keep()
    job = models.Job(build(kind), loss=loss, lr=0.01)
    if checkpointing is not None:
        job.inner["network"].gradient_checkpointing_enable({"use_reentrant": checkpointing})
    job.train()
    L.seed_everything(3, verbose=False)
    trainer = models.trainer([*callbacks, keep], **{"max_steps": 2, **kwargs})
    trainer.fit(job, models.tokens() if data is None else data)
    return keep.gradients, job, trainer


def assert_same(got, want, other, tolerance=1e-4):
    """All gradients agree, and the penalty made some of them."""
    assert len(got) == len(want) == len(other)
    for one, two, three in zip(got, want, other, strict=True):
        assert one.keys() == two.keys()
        difference = 0.0
        for name in two:
            norm = two[name].norm()
            assert (one[name] - two[name]).norm() <= tolerance * norm + 1e-6, name
            difference = max(difference, float((three[name] - two[name]).norm() / (norm + 1e-12)))
        assert difference > 0.05


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
def test_gradient_equals_that_of_a_loss_term(kind, penalty):
    make, dense = PENALTIES[penalty]
    with Term(dense, WEIGHT).listening(kind) as term:
        want, _, _ = fit(kind, term)
    got, job, trainer = fit(kind, callbacks=[make()])
    none, plain, _ = fit(kind)
    assert_same(got, want, none)
    # Dropout draws the same numbers, and the first forward is as if nobody had been there.
    assert torch.equal(job.losses[0], plain.losses[0])
    assert job.losses[1] != plain.losses[1]
    key = "entropy_band/penalty" if penalty in ("band", "rows") else "attention_prior/kl"
    assert float(trainer.callback_metrics[key]) == pytest.approx(term.values[-1], rel=1e-3)


@pytest.mark.parametrize(
    "setup",
    [
        {"accumulate_grad_batches": 4},
        {"accumulate_grad_batches": 3, "limit_train_batches": 4, "max_epochs": 1},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.1},
        {"checkpointing": False},
        {"checkpointing": True},
        {"checkpointing": False, "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("penalty", ["band", "window"])
def test_training_setups(penalty, setup):
    make, dense = PENALTIES[penalty]
    reference = {key: value for key, value in setup.items() if key != "checkpointing"}
    with Term(dense, WEIGHT).listening("gpt2") as term:
        want, _, _ = fit("gpt2", term, **reference)
    got, _, _ = fit("gpt2", callbacks=[make()], **setup)
    none, _, _ = fit("gpt2", **reference)
    tolerance = 3e-2 if "precision" in setup else 1e-4
    if setup.get("gradient_clip_val"):
        # Both are clipped to one length: what remains is the direction.
        assert all(abs(_length(one) - 0.1) < 1e-5 for one in got)
    assert_same(got, want, none, tolerance)


def _length(gradients):
    return float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())


def test_the_scale_of_fp16_is_carried():
    """A scaler multiplies the loss, and gradients are divided before they are kept."""

    class Scaler(torch.amp.GradScaler):
        def __init__(self):
            super().__init__("cpu", init_scale=2.0**10, growth_interval=1)

    make, dense = PENALTIES["band"]
    results = []
    for term in (Term(dense, WEIGHT), None):
        precision = MixedPrecision("16-mixed", "cpu", scaler=Scaler())
        # Numbers of fp16 overflow where products are computed in it on the CPU.
        precision.precision, precision.scaler = "bf16-mixed", precision.scaler
        precision.autocast_context_manager = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
        arguments = {"plugins": [precision], "accumulate_grad_batches": 2}
        if term is not None:
            with term.listening("gpt2"):
                results.append(fit("gpt2", term, **arguments)[0])
        else:
            results.append(fit("gpt2", callbacks=[make()], **arguments)[0])
            assert precision.scaler._scale > 2.0**10
    none = fit("gpt2", accumulate_grad_batches=2, precision="bf16-mixed")[0]
    assert_same(results[1], results[0], none, 3e-2)


def test_padding_and_sdpa():
    """Padded sequences, and the other implementation: rows of padding have no part in the penalty."""

    class Padded(models.Job):
        def training_step(self, batch, batch_idx):
            mask = torch.ones_like(batch)
            mask[:2, :5] = 0
            # What a padded token itself attends to differs between implementations.
            labels = batch.masked_fill(mask.roll(1, 1) * mask == 0, -100)
            loss = self.inner["network"](input_ids=batch, attention_mask=mask, labels=labels).loss
            return loss if self.extra_loss is None else loss + self.extra_loss(self)

    def run(implementation, loss=None, callbacks=()):
        torch.manual_seed(1)
        keep = Keep()
        job = Padded(models.llama(attn_implementation=implementation), loss=loss)
        models.trainer([*callbacks, keep], max_steps=1).fit(job, models.tokens())
        return keep.gradients

    for make, dense in (PENALTIES["band"], PENALTIES["window"]):
        with Term(dense, WEIGHT).listening("llama") as term:
            want = run("eager", term)
        for implementation in ("eager", "sdpa"):
            assert_same(run(implementation, callbacks=[make()]), want, run("eager"))


def test_a_prior_of_each_example():
    generator = torch.Generator().manual_seed(4)
    priors = torch.rand(8, N, N, generator=generator)
    data = [
        {"ids": row, "grounding": prior} for row, prior in zip(models.tokens(8).dataset, priors, strict=True)
    ]

    class Batches(models.Job):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["ids"], batch_idx) + 0 * len(batch) ** self.check(batch)

        def validation_step(self, batch, batch_idx):
            self.check(batch)

        def check(self, batch):
            assert batch.keys() == {"ids"}
            return 1

    class Bare(Batches):
        def check(self, batch):
            return 1

    def run(kind, loss=None, callbacks=()):
        keep = Keep()
        job = kind(build("gpt2"), loss=loss)
        L.seed_everything(3, verbose=False)
        loader = DataLoader(data, batch_size=4)
        models.trainer([*callbacks, keep], max_steps=1).fit(job, loader, loader)
        return keep.gradients

    with Term(divergence(priors[:4, None]), WEIGHT).listening("gpt2") as term:
        want = run(Bare, term)
    assert_same(run(Batches, callbacks=[AttentionPrior(weight=WEIGHT, prior="grounding")]), want, run(Bare))


def test_batches_that_can_bring_no_prior_are_said_once_and_trained_on():
    losses = []
    for callbacks in ([], [AttentionPrior(prior="grounding")]):
        torch.manual_seed(0)
        job = models.Job()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            models.trainer(callbacks, max_steps=3).fit(job, models.tokens())
        losses.append(torch.stack(job.losses))
    assert torch.equal(*losses)
    (told,) = [str(one.message) for one in said if "AttentionPrior" in str(one.message)]
    assert "expected a batch that is a dictionary" in told


def test_two_penalties_a_monitor_and_locater():
    """They add up, and a monitor hears what it would have heard."""
    callbacks = [
        PENALTIES["band"][0](),
        PENALTIES["window"][0](),
        AttentionPrior(weight=1.0, prior="uniform", name="flat", modules="*.h.0.*"),
        LocAteR(1e-3),
    ]
    with Term(band(0.5, 0.6, "head"), WEIGHT).listening("gpt2") as one:
        first = fit("gpt2", one, max_steps=1)[0][0]
    with Term(divergence(WINDOW), WEIGHT).listening("gpt2") as two:
        second = fit("gpt2", two, max_steps=1)[0][0]
    none = fit("gpt2", max_steps=1)[0][0]
    got = fit("gpt2", callbacks=callbacks[:2], max_steps=1)[0][0]
    for name in none:
        want = first[name] + second[name] - none[name]
        assert (got[name] - want).norm() <= 1e-4 * want.norm() + 1e-6
    heard, alone = AttentionMonitor(rows=None), AttentionMonitor(rows=None)
    _, _, trainer = fit("gpt2", callbacks=[heard, *callbacks], max_steps=1)
    fit("gpt2", callbacks=[alone], max_steps=1)
    assert "attention_prior/flat/kl" in trainer.callback_metrics
    for name in alone.history.statistics:
        got, want = heard.history.series(name), alone.history.series(name)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_nothing_is_left_behind():
    from transformers.modeling_utils import AttentionInterface

    before = dict(vars(AttentionInterface))
    fit("gpt2", callbacks=[EntropyBand(), AttentionMonitor(), AttentionPrior()], max_steps=1)
    assert dict(vars(AttentionInterface)) == before

    class Fails(models.Job):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        models.trainer([EntropyBand()]).fit(Fails(), models.tokens())
    assert dict(vars(AttentionInterface)) == before


def test_evaluation_is_free_and_unchanged():
    calls = []
    callback = EntropyBand(weight=1.0, low=0.5, high=0.6)
    job = models.Job(build("gpt2"))
    trainer = models.trainer([callback], max_steps=1, limit_val_batches=1, num_sanity_val_steps=1)

    class Count(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            calls.append(callback._penalty.take())

    trainer.callbacks.append(Count())
    trainer.fit(job, models.tokens(4), models.tokens(4))
    assert calls
    assert not any(calls)


def test_manual_optimization_and_skipped_steps():
    class Manual(models.Job):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def run(loss=None, callbacks=()):
        keep = Keep()
        L.seed_everything(3, verbose=False)
        models.trainer([*callbacks, keep], max_steps=2).fit(Manual(build("gpt2"), loss=loss), models.tokens())
        return keep.gradients

    make, dense = PENALTIES["window"]
    with Term(dense, WEIGHT).listening("gpt2") as term:
        want = run(term)
    assert_same(run(callbacks=[make()]), want, run())


class OwnAttention(torch.nn.Module):
    """Named like attention, and not through the interface."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(32, 32) for _ in range(3))
        self.num_heads = 4

    def forward(self, hidden):
        q, k, v = (
            part(hidden).unflatten(-1, (4, 8)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: EntropyBand(low=0.9, high=0.1), "low <= high"),
        (lambda: EntropyBand(per="token"), "per"),
        (lambda: EntropyBand(weight=-1.0), "weight"),
        (lambda: AttentionPrior(prior=torch.eye(3)), "into the batch"),
        (lambda: AttentionPrior(prior="window", window=0), "window"),
        (lambda: AttentionPrior(heads=[]), "heads"),
    ],
)
def test_arguments_are_checked(callback, message):
    with pytest.raises(ValueError, match=message):
        callback()


def test_what_cannot_be_done_is_refused_before_any_work():
    job = models.Job()
    job.inner["extra"] = OwnAttention()
    with pytest.raises(ValueError, match=r"inner\.extra"):
        models.trainer([EntropyBand()]).fit(job, models.tokens())
    models.trainer([EntropyBand(modules="*network*")], max_steps=1).fit(job, models.tokens())
    with pytest.raises(ValueError, match="match at least one"):
        models.trainer([EntropyBand(modules="nothing")]).fit(models.Job(), models.tokens())
    with pytest.raises(ValueError, match="different names"):
        models.trainer([EntropyBand(), EntropyBand()]).fit(models.Job(), models.tokens())
    with pytest.raises(ValueError, match="EncDec"):
        models.trainer([AttentionPrior(prior="diagonal", modules="*EncDec*")]).fit(
            models.Job(models.t5()), models.tokens()
        )
    with pytest.raises(ValueError, match=r"below 4, got \[4\]"):
        models.trainer([AttentionPrior(heads=[4])]).fit(models.Job(), models.tokens())


def test_deepspeed_is_refused(monkeypatch):
    callback = EntropyBand()
    trainer = models.trainer([callback])
    strategy = object.__new__(DeepSpeedStrategy)
    monkeypatch.setattr(type(trainer), "strategy", property(lambda self: strategy))
    with pytest.raises(ValueError, match="DeepSpeed"):
        callback.setup(trainer, models.Job(), "fit")


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = str(Path(__file__).with_name("penalties_ddp_job.py"))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for result in results:
        assert_same([result["callback"]], [result["term"]], [result["none"]])
        assert result["logged"] == pytest.approx(results[0]["logged"])
        # Means over both ranks.
        assert result["logged"] == pytest.approx(sum(one["own"] for one in results) / 2, rel=1e-4)
    assert results[0]["own"] != results[1]["own"]
    # Gates are parameters like others: their gradients are reduced.
    assert len(results[0]["gates"]) == 2
    for name, gradient in results[0]["gates"].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, results[1]["gates"][name])
    assert penalty_oracle.FILES["gpt2"].eager_attention_forward.__module__.startswith("transformers")
