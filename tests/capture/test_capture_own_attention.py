"""Attention that layers compute themselves, in its many forms: against their softmaxes, seen from outside."""

import copy
import warnings
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from call_oracle import Heard, assert_statistics, map_statistics, padding, registered
from models import llama
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import FunctionCall, SoftmaxCall
from lightning_qk.capture.hooks import softmax
from lightning_qk.heads.reader import find_attention

BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2],
    "num_heads": [2],
    "window_size": 4,
}
# What each of them does in its own way is said behind it.
TOYS = {
    "falcon": (tf.FalconModel, tf.FalconConfig(**BERT, num_kv_heads=1, alibi=True)),  # alibi, one key head
    "xglm": (  # clamps by torch.max, heads and batch in one axis
        tf.XGLMModel,
        tf.XGLMConfig(vocab_size=50, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    ),
    "layoutlmv3": (
        tf.LayoutLMv3Model,
        tf.LayoutLMv3Config(**BERT, coordinate_size=6, shape_size=4),
    ),  # CogView
    "tapas": (tf.TapasModel, tf.TapasConfig(**BERT)),
    "gpt2-upcast": (  # baddbmm beside the interface
        tf.GPT2Model,
        tf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, reorder_and_upcast_attn=True),
    ),
    "wavlm": (  # multi_head_attention_forward with a bias of positions
        tf.WavLMModel,
        tf.WavLMConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            conv_dim=(16,),
            conv_stride=(8,),
            conv_kernel=(10,),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            apply_spec_augment=False,
            layerdrop=0.0,
        ),
    ),
    "swinv2": (tf.Swinv2Model, tf.Swinv2Config(**SWIN)),  # masks of -100
    "hiera": (  # windows behind the heads
        tf.HieraModel,
        tf.HieraConfig(
            image_size=[32, 32],
            patch_size=[3, 3],
            patch_stride=[2, 2],
            patch_padding=[1, 1],
            embed_dim=16,
            depths=[2],
            num_heads=[2],
            num_query_pool=0,
            masked_unit_size=[4, 4],
        ),
    ),
    "reformer": (  # logsumexp in place of a softmax, chunks of keys
        tf.ReformerModel,
        tf.ReformerConfig(
            vocab_size=50,
            hidden_size=32,
            num_attention_heads=2,
            attention_head_size=16,
            feed_forward_size=48,
            attn_layers=["local"],
            local_attn_chunk_length=4,
            axial_pos_embds=False,
            max_position_embeddings=64,
            is_decoder=True,
        ),
    ),
    "prophetnet": (  # several streams of the same heads
        tf.ProphetNetDecoder,
        tf.ProphetNetConfig(
            vocab_size=50,
            hidden_size=32,
            num_decoder_layers=2,
            num_decoder_attention_heads=4,
            decoder_ffn_dim=48,
            num_encoder_layers=1,
            add_cross_attention=False,
        ),
    ),
    "pegasus_x": (  # keys beside keys, global and local
        tf.models.pegasus_x.modeling_pegasus_x.PegasusXEncoder,
        tf.PegasusXConfig(
            vocab_size=50,
            d_model=32,
            encoder_layers=1,
            encoder_attention_heads=4,
            encoder_ffn_dim=48,
            num_global_tokens=2,
            block_size=4,
            stagger_local_blocks=False,
        ),
    ),
}
IMAGES, SOUND = ("swinv2", "hiera"), ("wavlm",)


