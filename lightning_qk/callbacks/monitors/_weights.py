"""The part of QKSpectrumMonitor in a measurement: weights are read, and their moments are taken."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_qk.callbacks._layers import WatchedReader
from lightning_qk.callbacks._ranks import FailedTogether, all_or_none, digest
from lightning_qk.callbacks.monitors._round import Measuring, Part
from lightning_qk.metrics.eigenvalues import Cores
from lightning_qk.metrics.singular import SingularValues
from lightning_qk.metrics.spectrum import QKSpectrum, reading_order
from lightning_qk.record.states import KNOWN, LEFT_OUT, NO_VALUE, NOT_FINITE


class WeightLayers(NamedTuple):
    """The layers of a fit and what their weights are measured with."""

    reader: WatchedReader
    metric: QKSpectrum
    singular: SingularValues | None


class _MeasuringWeights(Measuring, Protocol):
    weight_layers: WeightLayers | None
    cores: list[Cores]
    step_of_weights: int | None

    def keep_known(self, layers: WeightLayers) -> None: ...
    def attempt(self, action: Callable[[], Any]) -> Any: ...
    def remember_start(self, values: dict[str, Tensor]) -> None: ...


class WeightsPart(Part):
    """Moments of the weights as they are now.

    Args:
        monitor: whose part it is.
        trainer: the trainer.
        pl_module: its module.
    """

    monitor: _MeasuringWeights

    def __init__(self, monitor: _MeasuringWeights, trainer: Trainer, pl_module: LightningModule) -> None:
        super().__init__(monitor, trainer, pl_module)
        self._layers = layers = monitor.weight_layers
        self.metrics = [] if layers is None else [layers.metric]
        self._statistics: list[str] = []
        self._broken: list[str] = []
        self._names = ""

    def prepare(self) -> None:
        """Read the weights. Gathering those that are spread over processes is collective: all agree before it."""
        layers = self._layers
        if layers is None:
            self.monitor.check_whole()
            return
        if layers.reader.gathers():
            self._names = all_or_none(self.trainer, lambda: self._get_ready(layers), facts=str)
        else:
            self._names = self._get_ready(layers)
        self._read(layers)
        self.monitor.step_of_weights = self.trainer.global_step

    def _get_ready(self, layers: WeightLayers) -> str:
        """Get ready to read the layers as the model is now; their names."""
        self.monitor.check_whole()
        layers.metric.to(self.pl_module.device).reset()
        if layers.reader.refresh():
            self.monitor.keep_known(layers)
        return repr(list(layers.reader.layers))

    def _read(self, layers: WeightLayers) -> None:
        """No collective calls but those that gather sharded weights, which are made whatever fails."""
        reader, metric, singular = layers
        order = reading_order(reader.layers)
        if singular is not None:
            order += singular.reading_order(reader.layers)
        with reader.to_the_end(order):
            metric.update(reader)
            self.monitor.cores = metric.cores
            if singular is not None:
                self.monitor.cores = [*metric.cores, *singular.cores(reader)]

    def words(self) -> list[float]:
        """Whether the layers are the same on every process."""
        if self.error is not None:
            return [-np.inf, -np.inf]
        own = digest(self._names)
        return [float(own), -float(own)]

    def agree(self, words: Sequence[float]) -> bool:
        """Nothing is measured where processes read other layers."""
        if words[0] != -words[1] and np.isfinite(words[0]):
            self.error = FailedTogether("the attention layers are not the same on every process")
        return False

    def results(self) -> list[Tensor]:
        """Values, and which heads of cross-attention have weights that are not finite."""
        if self._layers is None:
            return []
        metric = self._layers.metric
        values = metric.compute()
        self._statistics = list(values)
        tables = [torch.stack([value.reshape(-1) for value in values.values()])]
        for cores in metric.cores:
            if not cores.bilinear:
                self._broken += cores.names
                tables += (~cores.matrices.isfinite().all(-1).all(-1)).unbind()
        return tables

    def conclude(self, results: Sequence[Tensor]) -> None:
        """Values and states of all heads: cross-attention has no eigenvalues, and yet weights."""
        if self._layers is None:
            return
        table, *broken_heads = results
        values = dict(zip(self._statistics, table.float().unbind(), strict=True))
        broken = dict(zip(self._broken, broken_heads, strict=True))
        finite = np.isfinite(values["trace"].numpy()) & np.isfinite(values["frobenius_sq"].numpy())
        states, end = np.where(finite, KNOWN, NOT_FINITE), 0
        for name, heads in self._layers.metric.heads.items():
            own, end = slice(end, end + heads), end + heads
            if name not in self._layers.reader.layers:
                states[own] = LEFT_OUT
            elif name in broken:
                states[own] = np.where(broken[name].bool().numpy(), NOT_FINITE, NO_VALUE)
        self.monitor.states = torch.from_numpy(states)
        self.values = values


class StartPart(WeightsPart):
    """The weights that a run starts from, which are remembered and not logged."""

    def remember(self) -> None:
        """Keep them, and begin to solve their eigenproblems."""
        self.monitor.attempt(lambda: self.monitor.remember_start(self.values or {}))

    def publish(self) -> None:
        """Nothing."""
