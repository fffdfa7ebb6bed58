"""Layouts of layers that compute attention themselves: what reaches their products is the oracle."""

import itertools
import time
from collections.abc import Callable

import pytest
import torch
import transformers as tf
from heads_oracle import project, randomize
from heads_zoo import BERT, T5, WIDTH
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_qk.heads.reader import head_projections, unread

pytestmark = pytest.mark.usefixtures("code_of_a_library")

PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}


class Products(TorchFunctionMode):
    """Keeps the operands of every product of two tensors, for the layer that runs."""

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        super().__init__()
        self.running: list[str] = []
        self.inputs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        self.operands: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for layer in layers:
            module = model.get_submodule(layer)
            module.register_forward_pre_hook(lambda *_, layer=layer: self.running.append(layer))
            module.register_forward_hook(lambda *_: self.running.pop() and None)
            for child in module.modules():
                child.register_forward_pre_hook(self._keep(layer), with_kwargs=True)

    def _keep(self, layer: str) -> Callable[..., None]:
        def keep(module, args, kwargs):
            self.inputs[layer] += [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]

        return keep

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.running and getattr(function, "__name__", "") in PRODUCTS:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            self.operands[self.running[-1]] += given
        return function(*args, **kwargs)


def _model(name: str, config: str, **options: object) -> Callable[[], nn.Module]:
    def make():
        made = getattr(tf, config)(**options)
        made._attn_implementation = "eager"
        return getattr(tf, name)(made)

    return make


def _part(model: str, name: str, *arguments: object) -> Callable[[], nn.Module]:
    """One layer of a model's file, alone."""
    return lambda: getattr(
        __import__(f"transformers.models.{model}.modeling_{model}", fromlist=[name]), name
    )(*arguments)


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 50, (1, 6), generator=torch.Generator().manual_seed(1))}


def _hidden(*shape: int, name: str = "hidden") -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(*shape, generator=torch.Generator().manual_seed(1))}


def _image(side: int) -> Callable[[], dict[str, Tensor]]:
    return _hidden(1, 3, side, side, name="pixel_values")


def _two_sequences() -> dict[str, Tensor]:
    return {**_tokens(), "decoder_input_ids": _tokens()["input_ids"][:, :4]}


def _both() -> dict[str, Tensor]:
    vision, text = _hidden(1, 5, WIDTH)()["hidden"], _hidden(1, 7, WIDTH)()["hidden"]
    return {"vision_features": vision, "text_features": text}


