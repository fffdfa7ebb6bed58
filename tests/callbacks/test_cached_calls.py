"""Generation and caches beside the loss's forwards: what is measured is as if they were not there."""

import inspect

import models
import pytest
import torch
import transformers
from test_attention_evaluation import Evaluated
from torch import nn
from transformers.generation.utils import GenerationMixin

from lightning_qk import (
    AttentionMonitor,
    AttentionPrior,
    CollapseGuard,
    EntropyBand,
    HiddenStateMonitor,
    PositionMonitor,
    QKClip,
    SinkMonitor,
    TokenMonitor,
)
from lightning_qk.callbacks.interventions import qk_clip
from lightning_qk.guard.detector import CollapseDetector

WIDTH, HEADS = 32, 4


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=models.VOCABULARY,
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_source_positions=16,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return models.build(transformers.WhisperForConditionalGeneration, config)


MODELS = {"gpt2": models.gpt2, "t5": models.t5, "whisper": whisper}


def inputs(network, batch):
    if network.config.model_type == "whisper":
        features = torch.randn(len(batch), 8, 32, generator=torch.Generator().manual_seed(int(batch.sum())))
        return {"input_features": features}
    return {"input_ids": batch}


class Generating(models.Job):
    """Generates before and after the loss's forward, without touching torch's generator."""

    def __init__(self, kind: str, way: str = "generate") -> None:
        torch.manual_seed(0)
        super().__init__(MODELS[kind]())
        self.way = way
        self.said = []

    @torch.no_grad()
    def generate_here(self, batch):
        network, given = self.inner["network"], inputs(self.inner["network"], batch)
        with torch.random.fork_rng():
            if self.way == "generate":
                self.said.append(network.generate(**given, max_new_tokens=5, do_sample=False, use_cache=True))
            elif self.way == "without cache":
                self.said.append(
                    network.generate(**given, max_new_tokens=5, do_sample=False, use_cache=False)
                )

    def loss(self, batch):
        self.generate_here(batch)
        network = self.inner["network"]
        loss = network(**inputs(network, batch), labels=batch).loss
        self.generate_here(batch[:2])
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))


KINDS = {
    "attention": lambda **more: AttentionMonitor(
        rows=5, every_n_eval_batches=1, per_head=True, report=False, figures_every=0, **more
    ),
    "sinks": lambda **more: SinkMonitor(
        rows=5, every_n_eval_batches=1, report=False, figures_every=0, **more
    ),
    "position": lambda **more: PositionMonitor(every_n_eval_batches=1, report=False, figures_every=0, **more),
    "hidden": lambda **more: HiddenStateMonitor(report=False, **more),
    "tokens": lambda **more: TokenMonitor(
        tokens=5, every_n_eval_batches=1, predict_every=1, report=False, figures_every=0, **more
    ),
}


def fit(kind, way, monitors=tuple(KINDS), **more):
    job = Generating(kind, way)
    callbacks = [KINDS[name](**more) for name in monitors]
    trainer = models.trainer(
        callbacks, max_steps=2, log_every_n_steps=1, val_check_interval=2, num_sanity_val_steps=0
    )
    torch.manual_seed(1)
    trainer.fit(job, models.tokens(16, 9), models.tokens(4, 9))
    return job, callbacks, trainer


def same(one, other):
    return (one == other) | (one.isnan() & other.isnan())


@pytest.mark.parametrize("way", ["generate", "without cache"])
@pytest.mark.parametrize("kind", MODELS)
def test_statistics_are_those_of_the_job_without_generation(kind, way):
    generate = GenerationMixin.generate
    job, watching, trainer = fit(kind, way)
    plain, alone, plain_trainer = fit(kind, "none")
    assert GenerationMixin.generate is generate
    assert len(job.said) == 6
    assert all(torch.equal(a, b) for a, b in zip(job.losses, plain.losses, strict=True))
    for got, want in zip(watching, alone, strict=True):
        assert got.history.steps == want.history.steps == [0, 1]
        for name in want.history.values:
            assert bool(same(got.history.series(name), want.history.series(name)).all()), name
        [note] = [note for note in got.notes if "cached_calls=True" in note]
        count = len(got._names) if isinstance(got, HiddenStateMonitor) else len(got.watched())
        assert note.startswith(f"{count} of {count} layers")
        assert [one for one in got.notes if one != note] == want.notes
    names = {name for name in plain_trainer.callback_metrics if name.startswith("attn/val/")}
    assert names
    for name in names:
        assert bool(same(trainer.callback_metrics[name], plain_trainer.callback_metrics[name])), name


