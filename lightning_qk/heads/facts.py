"""What names, attributes and earlier calls tell of one attention layer; nothing is run.

Number and width of heads, and the factor on their dot products, are taken from the layer's own attributes first
and from the nearest configuration second: attention classes of transformers use many names for the same number,
and a good third keep no head count at all.
"""

import inspect
import math
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_qk.architecture.source_code import names_in
from lightning_qk.heads.layouts import KnownLayout, borrows_keys, unsupported
from lightning_qk.heads.live_weights import FlatUnit, flat_unit
from lightning_qk.heads.projections import InaccessibleWeights, Sizes, UnreadLayer
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


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a layer before its weights are looked for. It has no weights and is not kept.

    Attributes:
        layer: in its model.
        finding: what its real call has shown.
        trusts_names: the names of its children tell a layout, since its class is a known library's.
        kv_source: the layer whose keys it uses instead of its own.
        clip: the bound that its forward clamps q and k to, by its configuration.
        unit: the FSDP unit that flattens the weights.
    """

    layer: AttentionLayer
    finding: Finding
    trusts_names: bool
    kv_source: "KVSource | None"
    clip: float | None
    unit: FlatUnit | None

    @property
    def key_module(self) -> nn.Module:
        """The layer that has the keys: another one where they are shared."""
        return self.layer.module if self.kv_source is None else self.kv_source.module


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
    source, clip = kv_source(layer), configured_clip(layer)
    trusts_names = layer.is_known and not finding.ways
    reason = finding.reason or (unsupported(module) if trusts_names else None)
    if reason is not None:
        raise UnreadLayer(reason)
    unit = flat_unit((module, *layer.ancestors, *wrappers))
    if source is not None and unit is not None:
        raise InaccessibleWeights(
            f"its keys are those of {source.name}, which FSDP keeps flat in a unit of its own: use FSDP2 "
            "(ModelParallelStrategy, see configs/fsdp2.yaml)"
        )
    return LayerFacts(layer, finding, trusts_names, source, clip, unit)


# A layer reuses the keys of a layer of its own kind.
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


_CLIP = "clip_qkv"


def configured_clip(layer: AttentionLayer) -> float | None:
    """The bound that a layer's forward clamps its projections to, as OLMo, MPT and DBRX call it; None without."""
    code = getattr(inspect.unwrap(type(layer.module).forward), "__code__", None)
    if code is None or _CLIP not in names_in(code):
        return None
    for owner in (layer.module, layer.config):
        value = getattr(owner, _CLIP, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None


_D_HEAD = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "key_value_proj_dim",
    "dim_head",
    "dim_per_head",
    "attn_head_size",
    "hidden_size_per_attention_head",
    "d_head",
    "d_kv",
)
_HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_attn_heads",
    "heads",
    "nhead",
)
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_kv", "multi_query_group_num")


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            value = getattr(owner, name, None)
        except Exception:
            # A configuration of layers that differ refuses to give one number for all of them.
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _of_layer(module: nn.Module, config: Any) -> Any:
    """The layer's own configuration, where layers have one each."""
    index = getattr(module, "layer_idx", None)
    try:
        configs = getattr(config, "per_layer_config", None)
        return config if index is None or configs is None else configs[index]
    except Exception:
        # Not every configuration that offers it can make it.
        return config


def head_count(module: nn.Module) -> int | None:
    """How many heads a layer's own attributes say that it has; None where they do not."""
    return _number(module, _HEADS)


