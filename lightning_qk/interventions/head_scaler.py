"""Multiply the query and key weights of attention layers, head by head, where they are stored.

What a head computes is scaled exactly: weight rows, biases and what else is added to the queries. Rows of the
parameters themselves are multiplied, so that neither gradients nor optimizers' states are touched, and shards of
DTensors are multiplied where they are.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.live_weights import is_dtensor, is_plain
from lightning_qk.heads.projection import Projection, Side, StoredWeight
from lightning_qk.heads.reader import ProjectionReader


class StoredRows(NamedTuple):
    """Where the queries' or keys' rows of one layer lie.

    Attributes:
        projection: holds the rows, and their bias.
        places: which of its rows they are, ``(heads, coordinates)``.
    """

    projection: Projection
    places: Tensor

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that holds them now."""
        return _parameters(self.projection)[0]

    @property
    def transposed(self) -> bool:
        """Whether rows of the map are columns of the parameter."""
        return self.projection.stored is not None and self.projection.stored.transposed


class _Uneditable(Exception):
    """Weights cannot be multiplied; the message says what they are and the way out, as a clause."""


class HeadScaler:
    """Multiplies queries and keys of one layer.

    Attributes:
        name: qualified name of the layer.
        query: where the queries' rows lie.
        key: where the keys' rows lie.
        heads: number of query heads.
        kv_heads: number of key heads.
        d_head: width of a head.
        shared: how many coordinates, the last ones of each key, all heads have in common (the rotary part of
            latent attention): they are left as they are in the keys.
    """

    def __init__(self, plan: LayerReader) -> None:
        self._plan = plan
        self.name = plan.name
        self.heads, self.kv_heads = plan.sizes.heads, plan.sizes.kv_heads
        self.d_head = plan.sizes.d_head
        self.shared = plan.sizes.shared
        if plan.clip is not None:
            raise _Uneditable(
                f"whose queries and keys are clamped to ±{plan.clip:g} behind them, so that factors on them are "
                "none on what is multiplied: train without the clamp"
            )
        if plan.obstacle is not None:
            raise _Uneditable(plan.obstacle)
        self.query, self.key = self._stored(plan.query), self._stored(plan.key)
        for stored in (self.query, self.key):
            if len(stored.places.unique()) != stored.places.numel():
                raise _Uneditable(
                    "whose rows several heads share that do not follow each other, so that one head cannot be "
                    "scaled alone: use as many key heads as heads, or repeat them with repeat_interleave"
                )
        if self.query.projection is self.key.projection and bool(
            torch.isin(self.query.places, self.key.places).any()
        ):
            raise _Uneditable(
                "which give queries and keys alike, so that one cannot be scaled without the other"
            )
        self._shapes = [parameter.shape for parameter in self.parameters()]

    @property
    def is_frozen(self) -> bool:
        """Whether any of the weights takes no gradient now."""
        return not all(parameter.requires_grad for parameter in self.parameters())

    def problem(self) -> str | None:
        """Why the weights cannot be multiplied as they are now, as a clause about them; None where they can."""
        try:
            found = self.parameters()
        except _Uneditable as reason:
            return str(reason)
        except Exception as error:
            return f"that cannot be reached ({type(error).__name__}: {error})"
        if [parameter.shape for parameter in found] != self._shapes:
            return "of other shapes than before"
        strange = [own for own in found if not is_plain(own)]
        if strange:
            return f"of type {type(strange[0]).__name__} and {strange[0].dtype}"
        return None

    @torch.no_grad()
    def scale(self, query: Tensor, key: Tensor | None) -> None:
        """Multiply queries and keys in place.

        Args:
            query: factors, ``(heads,)`` or one for each coordinate, ``(heads, d_head)``.
            key: factors, ``(kv_heads,)`` or ``(kv_heads, d_head)``; what they say of shared coordinates is
                left out. None: the keys stay.
        """
        for side, stored, factors in (
            (self._plan.query, self.query, query),
            (self._plan.key, self.key, key),
        ):
            if factors is None:
                continue
            by_row = factors.detach().reshape(len(factors), -1).expand(-1, self.d_head)
            own = by_row[:, : stored.places.shape[1]]
            rows = torch.ones(stored.projection.rows, dtype=own.dtype, device=own.device)
            rows[stored.places.to(own.device)] = own
            weight, bias, where = _parameters(stored.projection)
            _multiply(weight, _by_element(where, weight, rows))
            if bias is not None:
                _multiply(bias, _of_bias(where, bias, rows))
            for name in side.added:
                added = getattr(self._plan.module, name)
                _multiply(added, by_row.reshape(added.shape))

    def parameters(self, only: str | None = None) -> list[nn.Parameter]:
        """What :meth:`scale` multiplies: of both sides, or only of ``"query"`` or ``"key"``."""
        found: list[nn.Parameter] = []
        sides = {"query": (self._plan.query, self.query), "key": (self._plan.key, self.key)}
        for side, stored in sides.values() if only is None else (sides[only],):
            weight, bias, _ = _parameters(stored.projection)
            found += [weight] if bias is None else [weight, bias]
            found += [getattr(self._plan.module, name) for name in side.added]
        return list(dict.fromkeys(found))

    def _stored(self, side: Side) -> StoredRows:
        projection = side.projection
        places = side.pick(torch.arange(projection.rows), self._plan.sizes)
        if projection.expansion is not None:
            # Behind the norm of the latent: what expands it may be scaled, and what bypasses it is shared.
            places = places[:, : places.shape[1] - projection.shared]
            projection = projection.expansion
        if projection.stored is None:
            raise _Uneditable(
                f"which are made from several tensors ({type(projection.module).__name__} {projection.name!r}: an "
                "adapter, a quantized weight or a composition): merge or drop what is around the weights"
            )
        weight, _, stored = _parameters(projection)
        if isinstance(stored.places, Tensor):
            shared = stored.places[stored.places >= 0]
            if not weight.is_contiguous() or len(shared.unique()) != len(shared):
                raise _Uneditable("that are kept out of order, or whose bias is added to several rows")
        return StoredRows(projection, places)