XLNET = {"d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 50}
DEBERTA = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
SWIN = {
    "image_size": 16,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 2,
}
LEVIT = {
    "image_size": 64,
    "hidden_sizes": [16, 24, 32],
    "num_attention_heads": [2, 3, 4],
    "depths": [1, 1, 1],
    "key_dim": [4, 4, 4],
    "attention_ratio": [2, 2, 2],
    "drop_path_rate": 0,
}
FUNNEL = {
    "vocab_size": 50,
    "block_sizes": [1, 1],
    "num_decoder_layers": 1,
    "d_model": WIDTH,
    "n_head": 4,
    "d_head": 8,
    "d_inner": 48,
}
REFORMER = {
    "attn_layers": ["local", "lsh"],
    "axial_pos_embds": False,
    "hidden_size": WIDTH,
    "feed_forward_size": 48,
    "num_attention_heads": 4,
    "attention_head_size": 8,
    "vocab_size": 50,
    "num_buckets": 2,
    "lsh_attn_chunk_length": 6,
    "local_attn_chunk_length": 6,
    "max_position_embeddings": 64,
}
GROUNDING = {"d_model": WIDTH, "encoder_ffn_dim": 64, "encoder_attention_heads": 8}

# How to build a model, what to feed it, how many layers it has, the layout of the first one.
CASES = {
    "t5": (_model("T5Model", "T5Config", **T5), _two_sequences, 6, "separate"),
    "xlnet": (_model("XLNetModel", "XLNetConfig", **XLNET), _tokens, 2, "separate"),
    "deberta": (_model("DebertaModel", "DebertaConfig", **DEBERTA), _tokens, 2, "[q,k,v] per head"),
    "deberta-v2": (_model("DebertaV2Model", "DebertaV2Config", **DEBERTA), _tokens, 2, "separate"),
    "funnel": (_model("FunnelModel", "FunnelConfig", **FUNNEL), _tokens, 3, "separate"),
    "swinv2": (_model("Swinv2Model", "Swinv2Config", **SWIN), _image(16), 2, "separate"),
    "levit": (_model("LevitModel", "LevitConfig", **LEVIT), _image(64), 5, "[q,k,v] per head"),
    "reformer": (_model("ReformerModel", "ReformerConfig", **REFORMER), _tokens, 2, "separate"),
    "squeezebert": (
        _model("SqueezeBertModel", "SqueezeBertConfig", **{**BERT, "embedding_size": WIDTH}),
        _tokens,
        2,
        "separate",
    ),
    "grounding-dino": (
        _part("grounding_dino", "GroundingDinoBiMultiHeadAttention", tf.GroundingDinoConfig(**GROUNDING)),
        _both,
        1,
        "separate",
    ),
    "aimv2": (
        _part(
            "aimv2",
            "Aimv2AttentionPoolingHead",
            tf.Aimv2VisionConfig(hidden_size=WIDTH, num_attention_heads=4),
        ),
        _hidden(1, 6, WIDTH, name="hidden_states"),
        1,
        "key",
    ),
    "timesfm": (
        _part(
            "timesfm",
            "TimesFmAttention",
            tf.TimesFmConfig(hidden_size=WIDTH, head_dim=8, num_attention_heads=4),
            0,
        ),
        _hidden(1, 6, WIDTH, name="hidden_states"),
        1,
        "separate",
    ),
}


def _record(name: str):
    make, feed, layers, layout = CASES[name]
    torch.manual_seed(0)
    model = randomize(make()).double().eval()
    read = head_projections(model)
    assert unread(model) == {}
    assert len(read) == layers
    assert next(iter(read.values())).layout == layout
    record = Products(model, list(read))
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in feed().items()}
    with record, torch.no_grad():
        model(**inputs)
    return read, record


def _projections(weight: Tensor, bias: Tensor | None, inputs: list[Tensor]) -> list[Tensor]:
    """W x + b, (batch, heads, n, d_head), for all inputs of the right width, features last or second."""
    width = weight.shape[-1]
    given = [x for x in inputs if x.dim() >= 2 and x.shape[-1] == width]
    given += [x.mT for x in inputs if x.dim() == 3 and x.shape[1] == width]
    # XLNet's tokens come first.
    given += [x.transpose(0, 1) for x in given if x.dim() == 3]
    given = [x.flatten(1, -2) if x.dim() > 2 else x[None] for x in given if x.is_floating_point()]
    return [project(weight, bias, x) for x in given]


def _reaches(ours: Tensor, operand: Tensor, factor: float | None) -> bool:
    """Whether an operand is W x + b in some order, up to a factor; None: a positive one for each vector."""
    if ours.numel() != operand.numel():
        return False
    theirs = operand.detach()
    if factor is None:
        theirs = (
            theirs.unflatten(-1, (-1, ours.shape[-1])) if theirs.shape[-1] % ours.shape[-1] == 0 else theirs
        )
        theirs = torch.nn.functional.normalize(
            theirs if theirs.shape[-1] == ours.shape[-1] else theirs.mT, dim=-1
        )
        ours = torch.nn.functional.normalize(ours, dim=-1)
    else:
        ours = factor * ours
    orders = itertools.permutations(range(4))
    return any(
        torch.allclose(ours.permute(order).flatten(), theirs.flatten(), rtol=1e-5, atol=1e-7)
        for order in orders
    )


