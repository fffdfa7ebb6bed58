"""Gradients of a penalty on projections, as those of the parameters that projections are made of."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_qk.heads.layer import LayerReader
from lightning_qk.heads.projections import HeadProjections


class Shares:
    """Gradients to add to those of parameters; nothing is changed before :meth:`add`."""

    def __init__(self) -> None:
        self._made: dict[nn.Parameter, Tensor] = {}
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._pulled: list[tuple[nn.Parameter, Tensor]] = []
        self._whole: dict[nn.Parameter, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._views or self._pulled or self._whole)

    def put_whole(self, shares: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Gradients in the shape of parameters; :meth:`squares` does not know them."""
        for parameter, share in shares:
            before = self._whole.get(parameter)
            self._whole[parameter] = share if before is None else before + share

    def put(
        self,
        layers: Mapping[str, LayerReader],
        heads: Mapping[str, HeadProjections],
        names: Sequence[str],
        gradients: Sequence[Tensor | None],
        wanted: Collection[int],
    ) -> None:
        """Split gradients of stacked projections, (layers, ...) for query and key, into those of parameters."""
        for side, stacked in zip(("query", "key"), gradients, strict=True):
            if stacked is None:
                continue
            for name, gradient in zip(names, stacked.unbind(0), strict=True):
                layer = layers[name]
                if not wants(layer, side, wanted):
                    continue
                view = layer.gradient_view(side, self._made)
                if view is None:
                    self._pulled += pulled(layer, getattr(heads[name], side), side, gradient, wanted)
                    continue
                place = view.data_ptr(), view.numel()
                # Tied weights have one gradient for several layers.
                before = self._views.get(place)
                self._views[place] = view, gradient if before is None else before[1] + gradient

    def put_pulled(self, shares: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Gradients in the shape of parameters, or of their local shards."""
        self._pulled += shares

    def squares(self) -> Tensor:
        """Squared norms of the gradients that are there and of what is to be added, ``(2,)``, of local shards."""
        together: dict[nn.Parameter, Tensor] = {}
        for parameter, share in self._pulled:
            together[parameter] = share + together[parameter] if parameter in together else share
        pairs = [
            *self._views.values(),
            *(
                (torch.zeros_like(one) if own.grad is None else own.grad, one)
                for own, one in together.items()
            ),
        ]
        sums = [
            torch.stack([local(side).to(torch.float32).square().sum() for side in pair]) for pair in pairs
        ]
        return summed(sums, 0) if sums else torch.zeros(2)

    def scale(self, factor: float | Tensor) -> None:
        """Multiply all of it."""
        self._views = {place: (view, part * factor) for place, (view, part) in self._views.items()}
        self._pulled = [(parameter, share * factor) for parameter, share in self._pulled]

    def add(self) -> None:
        """Add all of it."""
        for parameter in self._whole:
            if parameter.grad is None:
                self._made[parameter] = torch.zeros_like(parameter)
        for parameter, grad in self._made.items():
            parameter.grad = grad
        pairs = [
            *self._views.values(),
            *((parameter.grad, share) for parameter, share in self._whole.items()),
        ]
        if pairs:
            into, parts = zip(*pairs, strict=True)
            torch._foreach_add_(list(into), list(parts))
        for parameter, share in self._pulled:
            if parameter.grad is None:
                parameter.grad = share
            else:
                parameter.grad += share


def wants(layer: LayerReader, side: str, wanted: Collection[int]) -> bool:
    """Whether the weight of one side of a layer depends on a wanted parameter."""
    parameters = layer.parameters(side)
    if layer.is_flat:
        # FSDP has no gradient for a parameter that has none on any process.
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
    return any(id(parameter) in wanted for parameter in parameters)


def pulled(
    layer: LayerReader, projection: Tensor, side: str, gradient: Tensor, wanted: Collection[int]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Gradients of the parameters from that of a projection; of sharded ones, for the local shard."""
    if not projection.requires_grad:
        # A merged or disabled adapter takes no part.
        return []
    parameters = [parameter for parameter in layer.parameters(side) if id(parameter) in wanted]
    # Query and key may come from one gathered weight, through one graph.
    shares = torch.autograd.grad(
        projection, parameters, gradient.to(projection.dtype), retain_graph=True, allow_unused=True
    )
    return [
        (parameter, share) for parameter, share in zip(parameters, shares, strict=True) if share is not None
    ]


def local(tensor: Tensor) -> Tensor:
    """The shard of this process."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def summed(totals: list[Tensor], dim: int | None = None) -> Tensor:
    """The sum of tensors, or along a dimension of their stack."""
    if not totals:
        return torch.zeros(())  # of no layers
    if len(totals) == 1:
        return totals[0]
    # Layers may live on several devices; the sum is taken where the first one is.
    return torch.stack([total.to(totals[0].device) for total in totals]).sum(dim)