def build(name: str) -> nn.Module:
    kind, config = TOYS[name]
    torch.manual_seed(0)
    model = kind._from_config(copy.deepcopy(config), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def inputs_of(name: str, mask: Tensor | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name in IMAGES:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name in SOUND:
        return {"input_values": torch.randn(2, 160, generator=generator)}
    inputs = {"input_ids": torch.randint(3, 50, (2, 12), generator=generator)}
    if name == "prophetnet":
        inputs["use_cache"] = False
    if mask is not None:
        inputs["attention_mask"] = mask
    return inputs


class Seen(TorchFunctionMode):
    """Every softmax over the last axis of more than two: what it got and which layer's forward it ran in."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.logits: list[tuple[str, Tensor]] = []
        self.layers = layers
        self.running: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name == "multi_head_attention_forward":
            # The weights of each head, out of torch itself.
            _, weights = function(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
            self.logits.append((self.running[-1], weights.log()))
        elif name in ("softmax", "logsumexp") and self.running:
            tensor = args[0]
            dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
            if tensor.dim() > 2 and dim in (-1, tensor.dim() - 1):
                self.logits.append((self.running[-1], tensor.detach().double().clone()))
        return function(*args, **(kwargs or {}))

    @contextmanager
    def watching(self):
        handles = []
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_pre_hook(lambda *_, name=name: self.running.append(name)))
            handles.append(layer.register_forward_hook(lambda *_: self.running.pop() and None))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()


def by_head(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As (batch, heads, n, m), the axis of the heads found by hand: hiera's and pegasus_x's is the second."""
    batch, heads, n, m = shape
    if logits.dim() == 5 and logits.shape[1] == heads:
        logits = logits.transpose(1, 2)
    return logits.reshape(batch, heads, n, m)


def dense(logits: Tensor, hidden_below: float = -9e3) -> tuple[Tensor, Tensor]:
    """Probabilities, and the rows that see a key and are seen (batch, n)."""
    shown = logits > hidden_below
    p = logits.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0.0)
    keep = shown.any(-1).any(1)
    if p.shape[2] == p.shape[3]:
        keep = keep & shown.any(2).any(1)
    return p, keep


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("name", TOYS)
def test_statistics_are_those_of_the_layers_own_softmaxes(name, side):
    if side is not None and name in (*IMAGES, *SOUND, "reformer"):
        pytest.skip("no padding")
    model = build(name).eval()
    inputs = inputs_of(name, padding(side))
    layers = find_attention(model)
    with torch.no_grad(), warnings.catch_warnings(), Seen(layers).watching() as seen, Heard(model) as heard:
        warnings.simplefilter("ignore")
        model(**inputs)
    assert heard.problems == {}
    assert heard.seen == set(layers)
    expected = FunctionCall if name == "wavlm" else SoftmaxCall
    assert all(isinstance(call, expected) for _, call, *_ in heard.calls)
    assert [layer for layer, *_ in heard.calls] == [layer for layer, _ in seen.logits]
    for (_, call, statistics, shape), (_, logits) in zip(heard.calls, seen.logits, strict=True):
        # Swin's masks are of -100.
        p, keep = dense(by_head(logits, shape), -50.0 if name == "swinv2" else -9e3)
        # Reformer's chunks see the four keys before them, and each row one key more than the last.
        wanted = map_statistics(p, keep, offset=4 if name == "reformer" else 0)
        if p.shape[2] != p.shape[3] and name != "reformer":
            wanted.pop("distance")
            assert statistics["distance"].isnan().all()
        assert_statistics(statistics, wanted)
        if name == "layoutlmv3":
            assert call.relative
            assert statistics["max_logit"].isnan().all()


@pytest.mark.parametrize("name", ["xglm", "layoutlmv3", "wavlm", "swinv2", "gpt2-upcast", "prophetnet"])
def test_training_stays_bit_identical(name):
    model = build(name).train()

    def step() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**inputs_of(name))[0].square().mean()
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [loss.detach(), torch.rand(3), *grads]

    before = step()
    with Heard(model) as heard:
        during = step()
    after = step()
    assert heard.calls
    for values in (during, after):
        assert all(torch.equal(a, b) for a, b in zip(before, values, strict=True))