def layer_sizes(
    module: nn.Module,
    config: Any,
    rows: tuple[int, int],
    blocks: Callable[[int, int], tuple[int, int]],
    shared: int = 0,
) -> Sizes:
    """The head counts and width that explain the rows of a layer's projections.

    Args:
        module: the attention layer.
        config: the nearest configuration, or None.
        rows: of the projections that hold the queries and the keys.
        blocks: (heads, kv_heads) to how many blocks of d_head rows each of the two has; 0 where values of any
            width lie among them: among keys alone, or among queries and keys of each head.
        shared: how many rows, the last ones, all keys have in common.

    Raises:
        UnreadLayer: no head count is known, or it does not explain the rows.
    """
    config = _of_layer(module, config)
    d_head = _number(module, _D_HEAD)
    heads = head_count(module) or _number(config, _HEADS)
    of_query, of_key = (count > 0 for count in blocks(1, 1))
    if not of_query:
        d_head = _number(module, ("key_dim",)) or d_head
        if heads is None or d_head is None:
            raise UnreadLayer("it does not say how many heads it has and how wide their keys are")
        if rows[0] % heads or rows[0] // heads < 2 * d_head:
            raise UnreadLayer(
                f"its projection has {rows[0]} rows, which heads = {heads} and d_head = {d_head} do not explain"
            )
        return Sizes(heads, heads, d_head)
    if not of_key:
        if heads is None:
            raise UnreadLayer("neither it nor its config says how many heads it has")
        width, own = rows[0] // heads, rows[1] - shared
        if rows[0] % heads or own % heads or not shared <= width <= own // heads + shared:
            raise UnreadLayer(
                f"its projections have {rows[0]} rows of queries and {rows[1]} of keys and values, with {shared} "
                f"that all keys share, which heads = {heads} do not explain"
            )
        return Sizes(heads, heads, width, shared)
    if heads is None:
        d_head = d_head or _number(config, _D_HEAD)
        if d_head is None:
            raise UnreadLayer("neither it nor its config says how many heads it has or how wide they are")
    # Without a head count the rows give it, which is possible where they hold nothing but q.
    count = heads or rows[0] // (d_head or 1)
    by_rows = 0 if d_head is None else rows[1] // d_head
    for kv_heads in (_number(module, _KV_HEADS), _number(config, _KV_HEADS), count, by_rows, 1):
        if not kv_heads or count % kv_heads:
            continue
        wanted = blocks(count, kv_heads)
        width = d_head or rows[0] // wanted[0]
        if width and (wanted[0] * width, wanted[1] * width) == rows:
            return Sizes(count, kv_heads, width)
    known = " and ".join(
        f"{what} = {value}" for what, value in (("heads", heads), ("d_head", d_head)) if value is not None
    )
    raise UnreadLayer(f"its projections have {rows[0]} and {rows[1]} rows, which {known} do not explain")


# Attributes that hold the factor itself, and attributes that hold what the logits are divided by.
_FACTOR = ("scaling", "scale", "softmax_scale", "inv_norm_factor")
_DIVISOR = ("scale_attn", "norm_factor")


def softmax_scaling(module: nn.Module, d_head: int) -> float:
    """The factor on ``q · k``, with q and k as the projections give them.

    Some layers scale q before the attention call and pass a factor of 1; the product is the same.
    """
    relative = getattr(module, "pos_att_type", None)
    if relative is not None:
        # DeBERTa and its kin average over content's product and those with relative positions.
        return (d_head * (1 + sum(kind in ("c2p", "p2c") for kind in relative))) ** -0.5
    for name in _FACTOR:
        value = getattr(module, name, None)
        if isinstance(value, bool):
            # A switch: on is the usual factor.
            return d_head**-0.5 if value else 1.0
        number = _scalar(value)
        if number == 1.0 and _takes_inverse_root(module):
            return d_head**-0.5
        if number is not None:
            # The fourth root of d_head goes to q and to k alike.
            return number**2 if d_head > 1 and math.isclose(number, d_head**-0.25) else number
    for name in _DIVISOR:
        number = _scalar(getattr(module, name, None))
        if number is not None:
            return 1.0 / number
    if hasattr(module, "relative_attention_num_buckets"):
        # T5 and its kin: plain dot products.
        return 1.0
    return d_head**-0.5


def _takes_inverse_root(module: nn.Module) -> bool:
    """Whether the forward takes a power of -1/2 itself: ESM scales its queries and then calls with 1."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and -0.5 in code.co_consts


def _scalar(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return None
