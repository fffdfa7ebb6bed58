"""Scaled spectra against dense ones, and weights that come back."""

import copy

import models
import pytest
import torch
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from oracles import dense_moments
from torch import nn

from lightning_qk import AttentionMonitor, LocAteR, QKSpectrumMonitor, SpectrumScaling, spectrum_scaling
from lightning_qk.heads.reader import head_projections

MODELS = {"gpt2": models.gpt2, "bert": models.bert, "llama": models.llama}
BATCH = torch.randint(3, models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_spectra_are_scaled_and_come_back(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before = copy.deepcopy(model.state_dict())
    moments = {layer: dense_moments(head.query, head.key) for layer, head in head_projections(model).items()}
    keys = {layer: head.key.clone() for layer, head in head_projections(model).items()}
    plain = model(input_ids=BATCH).logits
    with spectrum_scaling(model, gamma=0.7, eps=2.0) as factors:
        for layer, head in head_projections(model).items():
            eta = moments[layer]["frobenius_sq"]
            want = 0.7 * (eta + 2.0).log() / eta.sqrt()
            torch.testing.assert_close(factors[layer].double(), want, rtol=1e-5, atol=0)
            after = dense_moments(head.query, head.key)
            torch.testing.assert_close(after["frobenius_sq"], want.square() * eta, rtol=1e-4, atol=0)
            torch.testing.assert_close(after["trace"], want * moments[layer]["trace"], rtol=1e-4, atol=1e-4)
            assert torch.equal(head.key, keys[layer])
        assert not torch.equal(model(input_ids=BATCH).logits, plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="inside"), spectrum_scaling(model):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def symmetric() -> nn.Module:
    """Keys that are the queries: W_QK is symmetric."""
    model = models.llama().requires_grad_(False)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.copy_(
            attention.k_proj.weight.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
        )
    return model


def test_the_two_statistics_agree_where_the_form_is_symmetric():
    model = symmetric()
    with spectrum_scaling(model) as frobenius:
        first = {name: own.clone() for name, own in frobenius.items()}
    with spectrum_scaling(model, statistic="trace_sq") as trace:
        for name, own in trace.items():
            torch.testing.assert_close(own, first[name])


def test_heads_that_have_no_value_are_refused_and_nothing_is_changed():
    torch.manual_seed(0)
    model = models.gpt2()
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(ValueError, match=r"above 0 for every head.*frobenius_sq"),
        spectrum_scaling(antisymmetric(model), statistic="trace_sq"),
    ):
        pass
    with torch.no_grad():
        model.load_state_dict(before)
        model.transformer.h[1].attn.c_attn.weight[:, :64] *= 1e-3
    small = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(ValueError, match="change their sign: use a larger eps"),
        spectrum_scaling(model, eps=0.0),
    ):
        pass
    assert all(torch.equal(value, small[key]) for key, value in model.state_dict().items())
    with spectrum_scaling(model, eps=1.0):
        pass
    qwen3 = models.build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**models._GROUPED))
    with pytest.raises(ValueError, match="norm of queries or keys"), spectrum_scaling(qwen3):
        pass


def antisymmetric(model: nn.Module) -> nn.Module:
    """The first head's form turns by a right angle: tr(W²) < 0."""
    weight = model.transformer.h[0].attn.c_attn.weight
    with torch.no_grad():
        turned = weight[:, :8].clone()
        weight[:, 32:36], weight[:, 36:40] = turned[:, 4:8], -turned[:, 0:4]
    return model


@pytest.mark.parametrize("arguments", [{"gamma": 0.0}, {"eps": -1.0}, {"statistic": "trace"}])
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match="expected"):
        SpectrumScaling(**arguments)


class Watch(models.Job):
    """Keeps the query weight that each kind of step sees."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(models.llama(), lr=1e-2)
        self.seen: dict[str, torch.Tensor] = {}

    def keep(self, kind: str) -> None:
        self.seen[kind] = self.inner["network"].model.layers[0].self_attn.q_proj.weight.detach().clone()

    def training_step(self, batch, batch_idx):
        self.keep("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.keep("validation")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.keep("test")

    def predict_step(self, batch, batch_idx):
        self.keep("predict")


def test_training_is_as_it_was_and_evaluation_is_scaled(tmp_path):
    plain, scaled = Watch(), Watch()
    arguments = {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
    models.trainer([], **arguments).fit(plain, models.tokens(), models.tokens())
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1)
    callbacks = [
        SpectrumScaling(2.0),
        LocAteR(0.0),
        QKSpectrumMonitor(report=False),
        AttentionMonitor(report=False),
    ]
    trainer = models.trainer([*callbacks, checkpoint], enable_checkpointing=True, **arguments)
    trainer.fit(scaled, models.tokens(), models.tokens())
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain.seen["training"], scaled.seen["training"])
    assert not torch.equal(plain.seen["validation"], scaled.seen["validation"])
    (path,) = tmp_path.glob("*step=4*.ckpt")
    saved = torch.load(path, weights_only=False)["state_dict"]
    name = "inner.network.model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(saved[name], scaled.state_dict()[name])

    final = copy.deepcopy(scaled.state_dict())
    again = models.trainer([SpectrumScaling(2.0)])
    again.test(scaled, models.tokens(), verbose=False)
    again.predict(scaled, models.tokens())
    for kind in ("test", "predict"):
        ratio = scaled.seen[kind] / final[name]
        by_head = ratio.view(4, -1)
        torch.testing.assert_close(by_head, by_head[:, :1].expand_as(by_head), rtol=1e-4, atol=0)
        assert (by_head[:, 0] - 1).abs().max() > 0.05
    assert all(torch.equal(value, final[key]) for key, value in scaled.state_dict().items())