@pytest.mark.parametrize("name", sorted(CASES))
def test_weights_give_the_operands_of_the_layers_own_products(name):
    read, record = _record(name)
    for layer, heads in read.items():
        inputs, operands = record.inputs[layer], record.operands[layer]
        factors = [None] if heads.qk_norm else [1.0, heads.scaling, heads.scaling**0.5]
        for weight, bias in ((heads.query, heads.query_bias), (heads.key, heads.key_bias)):
            # A query that is learnt itself does not depend on any input.
            found = [
                x[:, :, :1] if not weight.any() else x for x in _projections(weight.detach(), bias, inputs)
            ]
            assert any(
                _reaches(ours.detach(), operand, factor)
                for ours in found
                for operand in operands
                for factor in factors
            ), (layer, tuple(weight.shape))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("key_width", [None, 20])
def test_torch_attention_gives_the_probabilities_of_its_weights(key_width, batch_first):
    attention = nn.MultiheadAttention(WIDTH, 4, kdim=key_width, vdim=key_width, batch_first=batch_first)
    randomize(attention, seed=3)
    x, others = torch.randn(1, 6, WIDTH), torch.randn(1, 5, key_width or WIDTH)
    given = (x, others, others) if batch_first else [t.transpose(0, 1) for t in (x, others, others)]
    probabilities = attention(*given, need_weights=True, average_attn_weights=False)[1]
    (heads,) = head_projections(attention).values()
    query, key = project(heads.query, heads.query_bias, x), project(heads.key, heads.key_bias, others)
    torch.testing.assert_close(
        (heads.scaling * query @ key.mT).softmax(-1), probabilities, rtol=1e-4, atol=1e-5
    )
    assert heads.self_attention is (key_width is None)


def test_of_two_inputs_that_attend_to_each_other_none_is_the_other():
    (heads,) = head_projections(CASES["grounding-dino"][0]()).values()
    assert not heads.self_attention


class SharedAttention(nn.Module):
    """Attention that lends its keys or uses those of an earlier layer; it stands for a class of transformers."""

    __module__ = "transformers.models.shared"

    def __init__(self, kind: str, *, borrows: bool, index: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.layer_type, self.is_kv_shared_layer = 2, kind, borrows
        self.q_proj = nn.Linear(8, 8)
        if not borrows:
            self.k_proj = nn.Linear(8, 8)
        if index is not None:
            self.kv_shared_layer_index = index


def _stack(*layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": layer}) for layer in layers])})


def test_keys_are_those_of_the_last_earlier_layer_of_the_same_kind():
    kinds = [("near", False), ("far", False), ("near", False), ("near", True), ("far", True)]
    model = _stack(*(SharedAttention(kind, borrows=borrows) for kind, borrows in kinds))
    read = head_projections(model)
    assert [heads.key_layer for heads in read.values()] == [
        None,
        None,
        None,
        "layers.2.attn",
        "layers.1.attn",
    ]
    borrowed = read["layers.4.attn"]
    assert borrowed.key.data_ptr() == model["layers"][1]["attn"].k_proj.weight.data_ptr()
    assert borrowed.query.data_ptr() == model["layers"][4]["attn"].q_proj.weight.data_ptr()


def test_a_layer_may_name_the_one_whose_keys_it_uses():
    model = _stack(
        SharedAttention("near", borrows=False),
        SharedAttention("near", borrows=False),
        SharedAttention("near", borrows=True, index=0),
    )
    assert head_projections(model)["layers.2.attn"].key_layer == "layers.0.attn"


def test_a_layer_without_the_one_whose_keys_it_uses_is_named():
    model = _stack(SharedAttention("far", borrows=False), SharedAttention("near", borrows=True))
    assert "keys of an earlier layer, which is not part of the module" in unread(model)["layers.1.attn"]


def test_thirty_two_layers_are_read_within_a_second():
    config = tf.LlamaConfig(
        hidden_size=64, num_hidden_layers=32, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    model = tf.LlamaModel(config)
    start = time.process_time()
    assert len(head_projections(model)) == 32
    assert time.process_time() - start < 1
