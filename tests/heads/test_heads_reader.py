import pytest
import torch
from heads_oracle import parts, project, randomize, reorder, run
from heads_zoo import LLAMA, ZOO, build, feed
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from lightning_qk.functional.rotary import rotate
from lightning_qk.heads.reader import find_attention, head_projections, unread

ALL = sorted(ZOO)


@pytest.mark.parametrize("name", ALL)
def test_weights_give_the_q_and_k_that_attention_received(name):
    model = build(name)
    calls = run(model, feed(name))
    read = head_projections(model)

    assert list(read) == [module for module in dict(model.named_modules()) if module in calls]
    expect = ZOO[name].expect
    for layer, call in calls.items():
        heads = read[layer]
        key_input = calls[heads.key_layer].key_input if heads.key_layer else call.key_input
        query = project(heads.query, heads.query_bias, call.query_input)
        key = project(heads.key, heads.key_bias, key_input)
        if expect.reordered:
            query, key = reorder(query, expect.apart), reorder(key, expect.apart)
        if heads.qk_norm:
            # The norm leaves a factor a token; a LayerNorm's offset stays out of the weights.
            norm_bias = _norm_offsets(model.get_submodule(layer))
            for ours, theirs, offset in ((query, call.query, norm_bias[0]), (key, call.key, norm_bias[1])):
                for mine, its in zip(
                    parts(ours, expect.apart), parts(theirs - offset, expect.apart), strict=True
                ):
                    cosine = torch.cosine_similarity(mine, its, dim=-1)
                    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-5)
        else:
            # Whisper and others scale q before the call and pass 1.
            torch.testing.assert_close(heads.scaling * query, call.scaling * call.query, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(key, call.key, rtol=1e-5, atol=1e-5)


def _norm_offsets(attention):
    norms = [child for name, child in attention.named_children() if "norm" in name]
    # Layers that borrow keys have no norm for them.
    norms += [None] * (2 - len(norms))
    return [getattr(norm, "bias", None) if getattr(norm, "bias", None) is not None else 0.0 for norm in norms]


@pytest.mark.parametrize("name", ALL)
def test_description_of_the_layers(name):
    expect = ZOO[name].expect
    model = build(name)
    read = head_projections(model)
    assert unread(model) == {}
    assert list(find_attention(model)) == list(read)
    assert len(read) == expect.layers
    assert {heads.heads for heads in read.values()} == {expect.heads}
    assert {heads.kv_heads for heads in read.values()} == {expect.kv_heads}
    assert {heads.qk_norm for heads in read.values()} == {expect.qk_norm}
    assert {heads.rotary is not None for heads in read.values()} == {expect.rotary}
    assert sum(not heads.self_attention for heads in read.values()) == expect.cross
    assert sum(heads.key_layer is not None for heads in read.values()) == expect.borrowed


@pytest.mark.parametrize("name", [name for name in ALL if not ZOO[name].expect.qk_norm])
def test_scaling_is_that_of_the_logits(name):
    model = build(name)
    read = head_projections(model)
    for layer, call in run(model, feed(name)).items():
        heads = read[layer]
        groups = heads.heads // heads.kv_heads
        key = project(heads.key, heads.key_bias, call.key_input).repeat_interleave(groups, 1)
        logits = heads.scaling * project(heads.query, heads.query_bias, call.query_input) @ key.mT
        true = call.scaling * call.query @ call.key.repeat_interleave(groups, 1).mT
        torch.testing.assert_close(logits, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if ZOO[name].expect.qk_norm])
def test_scaling_under_qk_norm_is_the_one_passed(name):
    model = build(name)
    read = head_projections(model)
    for layer, call in run(model, feed(name)).items():
        assert read[layer].scaling == pytest.approx(call.scaling)


