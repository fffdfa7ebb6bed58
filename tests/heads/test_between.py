"""What stands between projection and product: applied, named or refused."""

import math

import pytest
import torch
import transformers
from heads_zoo import GQA
from sweep import D_HEAD, HEADS, WIDTH, attend
from torch import nn
from torch.nn import functional as F

from lightning_qk import head_projections, verify
from lightning_qk.heads.inferred_layout import check_tokens
from lightning_qk.heads.projections import NotTokenAttention
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.interventions.head_scaler import head_scalers


class Base(nn.Module):
    """A fused projection of a known name, [Q|K|V]; subclasses put something between it and the product."""

    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(D_HEAD))
        self.shift = nn.Parameter(torch.zeros(HEADS, 1, D_HEAD))

    def split(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, D_HEAD)).permute(2, 0, 3, 1, 4)


class ClampedAttention(Base):
    def forward(self, x):
        return attend("matmul", *(part.clamp(-8, 8) for part in self.split(x)))


class OneSidedAttention(Base):
    def forward(self, x):
        return attend("matmul", *(part.clamp(max=8) for part in self.split(x)))


class RectifiedAttention(Base):
    def forward(self, x):
        return attend("matmul", *(part.relu() for part in self.split(x)))


class TemperatureAttention(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return (q @ k.mT * self.temperature).softmax(-1) @ v


class ExponentAttention(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return (q @ k.mT * self.logit_scale.exp()).softmax(-1) @ v


class GainAttention(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return ((q * self.gain) @ k.mT).softmax(-1) @ v


class ShiftAttention(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return ((q + self.shift) @ k.mT).softmax(-1) @ v


class CosineAttention(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v


class TalkingAttention(Base):
    def __init__(self):
        super().__init__()
        self.talk = nn.Parameter(torch.eye(HEADS))

    def forward(self, x):
        q, k, v = self.split(x)
        return torch.einsum("bhij,hg->bgij", q @ k.mT, self.talk).softmax(-1) @ v


class UnmovedAttention(Base):
    """Heads cut without moving the tokens: each holds vectors of several."""

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (part.reshape(batch, HEADS, tokens, D_HEAD) for part in self.qkv(x).chunk(3, -1))
        return attend("sdpa", q, k, v)


class LengthAttention(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return attend("sdpa", q * math.log(x.shape[1] + 1), k, v)


class ConvolvedAttention(Base):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(3 * WIDTH, 3 * WIDTH, 3, padding=1, groups=3 * WIDTH)

    def forward(self, x):
        rows = self.mix(self.qkv(x).mT).mT
        return attend("sdpa", *rows.unflatten(-1, (3, HEADS, D_HEAD)).permute(2, 0, 3, 1, 4))


class AdaptedAttention(Base):
    """A LoRA by hand, whose second matrix is zero."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 3 * WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        rows = self.qkv(x) + self.up(self.down(x))
        return attend("sdpa", *rows.unflatten(-1, (3, HEADS, D_HEAD)).permute(2, 0, 3, 1, 4))


class ChannelAttention(Base):
    def forward(self, x):
        q, k, v = (part.mT for part in self.split(x))
        return (q @ k.mT * self.temperature).softmax(-1) @ v


class SignAttention(Base):
    def forward(self, x):
        q, k, v = self.split(x)
        return attend("matmul", q.sign(), k.sign(), v)


class CrossCovarianceAttention(Base):
    def forward(self, x):
        q, k, v = (part.mT for part in self.split(x))
        q, k = (F.normalize(part, dim=-1) for part in (q, k))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def _refusal(kind):
    model = nn.ModuleDict({"layer": kind()})
    reader = ProjectionReader(model, allow_empty=True)
    assert "layer" not in reader
    assert str(reader.refusals["layer"]) == reader.unread["layer"]
    return reader.refusals["layer"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OneSidedAttention, "large ones of its queries are bounded, by no clamp"),
        (RectifiedAttention, "something that is not linear"),
        (TemperatureAttention, "its learnt parameter 'temperature'"),
        (ExponentAttention, "its learnt parameter 'logit_scale'"),
        (GainAttention, "its learnt parameter 'gain'"),
        (ShiftAttention, "its learnt parameter 'shift'"),
        (CosineAttention, "are divided by their length in its own forward, as for a cosine"),
        (TalkingAttention, "its queries"),
        (UnmovedAttention, "vectors of several heads together"),
        (LengthAttention, "how many tokens there are"),
        (ConvolvedAttention, "its queries"),
        (AdaptedAttention, "its queries mix rows of its projections: they are sums of several (an adapter"),
    ],
)
def test_what_is_no_form_of_the_projections_is_refused_by_name(kind, reason):
    refusal = _refusal(kind)
    assert reason in str(refusal)
    assert not isinstance(refusal, NotTokenAttention)


@pytest.mark.parametrize("kind", [ChannelAttention, CrossCovarianceAttention])
def test_attention_over_channels_is_no_attention_over_tokens(kind):
    assert isinstance(_refusal(kind), NotTokenAttention)
    # What is asked of classes whose names are believed.
    with pytest.raises(NotTokenAttention):
        check_tokens(AttentionLayer("", kind()))


@pytest.mark.parametrize("kind", [ClampedAttention, TemperatureAttention, LengthAttention])
def test_attention_over_tokens_is_none_over_channels(kind):
    check_tokens(AttentionLayer("", kind()))


def test_a_clamp_is_named_and_its_weights_are_not_edited():
    model = nn.ModuleDict({"layer": ClampedAttention()})
    reader = ProjectionReader(model)
    assert reader["layer"].clip == pytest.approx(8.0)
    assert torch.equal(reader["layer"].query, model["layer"].qkv.weight[:WIDTH].unflatten(0, (HEADS, D_HEAD)))
    with pytest.raises(ValueError, match="clamped to ±8"):
        head_scalers(reader, ["layer"])


@pytest.mark.parametrize("clip", [None, 8.0])
def test_the_clamp_of_a_known_model_is_named(clip):
    model = transformers.OlmoModel(transformers.OlmoConfig(**GQA, clip_qkv=clip))
    reader = ProjectionReader(model)
    assert len(reader) == 2
    for heads in head_projections(model).values():
        assert heads.clip == clip
    if clip is None:
        head_scalers(reader, reader)
    else:
        with pytest.raises(ValueError, match="clamped"):
            head_scalers(reader, reader)


def _clamped(clip):
    class ClampedAttention(Base):
        def forward(self, x):
            return attend("matmul", *(part.clamp(-clip, clip) for part in self.split(x)))

    return ClampedAttention


@pytest.mark.parametrize("clip", [1.0, 0.3, 1e-3])
def test_a_clamp_that_keeps_a_layer_from_being_read_is_the_reason(clip):
    for side in ("queries", "keys"):

        class One(Base):
            def forward(self, x, side=side):
                q, k, v = self.split(x)
                if side == "queries":
                    return attend("matmul", q.clamp(-clip, clip), k, v)
                return attend("matmul", q, k.clamp(-clip, clip), v)

        said = f"a clamp to ±{clip:.3g} between projection and product changes its {side}"
        assert said in str(_refusal(One))
    assert "a clamp to ±" in str(_refusal(_clamped(clip)))


@pytest.mark.parametrize("kind", [SignAttention, RectifiedAttention, CosineAttention, TemperatureAttention])
def test_what_is_no_clamp_is_not_called_one(kind):
    assert "a clamp" not in str(_refusal(kind))


@pytest.mark.parametrize("clip", [0.3, 1e-3])
def test_a_clamp_that_acts_is_named_by_the_self_check(clip):
    torch.manual_seed(0)
    model = transformers.OlmoModel(transformers.OlmoConfig(**GQA, clip_qkv=clip))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    for found in verify(model, {"input_ids": torch.randint(0, GQA["vocab_size"], (2, 9))}).values():
        assert not found.ok
        assert found.reason.startswith(f"a clamp to ±{clip:g} between projection and product changes ")
        assert "of the numbers in its queries" in found.reason


def test_a_clamp_that_does_not_act_is_not_blamed():
    """What differs is something else then."""
    torch.manual_seed(0)
    model = transformers.OlmoModel(transformers.OlmoConfig(**GQA, clip_qkv=1e4))
    first = next(iter(ProjectionReader(model).layers))
    own = model.get_submodule(first)
    own.q_proj.register_forward_hook(lambda module, args, out: out.flip(-1))
    found = verify(model, {"input_ids": torch.randint(0, GQA["vocab_size"], (2, 9))})[first]
    assert not found.ok
    assert "clamp" not in found.reason


def test_the_factor_behind_norms_is_the_layers_own():
    class NormedAttention(Base):
        def __init__(self):
            super().__init__()
            self.norm_a, self.norm_b = nn.LayerNorm(D_HEAD), nn.RMSNorm(D_HEAD)
            self.scale = 8.0  # which divides

        def forward(self, x):
            q, k, v = self.split(x)
            return (self.norm_a(3 * q) @ self.norm_b(k).mT / self.scale).softmax(-1) @ v

    (heads,) = head_projections(nn.ModuleDict({"layer": NormedAttention()})).values()
    assert heads.qk_norm
    assert heads.scaling == pytest.approx(1 / 8)


def test_the_name_of_a_class_does_not_make_it_known():
    class Replaced(transformers.models.llama.modeling_llama.LlamaAttention):
        """Keys and queries exchanged behind the same names."""

        def forward(self, hidden_states):
            k, q, v = (
                own(hidden_states).unflatten(-1, (4, 8)).transpose(1, 2)
                for own in (self.q_proj, self.k_proj, self.v_proj)
            )
            return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None

    config = transformers.LlamaConfig(**{**GQA, "num_key_value_heads": 4})
    layer = Replaced(config, 0)
    (heads,) = head_projections(nn.ModuleDict({"layer": layer})).values()
    assert torch.equal(heads.query, layer.k_proj.weight.unflatten(0, (4, 8)))
    assert torch.equal(heads.key, layer.q_proj.weight.unflatten(0, (4, 8)))
