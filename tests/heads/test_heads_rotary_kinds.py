"""Rotations of every kind that transformers ships, against the logits that the models themselves compute."""

from contextlib import contextmanager

import pytest
import torch
import transformers as tf
from heads_oracle import project, randomize
from heads_zoo import BERT, GPT2, GQA, LLAMA
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_qk.functional import qk_eigenvalues
from lightning_qk.functional.rotary import rotate_between
from lightning_qk.heads.reader import ProjectionReader, head_projections

pytestmark = pytest.mark.usefixtures("code_of_a_library")

TOKENS = 9
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}
GPTJ = {**GPT2, "rotary_dim": 4, "bos_token_id": 0, "eos_token_id": 0}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
LLAMA4 = {
    **GQA,
    "head_dim": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "no_rope_layers": [1, 0],
    "use_qk_norm": False,
    "attn_temperature_tuning": False,
}

# Model and config classes, options; then pairs, interleaved and scale of the first layer.
KINDS = {
    "plain": ("Llama", GQA, (4, False, 1.0)),
    "linear": (
        "Llama",
        {**GQA, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        (4, False, 1.0),
    ),
    "llama3": ("Llama", {**GQA, "rope_parameters": LLAMA3}, (4, False, 1.0)),
    "yarn": ("Llama", {**GQA, "rope_parameters": YARN}, (4, False, 1.13863)),
    "longrope": (
        "Phi3",
        {**GQA, "original_max_position_embeddings": 16, "rope_parameters": LONG},
        (4, False, 1.22474),
    ),
    "partial": ("GPTNeoX", BERT, (1, False, 1.0)),
    "interleaved": ("Cohere", GQA, (4, True, 1.0)),
    "partial and interleaved": ("Glm", {**GQA, "head_dim": 8}, (2, True, 1.0)),
    "halves of the angles": ("Helium", {**GQA, "head_dim": 8}, (4, True, 1.0)),
    "complex numbers": ("Llama4Text", LLAMA4, (4, True, 1.0)),
    "three equal positions": ("Qwen2VLText", {**GQA, "rope_parameters": MROPE}, (4, False, 1.0)),
    "a module of each layer": ("Moshi", {**GQA, "head_dim": 8, "ffn_dim": 64}, (4, False, 1.0)),
    "a table of each layer": ("GPTJ", GPTJ, (2, True, 1.0)),
    "a table, fused projections": ("CodeGen", GPTJ, (2, True, 1.0)),
    "a table of the encoder": ("RoFormer", {**BERT, "embedding_size": 32}, (4, True, 1.0)),
    "encoder of proteins": (
        "Esm",
        {**LLAMA, "position_embedding_type": "rotary", "mask_token_id": 3},
        (4, False, 1.0),
    ),
}


def build(family: str, options: dict) -> torch.nn.Module:
    names = {"Llama4Text": "Llama4TextModel", "Qwen2VLText": "Qwen2VLTextModel"}
    if not hasattr(tf, family + "Config"):
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = getattr(tf, family + "Config")(**options)
    config._attn_implementation = "eager"  # before it is built: some choose a class by it
    model = getattr(tf, names.get(family, family + "Model"))(config)
    tables = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    randomize(model)
    with torch.no_grad():  # sines and cosines are no weights
        for name, value in tables.items():
            model.get_parameter(name).copy_(value)
    return model.double().eval()


class _Products(TorchFunctionMode):
    """Keeps the first product of queries and keys of a layer: of a shape (batch, heads, tokens, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.first: torch.Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        named = getattr(function, "__name__", "") in ("matmul", "__matmul__", "baddbmm", "bmm")
        if named and self.first is None and out.dim() == 4 and out.shape[-2:] == (TOKENS, TOKENS):
            self.first = out.detach().clone()
        return out


@contextmanager
def observed(model, names):
    """Layer name → the layer's input and its products of queries and keys, before scale and mask."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for name in names:
        state: dict = {}

        def before(module, args, kwargs, state=state):
            state["x"] = args[0] if args else kwargs["hidden_states"]
            state["mode"] = _Products()
            state["mode"].__enter__()

        def after(module, args, kwargs, out, state=state, name=name):
            state["mode"].__exit__(None, None, None)
            found[name] = state["x"], state["mode"].first

        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def predicted(heads, x: torch.Tensor) -> torch.Tensor:
    """q · k of all pairs of tokens, (batch, heads, n, n), with the rotation between their positions."""
    query = project(heads.query, heads.query_bias, x)
    key = project(heads.key, heads.key_bias, x).repeat_interleave(heads.heads // heads.kv_heads, 1)
    if heads.rotary is None:
        return query @ key.mT
    place = torch.arange(x.shape[1])
    offsets = (place[None] - place[:, None]).flatten()  # of the key from the query
    turns = rotate_between(torch.eye(heads.d_head, dtype=x.dtype), heads.rotary, offsets)
    turns = turns.view(len(place), len(place), heads.d_head, heads.d_head)
    return torch.einsum("bhie,ijef,bhjf->bhij", query, turns, key)


def assert_predicts(model, read) -> None:
    tokens = torch.randint(3, 50, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with observed(model, list(read)) as found, torch.no_grad():
        model(input_ids=tokens)
    for name, (x, got) in found.items():
        want = predicted(read[name], x)
        # Some scale the query before the product.
        scales = (1.0, read[name].scaling, read[name].d_head ** -0.5)
        factor = min(scales, key=lambda scale, got=got, want=want: float((got - scale * want).norm()))
        torch.testing.assert_close(
            got.to(want), factor * want, rtol=2e-5, atol=2e-5 * want.abs().max().item()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_rotation_gives_the_logits_of_the_model(kind):
    family, options, (pairs, interleaved, scale) = KINDS[kind]
    model = build(family, options)
    read = head_projections(model)
    first = next(iter(read.values()))
    assert (first.rotary.inv_freq.numel(), first.rotary.interleaved) == (pairs, interleaved)
    assert first.rotary.scale == pytest.approx(scale, abs=1e-5)
    assert first.position == "rotary"
    assert_predicts(model, read)


@pytest.mark.parametrize("kind", ["plain", "interleaved", "yarn", "a table of each layer"])
def test_another_rotation_does_not_give_them(kind):
    family, options, _ = KINDS[kind]
    model = build(family, options)
    read = head_projections(model)
    for change in ({"interleaved": not read_first(read).rotary.interleaved}, {"scale": 1.5}):
        changed = {name: _with(heads, **change) for name, heads in read.items()}
        with pytest.raises(AssertionError):
            assert_predicts(model, changed)
    backward = {name: _with(heads, inv_freq=-heads.rotary.inv_freq) for name, heads in read.items()}
    with pytest.raises(AssertionError):
        assert_predicts(model, backward)


def read_first(read):
    return next(iter(read.values()))


def _with(heads, **change):
    from dataclasses import replace

    return replace(heads, rotary=heads.rotary._replace(**change))


@pytest.mark.parametrize("kind", ["yarn", "partial", "a table of each layer"])
def test_eigenvalues_at_an_offset_are_those_of_the_form_between_two_positions(kind):
    """Tokens of two positions: the dense form of their logits, W_q^T R W_k, from what the model does."""
    family, options, _ = KINDS[kind]
    heads = next(iter(head_projections(build(family, options)).values()))
    for offset in (-4, 3):
        turn = rotate_between(
            torch.eye(heads.d_head, dtype=torch.float64), heads.rotary, torch.tensor(offset)
        )
        dense = heads.query.mT @ turn @ heads.key.repeat_interleave(heads.heads // heads.kv_heads, 0)
        want = torch.linalg.eigvals(dense)
        want = want.gather(-1, want.abs().argsort(-1, descending=True))[:, : heads.d_head]
        got = qk_eigenvalues(heads.query, heads.key, offset=offset, rotary=heads.rotary)
        torch.testing.assert_close(got.abs(), want.abs(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(got.sum(-1), want.sum(-1), rtol=1e-6, atol=1e-8)


def test_frequencies_that_grow_with_the_sequence_are_read_live():
    options = {
        **GQA,
        "max_position_embeddings": 4,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    }
    model = build("Llama", options)
    reader = ProjectionReader(model)
    before = next(iter(reader.values())).rotary.inv_freq.clone()
    assert_predicts(model, reader)  # nine tokens, of which the model expects four
    assert not torch.equal(next(iter(reader.values())).rotary.inv_freq, before)


def test_reading_leaves_the_rotary_module_as_it_is():
    options = {
        **GQA,
        "max_position_embeddings": 4,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    }
    model = build("Llama", options)
    before, state = model.rotary_emb.inv_freq, dict(vars(model.rotary_emb))
    head_projections(model)
    assert model.rotary_emb.inv_freq is before
    assert vars(model.rotary_emb) == state


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Dinov3ViT", {"patch_size": 8, "image_size": 16}),
        ("PixtralVision", {"patch_size": 8, "image_size": 16}),
        (
            "Llama4Vision",
            {"patch_size": 8, "image_size": 16, "vision_output_dim": 32, "pixel_shuffle_ratio": 0.5},
        ),
    ],
)
def test_images_are_rotated_by_two_coordinates(family, options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    name = {"Dinov3ViT": "DINOv3ViT"}.get(family, family)
    if not hasattr(tf, name + "Config"):
        pytest.skip(f"this transformers has no {name}")
    model = getattr(tf, name + "Model")(getattr(tf, name + "Config")(**sizes, **options))
    read = head_projections(model)
    assert read
    for heads in read.values():
        assert heads.rotary is None
        assert heads.position == "rotary (2-D)"


class CountedRotary(nn.Module):
    """Turns queries and keys itself, by the number of each token, and keeps its tables."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1, 0.01]))
        self.kept = None

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(q.shape[-2])[:, None] * self.inv_freq
        self.kept = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        return self._turn(q), self._turn(k)

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.kept
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


class CountingAttention(nn.Module):
    __module__ = "transformers.models.toy"  # whose names tell

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 6
        self.q_proj, self.k_proj = nn.Linear(24, 24), nn.Linear(24, 24)
        self.rotary_embeddings = CountedRotary()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        q, k = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        q, k = self.rotary_embeddings(q, k)
        return torch.matmul(q, k.mT)

    forward.__module__ = "transformers.models.toy"


def test_a_module_that_turns_queries_and_keys_itself():
    attention = CountingAttention()
    (heads,) = head_projections(attention).values()
    assert attention.rotary_embeddings.kept is None
    assert (heads.position, heads.rotary.interleaved, heads.rotary.scale) == ("rotary", False, 1.0)
    assert heads.rotary.inv_freq.data_ptr() == attention.rotary_embeddings.inv_freq.data_ptr()
    x = torch.randn(2, TOKENS, 24)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), predicted(heads, x), rtol=1e-4, atol=1e-4)


class ThreeCoordinates(nn.Module):
    """Gives angles by each of three coordinates, for text three equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1, 0.01]))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.cat([position_ids[:, :, :, None] * self.inv_freq] * 2, -1)
        return angles.cos(), angles.sin()


def apply_rotary_by_coordinate(q, k, cos, sin):
    """The first frequency by time, the others by height and width."""
    cos, sin = (torch.stack([part[i % 3, ..., i] for i in range(6)], -1)[:, None] for part in (cos, sin))
    halves = [torch.cat([-x[..., 3:], x[..., :3]], -1) for x in (q, k)]
    return q * cos + halves[0] * sin, k * cos + halves[1] * sin


class ThreeCoordinatesAttention(CountingAttention):
    __module__ = "transformers.models.toy"

    def __init__(self) -> None:
        super().__init__()
        del self.rotary_embeddings

    def forward(self, hidden_states: torch.Tensor, position_embeddings) -> torch.Tensor:
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        q, k = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        q, k = apply_rotary_by_coordinate(q, k, *position_embeddings)
        return torch.matmul(q, k.mT)

    forward.__module__ = "transformers.models.toy"


def test_text_among_images_has_one_position_for_three_coordinates():
    model = nn.ModuleDict({"attention": ThreeCoordinatesAttention(), "rotary_emb": ThreeCoordinates()})
    heads = head_projections(model)["attention"]
    assert heads.position == "rotary"
    assert heads.rotary.inv_freq.data_ptr() == model["rotary_emb"].inv_freq.data_ptr()
    x = torch.randn(2, TOKENS, 24)
    angles = model["rotary_emb"](x, torch.arange(TOKENS).expand(3, 2, -1))
    with torch.no_grad():
        got = model["attention"](x, angles)
        torch.testing.assert_close(got, predicted(heads, x), rtol=1e-4, atol=1e-4)


class Coordinates(nn.Module):
    """Gives angles by learnt products with the coordinates of key points."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(2, 3, bias=False)

    def forward(self, keypoints: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.cat([self.projector(keypoints)] * 2, -1)
        return angles.cos(), angles.sin()


def apply_rotary_pos_emb(q, k, cos, sin):
    halves = [torch.cat([-x[..., 3:], x[..., :3]], -1) for x in (q, k)]
    return q * cos[:, None] + halves[0] * sin[:, None], k * cos[:, None] + halves[1] * sin[:, None]


class KeypointAttention(CountingAttention):
    """Rotates where it is given angles, and takes keys from elsewhere where it is given those."""

    __module__ = "transformers.models.toy"

    def __init__(self, heads: int | None = None) -> None:
        super().__init__()
        del self.rotary_embeddings
        self.turned = heads

    def forward(self, hidden_states, position_embeddings=None, encoder_hidden_states=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k = self.k_proj(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if position_embeddings is not None:
            q[:, : self.turned], k[:, : self.turned] = apply_rotary_pos_emb(
                q[:, : self.turned], k[:, : self.turned], *position_embeddings
            )
        return torch.matmul(q, k.mT)

    forward.__module__ = "transformers.models.toy"


class Keypoints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positional_encoder = Coordinates()
        self.self_attention, self.cross_attention = KeypointAttention(), KeypointAttention()


def test_key_points_are_rotated_by_two_coordinates_and_not_against_other_images():
    read = head_projections(Keypoints())
    own, other = read["self_attention"], read["cross_attention"]
    assert (own.position, own.rotary, own.self_attention) == ("rotary (2-D)", None, True)
    assert (other.position, other.rotary, other.self_attention) == ("none", None, False)


@pytest.mark.parametrize("turned", [None, 1])
def test_a_rotation_of_some_heads_is_not_that_of_the_layer(turned):
    rotary = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(
        tf.LlamaConfig(hidden_size=24, num_attention_heads=4, head_dim=6)
    )
    model = nn.ModuleDict({"attention": KeypointAttention(turned), "rotary_emb": rotary})
    heads = head_projections(model)["attention"]
    assert heads.position == "rotary"
    assert (heads.rotary is None) is (turned is not None)


def test_planning_takes_little_for_each_layer():
    import time

    model = tf.LlamaModel(tf.LlamaConfig(**{**GQA, "num_hidden_layers": 32}))
    ProjectionReader(model)
    start = time.perf_counter()
    ProjectionReader(model)
    assert time.perf_counter() - start < 1.0