class Attention(nn.Module):
    """Attention by hand, in the way that it is told."""

    def __init__(self, way: str = "plain", heads: int = 4) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.num_heads, self.way = heads, way
        self.soft = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return (self.probabilities(q, k, x) @ v).transpose(1, 2).flatten(2)

    def probabilities(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.way == "module":
            return self.soft(torch.einsum("bhid,bhjd->bhij", q, k))
        if self.way == "torch":
            merged = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
            return torch.softmax(merged, 2, dtype=torch.float64).to(q.dtype).view(-1, self.num_heads, n, n)
        if self.way == "inplace":
            logits = torch.baddbmm(torch.zeros(1, n, n), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.5)
            logits += torch.randn(n, n, generator=torch.Generator().manual_seed(0))
            hidden = ~torch.ones(n, n, dtype=torch.bool).tril()
            return F.softmax(logits.masked_fill_(hidden, -1e9), dim=-1).view(-1, self.num_heads, n, n)
        if self.way == "queries last":
            return (k @ q.mT).transpose(-1, -2).softmax(-1)
        if self.way == "cut":
            return F.pad((q @ k.mT)[..., 1:].softmax(-1), (1, 0))
        if self.way == "mixed":
            return (q @ k.mT).flip(-1).softmax(-1)
        if self.way == "over queries":
            return (q @ k.mT).softmax(-2)
        if self.way == "linear":
            return q.softmax(-1) @ k.softmax(-2).mT
        if self.way == "sink":
            sink = q.sum(-1, keepdim=True)
            return torch.cat([q @ k.mT, sink], dim=-1).softmax(-1)[..., :-1]
        if self.way == "recomputed":
            return checkpoint(lambda q, k: (q @ k.mT).softmax(-1), q, k, use_reentrant=False)
        return (q @ k.mT / 2).softmax(-1)


def x(batch: int = 2, n: int = 6) -> Tensor:
    return 2 * torch.randn(batch, n, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("way", ["plain", "module", "torch", "inplace", "queries last", "sink"])
def test_ways_to_write_it(way):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(way))
    with torch.no_grad(), Heard(model) as heard:
        model(x())
    ((_, call, statistics, shape),) = heard.calls
    assert shape == (2, 4, 6, 6)
    assert call.d_head == 4
    layer = model[0]
    with torch.no_grad():
        q, k = (p(x()).unflatten(-1, (4, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
        p = layer.probabilities(q, k, x())
    assert_statistics(statistics, map_statistics(p, torch.ones(2, 6, dtype=torch.bool), sink=way == "sink"))


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("cut", "does not hold whole rows"),
        ("mixed", "does not hold whole rows"),
        ("over queries", "not that of the keys"),
        ("linear", "does not hold whole rows"),
    ],
)
def test_what_is_no_row_over_all_keys_is_named(way, said):
    model = nn.Sequential(Attention(way))
    with torch.no_grad(), Heard(model) as heard:
        model(x())
    assert heard.calls == []
    assert said in heard.problems["0"]


def test_a_checkpoint_inside_the_layer_counts_once():
    model = nn.Sequential(Attention("recomputed"))
    with Heard(model) as heard:
        model(x().requires_grad_()).sum().backward()
    assert len(heard.calls) == 1
    assert heard.problems == {}


class Interface(Attention):
    """Takes a softmax for a purpose of its own before it calls the interface, as SAM 2 does."""

    def __init__(self, ways: tuple[str, ...]) -> None:
        super().__init__()
        self.ways = ways
        self.is_causal = False

    def forward(self, x: Tensor) -> Tensor:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        q, k, v = (
            layer(x).unflatten(-1, (4, 4)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = v
        if "softmax" in self.ways:
            out = ((q @ k.mT / 7).softmax(-1) @ v).transpose(1, 2)
        if "call" in self.ways:
            function = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
            out, _ = function(self, q, k, v, None, dropout=0.0, scaling=0.5)
        return out.flatten(2)


@pytest.mark.parametrize("ways", [("softmax", "call"), ("call",), ("softmax",)])
def test_the_interface_goes_before_a_softmax_of_the_same_forward(ways):
    torch.manual_seed(0)
    model = nn.Sequential(Interface(ways))
    with torch.no_grad(), Heard(model) as heard:
        model(x())
        model(x())
    assert heard.problems == {}
    kinds = [type(call) for _, call, *_ in heard.calls]
    assert kinds == 2 * [FunctionCall if "call" in ways else SoftmaxCall]


def test_a_boolean_mask_that_is_added_is_measured_as_what_it_does():
    def careless(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        p = (query @ key.mT * scaling + attention_mask.bool()).softmax(-1)
        maps.append(p)
        return (p @ value).transpose(1, 2), None

    maps: list[Tensor] = []
    model = llama(attn_implementation="eager").eval()
    model.config._attn_implementation_internal = "careless"
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with registered(careless=careless), torch.no_grad(), Heard(model) as heard:
        model(torch.arange(24).view(2, 12), attention_mask=mask)
    assert heard.problems == {}
    everyone = torch.ones(2, 12, dtype=torch.bool)
    own = [p for p in maps if p.shape[2] == 12][1::2]
    for (_, call, statistics, _), p in zip(heard.calls, own, strict=True):
        assert isinstance(call, SoftmaxCall)
        assert_statistics(statistics, map_statistics(p, everyone))


def test_several_captures_and_a_layer_in_a_layer():
    class Outer(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention("module")

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inner(x))

    torch.manual_seed(0)
    model = nn.Sequential(Outer())
    found: dict[str, list[str]] = {"all": [], "inner": []}
    names = {model[0]: "outer", model[0].inner: "inner"}
    both = AttentionCapture(names, lambda name, call: found["all"].append(name))
    one = AttentionCapture({model[0].inner: "inner"}, lambda name, call: found["inner"].append(name))
    forward = Attention.forward
    both.install()
    one.install()
    both.enabled = True
    model(x())
    assert found == {"all": ["inner", "outer"], "inner": []}
    one.enabled = True
    both.enabled = False
    model(x())
    assert found == {"all": ["inner", "outer"], "inner": ["inner"]}
    one.remove()
    assert Attention.forward is not forward
    both.remove()
    assert Attention.forward is forward


def test_nothing_is_observed_on_steps_that_are_not_measured(monkeypatch):
    entered = []
    monkeypatch.setattr(softmax, "_Observer", lambda: entered.append(1) or nullcontext())
    model = nn.Sequential(Attention())
    with Heard(model) as heard:
        heard.enabled = False
        model(x())
        assert entered == []
        heard.enabled = True
        model(x())
        assert entered == [1]


def test_a_forward_that_was_replaced_on_the_layer_is_observed():
    model = nn.Sequential(Attention())
    forward = model[0].forward
    model[0].forward = lambda *args: forward(*args)  # as accelerate's hooks do
    replaced = model[0].forward
    with Heard(model) as heard:
        model(x())
    assert len(heard.calls) == 1
    assert model[0].forward is replaced


def test_mixed_precision():
    torch.manual_seed(0)
    model = nn.Sequential(Attention())
    with torch.autocast("cpu", torch.bfloat16), Heard(model) as heard:
        model(x())
    ((_, call, statistics, _),) = heard.calls
    assert call.tensor.dtype == torch.bfloat16
    p = call.tensor.double().softmax(-1)
    assert_statistics(statistics, map_statistics(p, torch.ones(2, 6, dtype=torch.bool)))


def test_inside_a_graph_it_is_named():
    torch._dynamo.reset()
    model = nn.Sequential(Attention())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), Heard(model) as heard:
        got = compiled(x())
    assert torch.equal(got, model(x()).detach())
    assert heard.calls == []
    assert "inside a graph of torch.compile" in heard.problems["0"]
    torch._dynamo.reset()


def test_a_layer_with_parts_that_would_notice_is_not_observed():
    class Holder(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.part(x))

    torch.manual_seed(0)
    model = nn.Sequential(Holder()).eval()
    with torch.no_grad():
        want = model(x())
        with Heard(model) as heard:
            got = model(x())
    assert torch.equal(want, got)
    assert "0" not in heard.seen
