"""Callbacks that change a training refuse at the start and raise nothing once it has begun."""

import copy
import warnings

import lightning as L
import models
import pytest
import torch
import transformers
from intervention_jobs import EDITORS, KINDS, At, Seeded, account, assert_same, fit, make, weights
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_qk import LocAteR, QKClip, QKSpectrumMonitor, SigmaReparam, UpdateCap


def attention(job, index=0):
    return job.inner["network"].model.layers[index].self_attn


def pruned(job):
    prune.l1_unstructured(attention(job).q_proj, "weight", amount=0.3)


def weight_normed(job):
    parametrizations.weight_norm(attention(job).k_proj)


def replaced_projection(job):
    attention(job).q_proj = copy.deepcopy(attention(job).q_proj)


def replaced_attention(job):
    job.inner["network"].model.layers[0].self_attn = copy.deepcopy(attention(job))


def other_attention(job):
    class Identity(nn.Module):
        def forward(self, hidden_states, **_):
            return hidden_states, None

    for layer in job.inner["network"].model.layers:
        layer.self_attn = Identity()


def removed_layer(job):
    network = job.inner["network"].model
    network.layers = network.layers[:1]


def frozen(job):
    attention(job).requires_grad_(False)


def reshaped(job):
    own = attention(job).q_proj
    own.weight = nn.Parameter(own.weight.detach()[:8].clone())
    own.bias = None
    own.register_forward_hook(lambda module, args, output: output.repeat_interleave(4, -1))


def adapter_merged(job):
    """A composition that was not there at the start."""
    own = attention(job).q_proj
    attention(job).q_proj = nn.Sequential(own, nn.Linear(own.out_features, own.out_features))


def broken_weights(job):
    with torch.no_grad():
        attention(job).q_proj.weight.fill_(torch.nan)


FAULTS = [
    pruned,
    weight_normed,
    replaced_projection,
    replaced_attention,
    other_attention,
    removed_layer,
    frozen,
    reshaped,
    adapter_merged,
    broken_weights,
]


class LlamaJob(Seeded):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(model=models.llama())


TOGETHER = {
    "weights": ["QKClip", "UpdateCap", "LocAteR", "SpectrumScaling"],
    "attention": ["EntropyBand", "AttentionPrior", "SoftCap"],
    "hard": ["HardAttention"],
    "gates": ["DifferentiableAttentionMask"],
    "reparametrized": ["SigmaReparam"],
}
# torch itself does not put these on a parametrized weight.
IMPOSSIBLE = (pruned, weight_normed, reshaped)


