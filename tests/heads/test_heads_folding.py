import pytest
import torch
from heads_oracle import project, recorded_calls
from heads_zoo import ZOO, build, feed

from lightning_qk.heads.reader import head_projections

ALL = sorted(ZOO)


def _norm_inputs(model, inputs):
    """Every norm's input and output tensors in one forward, with the norm."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
    ]
    with recorded_calls(model) as calls, torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return calls, seen


def _normalized(norm, x):
    if isinstance(norm, torch.nn.LayerNorm):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if type(norm).__name__ == "CohereLayerNorm":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("name", ALL)
def test_folded_weights_act_on_the_normalized_input_of_the_norm(name):
    model = build(name)
    calls, seen = _norm_inputs(model, feed(name))
    folded = {
        layer: heads for layer, heads in head_projections(model, fold_norm=True).items() if heads.norm_folded
    }
    assert len(folded) == ZOO[name].expect.folded
    for layer, heads in folded.items():
        call = calls[layer]
        norm, before = next((norm, x) for norm, x, out in seen if out is call.query_input)
        x = _normalized(norm, before)
        query = project(heads.query, heads.query_bias, x)
        key = project(heads.key, heads.key_bias, x)
        if heads.qk_norm:
            plain = head_projections(model)[layer]
            want = project(plain.query, plain.query_bias, call.query_input)
            torch.testing.assert_close(query, want, rtol=1e-5, atol=1e-5)
            continue
        torch.testing.assert_close(heads.scaling * query, call.scaling * call.query, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(key, call.key, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_folded_is_given_as_it_is(name):
    model = build(name)
    plain, folded = head_projections(model), head_projections(model, fold_norm=True)
    for layer, heads in folded.items():
        if not heads.norm_folded:
            torch.testing.assert_close(heads.query, plain[layer].query)
            torch.testing.assert_close(heads.key, plain[layer].key)


def test_layer_norm_folding_removes_the_mean():
    heads = next(iter(head_projections(build("gpt2"), fold_norm=True).values()))
    assert heads.query.sum(-1).abs().max() < 1e-10


def test_gradients_reach_the_gain():
    model = build("llama")
    heads = head_projections(model, fold_norm=True)["model.layers.1.self_attn"]
    (heads.query.square().sum() + heads.key.square().sum()).backward()
    layer = model.model.layers[1]
    assert layer.input_layernorm.weight.grad.abs().max() > 0
    assert layer.self_attn.q_proj.weight.grad.abs().max() > 0
    assert layer.post_attention_layernorm.weight.grad is None


def test_pre_and_post_norm_of_one_class_are_told_apart():
    from heads_zoo import BERT, WIDTH
    from transformers import OPTConfig, OPTModel

    options = {**BERT, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}
    for before in (True, False):
        model = OPTModel(OPTConfig(**options, do_layer_norm_before=before))
        assert {heads.norm_folded for heads in head_projections(model, fold_norm=True).values()} == {before}


class Parent(torch.nn.Module):
    """A layer around attention that does something with what it gives to it."""

    def __init__(self, attention, change):
        super().__init__()
        self.norm, self.inner, self.change = torch.nn.LayerNorm(32), Inner(attention, change), change

    def forward(self, x):
        return self.inner(self.norm(x))


class Inner(torch.nn.Module):
    def __init__(self, attention, change):
        super().__init__()
        self.attention, self.change = attention, change

    def forward(self, x):
        return self.attention(self.change(x))


@pytest.mark.parametrize(
    ("change", "folded"),
    [(lambda x: x, True), (lambda x: 2 * x, False), (lambda x: x.nothing, False)],
)
def test_only_an_input_that_is_the_norms_output_is_folded(change, folded):
    attention = build("bert", torch.float32).bert.encoder.layer[0].attention.self
    (heads,) = head_projections(Parent(attention, change), fold_norm=True).values()
    assert heads.norm_folded is folded


def test_a_child_between_norm_and_attention_is_not_folded_over():
    attention = build("bert", torch.float32).bert.encoder.layer[0].attention.self
    between = torch.nn.Linear(32, 32)
    parent = Parent(attention, lambda x: x)
    parent.inner.change = between
    (heads,) = head_projections(parent, fold_norm=True).values()
    assert not heads.norm_folded


def test_probing_leaves_the_random_state_and_running_statistics_alone():
    model = build("whisper", torch.float32).train()
    state = torch.random.get_rng_state()
    head_projections(model, fold_norm=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