@pytest.mark.parametrize("kind", MODELS)
def test_all_calls_are_pooled_where_asked(kind, monkeypatch):
    shapes = {}
    measure = AttentionMonitor.measure_call

    def spy(self, name, call):
        shapes.setdefault(name, []).append(call.lengths)
        return measure(self, name, call)

    monkeypatch.setattr(AttentionMonitor, "measure_call", spy)
    _, [watching], trainer = fit(kind, "generate", ("attention",), cached_calls=True)
    with_all = dict(shapes)
    shapes.clear()
    _, _, plain = fit(kind, "none", ("attention",))
    assert with_all.keys() == shapes.keys()
    for name, calls in shapes.items():
        assert len(calls) == 3  # two steps and one batch of validation
        assert len(with_all[name]) >= 3 * 3, name
    decoders = [name for name in shapes if "encoder" not in name]
    assert all(any(n == 1 for n, _ in with_all[name]) for name in decoders)
    assert not any("cached_calls" in note for note in watching.notes)
    for key in ("attn/entropy/mean", "attn/val/entropy/mean"):
        assert trainer.callback_metrics[key].isfinite()
        assert trainer.callback_metrics[key] != plain.callback_metrics[key]


def shapes_of(job, **more):
    """Numbers of queries and keys of every call that is measured in one step."""
    watching = KINDS["attention"](**more)
    heard = []
    hear = watching.measure_call
    watching.measure_call = lambda name, call: heard.append(call.lengths) or hear(name, call)
    models.trainer([watching], max_steps=1, log_every_n_steps=1).fit(job, models.tokens(8, 9))
    return heard, watching


