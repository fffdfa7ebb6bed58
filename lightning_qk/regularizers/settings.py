"""Which penalty on which layers: LocAteR's settings, and layers of one shape as the penalty sees them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_qk.architecture.labels import matches, no_match
from lightning_qk.functional.checks import floating, number
from lightning_qk.functional.layer_inputs import covariance_root, token_mean
from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.functional.spectrum import Support, support_size
from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import ProjectionReader, group_layers, stack
from lightning_qk.heads.token_vectors import has_vectors
from lightning_qk.regularizers import closed_form

Form = Literal["variance", "target", "limit"]
Target = float | Mapping[str, Tensor]

LIMIT = 8.0
"""Standard deviation of a head's logits between independent tokens that the limit form leaves alone: of the 342
heads of SmolLM2-135M and all-MiniLM-L6-v2 all but one have less on WikiText-2 (``examples/paper/spreads.py``)."""


class Settings(NamedTuple):
    """Which penalty: arguments of :func:`locater_penalty`."""

    form: Form
    support: Support
    target: Target | None
    nu: float
    moments: Mapping[str, Tensor] | None = None
    limit: float = LIMIT
    inputs: Mapping[str, tuple[Tensor, Tensor]] | None = None

    def check(self) -> None:
        """Raise ValueError for an unknown form or support, or a target that does not go with the form."""
        check_form(self.form, self.target)
        number(self.nu, "nu")
        check_limit(self.limit)
        if (self.form == "limit") != (self.inputs is not None) or (self.form == "limit" and self.moments):
            given = " and ".join(name for name in ("inputs", "moments") if getattr(self, name)) or "neither"
            raise ValueError(
                "expected inputs with form='limit', whose limit is in units of logits, and moments with others "
                f"alone, got {given} with form={self.form!r}: pass what LayerInputs.inputs gives, or its moments"
            )
        for aim in self.target.values() if isinstance(self.target, Mapping) else ():
            floating(aim, "target")
        if self.target is not None and not isinstance(self.target, Mapping):
            number(self.target, "target")
        support_size(torch.empty(1, 1), self.support)

    def of(self, batch: "LayerBatch") -> closed_form.Form | closed_form.Limit:
        """The form for layers of one shape."""
        n = batch.n
        if self.form == "limit":
            return closed_form.Limit(self.limit)
        if self.form == "variance":
            return closed_form.Form(n, -1.0, 0.0)
        if isinstance(self.target, Mapping):
            aims = [self._aim(name, batch.query) for name in batch.names]
            return closed_form.Form(n, self.nu, torch.stack(aims))
        assert self.target is not None  # check_form
        return closed_form.Form(n, self.nu, float(self.target))

    def input_of(self, name: str, width: int) -> tuple[Tensor, Tensor]:
        """Tokens ``(tokens, width)`` that enter a layer, and how many each stands for."""
        tokens, weight = (self.inputs or {}).get(name, (None, None))
        if tokens is None or weight is None or tokens.dim() != 2 or tokens.shape[1] != width:
            got = "none" if tokens is None else f"shape {tuple(tokens.shape)}"
            raise ValueError(
                f"expected inputs of shape (tokens, {width}) for layer {name!r}, got {got}: pass the tokens that "
                "enter each penalized layer, and how many each stands for"
            )
        return tokens, weight

    def _aim(self, name: str, query: Tensor) -> Tensor:
        """The target of a layer's heads, beside its weights."""
        assert isinstance(self.target, Mapping)
        aim, heads = self.target.get(name), query.shape[-3]
        if aim is None or tuple(aim.shape) not in ((), (heads,)):
            got = "none" if aim is None else f"shape {tuple(aim.shape)}"
            raise ValueError(
                f"expected a target of shape ({heads},) for layer {name!r}, got {got}: pass one number a "
                "head for every layer that is penalized"
            )
        aim = aim.to(query)
        return aim if aim.dim() else aim.expand(heads)


