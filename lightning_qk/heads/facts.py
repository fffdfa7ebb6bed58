"""What is known of one attention layer: its facts before its weights are looked for, and their layout."""

import inspect
import math
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_qk.architecture.source_code import is_known, names_in
from lightning_qk.heads.layouts import KnownLayout, borrows_keys, unsupported
from lightning_qk.heads.norms import NormPlan
from lightning_qk.heads.projection import Projection
from lightning_qk.heads.projections import InaccessibleWeights, Sizes, UnreadLayer
from lightning_qk.heads.sharding import flat_root, flat_unit
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.heads.trials import Trial


class Finding(NamedTuple):
    """What a layer's real call has shown.

    Attributes:
        ways: how it was called, where it has to be run so to be read.
        layout: the layout by which it has to be read, since that gave what its attention received.
        added: parameters of the layer that are added to its queries besides.
        reason: why it has to be left out; None to read it.
        self_attention: whether queries and keys are computed from the same tokens; None where that was not seen.
    """

    ways: tuple[Trial, ...] = ()
    layout: KnownLayout | None = None
    added: tuple[str, ...] = ()
    reason: str | None = None
    self_attention: bool | None = None


_findings: "weakref.WeakKeyDictionary[nn.Module, tuple[Finding, list[Any]]]" = weakref.WeakKeyDictionary()


def settle(module: nn.Module, finding: Finding) -> None:
    """Let all readers of a layer know; those that exist notice at their next ``refresh``, if it is news."""
    known, make_up = _findings.get(module), _make_up(module)
    if known is None or known[1] != make_up or not _is_same(known[0], finding):
        _findings[module] = finding, make_up


def finding_of(module: nn.Module) -> Finding | None:
    """What is known of a layer from its calls; None where nothing is."""
    known = _findings.get(module)
    return None if known is None else known[0]


def forget_changed(model: nn.Module) -> None:
    """Forget what is known of layers that are not what they were: their modules, forwards or settings changed."""
    for module in model.modules():
        known = _findings.get(module)
        if known is not None and known[1] != _make_up(module):
            del _findings[module]


def _make_up(module: nn.Module) -> list[Any]:
    """What a layer computes by, but for its weights' values."""
    plain = (bool, int, float, str, type(None))
    return [
        (
            name,
            id(part),
            type(part),
            getattr(vars(part).get("forward"), "__func__", vars(part).get("forward")),
            {key: own for key, own in vars(part).items() if isinstance(own, plain) and key != "training"},
        )
        for name, part in module.named_modules()
    ]


def _is_same(one: Finding, other: Finding) -> bool:
    """Whether two findings say the same; calls, which hold tensors, have to be the very same."""
    ways = len(one.ways) == len(other.ways) and all(map(operator.is_, one.ways, other.ways))
    return ways and one._replace(ways=()) == other._replace(ways=())


# What torch itself keeps of a module; whether it trains changes with every validation.
_OF_TORCH = frozenset({*vars(nn.Module()), "training"})
# After so many changes without any effect an attribute is taken for a counter.
_HARMLESS_CHANGES = 3

_Places = dict[tuple[int, str], Any]


class Constants:
    """The plain attributes and the buffers of a layer and all modules in it, to see whether they changed.

    A temperature that is annealed, a gate that is closed, an expert that is chosen: what was found out about the
    layer holds as long as they stay. Nothing of the device is waited for. What changes several times and turns out
    to change nothing, such as a counter of steps, is not looked at any more.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._changes: dict[tuple[int, str], int] = {}
        self._kept = self._now()

    def are_kept(self) -> bool:
        """Whether nothing changed since then."""
        return self._module() is None or not self._changed(self._now())

    def keep(self) -> None:
        """Take what is there now for what was kept: it was seen to make no difference."""
        now = self._now()
        for place in self._changed(now):
            self._changes[place] = self._changes.get(place, 0) + 1
        self._kept = now

    def _changed(self, now: _Places) -> list[tuple[int, str]]:
        return [
            place
            for place in {**self._kept, **now}
            if self._kept.get(place, now) != now.get(place, now)
            and self._changes.get(place, 0) < _HARMLESS_CHANGES
        ]

    def _now(self) -> _Places:
        module = self._module()
        found: _Places = {}
        for place, own in enumerate(() if module is None else module.modules()):
            for name, value in own.__dict__.items():
                if name not in _OF_TORCH and _is_plain(value):
                    found[place, name] = value
            for name, buffer in own._buffers.items():
                if buffer is not None:
                    found[place, name] = (id(buffer), _version(buffer))
        return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= 64 and all(isinstance(part, bool | int | float | str) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not say."""
    return -1 if tensor.is_inference() else tensor._version


