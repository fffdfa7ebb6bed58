"""Attention as strangers write it: mixed derivatives of the layer's own logits against what is read."""

import copy
import math
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qk.architecture.source_code import is_known
from lightning_qk.functional import qk_moments
from lightning_qk.heads.layer import layer_reader
from lightning_qk.heads.projections import UnreadLayer
from lightning_qk.heads.reader import ProjectionReader, head_projections
from lightning_qk.heads.sites import attention_sites
from lightning_qk.interventions.qk_clip import clip_qk
from lightning_qk.verification import Status, verify

WIDTH, HEADS, D_HEAD, TOKENS = 16, 4, 4, 6


def split(rows: Tensor) -> Tensor:
    return rows.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class StrangeAttention(nn.Module):
    """Subclasses and recipes say how ``sides`` and ``logits`` are made; ``seen`` keeps the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.norm: Any = nn.LayerNorm(HEADS)
        self.tau, self.which = 1.0, "q"
        self.register_buffer("gain", torch.ones(D_HEAD))
        self.seen: Tensor | None = None
        self.calls: list[int] = []

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split(self.q(x)), split(self.k(x)), split(self.v(x))

    def logits(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        return q @ k.mT / D_HEAD**0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.sides(x)
        logits = self.logits(q, k, x)
        self.seen = logits
        return self.o((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def made(*, prepare: Callable[[Any], None] | None = None, **methods: Any) -> StrangeAttention:
    torch.manual_seed(0)
    layer = type("StrangeAttention", (StrangeAttention,), methods)()
    if prepare is not None:
        prepare(layer)
    return layer


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-7, 7)


class Capped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 30 * torch.tanh(super().forward(x) / 30)


class Centred(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True) if x.dim() == 3 else x)


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class Multiplied(nn.Linear):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class FiLMNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


def complex_logits(self: Any, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    q, k = (torch.view_as_complex(own.unflatten(-1, (-1, 2)).contiguous()) for own in (q, k))
    return (q @ k.mT).real / D_HEAD**0.5


def mixed_heads(self: Any, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    return self.norm((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def twice(self: Any, x: Tensor) -> Tensor:
    first = StrangeAttention.forward(self, x)
    seen = self.seen
    q, k, v = split(self.other(first)), split(self.k(x)), split(self.v(x))
    out = (q @ k.mT / D_HEAD**0.5).softmax(-1) @ v
    self.seen = seen
    return self.o(out.transpose(1, 2).flatten(2))


def in_place(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.mul_(4.0) if not x.requires_grad else x * 4.0
    return split(self.q(x)), split(self.k(x)), split(self.v(x))


def set_norm(kind: Callable[[], nn.Module]) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, "norm", kind())


def through_norm(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return StrangeAttention.sides(self, self.norm(x))


# None of these is one factor times x W_QK x of the layer's input: no form may be given.
NOT_A_FORM: dict[str, dict[str, Any]] = {
    "mean of the input decides": {
        "sides": lambda self, x: (
            split((self.q if x.mean() > 0 else self.other)(x)), split(self.k(x)), split(self.v(x)),
        )
    },
    "scale of the input": {"logits": lambda self, q, k, x: q @ k.mT / x.std()},
    "scale of the number of tokens": {"logits": lambda self, q, k, x: q @ k.mT * math.log(x.shape[1])},
    "one projection of two inputs": {
        "sides": lambda self, x: (split(self.k(2 * x)), split(self.k(x)), split(self.v(x)))[:3]
    },
    "one projection of sums of tokens": {
        "sides": lambda self, x: (split(self.k(x.cumsum(1))), split(self.k(x)), split(self.v(x)))
    },
    "input changed in place": {"sides": in_place},
    "clamp between two projections": {
        "sides": lambda self, x: (split(self.other(self.q(x).clamp(-6, 6))), split(self.k(x)), split(self.v(x)))
    },
    "cap in a projection": {"prepare": lambda own: setattr(own, "q", Capped(WIDTH, WIDTH))},
    "tokens mixed in a projection": {"prepare": lambda own: setattr(own, "k", Centred(WIDTH, WIDTH))},
    "complex": {"logits": complex_logits},
    "norm of logits": {"logits": mixed_heads},
    "heads mixed by a module": {"logits": mixed_heads, "prepare": set_norm(lambda: nn.Linear(HEADS, HEADS))},
    "hyperbolic sine": {"logits": lambda self, q, k, x: (q @ k.mT / 2).sinh()},
    "a norm by name alone": {"sides": through_norm, "prepare": set_norm(FiLMNorm)},
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_A_FORM)
def test_what_is_no_form_of_the_input_is_refused(name: str) -> None:
    layer = made(**NOT_A_FORM[name])
    (site,) = attention_sites(nn.ModuleDict({"attention": layer}))
    with pytest.raises(UnreadLayer):
        layer_reader(site, fold_norm=False)
    x = torch.randn(2, TOKENS, WIDTH)
    (verdict,) = verify(nn.Sequential(layer), x).values()
    assert not verdict.ok  # neither does its real call make it readable


def forms(layer: StrangeAttention) -> Tensor:
    """Mixed second derivatives of a logit by its two tokens: (heads, d, d)."""
    layer = copy.deepcopy(layer).double()
    x = torch.randn(1, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    layer(x)
    assert layer.seen is not None
    found = []
    for head in range(HEADS):
        (by_query,) = torch.autograd.grad(layer.seen[0, head, 0, 1], x, create_graph=True)
        rows = [torch.autograd.grad(own, x, retain_graph=True)[0][0, 1] for own in by_query[0, 0]]
        found.append(torch.stack(rows))
    return torch.stack(found)


def read_forms(model: nn.Module) -> Tensor:
    (read,) = head_projections(model).values()
    return (read.scaling * torch.einsum("hed,hef->hdf", read.query, read.key)).double().detach()


# What is read again when a number or a buffer beside the parameters changes.
EDITED: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "temperature": (
        {"logits": lambda self, q, k, x: q @ k.mT / self.tau},
        lambda own: setattr(own, "tau", 3.0),
    ),
    "gain": (
        {"sides": lambda self, x: (split(self.q(x)) * self.gain, split(self.k(x)), split(self.v(x)))},
        lambda own: own.gain.mul_(2.0),
    ),
    "expert": (
        {"sides": lambda self, x: (split(getattr(self, self.which)(x)), split(self.k(x)), split(self.v(x)))},
        lambda own: setattr(own, "which", "other"),
    ),
    "masked weight": (
        {"prepare": lambda own: setattr(own, "q", Masked())},
        lambda own: own.q.mask[:, ::2].zero_(),
    ),
    "factor of a projection": (
        {"prepare": lambda own: setattr(own, "q", Multiplied(WIDTH, WIDTH))},
        lambda own: setattr(own.q, "factor", 2.5),
    ),
    "nothing": ({}, lambda own: None),
    "two attentions, one of them readable": ({"forward": twice}, lambda own: None),
}


@pytest.mark.parametrize("name", EDITED)
def test_numbers_beside_the_parameters_are_followed(name: str) -> None:
    recipe, edit = EDITED[name]
    layer = made(**recipe)
    model = nn.Sequential(layer)
    reader = ProjectionReader(model)
    torch.testing.assert_close(read_forms(model), forms(layer), rtol=1e-4, atol=1e-6)
    before = qk_moments(reader["0"].query, reader["0"].key)["trace"]
    edit(layer)
    is_other = reader.refresh()
    (read,) = reader.values()
    got = (read.scaling * torch.einsum("hed,hef->hdf", read.query, read.key)).double()
    torch.testing.assert_close(got.detach(), forms(layer), rtol=1e-4, atol=1e-6)
    changed = (name == "temperature") or not torch.equal(qk_moments(read.query, read.key)["trace"], before)
    assert changed or name == "gain" or not is_other
    assert not reader.refresh()


def test_a_gate_that_closes_on_some_coordinates_is_noticed() -> None:
    layer = made(**EDITED["gain"][0])
    model = nn.ModuleDict({"attention": layer})
    reader = ProjectionReader(model, allow_empty=True)
    layer.gain[1] = 0.0
    assert reader.refresh()
    assert not reader.layers
    assert "not rows of its projections" in reader.unread["attention"]


@pytest.mark.parametrize(
    "sides",
    [
        lambda self, x: (split(self.q(x)), split(self.k(x)), split(self.k(x))),
        lambda self, x: (split(self.q(x)), split(self.k(x)), split(self.k(x).roll(3, -1))),
        lambda self, x: (split(self.q(x)), split(self.k(x)), split(self.v(x) + self.q(x).tanh())),
    ],
)
def test_what_makes_more_than_queries_and_keys_is_not_clipped(sides: Any) -> None:
    layer = made(sides=sides)
    model = nn.Sequential(layer)
    torch.testing.assert_close(read_forms(model), forms(layer), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="make more than queries and keys"):
        clip_qk(model, {"0": torch.full((HEADS,), 1e3)})


@pytest.mark.parametrize("is_training", [False, True])
def test_a_factor_that_only_training_has_is_seen_in_the_logits(is_training: bool) -> None:
    layer = made(logits=lambda self, q, k, x: q @ k.mT * (0.7 if self.training else 0.5))
    layer.train(is_training)
    (verdict,) = verify(nn.Sequential(layer), torch.randn(2, TOKENS, WIDTH)).values()
    assert verdict.status is (Status.DIFFERS if is_training else Status.VERIFIED)


def test_a_hook_that_multiplies_queries_is_seen() -> None:
    layer = made()
    layer.q.register_forward_hook(lambda module, args, output: 3 * output)
    (verdict,) = verify(nn.Sequential(layer), torch.randn(2, TOKENS, WIDTH)).values()
    assert verdict.status is Status.DIFFERS


def test_running_a_layer_leaves_no_trace() -> None:
    def sides(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(1)
        random.random()
        return StrangeAttention.sides(self, x)

    layer = made(sides=sides)
    random.seed(3)
    state = random.getstate()
    assert head_projections(nn.Sequential(layer))
    assert layer.calls == []
    assert random.getstate() == state


def test_a_bias_on_logits_is_a_position() -> None:
    layer = made(logits=lambda self, q, k, x: q @ k.mT - torch.arange(x.shape[1]).to(x))
    (read,) = head_projections(nn.Sequential(layer)).values()
    assert read.position == "relative bias"


def test_a_clamp_in_a_projection_is_named() -> None:
    layer = made(prepare=lambda own: setattr(own, "q", Clamped(WIDTH, WIDTH)))
    (read,) = head_projections(nn.Sequential(layer)).values()
    assert read.clip == pytest.approx(7.0)


def test_a_function_that_says_it_is_the_librarys_is_asked_for_its_code() -> None:
    known = nn.MultiheadAttention(WIDTH, HEADS)
    assert is_known(known)
    written = types.FunctionType((lambda self, *args, **kwargs: args[0]).__code__, {})
    written.__module__, written.__wrapped__ = "torch.nn.modules.activation", nn.MultiheadAttention.forward
    known.forward = types.MethodType(written, known)
    assert not is_known(known)