class LayerBatch(NamedTuple):
    """Layers of one shape, in float32 at least.

    Attributes:
        names: of the layers.
        query: ``(layers, heads, d_head, d_model)``, or seen through tokens ``(layers, heads, d_head, tokens)``.
        key: likewise.
        n: size of the support.
        roots: ``(layers, tokens, d_model)``, scaled, that weights of query and of key are seen through; None: they
            are as they are.
    """

    names: list[str]
    query: Tensor
    key: Tensor
    n: int
    roots: tuple[Tensor, Tensor] | None

    def back(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients by weights of query and of key from those by what is seen of them."""
        if self.roots is None:
            return list(gradients)
        return [
            None if gradient is None else _through(gradient, roots)
            for gradient, roots in zip(gradients, self.roots, strict=True)
        ]


def batches(heads: Mapping[str, HeadProjections], settings: Settings) -> Iterator[LayerBatch]:
    """Layers of one shape together, seen through the tokens where there are moments."""
    for names in group_layers(heads, lambda head: (head.query, head.key)):
        query, key = (stack([getattr(heads[name], side) for name in names]) for side in ("query", "key"))
        yield batch_of(query, key, {name: heads[name] for name in names}, settings)


def batch_of(
    query: Tensor, key: Tensor, layers: Mapping[str, HeadProjections | LayerReader], settings: Settings
) -> LayerBatch:
    """Weights of layers, ``(layers, heads, d_head, d_model)``, seen through the tokens where there are moments."""
    query, key = at_least_float32(query), at_least_float32(key)
    if query.dtype != key.dtype:
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(dtype), key.to(dtype)
    n = support_size(query, settings.support)
    if settings.form == "limit":
        root, mean = _about(settings, layers, query)
        # Queries count with their mean; that of keys shifts whole rows of logits, which changes nothing.
        roots = torch.cat([root, mean], 1), nn.functional.pad(root, (0, 0, 0, 1))
    elif settings.moments is None:
        return LayerBatch(list(layers), query, key, n, None)
    else:
        root = _roots(settings.moments, layers, query)
        roots = root, root
    query, key = (_through(side, own.mT) for side, own in zip((query, key), roots, strict=True))
    return LayerBatch(list(layers), query, key, n, roots)


def _through(side: Tensor, roots: Tensor) -> Tensor:
    """``(layers, heads, d_head, a)`` times ``(layers, a, b)``."""
    with full_precision(side.device):
        return (side.flatten(1, 2) @ roots).unflatten(1, side.shape[1:3])


def _about(
    settings: Settings, layers: Mapping[str, HeadProjections | LayerReader], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Factors of ``s Σ`` of what enters some layers, ``(layers, tokens, d_model)``, and ``√s μ`` as one row."""
    found = [settings.input_of(name, layer.width[0]) for name, layer in layers.items()]
    longest = max(len(weight) for _, weight in found)
    rows = [longest - len(weight) for _, weight in found]
    tokens, weights = (
        torch.stack(
            [
                nn.functional.pad(own[side], (0, 0, 0, more)[2 * side :]) if more else own[side]
                for own, more in zip(found, rows, strict=True)
            ]
        )
        for side in range(2)
    )
    return (
        _scaled(covariance_root(tokens, weights).unbind(0), layers, like),
        _scaled(token_mean(tokens, weights).unbind(0), layers, like)[:, None],
    )


def _scaled(
    parts: Sequence[Tensor], heads: Mapping[str, HeadProjections | LayerReader], like: Tensor
) -> Tensor:
    """Tensors of layers, one below the other, times the root of each layer's softmax scale; detached."""
    with torch.no_grad():
        if len({(part.dtype, part.device) for part in parts}) > 1:
            parts = [part.to(like) for part in parts]
        stacked = torch.stack(tuple(parts)).to(like)
        scales = [abs(float(head.scaling)) ** 0.5 for head in heads.values()]
        if len(set(scales)) == 1:
            return stacked * scales[0]
        return stacked * torch.tensor(scales).to(like).view(-1, *(1,) * (stacked.dim() - 1))


def _roots(
    moments: Mapping[str, Tensor], heads: Mapping[str, HeadProjections | LayerReader], like: Tensor
) -> Tensor:
    """Factors of ``s Σ`` of some layers, ``(layers, tokens, d_model)``; rows of zeros make them as long."""
    found = []
    for name, head in heads.items():
        root = moments.get(name)
        if root is None or root.dim() != 2 or root.shape[1] != head.width[0]:
            got = "none" if root is None else f"shape {tuple(root.shape)}"
            raise ValueError(
                f"expected moments of shape (tokens, {head.width[0]}) for layer {name!r}, got {got}: pass a "
                "factor of the covariance of what enters each penalized layer"
            )
        found.append(root)
    longest = max(len(root) for root in found)
    if any(len(root) < longest for root in found):
        found = [nn.functional.pad(root, (0, 0, 0, longest - len(root))) for root in found]
    return _scaled(found, heads, like)


def check_form(form: str, target: object) -> None:
    """Raise ValueError unless form and target go together."""
    if form not in get_args(Form):
        raise ValueError(
            f"expected form to be 'variance', 'target' or 'limit', got {form!r}: pass one of these"
        )
    if form == "target" and target is None:
        raise ValueError(
            "expected a target mean with form='target', got None: pass target=, a number or one tensor a layer"
        )
    if form != "target" and target is not None:
        raise ValueError(
            f"expected no target with form={form!r}, which keeps the mean free, got {target!r}: leave "
            "target out or pass form='target'"
        )


def check_limit(limit: float) -> None:
    """Raise ValueError for a limit that is no positive finite number."""
    if number(limit, "limit") <= 0:
        raise ValueError(
            f"expected a limit above 0, got {limit}: pass a standard deviation of logits, such as 8"
        )


def select_layers(
    projections: Mapping[str, HeadProjections],
    *,
    modules: str | Sequence[str] | None = None,
    cross_attention: bool = False,
    by_tokens: bool = False,
    limited: bool = False,
) -> list[str]:
    """Names of the penalized layers, by name pattern and kind; nothing is gathered.

    Raises:
        ValueError: nothing is left.
    """
    if not isinstance(projections, Mapping):
        raise TypeError(
            f"expected a module or a mapping of projections by name, got {type(projections).__name__}: pass "
            "the model or what head_projections returned for it"
        )
    if not projections:
        raise ValueError(
            "expected at least one layer, got an empty mapping: pass what head_projections returned"
        )
    layers: Mapping[str, LayerReader | HeadProjections] = projections
    if isinstance(projections, ProjectionReader):
        layers = projections.layers
    chosen = [
        name
        for name, layer in layers.items()
        if matches(name, modules) and left_out(layer, cross_attention, by_tokens, limited) is None
    ]
    if not chosen:
        matched = [name for name in layers if matches(name, modules)]
        if matched:
            reason = left_out(layers[matched[0]], cross_attention, by_tokens, limited)
            more = f" (and {len(matched) - 1} more)" if len(matched) > 1 else ""
            raise ValueError(
                "expected at least one attention layer whose spectrum can be penalized, got "
                f"{matched[0]}{more}, {reason}: "
                f"{_way_out(layers, matched, cross_attention, by_tokens, limited)}"
            )
        unread = projections.unread if isinstance(projections, ProjectionReader) else {}
        unread = {name: reason for name, reason in unread.items() if matches(name, modules)}
        raise no_match(projections, unread, modules)
    return chosen


def left_out(
    layer: LayerReader | HeadProjections,
    cross_attention: bool,
    by_tokens: bool = False,
    limited: bool = False,
) -> str | None:
    """Why a layer has no penalty, as a clause about it; None where it has one."""
    if by_tokens and layer.self_attention and layer.key_layer is not None:
        return f"whose keys are those of {layer.key_layer}, so that its queries and keys have other inputs"
    if layer.self_attention and limited and not has_vectors(layer):
        return "whose queries and keys are divided by what its projections alone do not tell"
    if layer.self_attention:
        return None
    if by_tokens:
        return "which is not known to be self-attention, and has no token-aware spectrum then"
    if layer.width[0] != layer.width[1]:
        return f"which relates queries of width {layer.width[0]} to keys of width {layer.width[1]}"
    if cross_attention:
        return None
    return "which is not known to be self-attention: its keys may be those of other tokens"


def _way_out(
    layers: Mapping[str, LayerReader | HeadProjections],
    matched: Sequence[str],
    cross_attention: bool,
    by_tokens: bool,
    limited: bool,
) -> str:
    if limited and any(left_out(layers[name], False, True) is None for name in matched):
        return "pass a model and not its projections, or another form"
    if by_tokens:
        return "leave moments (or sigma='tokens') out, or such layers by modules="
    if not cross_attention and any(left_out(layers[name], True) is None for name in matched):
        return "pass cross_attention=True to penalize it all the same"
    return "the penalty needs queries and keys of one space"