_CLIP = "clip_qkv"


def configured_clip(module: nn.Module, config: Any) -> float | None:
    """The bound that a layer's forward clamps its projections to, as OLMo, MPT and DBRX call it; None without."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or _CLIP not in names_in(code):
        return None
    for owner in (module, config):
        value = getattr(owner, _CLIP, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None


class Factor(NamedTuple):
    """A factor on the coordinates of one side.

    Attributes:
        side: ``"query"`` or ``"key"``.
        parameter: attribute of the layer; it has the factor if this is a parameter of more than one number.
        values: the layer to the factor, which broadcasts to (heads, d_head).
        normalizes: the layer divides each side by its length besides: cosine attention. The softmax scale of
            the normalized form, whose vectors have length ``d_head ** 0.5``, is then ``1 / d_head``, and 1 else.
    """

    side: str
    parameter: str
    values: Callable[[nn.Module], Tensor]
    normalizes: bool = False


def _per_dim(module: nn.Module) -> Tensor:
    scale = getattr(module, "q_scale", getattr(module, "scaling", 1.0))
    return F.softplus(module.per_dim_scale) * scale  # type: ignore[arg-type]


def _per_dim_key(module: nn.Module) -> Tensor:
    return torch.as_tensor(getattr(module, "k_scale", 1.0))


def _base_two(module: nn.Module) -> Tensor:
    scaling: Tensor = module.scaling  # type: ignore[assignment]
    return F.softplus(scaling) * (math.log2(math.e) / math.sqrt(scaling.numel()))


def _temperature(module: nn.Module) -> Tensor:
    scale: Tensor = module.logit_scale  # type: ignore[assignment]
    return scale.clamp(max=math.log(100.0)).exp().flatten()[:, None]


_FACTORS = (
    # Gemma's audio towers and VideoPrism's pooling head.
    Factor("query", "per_dim_scale", _per_dim),
    Factor("key", "per_dim_scale", _per_dim_key),
    # TimesFM.
    Factor("query", "scaling", _base_two),
    # Swin v2: cosine attention with a temperature for each head.
    Factor("query", "logit_scale", _temperature, normalizes=True),
)


def learnt_factors(module: nn.Module) -> dict[str, Factor]:
    """The factors that a layer has, by side."""
    found = {}
    for factor in _FACTORS:
        parameter = module._parameters.get(factor.parameter)
        if parameter is not None and parameter.numel() > 1:
            found[factor.side] = factor
    return found


# Layers lend to layers of their own kind.
_KIND = ("layer_type", "use_rope")


class KVSource(NamedTuple):
    """The layer whose keys a KV-sharing layer reuses: its qualified name and itself."""

    name: str
    module: nn.Module


def kv_source(site: AttentionLayer) -> KVSource | None:
    """Finds the layer whose keys a KV-sharing layer reuses; None for a layer with keys of its own.

    It is the one whose index the layer holds, else the last one before it that is of its kind, has keys and,
    where layers say so (``store_full_length_kv``), stores them.

    Raises:
        UnreadLayer: the layer has no keys of its own, and no such layer is found.
    """
    module = site.module
    if not borrows_keys(module):
        return None
    parts = site.name.split(".")
    for depth, ancestor in enumerate(site.ancestors):
        # The module list that holds the layers, and the way from one of them to its attention.
        place = len(parts) - 1 - depth
        if not isinstance(ancestor, nn.ModuleList) or not parts[place].isdigit():
            continue
        index, path = int(parts[place]), ".".join(parts[place + 1 :])
        own = getattr(module, "kv_shared_layer_index", None)
        for earlier in [own] if isinstance(own, int) else range(index - 1, -1, -1):
            found = _attention(ancestor[earlier], path)
            if found is not None and _lends(found, module):
                return KVSource(".".join([*parts[:place], str(earlier), *parts[place + 1 :]]), found)
    raise UnreadLayer("it uses the keys of an earlier layer, which is not part of the module that was passed")


def _attention(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _lends(module: nn.Module, to: nn.Module) -> bool:
    same = all(getattr(module, name, None) == getattr(to, name, None) for name in _KIND)
    return same and not borrows_keys(module) and getattr(module, "store_full_length_kv", True)


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer before its weights are looked for. It has no weights and is not kept.

    Attributes:
        layer: in its model.
        finding: what its real call has shown.
        trusts_names: the names of its children tell a layout, since its class is a known library's.
        kv_source: the layer whose keys it uses instead of its own.
        key_layer: its qualified name.
        clip: the bound that its forward clamps q and k to, by its configuration.
        constants: the numbers that it keeps beside its parameters.
        unit: the FSDP unit that flattens the weights.
        root: the outermost of all units, where it is known to be.
    """

    layer: AttentionLayer
    finding: Finding
    trusts_names: bool
    kv_source: nn.Module | None
    key_layer: str | None
    clip: float | None
    constants: Constants
    unit: "weakref.ref[nn.Module] | None"
    root: "weakref.ref[nn.Module] | None"