@pytest.mark.parametrize("name", [name for name in ALL if ZOO[name].expect.rotary])
def test_rotary_turns_position_zero_into_every_other_position(name):
    model = build(name)
    read = head_projections(model)
    still, turned = run(model, feed(name)), run(model, feed(name, positions=True))
    # Later layers see other inputs; the first layer of each kind of rotation is enough, the rest by weights.
    for layer, call in turned.items():
        heads = read[layer]
        position = torch.arange(call.query.shape[2])
        # What the model rotates at position 0 it has put in order before.
        rotary = heads.rotary._replace(interleaved=False) if ZOO[name].expect.reordered else heads.rotary
        if heads.qk_norm:
            if layer != next(iter(turned)):
                continue
            query, key = still[layer].query, still[layer].key
        else:
            # ESM scales q before the call and passes 1.
            query = project(heads.query, heads.query_bias, call.query_input) * (heads.scaling / call.scaling)
            key = project(heads.key, heads.key_bias, call.key_input)
        for before, after in ((query, call.query), (key, call.key)):
            columns = before.permute(2, 0, 1, 3)[..., None]
            want = torch.stack(
                [rotate(column, rotary, place) for column, place in zip(columns, position, strict=True)]
            )
            torch.testing.assert_close(want[..., 0].permute(1, 2, 0, 3), after, rtol=1e-5, atol=1e-5)


