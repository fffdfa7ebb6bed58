"""PEFT adapters: what is read is the merged model's, and gradients reach the adapter alone."""

import copy
import warnings

import pytest
import torch
from heads_zoo import build, feed
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model

from lightning_qk import head_projections, locater_penalty
from lightning_qk.functional import qk_moments
from lightning_qk.heads.module_projection import ModuleMatrix
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.regularizers.locater import LocaterPenalty, Settings

LORA = {
    "lora": {"lora_dropout": 0.3},
    "dora": {"use_dora": True, "lora_dropout": 0.3},
    "rslora": {"use_rslora": True},
}
TARGETS = {
    "llama": ["q_proj"],
    "gpt2": ["c_attn"],
    "bert": ["query", "key"],
    "gpt-neox": ["query_key_value"],
}
VARIANCE = Settings("variance", "model", None, 1.0)


def _adapted(name, config, dtype=torch.float64):
    """A toy model in training mode whose adapters are far from zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(name, dtype), config)
    _disturb(model)
    return model.to(dtype).train()


def _disturb(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def _moments(model):
    return [qk_moments(head.query, head.key) for head in head_projections(model).values()]


def _assert_same(got, want, tolerance=1e-5):
    assert len(got) == len(want) == 2
    for ours, theirs in zip(got, want, strict=True):
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", LORA)
def test_moments_are_those_of_the_merged_model(name, kind):
    model = _adapted(name, LoraConfig(r=3, target_modules=TARGETS[name], **LORA[kind]))
    base = _moments(model.get_base_model())
    state = torch.get_rng_state()
    got = _moments(model)
    assert torch.equal(state, torch.get_rng_state())
    merged = copy.deepcopy(model).merge_and_unload()
    _assert_same(got, _moments(merged))
    # Adapters sit in the base model's own modules.
    _assert_same(got, base)
    with model.disable_adapter():
        assert not torch.allclose(_moments(model)[0]["trace_sq"], got[0]["trace_sq"])


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["query", "key"], feedforward_modules=[]),
        LoHaConfig(r=2, target_modules=["query", "key"]),
        OFTConfig(oft_block_size=4, r=0, target_modules=["query"]),
    ],
    ids=["ia3", "loha", "oft"],
)
def test_other_adapters_are_run(config):
    model = _adapted("bert", config, torch.float32)
    _assert_same(_moments(model), _moments(copy.deepcopy(model).merge_and_unload()), 1e-4)


@pytest.mark.parametrize("kind", LORA)
def test_the_short_way_has_the_gradients_of_the_run(kind):
    """The layer's own forward is the oracle, of DoRA's norm too, which takes no gradient."""
    layer = _adapted("bert", LoraConfig(r=3, target_modules=["query"], **LORA[kind])).base_model
    layer = layer.get_submodule("model.bert.encoder.layer.0.attention.self.query")
    plan = ModuleMatrix(layer, "query")
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    probe = torch.randn(plan.rows, plan.columns, dtype=torch.float64)
    both = []
    for short in (True, False):
        plan._is_closed = dict.fromkeys(plan._is_closed, short)
        weight, bias = plan.read()
        both.append((weight, bias, *torch.autograd.grad((weight * probe).sum(), trained)))
    for short, ran in zip(*both, strict=True):
        torch.testing.assert_close(short, ran, rtol=1e-9, atol=1e-9)
    assert len(trained) == (3 if kind == "dora" else 2)


def test_what_is_switched_while_training_is_seen():
    model = _adapted("llama", LoraConfig(r=3, target_modules=["q_proj", "k_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model.set_adapter("other")
    _disturb(model.double(), 6)
    reader = ProjectionReader(model)

    def now():
        return [qk_moments(head.query, head.key) for head in reader.values()]

    def received():
        """The queries that the first layer's own forward makes of its input."""
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn")
        return layer.q_proj(x)

    x = torch.randn(4, 32, dtype=torch.float64)
    model.eval()
    seen = []
    for change in (
        lambda: None,
        lambda: model.set_adapter("default"),
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.merge_adapter(["default"]),
    ):
        change()
        head = next(iter(reader.values()))
        got = torch.einsum("nd,hed->nhe", x, head.query).flatten(1)
        if head.query_bias is not None:
            got = got + head.query_bias.flatten()
        torch.testing.assert_close(got, received(), rtol=1e-9, atol=1e-9)
        seen.append(now()[0]["trace_sq"])
    assert not any(torch.allclose(seen[0], other) for other in seen[1:4])
    assert not reader.refresh()