def describe(
    layer: AttentionLayer, wrappers: tuple[nn.Module, ...] = (), finding: Finding | None = None
) -> LayerFacts:
    """What is known of a layer from its class, its names and its earlier calls; nothing is run.

    Args:
        layer: in its model.
        wrappers: modules around the model that the layer was found in, nearest first.
        finding: what its real call has shown; None for what is known of it.

    Raises:
        UnreadLayer: it is known that it cannot be read.
    """
    module = layer.module
    finding = finding or finding_of(module) or Finding()
    trusts_names = is_known(module) and not finding.ways
    reason = finding.reason or (unsupported(module) if trusts_names else None)
    if reason is not None:
        raise UnreadLayer(reason)
    source, clip, constants = kv_source(layer), configured_clip(module, layer.config), Constants(module)
    chain = (module, *layer.ancestors, *wrappers)
    # The outermost unit of a part of a model need not be the root: it is one where nothing is around it.
    unit, root = flat_unit(chain), flat_root(chain)
    if source is not None and unit is not None:
        raise InaccessibleWeights(
            f"its keys are those of {source.name}, which FSDP keeps flat in a unit of its own: use FSDP2 "
            "(ModelParallelStrategy, see configs/fsdp2.yaml)"
        )
    return LayerFacts(
        layer,
        finding,
        trusts_names,
        None if source is None else source.module,
        None if source is None else source.name,
        clip,
        constants,
        None if unit is None else weakref.ref(unit),
        weakref.ref(root) if root is not None and root is chain[-1] else None,
    )


class Side(NamedTuple):
    """Query or key of one layer: where its rows lie, and what to fold into them."""

    projection: Projection
    pick: Callable[[Tensor, Sizes], Tensor]
    qk_norm: NormPlan | None
    factor: Factor | None = None
    added: tuple[str, ...] = ()

    def view(self, parameter: Tensor, sizes: Sizes) -> Tensor | None:
        """The part of a tensor of the weight's shape that belongs to this side, (heads, d_head, d_in), as a view.

        None where the layout's order needs a copy.
        """
        rows = self.pick(self.projection.as_rows(parameter), sizes)
        shares = rows.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        return rows if shares else None


@dataclass(frozen=True)
class Layout:
    """Where the weights of one layer are, and what is between them and the softmax.

    Attributes:
        name: of the table's entry.
        query: the query side.
        key: the key side.
        sizes: head counts and width of a head.
        scaling: the softmax scale.
        normalizes: queries or keys are normalized behind their projections.
        crosses: queries and keys are known to come from different inputs.
        is_decided: whether that is known; False where nothing but a call tells.
        inner_norms: norms that are part of the projections.
        clip: the bound that q and k are clamped to behind the projections, or None.
        obstacle: why heads must not be scaled by their rows, as a clause about the weights, or None.
        is_capped: large logits are bounded, of a layer that was run.
        is_added_to: something besides ``q · k`` is added to the logits, of a layer that was run.
        is_turned: queries and keys change with the token's place, of a layer that was run.
    """

    name: str
    query: Side
    key: Side
    sizes: Sizes
    scaling: float
    normalizes: bool = False
    crosses: bool = False
    is_decided: bool = True
    inner_norms: tuple[nn.Module, ...] = ()
    clip: float | None = None
    obstacle: str | None = None
    is_capped: bool = False
    is_added_to: bool = False
    is_turned: bool = False

    @property
    def qk_norm(self) -> bool:
        """Whether a norm is between the layer's input and the dot product."""
        return self.normalizes or self.query.projection.normed or self.key.projection.normed