class ByHand(models.Job):
    """Goes on from a cache in a loop of its own."""

    def training_step(self, batch, batch_idx):
        network = self.inner["network"]
        with torch.no_grad():
            out = network(input_ids=batch[:, :4], use_cache=True)
            for size in (1, 1, 3):
                start = out.past_key_values.get_seq_length()
                out = network(
                    input_ids=batch[:, start : start + size],
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
        return network(input_ids=batch, labels=batch).loss


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_cache_by_hand_is_left_out(kind):
    heard, watching = shapes_of(ByHand(getattr(models, kind)()))
    assert sorted(set(heard)) == [(4, 4), (9, 9)]
    assert any("2 of 2 layers" in note and "cached_calls=True" in note for note in watching.notes)
    heard, _ = shapes_of(ByHand(getattr(models, kind)()), cached_calls=True)
    assert sorted(set(heard)) == [(1, 5), (1, 6), (3, 9), (4, 4), (9, 9)]


class Remembering(nn.Module):
    """Causal self-attention with learnt keys before the tokens', as some libraries have."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.memory = nn.Parameter(torch.randn(2, HEADS, more, WIDTH // HEADS))

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (
            torch.cat([learnt.expand(len(x), -1, -1, -1), own], 2)
            for learnt, own in zip(self.memory, (k, v), strict=True)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class WithMemory(models.Job):
    def __init__(self) -> None:
        super().__init__(nn.ModuleDict({"words": nn.Embedding(50, WIDTH), "attention": Remembering(3)}))

    def training_step(self, batch, batch_idx):
        network = self.inner["network"]
        short = network["attention"](network["words"](batch[:, :5])).square().mean()
        return short + network["attention"](network["words"](batch)).square().mean()


def test_learnt_keys_are_no_cache():
    heard, watching = shapes_of(WithMemory())
    assert heard == [(5, 8), (9, 12)]
    assert not any("cached_calls" in note for note in watching.notes)


def test_generation_alone_is_not_called_a_layer_that_did_not_run():
    class Speaking(Evaluated):
        def validation_step(self, batch, batch_idx):
            self.inner["network"].generate(batch, max_new_tokens=3, do_sample=False)

    watching = KINDS["attention"]()
    models.trainer([watching]).validate(Speaking(), models.tokens(4), verbose=False)
    assert len(watching.notes) == 1
    assert "cached_calls=True" in watching.notes[0]


def test_a_guard_says_nothing_of_an_argument_that_it_does_not_have():
    guard = CollapseGuard(every_n_steps=1)
    job = Generating("gpt2")
    with torch.random.fork_rng():
        models.trainer([guard], max_steps=2).fit(job, models.tokens(16, 9))
    assert not any("cached_calls" in note for note in getattr(guard, "notes", []))
    assert job.said


WITH_GRADIENTS = inspect.unwrap(GenerationMixin.generate)


class Speaking(transformers.GPT2LMHeadModel):
    """Generates with gradients, as models do whose own ``generate`` is not under ``no_grad``."""

    def generate(self, *args, **kwargs):
        return WITH_GRADIENTS(self, *args, **kwargs)


def speaking():
    return models.build(Speaking, models.gpt2().config)


MODELS["with gradients"] = speaking


class WithGradients(Generating):
    generate_here = Generating.generate_here.__wrapped__


def steer(kind, way, callback):
    kind_of = WithGradients if kind == "with gradients" else Generating
    job = kind_of(kind, way)
    torch.manual_seed(1)
    models.trainer([callback], max_steps=2, log_every_n_steps=1).fit(job, models.tokens(16, 9))
    return job


@pytest.mark.parametrize(
    ("kind", "way"), [("gpt2", "generate"), ("whisper", "without cache"), ("with gradients", "generate")]
)
def test_largest_logits_and_their_clip_are_those_of_the_job_without_generation(kind, way, monkeypatch):
    heard = []
    measure = qk_clip.max_logits
    monkeypatch.setattr(
        qk_clip, "max_logits", lambda call, **more: heard.append(call) or measure(call, **more)
    )
    clip, alone = QKClip(0.5), QKClip(0.5)
    job, plain = steer(kind, way, clip), steer(kind, "none", alone)
    with_generation, without = heard[: len(heard) // 2], heard[len(heard) // 2 :]
    assert len(with_generation) == len(without) > 0
    assert job.said
    assert all(torch.equal(a, b) for a, b in zip(job.losses, plain.losses, strict=True))
    assert any((gamma < 1).any() for gamma in alone.gammas.values())
    for name, want in alone.maxima.items():
        assert torch.equal(clip.maxima[name], want), name
        assert torch.equal(clip.gammas[name], alone.gammas[name]), name
    for a, b in zip(job.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_calls_with_a_cache_by_hand_are_not_clipped_by(monkeypatch):
    heard = []
    measure = qk_clip.max_logits
    monkeypatch.setattr(
        qk_clip, "max_logits", lambda call, **more: heard.append(call.shape[2:]) or measure(call, **more)
    )
    models.trainer([QKClip(0.5)], max_steps=1).fit(ByHand(models.gpt2()), models.tokens(8, 9))
    assert sorted(set(heard)) == [(4, 4), (9, 9)]


PENALTIES = {
    "band": lambda: EntropyBand(weight=1.0, low=0.5, high=0.6),
    "prior": lambda: AttentionPrior(weight=1.0, prior="window"),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_those_of_the_job_without_generation(name):
    callback, alone = PENALTIES[name](), PENALTIES[name]()
    job, plain = (steer("with gradients", way, own) for way, own in (("generate", callback), ("none", alone)))
    assert job.said
    assert len(callback.event_log.curves) == 2
    assert str(callback.event_log.state_dict()) == str(alone.event_log.state_dict())
    for a, b in zip(job.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "way"),
    [("whisper", "generate"), ("with gradients", "generate"), ("with gradients", "without cache")],
)
def test_a_guard_reads_the_cosine_of_the_job_without_generation(kind, way, monkeypatch):
    read = []
    observe = CollapseDetector.observe
    monkeypatch.setattr(
        CollapseDetector, "observe", lambda self, reading: read.append(reading) or observe(self, reading)
    )
    for own in (way, "none"):
        steer(kind, own, CollapseGuard(every_n_steps=1))
    for got, want in zip(read[:2], read[2:], strict=True):
        assert bool(want.values["hidden/cosine"].isfinite().any())
        for name in want.values:
            assert bool(same(got.values[name], want.values[name]).all()), name