def test_every_intervention_is_tried():
    assert sorted(name for names in TOGETHER.values() for name in names) == sorted(KINDS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("group", TOGETHER)
def test_nothing_that_happens_in_mid_run_ends_it(group, fault):
    if group == "reparametrized" and fault in IMPOSSIBLE:
        pytest.skip("torch refuses it itself")
    callbacks = [make(name) for name in TOGETHER[group]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer, _ = fit(
            [*callbacks, At(fault, step=1)], LlamaJob(), max_steps=3, val=True, val_check_interval=1
        )
    assert trainer.global_step == 3


class Raises:
    """Fails from its third call on, as whatever a callback uses may."""

    def __init__(self, original):
        self.original, self.calls = original, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("injected")
        return self.original(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("QKClip", "lightning_qk.callbacks.interventions.qk_clip.apply_clip"),
        ("QKClip", "lightning_qk.callbacks.interventions.qk_clip.max_logits"),
        ("UpdateCap", "lightning_qk.interventions.update_cap.subspace_iteration"),
        ("LocAteR", "lightning_qk.regularizers.locater.penalty_and_gradients"),
        ("EntropyBand", "lightning_qk.interventions.penalties.attention_logits"),
        ("SoftCap", "lightning_qk.interventions.replaced_attention.soft_capped_attention"),
        ("DifferentiableAttentionMask", "lightning_qk.interventions.attention_mask.gated_attention"),
        ("SpectrumScaling", "lightning_qk.interventions.spectrum_scaling._eta"),
    ],
)
def test_an_error_of_its_own_does_not_end_the_run_and_is_told_once(name, where, monkeypatch):
    module, _, attribute = where.rpartition(".")
    original = getattr(__import__(module, fromlist=["_"]), attribute)
    monkeypatch.setattr(where, Raises(original))
    with pytest.warns(UserWarning, match="injected") as caught:
        trainer, _ = fit([make(name, modules="*.0.*")], max_steps=5, val=True, val_check_interval=1)
    assert trainer.global_step == 5
    assert len([one for one in caught if "injected" in str(one.message)]) == 1


class BrokenLogger(Logger):
    name = version = "broken"

    def log_metrics(self, metrics, step=None):
        if any(
            key.startswith(("clip/", "update_cap/", "sigma_reparam/", "spectrum_scaling/")) for key in metrics
        ):
            raise OSError("no space left")

    def log_hyperparams(self, *_, **__):
        pass


@pytest.mark.parametrize("name", ["QKClip", "UpdateCap", "SigmaReparam", "SpectrumScaling"])
def test_a_logger_that_raises_does_not_change_the_training(name):
    _, want = fit([make(name)], max_steps=4, val=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, got = fit(
            [make(name, **({"per_layer": True} if name == "QKClip" else {}))],
            max_steps=4,
            val=True,
            logger=BrokenLogger(),
        )
    assert_same(weights(got), weights(want))


def test_a_layer_whose_weights_change_form_is_left_alone_and_the_other_is_not():
    clip = QKClip(0.05)
    with pytest.warns(UserWarning, match="is not clipped any more") as caught:
        fit([clip, At(pruned)], job := LlamaJob(), max_steps=6)
    said = [str(one.message) for one in caught if "any more" in str(one.message)]
    assert len(said) == 1
    assert "model.layers.0.self_attn" in said[0]
    assert "something makes from others" in said[0]
    assert list(clip.left) == ["inner.network.model.layers.0.self_attn"]
    assert list(clip.gammas) == ["inner.network.model.layers.1.self_attn"]
    assert clip.gammas["inner.network.model.layers.1.self_attn"].min() < 1
    assert prune.is_pruned(attention(job))


# Frozen layers


class Unfreeze(BaseFinetuning):
    """The network's first layer trains from the second epoch on."""

    def freeze_before_training(self, pl_module):
        self.freeze(attention(pl_module))

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(attention(pl_module), optimizer, lr=1e-2)


class Late(LlamaJob):
    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=1e-2)


@pytest.mark.parametrize("name", EDITORS)
def test_frozen_layers_are_refused_at_the_start_with_the_way_out(name):
    job = LlamaJob()
    attention(job).requires_grad_(False)
    before = weights(job)
    with pytest.raises(
        ValueError, match=r"frozen ones in inner\.network\.model\.layers\.0.*when='unfrozen'.*modules="
    ):
        fit([make(name)], job)
    assert_same(weights(job), before)
    fit([make(name, modules="*layers.1*")], LlamaJob(), max_steps=1)


class Watch(L.Callback):
    """The weights of the first layer's queries after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(attention(pl_module).q_proj.weight.detach().clone())


@pytest.mark.parametrize("name", EDITORS)
def test_layers_that_are_unfrozen_later_are_waited_for(name):
    if name == "SigmaReparam":
        callbacks = [SigmaReparam(when="unfrozen")]
    else:
        callbacks = [make(name, when="unfrozen")]
    job, watch = Late(), Watch()
    start = attention(job).q_proj.weight.detach().clone()
    models.trainer([*callbacks, Unfreeze(), watch], max_steps=-1, max_epochs=2).fit(job, models.tokens(8))
    first, second = watch.seen[:2], watch.seen[2:]
    for seen in first:
        torch.testing.assert_close(seen, start, rtol=1e-6, atol=1e-6)
    assert not torch.equal(second[-1], start)
    if name == "UpdateCap":
        change = torch.linalg.matrix_norm(second[0] - start, 2) / torch.linalg.matrix_norm(start, 2)
        assert change < 1.1e-4
    if name == "QKClip":
        assert callbacks[0].gammas["inner.network.model.layers.0.self_attn"].min() < 1
        assert [step for step, told in callbacks[0].event_log.events if "layer_00" in told] == [2]
        assert [step for step, told in callbacks[0].event_log.events if "layer_01" in told] == [0]


def test_when_is_checked():
    for kind in EDITORS.values():
        with pytest.raises(ValueError, match="'always' or 'unfrozen', got 'never'"):
            kind(when="never")


# What is refused at the start, or has no value


@pytest.mark.parametrize("kind", ["MPNet", "DonutSwin"])
def test_logits_that_cannot_be_told_are_refused_at_the_start(kind):
    """They take their softmax themselves, of logits with a bias of relative positions."""
    sizes = {
        "MPNet": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        "DonutSwin": {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2]},
    }
    config = getattr(transformers, f"{kind}Config")(**sizes[kind])

    class Never(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = getattr(transformers, f"{kind}Model")(config)

        def training_step(self, batch, batch_idx):
            raise AssertionError("work was begun")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    refusal = r"got network.*attention.*leave such a layer out with QKClip\(modules=…\)"
    with pytest.raises(ValueError, match=refusal):
        models.trainer([QKClip()]).fit(Never(), models.tokens())


class Padding(models.Job):
    """Nothing but padding at some steps."""

    def training_step(self, batch, batch_idx):
        mask = torch.ones_like(batch) if batch_idx % 2 else torch.zeros_like(batch)
        return self.inner["network"](input_ids=batch, attention_mask=mask, labels=batch).loss


def test_a_step_without_logits_logs_none():
    class Finite(L.Callback):
        def __init__(self):
            self.keys = []

        def on_train_batch_end(self, trainer, *_):
            found = {key: float(value) for key, value in trainer.logged_metrics.items() if "clip/" in key}
            found |= {key: float(value) for key, value in trainer.callback_metrics.items() if "clip/" in key}
            assert all(torch.tensor(list(found.values())).isfinite())
            self.keys.append(found)

    clip, finite = QKClip(1.0, per_layer=True, per_head=True), Finite()
    models.trainer([clip, finite], max_steps=3).fit(Padding(models.bert()), models.tokens())
    assert "clip/max_logit/max" not in finite.keys[0]
    assert "clip/max_logit/max" in finite.keys[1]
    steps, values = account(clip)[0]["clip/max_logit/max"]
    assert steps == [1]
    assert values[0] > 0


def test_locater_leaves_frozen_copies_out_of_its_value():
    class Taught(Seeded):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.inner["network"]).requires_grad_(False)
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    parameter.mul_(3)

    alone, _ = fit([LocAteR(0.0)], max_steps=1)
    taught, _ = fit([LocAteR(0.0)], Taught(), max_steps=1)
    assert taught.callback_metrics["locater/penalty"] == alone.callback_metrics["locater/penalty"]


def test_locater_blames_no_pattern_that_nobody_gave():
    class Crossing(models.Job):
        def __init__(self):
            super().__init__(nn.ModuleDict({"cross_attn": models.gpt2().transformer.h[0].attn}))
            self.inner["network"]["cross_attn"].is_cross_attention = True

    with pytest.raises(ValueError, match=r"got inner\.network\.cross_attn") as caught:
        models.trainer([LocAteR(1.0)]).fit(Crossing(), models.tokens())
    assert "modules=None" not in str(caught.value)


def test_a_layer_that_was_read_wrongly_is_left_out_of_the_next_fit_until_it_changes():
    """What one fit has found holds for the next with the same layer, and not for one that was mended."""
    job = Seeded(model=models.llama())
    name = "inner.network.model.layers.1.self_attn"
    projection = job.get_submodule(name).q_proj
    hook = projection.register_forward_hook(lambda module, args, out: out.flip(-1))
    with pytest.warns(UserWarning, match=rf"{name} is left out: its queries are not W x \+ b"):
        fit([QKSpectrumMonitor(report=False)], job, max_steps=1)
    for callback in (QKClip(1.0), LocAteR(1.0)):
        with pytest.warns(UserWarning, match=rf"{name} is (not clipped|left out): its queries are not"):
            fit([callback], job, max_steps=1)
    with pytest.raises(ValueError, match="expected query and key weights that can be read in"):
        fit([UpdateCap(1e-4, modules="*.1.self_attn")], job, max_steps=1)
    hook.remove()
    job.get_submodule(name).is_mended = True
    clip = QKClip(1.0)
    fit([clip], job, max_steps=1)
    assert clip.maxima[name].isfinite().all()
    assert not clip.left


class Tempered(nn.Module):
    """Attention with a learnt factor on its logits, which no reading tells."""

    def __init__(self):
        super().__init__()
        self.qkv, self.factor = nn.Linear(32, 96), nn.Parameter(torch.ones(()))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT * self.factor).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", [LocAteR, QKClip, UpdateCap])
def test_patterns_that_match_only_what_cannot_be_read_are_not_said_to_match_nothing(kind):
    network = nn.ModuleDict({"words": nn.Embedding(50, 32), "attention": Tempered(), "other": models.gpt2()})
    callback = kind(1.0, modules="*.attention")
    with pytest.raises(
        ValueError, match=r"network\.attention.*its learnt parameter 'factor'.*modules="
    ) as caught:
        fit([callback], Seeded(model=network), max_steps=1)
    assert "matches none" not in str(caught.value)


def test_a_layer_can_be_given_up_in_mid_run():
    name = "inner.network.transformer.h.1.attn"
    for callback in (QKClip(1.0), UpdateCap(1e-4), LocAteR(1.0)):
        with pytest.warns(UserWarning, match=rf"{name}.*any more: it is read wrongly"):
            fit(
                [callback, At(lambda _, own=callback: own.leave_alone({name: "it is read wrongly"}))],
                max_steps=5,
            )
