"""Attention layers that an adapter is wrapped around as a whole, as PEFT does with torch's MultiheadAttention."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.heads.affine import Affine, AffineMap
from lightning_qk.heads.errors import UnreadLayer, alive
from lightning_qk.heads.sharding import check_access, is_dtensor, whole


def adapter_around(module: nn.Module, ancestors: Sequence[nn.Module]) -> nn.Module | None:
    """The adapter that a layer is the base of, or None."""
    if not ancestors or ancestors[0]._modules.get("base_layer") is not module:
        return None
    return ancestors[0] if hasattr(ancestors[0], "active_adapters") else None


class AdaptedPlan:
    """A fused projection of a layer with a product of low rank beside it, see :class:`AffineMap`."""

    def __init__(self, plan: AffineMap, adapter: nn.Module) -> None:
        """Find out how the two are read.

        Raises:
            UnreadLayer: the adapter does something else than to add a product of low rank.
        """
        self.name, self.rows, self.columns = plan.name, plan.rows, plan.columns
        self._plan = plan
        self._adapter = weakref.ref(adapter)
        layer: Any = adapter
        for parameter in adapter.parameters():
            check_access(parameter, f"the adapter of its {plan.name!r}")
        names = [*layer.lora_A] if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) else []
        plain = bool(names) and not getattr(layer, "lora_variant", None)
        if not plain or any(self._added(name).shape != (self.rows, self.columns) for name in names):
            raise UnreadLayer(
                f"an adapter is around it ({type(adapter).__name__}) that does more than add a product of low "
                f"rank to its {plan.name!r}"
            )

    @property
    def module(self) -> nn.Module:
        """The layer that holds the projection."""
        return self._plan.module

    @property
    def as_matrix(self) -> bool:
        """Whether reading runs a module."""
        return self._plan.as_matrix

    def read(self) -> Affine:
        """The map as it is now, with the adapters that take part now."""
        layer: Any = alive(self._adapter)
        weight, bias = self._plan.read()
        disabled, merged = bool(layer.disable_adapters), tuple(layer.merged_adapters)
        if merged:
            # They are in the weight; the next forward takes them out again where they are disabled.
            added = [-self._added(name) for name in merged if disabled]
        else:
            added = [
                self._added(name) for name in layer.active_adapters if name in layer.lora_A and not disabled
            ]
        for product in added:
            weight = weight + product
        return Affine(weight, bias)

    def plain_weight(self) -> nn.Parameter | None:
        """None: the weight is a sum."""
        return None

    def weight_parameters(self) -> list[nn.Parameter]:
        """Those of the base and of all adapters."""
        layer: Any = alive(self._adapter)
        own = [parameter for side in (layer.lora_A, layer.lora_B) for parameter in side.parameters()]
        return self._plan.weight_parameters() + own

    def is_sharded(self) -> bool:
        """Whether reading gathers."""
        return self._plan.is_sharded() or any(is_dtensor(own) for own in self.weight_parameters())

    def is_view(self) -> bool:
        """False: the sum takes memory."""
        return False

    def as_rows(self, weight: Tensor) -> Tensor:
        """The tensor itself: what is read has the form (out, in)."""
        return weight

    def _added(self, name: str) -> Tensor:
        layer: Any = alive(self._adapter)
        down, up = (whole(side[name].weight) for side in (layer.lora_A, layer.lora_B))
        with torch.autocast(down.device.type, enabled=False):
            return layer.scaling[name] * (up @ down)