def test_reading_does_not_take_a_disabled_adapter_out_of_the_weights():
    model = _adapted("llama", LoraConfig(r=3, target_modules=["q_proj"]))
    with model.disable_adapter():
        want = _moments(model)
    model.merge_adapter()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    stored = layer.base_layer.weight.clone()
    with torch.no_grad():
        model.base_model.disable_adapter_layers()
        _assert_same(_moments(model), want, 1e-9)
    assert layer.merged
    assert torch.equal(layer.base_layer.weight, stored)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("way", ["loss", "callback"])
def test_the_penalty_reaches_the_adapter_alone(name, kind, way):
    model = _adapted(name, LoraConfig(r=3, target_modules=TARGETS[name], **LORA[kind]))
    heads = head_projections(model)
    value = sum(qk_moments(head.query, head.key)["sym_var"].sum() for head in heads.values())
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    shares = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    want = {key: share for key, share in zip(trained, shares, strict=True) if share is not None}
    if way == "loss":
        penalty = locater_penalty(model)
        penalty.backward()
        reached = True
    else:
        penalty, reached = LocaterPenalty(ProjectionReader(model)).add_gradient(
            VARIANCE, 1.0, list(model.parameters())
        )
    assert reached
    torch.testing.assert_close(penalty.detach(), value.detach())
    given = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    # Two or three tensors for every adapted projection of the two layers, and nothing else.
    assert set(given) == set(want)
    assert len(given) == 2 * len(TARGETS[name]) * (3 if kind == "dora" else 2)
    for key, gradient in given.items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-6, atol=1e-9, msg=key)


def test_an_adapter_that_takes_no_part_is_not_reached():
    model = _adapted("llama", LoraConfig(r=3, target_modules=["q_proj"]))
    model.merge_adapter()
    value, reached = LocaterPenalty(ProjectionReader(model)).add_gradient(
        VARIANCE, 1.0, list(model.parameters())
    )
    assert value > 0
    assert not reached
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not locater_penalty(model).requires_grad


def test_queries_with_an_adapter_are_what_attention_receives():
    from heads_oracle import project, run

    model = _adapted("llama", LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)).eval()
    calls = run(model, feed("llama"))
    for name, head in head_projections(model).items():
        call = calls[name]
        torch.testing.assert_close(project(head.query, head.query_bias, call.query_input), call.query)
        torch.testing.assert_close(project(head.key, head.key_bias, call.key_input), call.key)


def _multihead():
    model = torch.nn.ModuleDict({"attn": torch.nn.MultiheadAttention(16, 2, batch_first=True)}).double()
    # Where the layer is wrapped as a whole the weights lie in the wrapper, and its base keeps its own.
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["attn"]))
    _disturb(model.double())
    return model, model.base_model.model["attn"]


def _first(model):
    (head,) = head_projections(model).values()
    return torch.cat([head.query.flatten(0, 1), head.key.flatten(0, 1)])


def test_an_adapter_around_a_whole_layer_takes_part():
    model, layer = _multihead()
    base = layer.base_layer.in_proj_weight.detach().clone()[:32]
    added = layer.scaling["default"] * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight)[:32]
    got = _first(model)
    torch.testing.assert_close(got, base + added)
    got.square().sum().backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    assert layer.base_layer.in_proj_weight.grad is None
    with model.disable_adapter():
        torch.testing.assert_close(_first(model), base)
    reader = ProjectionReader(model)
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    want = layer.eval()(x, x, x)[0]
    layer.merge()
    torch.testing.assert_close(layer(x, x, x)[0], want)
    (head,) = reader.values()
    torch.testing.assert_close(head.query.flatten(0, 1), (base + added)[:16])


def test_the_penalty_reaches_an_adapter_around_a_whole_layer():
    model, _ = _multihead()
    value, reached = LocaterPenalty(ProjectionReader(model)).add_gradient(
        VARIANCE, 1.0, list(model.parameters())
    )
    given = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert reached
    assert set(given) == {
        name for name, p in model.named_parameters() if "lora_" in name and "attn.lora" in name
    }
    model.zero_grad()
    penalty = locater_penalty(model)
    penalty.backward()
    torch.testing.assert_close(penalty.detach(), value)
    for name, parameter in model.named_parameters():
        if name in given:
            torch.testing.assert_close(parameter.grad, given[name])