def test_layers_of_two_kinds_have_their_own_frequencies():
    model = build("gemma3")
    local, full = (heads.rotary.inv_freq for heads in head_projections(model).values())
    rotary = model.rotary_emb
    assert local.data_ptr() == rotary.sliding_attention_inv_freq.data_ptr()
    assert full.data_ptr() == rotary.full_attention_inv_freq.data_ptr()
    assert not torch.equal(local, full)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_live_parameters(name):
    model = build(name)
    for layer, heads in head_projections(model).items():
        model.zero_grad()
        (heads.query.sum() + heads.key.sum()).backward()
        own = [parameter for parameter in model.get_submodule(layer).parameters() if parameter.dim() == 2]
        assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in own)


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt2-cross", "bert", "llama", "phi3", "gpt-neox", "t5", "modernbert"]
)
def test_tensors_are_views_that_follow_training(name):
    model = build(name)
    read = head_projections(model)
    before = {layer: heads.query.clone() for layer, heads in read.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for layer, heads in read.items():
        torch.testing.assert_close(heads.query, 2 * before[layer])


@pytest.mark.parametrize("name", ALL)
def test_half_precision_weights(name):
    model = build(name, torch.bfloat16)
    exact = head_projections(build(name))
    for layer, heads in head_projections(model).items():
        torch.testing.assert_close(heads.query.double(), exact[layer].query, rtol=2e-2, atol=2e-2)
        assert heads.query.dtype == (torch.float32 if heads.qk_norm else torch.bfloat16)
        assert heads.scaling == exact[layer].scaling


class Wrapped(nn.Module):
    """Holds its network as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_names_are_those_of_named_modules_in_order():
    import lightning

    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.student = Wrapped(build("gpt2"))
            self.cross_encoder = build("bert")
            self.again = self.student.module

    model = Two()
    read = head_projections(model)
    assert list(read) == [
        "student.module.transformer.h.0.attn",
        "student.module.transformer.h.1.attn",
        "cross_encoder.bert.encoder.layer.0.attention.self",
        "cross_encoder.bert.encoder.layer.1.attention.self",
    ]
    assert all(heads.self_attention for heads in read.values())
    attention = model.student.module.transformer.h[0].attn
    assert read["student.module.transformer.h.0.attn"].query.data_ptr() == attention.c_attn.weight.data_ptr()


def test_the_attention_layer_itself_may_be_passed():
    attention = build("llama").model.layers[0].self_attn
    assert list(head_projections(attention)) == [""]


def test_parametrized_weights_are_the_effective_ones():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = build("bert")
    before = next(iter(head_projections(model).values())).query.detach().clone()
    projection = model.bert.encoder.layer[0].attention.self.query
    nn.utils.parametrize.register_parametrization(projection, "weight", Double())
    heads = next(iter(head_projections(model).values()))
    torch.testing.assert_close(heads.query, 2 * before)
    heads.query.sum().backward()
    assert torch.equal(
        projection.parametrizations.weight.original.grad, torch.full_like(projection.weight, 2.0)
    )


def test_a_model_without_attention():
    with pytest.raises(
        ValueError, match=r"expected .* attention, found none in Sequential: build the network"
    ):
        head_projections(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert unread(nn.Linear(2, 2)) == {}


def test_no_module_at_all():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        head_projections({})


class StrangeAttention(nn.Module):
    """Attention of a layout that nobody knows."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 24)


def test_attention_of_an_unknown_layout_is_named_with_its_class():
    model = nn.ModuleDict({"first": StrangeAttention(), "second": StrangeAttention()})
    assert list(find_attention(model)) == ["first", "second"]
    assert "StrangeAttention has no known layout" in unread(model)["second"]
    with pytest.raises(
        ValueError, match=r"found 2 in ModuleDict of which none can be read \(first because .*mix"
    ):
        head_projections(model)


def test_readable_layers_are_returned_when_others_are_not():
    model = nn.ModuleList([build("gpt2"), StrangeAttention()])
    assert list(head_projections(model)) == ["0.transformer.h.0.attn", "0.transformer.h.1.attn"]
    assert list(unread(model)) == ["1"]


class Adapter(nn.Module):
    """Adds to a linear map what is not affine; its ``weight`` is not what it applies."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x).relu())


def _first_attention(model):
    return model.bert.encoder.layer[0].attention.self


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: setattr(a, "query", Adapter(a.query)), "'query' is a Adapter whose output is not W x + b"),
        (lambda a: setattr(a, "key", nn.Conv1d(32, 32, 3)), "Conv1d whose weight has shape"),
        (lambda a: setattr(a, "key", a.key.to("meta")), "meta device"),
        (lambda a: setattr(a, "attention_head_size", 7), "which heads = 4 and d_head = 7 do not explain"),
        (lambda a: setattr(a, "key", nn.Linear(32, 24)), "32 and 24 rows"),
        (
            lambda a: setattr(a.query, "weight", nn.Parameter(a.query.weight.char(), requires_grad=False)),
            "quantized weight",
        ),
    ],
)
def test_a_projection_that_is_not_a_plain_linear_map_is_left_out_with_the_reason(spoil, reason):
    model = build("bert", torch.float32)
    spoil(_first_attention(model))
    assert reason in unread(model)["bert.encoder.layer.0.attention.self"]
    assert list(head_projections(model)) == ["bert.encoder.layer.1.attention.self"]


def test_gated_double_width_queries_are_not_misread():
    model = LlamaModel(LlamaConfig(**LLAMA))
    model.layers[0].self_attn.q_proj = nn.Linear(32, 64)
    assert "64 and 32 rows" in unread(model)["layers.0.self_attn"]


def test_a_layer_without_head_counts_takes_them_from_the_config():
    model = BertModel(BertConfig(**ZOO_BERT, num_attention_heads=8))
    attention = model.encoder.layer[0].attention.self
    del attention.num_attention_heads, attention.attention_head_size
    heads = head_projections(model)["encoder.layer.0.attention.self"]
    assert (heads.heads, heads.d_head) == (8, 4)


ZOO_BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 50}


def test_reading_draws_no_random_numbers_and_changes_nothing():
    model = randomize(build("qwen3"))
    state = torch.random.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: seen.append(module))
    head_projections(model, fold_norm=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert seen == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


class _Mixing(nn.Module):
    """Attention of one's own: no layout is known of its class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.first, self.second, self.third)
        )
        weights = (q @ k.mT * 8**-0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


def test_the_route_tells_how_the_weights_were_found() -> None:
    model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4))
    changed = model.encoder.layer[1].attention.self
    changed.key = nn.Sequential(changed.key, nn.Linear(32, 32))
    assert [head.route for head in head_projections(model).values()] == ["table", "table, as a matrix"]
    own = _Mixing()
    assert [head.route for head in head_projections(own).values()] == ["inferred"]
    own.second = nn.Sequential(own.second, nn.Linear(16, 16))
    assert [head.route for head in head_projections(own).values()] == ["inferred, as a matrix"]