def head_scalers(
    reader: ProjectionReader, names: Iterable[str], *, trained: bool = True
) -> dict[str, HeadScaler]:
    """Editors of some layers.

    Args:
        reader: of the model.
        names: the layers.
        trained: frozen weights are refused.

    Raises:
        ValueError: the weights of a layer are no plain trainable parameters of its own; the message names the
            layer and the way out.
    """
    model = reader.model
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    lenders = {plan.key_layer: name for name, plan in reader.layers.items() if plan.key_layer is not None}
    editors = {}
    for name in names:
        try:
            editors[name] = _editor(reader.layers[name], lenders, holders, trained=trained)
        except _Uneditable as reason:  # noqa: PERF203
            raise ValueError(
                f"expected query and key weights of {name or type(model).__name__} that are trainable parameters "
                f"of its own, got weights {reason}, or leave the layer out with modules="
            ) from None
    return editors


def _editor(
    plan: LayerReader, lenders: dict[str, str], holders: "Counter[int]", *, trained: bool
) -> HeadScaler:
    if plan.is_flat:
        raise _Uneditable("which FSDP flattens: use FSDP2 (ModelParallelStrategy, see configs/fsdp2.yaml)")
    other = plan.key_layer or lenders.get(plan.name)
    if other is not None:
        raise _Uneditable(f"whose keys are those of {other} too: train without it")
    if getattr(plan.module, "bias_k", None) is not None:
        raise _Uneditable("with a learnt key beside the projections: use add_bias_kv=False")
    editor = HeadScaler(plan)
    for parameter in editor.parameters():
        if holders[id(parameter)] > 1:
            raise _Uneditable("that another module shares: untie them")
        if trained and not parameter.requires_grad:
            raise _Uneditable("that are frozen: unfreeze them")
        if not is_plain(parameter):
            raise _Uneditable(
                f"of type {type(parameter).__name__} and {parameter.dtype}: keep them unquantized"
            )
    return editor


def _parameters(projection: Projection) -> tuple[nn.Parameter, nn.Parameter | None, StoredWeight]:
    """Weight, bias and where in them the rows lie, as they are now."""
    stored = projection.stored
    assert stored is not None  # as of all that can be edited
    weight, bias = stored.weight, stored.bias
    if weight is not None and (bias is None or isinstance(bias, nn.Parameter)):
        return weight, bias, stored
    raise _Uneditable(
        f"which something makes from others ({projection.name!r} has a parametrization or a hook): remove it"
    )


def _by_element(stored: StoredWeight, weight: Tensor, rows: Tensor) -> Tensor:
    """Factors of rows in a shape that broadcasts to the weight's."""
    if stored.stride == 1 and weight.shape[0] == len(rows):
        return rows.view(-1, *(1,) * (weight.dim() - 1))
    if stored.stride == len(rows) and weight.shape[0] == stored.columns:
        return rows.view(1, *weight.shape[1:])
    return rows.view(-1, 1, stored.stride).expand(-1, stored.columns, -1).reshape(weight.shape)


def _of_bias(stored: StoredWeight, bias: Tensor, rows: Tensor) -> Tensor:
    """Factors of rows in the bias's shape."""
    factors = rows.new_ones(bias.numel())
    if isinstance(stored.places, slice):
        factors[stored.places] = rows
    else:
        places = stored.places.to(rows.device)
        factors[places[places >= 0]] = rows[places >= 0]
    return factors.view(bias.shape)


def _multiply(parameter: Tensor, factors: Tensor) -> None:
    """Multiply a parameter in place by factors that broadcast to its shape."""
    tensor: Any = parameter.detach()
    tensor.mul_(_replicated(factors, tensor) if is_dtensor(tensor) else factors.to(tensor.device))


def _replicated(factors: Tensor, like: Any) -> Any:
    """The same numbers on every process, for a product with a DTensor; no communication."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    local = factors.to(like.to_local().device)
    return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
