"""Quantized weights: the spectra are those of the numbers that the codes stand for."""

import warnings

import pytest
import torch
from heads_zoo import build, feed
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel

from lightning_qk import head_projections, locater_penalty
from lightning_qk.functional import qk_moments
from lightning_qk.heads.module_projection import projection_of
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.locater import LocaterPenalty, Settings

VARIANCE = Settings("variance", "model", None, 1.0)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

pytestmark = pytest.mark.filterwarnings("ignore")


def _int8(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def _int4(model):
    torchao = pytest.importorskip("torchao.quantization")
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16))
    torchao.quantize_(model, config)


def _dynamic(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())


def _bnb(make):
    def quantize(model):
        library = pytest.importorskip("bitsandbytes")
        for name, module in list(model.named_modules()):
            if name.rpartition(".")[2] in PROJECTIONS:
                # Bytes of 4-bit codes are packed in blocks of 64 numbers.
                other = make(library.nn, module)
                other.load_state_dict(module.state_dict())
                model.set_submodule(name, other.to("cpu"))

    return quantize


_bnb_8bit = _bnb(
    lambda nn_, linear: nn_.Linear8bitLt(
        linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False
    )
)
_bnb_4bit = _bnb(
    lambda nn_, linear: nn_.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        quant_type="nf4",
        compute_dtype=torch.float32,
    )
)

QUANTIZED = {
    "torchao-int8": _int8,
    "torchao-int4": _int4,
    "torchao-int8-dynamic": _dynamic,
    "bitsandbytes-8bit": _bnb_8bit,
    "bitsandbytes-4bit": _bnb_4bit,
}


def _quantized(kind):
    model = build("llama", torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        QUANTIZED[kind](model)
    return model


def _dequantized(model):
    """A plain model with what each quantized projection does to unit vectors as its weights."""
    plain = build("llama", torch.float32)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("q_proj", "k_proj"):
            with torch.no_grad():
                zero = module(torch.zeros(1, module.in_features))
                weight = (module(torch.eye(module.in_features)) - zero).T
                plain.get_submodule(name).weight.copy_(weight)
    return plain


def _moments(model):
    return [qk_moments(head.query, head.key) for head in head_projections(model).values()]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_spectra_are_those_of_the_dequantized_weights(kind):
    model = _quantized(kind)
    original = _moments(build("llama", torch.float32))
    got, want = _moments(model), _moments(_dequantized(model))
    assert len(got) == 2
    # Where the input is quantized too, the run gives unit vectors only to one part in 127.
    tolerance = 2e-2 if kind.endswith("dynamic") else 1e-3
    for ours, theirs, before in zip(got, want, original, strict=True):
        assert not torch.equal(ours["trace_sq"], before["trace_sq"])
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=tolerance, msg=key)
    for head in head_projections(model).values():
        assert head.query.dtype == torch.float32


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-int4", "bitsandbytes-8bit", "bitsandbytes-4bit"])
def test_reading_leaves_outputs_as_they_are(kind):
    model, inputs = _quantized(kind), feed("llama")
    want = model(**inputs).logits
    head_projections(model)
    assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("kind", ["torchao-int8", "bitsandbytes-8bit", "bitsandbytes-4bit"])
@pytest.mark.parametrize("way", ["loss", "callback"])
def test_gradients_reach_the_adapters_of_a_quantized_model(kind, way):
    model = get_peft_model(_quantized(kind), LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    generator = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(generator=generator).mul_(0.2)
    model.train()
    # The oracle: dense weights of the quantized base, and B A added by hand.
    total = torch.zeros(())
    for layer in model.get_submodule("base_model.model.model.layers"):
        sides = []
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            base = projection.base_layer
            with torch.no_grad():
                zero = base(torch.zeros(1, 32))
                weight = (base(torch.eye(32)) - zero).T
            added = projection.lora_B["default"].weight @ projection.lora_A["default"].weight
            sides.append((weight + projection.scaling["default"] * added).unflatten(0, (-1, 8)))
        total = total + qk_moments(*sides)["sym_var"].sum()
    want = torch.autograd.grad(total, list(trained.values()))
    if way == "loss":
        locater_penalty(model).backward()
    else:
        _, reached = LocaterPenalty(ProjectionReader(model)).add_gradient(
            VARIANCE, 1.0, list(model.parameters())
        )
        assert reached
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)
    for (name, parameter), gradient in zip(trained.items(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-4, msg=name)


def test_codes_that_are_packed_for_evaluation():
    library = pytest.importorskip("bitsandbytes")
    linear = nn.Linear(64, 64)
    module = library.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    module.load_state_dict(linear.state_dict())
    plan = projection_of(module.to("cpu"), "q")
    want = plan.read().weight
    with torch.no_grad():
        module.eval()(torch.randn(3, 64))
    torch.testing.assert_close(plan.read().weight, want, rtol=1e-2, atol=2e-3)


def test_a_frozen_quantized_model_is_not_reached():
    model = _quantized("torchao-int8")
    _, reached = LocaterPenalty(ProjectionReader(model)).add_gradient(VARIANCE, 1.0, list(model.parameters()))
    assert not reached


def test_codes_without_a_way_to_run_them_are_named():
    module = nn.Linear(6, 8)
    module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnreadLayer, match="quantized weight"):
        projection_of(module, "q")


def test_ibert_is_read_while_it_does_not_quantize():
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    plain, quantizing = (
        AutoModel.from_config(AutoConfig.for_model("ibert", **fields, vocab_size=32, quant_mode=mode))
        for mode in (False, True)
    )
    (head,) = head_projections(plain).values()
    weight = plain.encoder.layer[0].attention.self.query.weight
    torch.testing.assert_close(head.query.flatten(0, 1), weight)
    with pytest.raises(ValueError, match="query_activation"):
        head_projections(quantizing)
