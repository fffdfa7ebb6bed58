"""What a monitor says of its statistics, and the log keys that follow from it."""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_qk.record.families import checked_families
from lightning_qk.record.history import History
from lightning_qk.record.states import NOT_FINITE
from lightning_qk.record.statistics import describe

PerLayer = bool | str | Sequence[str] | None
Families = str | Sequence[str] | None


def without_errors(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Standard errors stay in the history: three more keys for each statistic would bury the rest."""
    return {name: flat for name, flat in values.items() if not name.endswith("_se")}


def _numbers(values: Mapping[str, Tensor]) -> Iterable[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """The same as arrays."""
    return zip(values, torch.stack(list(values.values())).numpy() if values else (), strict=True)


class LogKeys:
    """Aggregates of per-head values under their log keys; base of the monitors, which set the attributes.

    Values are tensors on the CPU. Their sums are small and many: numpy's calls cost a tenth of torch's.

    Attributes:
        counted: which heads count in aggregates over the model; None for all.
    """

    group: str
    """Prefix of the log keys."""
    statistics: tuple[str, ...]
    """Statistics that it has, without those that are made on request."""
    layer_statistics: tuple[str, ...] = ()
    """Statistics that are logged for every layer unless others are asked for."""
    extremes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Statistic → which of ``min`` and ``max`` over all heads loggers get beside the mean."""

    per_layer: bool | tuple[str, ...] | None
    per_head: bool
    families: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    counted: Tensor | None = None

    def set_keys(
        self, per_layer: PerLayer, per_head: bool, families: Families = None, exclude: Families = ()
    ) -> None:
        """Keep the arguments; for the end of ``__init__``.

        Raises:
            ValueError: ``per_layer`` names something that is no statistic of this monitor, or is not to be logged;
                a family is unknown.
        """
        self.per_head = per_head
        self.families = None if families is None else checked_families("families", families)
        self.exclude = checked_families("exclude", exclude or ())
        if per_layer is None or isinstance(per_layer, bool):
            self.per_layer = per_layer
            return
        self.per_layer = (per_layer,) if isinstance(per_layer, str) else tuple(per_layer)
        known = (*self.statistics, *self.layer_statistics)
        unknown = [name for name in self.per_layer if name not in known]
        if unknown:
            names = ", ".join(dict.fromkeys(known))
            raise ValueError(
                f"expected per_layer to be True, False or names among {names}, got {unknown[0]!r}: correct it"
            )
        silent = [name for name in self.per_layer if not self.is_logged(name)]
        if silent:
            raise ValueError(
                f"expected per_layer to name statistics of families that are logged, got {silent[0]!r}: add the "
                f"family {describe(silent[0], self.group).family!r} to families, or take it out of exclude"
            )

    def is_logged(self, statistic: str) -> bool:
        """Whether loggers get a statistic, by its family."""
        return self.logs_family(describe(statistic, self.group).family)

    def logs_family(self, family: str) -> bool:
        """Whether loggers get statistics of a family."""
        return family not in self.exclude and (self.families is None or family in self.families)

    def has_value(self, name: str, flat: Tensor) -> Tensor:
        """Which heads have a value of a statistic when all is well, boolean, of the shape of ``flat``."""
        return torch.ones_like(flat, dtype=torch.bool)

    def over_the_model(
        self, values: Mapping[str, Tensor], prefix: str | None = None, *, states: Tensor | None = None
    ) -> dict[str, float]:
        """Mean, minimum and maximum over heads that have a value and count; keys begin with the group or a prefix.

        NaN where a head that should have a value is not finite: numbers of the others would look healthy.
        """
        prefix = prefix or self.group
        scalars: dict[str, float] = {}
        counted = None if self.counted is None else self.counted.numpy()
        broken = self._broken_heads(values, states)
        for name, numbers in _numbers(values):
            bad = broken.get(name)
            if counted is not None and counted.shape == numbers.shape:
                numbers, bad = numbers[counted], None if bad is None else bad[counted]
            finite = numbers[np.isfinite(numbers)]
            if bad is not None and bad.any():
                found = (math.nan,) * 3
            elif finite.size:
                found = float(finite.mean(dtype=np.float64)), float(finite.min()), float(finite.max())
            else:
                continue
            for reduction, value in zip(("mean", "min", "max"), found, strict=True):
                scalars[f"{prefix}/{name}/{reduction}"] = value
        return scalars

    def _broken_heads(
        self, values: Mapping[str, Tensor], states: Tensor | None
    ) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Of each statistic, which heads should have a value and are not finite; empty where all is well."""
        if states is None or not (broken := states.numpy() == NOT_FINITE).any():
            return {}
        return {
            name: broken & ~np.isfinite(numbers) & self.has_value(name, values[name]).numpy()
            for name, numbers in _numbers(values)
        }

    def by_layer_and_head(
        self,
        history: History,
        values: Mapping[str, Tensor],
        prefix: str | None = None,
        *,
        states: Tensor | None = None,
    ) -> dict[str, float]:
        """Means over the heads of each layer, of some statistics, and each head where asked.

        NaN where a head of the layer is not finite.
        """
        by_layer = self._by_layer(values, is_evaluation=prefix is not None)
        prefix = prefix or self.group
        scalars: dict[str, float] = {}
        broken = self._broken_heads(values, states)
        ends = list(itertools.accumulate(history.heads))
        names = [name for name in values if self.is_logged(name)]
        for name in names if self.per_head else [name for name in names if name in by_layer]:
            numbers, bad = values[name].numpy(), broken.get(name)
            is_finite = np.isfinite(numbers)
            for label, heads, end in zip(history.layers, history.heads, ends, strict=True):
                own = slice(end - heads, end)
                if name in by_layer:
                    if bad is not None and bad[own].any():
                        scalars[f"{prefix}/{label}/{name}"] = math.nan
                    elif is_finite[own].any():
                        mean = numbers[own][is_finite[own]].mean(dtype=np.float64)
                        scalars[f"{prefix}/{label}/{name}"] = float(mean)
                if self.per_head:
                    scalars.update(
                        (f"{prefix}/{label}/head_{index:02d}/{name}", value)
                        for index, value in enumerate(numbers[own].tolist())
                        if math.isfinite(value)
                    )
        return scalars

    def _by_layer(self, values: Mapping[str, Tensor], is_evaluation: bool) -> Collection[str]:
        """Statistics that are logged for every layer; of evaluation loops only where all are asked for."""
        if isinstance(self.per_layer, bool):
            return values if self.per_layer else ()
        if is_evaluation:
            return ()
        return self.layer_statistics if self.per_layer is None else self.per_layer

    def worth_logging(self, overall: Mapping[str, float], *, is_evaluation: bool = False) -> dict[str, float]:
        """What loggers get of :meth:`over_the_model`: every mean, and the extremes that tell something.

        A dashboard of all of them would bury these, and ``trainer.callback_metrics`` has them all. Statistics of
        families that are not logged are left out.
        """
        kept: dict[str, float] = {}
        for key, value in overall.items():
            *_, statistic, reduction = key.split("/")
            if not self.is_logged(statistic):
                continue
            wanted = () if is_evaluation else self.extremes.get(statistic, ())
            if reduction == "mean" or reduction in wanted:
                kept[key] = value
        return kept
