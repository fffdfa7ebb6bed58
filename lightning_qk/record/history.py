"""What a monitor remembers of a run: per-head statistics over steps, bounded in memory."""

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.record.atomic_write import whole_file
from lightning_qk.record.forgotten import Forgotten
from lightning_qk.record.snapshots import Snapshots


class History:
    """Per-head statistics at the logged steps of one monitor.

    Heads of all layers lie flat, one after the other in the order of ``layers``, so that layers with
    different numbers of heads need no padding. When more than ``max_points`` steps were kept, every second
    one is dropped and from then on only every second one is kept: memory is bounded however long the run.
    The newest point is always there.

    Args:
        layers: labels of the layers, in the model's order.
        heads: number of heads of each layer.
        max_points: how many steps to keep, at least 2.
    """

    def __init__(self, layers: Sequence[str], heads: Sequence[int], max_points: int = 256) -> None:
        if len(layers) != len(heads):
            raise ValueError(f"expected one head count a layer, got {len(heads)} for {len(layers)} layers")
        if max_points < 2:
            raise ValueError(
                f"expected max_points of at least 2, got {max_points}: pass how many steps to keep"
            )
        self.layers = tuple(layers)
        self.heads = tuple(int(h) for h in heads)
        self.max_points = max_points
        self.steps: list[int] = []
        self.values: dict[str, list[Tensor]] = {}
        # One entry a step: state of each head, int8 (logging/states.py); None where a record tells of none.
        self.states: list[Tensor | None] = []
        # Label → why a layer has no numbers.
        self.reasons: dict[str, str] = {}
        # Where points go that thinning takes out; None lets go of them.
        self.forgotten: Forgotten | None = None
        self._stride = 1
        self._seen = 0

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def statistics(self) -> list[str]:
        """Names of the statistics that were recorded."""
        return list(self.values)

    def append(self, step: int, values: Mapping[str, Tensor], states: Tensor | None = None) -> None:
        """Record one step.

        A step that is the newest already is completed or overwritten. A step before the newest one means that
        the run was set back: what came at or after it is forgotten.

        Args:
            step: the logger's step.
            values: statistic → float tensor of shape ``(sum(heads),)``; NaN where a head has no value.
            states: why, one of :mod:`lightning_qk.record.states` a head, shape ``(sum(heads),)``; None: not told.

        Raises:
            ValueError: a tensor does not have one value a head. Nothing was recorded then.
        """
        step, flat = int(step), self._flat(values)
        if states is not None and states.numel() != sum(self.heads):
            raise ValueError(f"expected {sum(self.heads)} states, one a head, got {states.numel()}")
        self._rewind(step)
        if not self.steps or step > self.steps[-1]:
            # The newest point replaces the last one when that was kept only for being the newest.
            if self.steps and (self._seen - 1) % self._stride != 0:
                self._forget(len(self.steps) - 1)
            self.steps.append(step)
            self.states.append(None)
            self._seen += 1
        if states is not None:
            self.states[-1] = states.detach().to("cpu", torch.int8, copy=True).reshape(-1)
        self._write(len(self.steps) - 1, flat)
        if len(self.steps) > self.max_points:
            self._stride *= 2
            for index in range(len(self.steps) - 2, 0, -1):
                if index % 2:
                    self._forget(index)

    def complete(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Add values that came late to a step that was recorded; nothing where that step is no longer kept.

        Args:
            step: the logger's step.
            values: as for :meth:`append`.

        Raises:
            ValueError: a tensor does not have one value a head. Nothing was recorded then.
        """
        flat = self._flat(values)
        if step in self.steps:
            self._write(self.steps.index(step), flat)

    def _flat(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        total, flat = sum(self.heads), {}
        for name, value in values.items():
            if value.numel() != total:
                raise ValueError(f"expected {total} values of {name!r}, one a head, got {value.numel()}")
            # A copy: the caller may go on writing into its tensor.
            flat[name] = value.detach().to("cpu", torch.float32, copy=True).reshape(-1)
        return flat

    def _write(self, index: int, flat: Mapping[str, Tensor]) -> None:
        for name in flat:
            self.values.setdefault(name, [])
        for column in self.values.values():
            missing = len(self.steps) - len(column)
            column.extend(torch.full((sum(self.heads),), torch.nan) for _ in range(missing))
        for name, value in flat.items():
            self.values[name][index] = value

    def _rewind(self, step: int) -> None:
        if not self.steps or step >= self.steps[-1]:
            return
        if self.forgotten is not None:
            self.forgotten.cut(step)
        while self.steps and self.steps[-1] >= step:
            self._drop(len(self.steps) - 1)
        # Only the last point could lie off the stride, and it is gone.
        self._seen = (len(self.steps) - 1) * self._stride + 1 if self.steps else 0

    def _forget(self, index: int) -> None:
        if self.forgotten is not None:
            values = {name: column[index] for name, column in self.values.items()}
            self.forgotten.keep(self.steps[index], values)
        self._drop(index)

    def _drop(self, index: int) -> None:
        del self.steps[index]
        del self.states[index]
        for column in self.values.values():
            del column[index]

    def state(self, label: str, index: int = -1) -> Tensor | None:
        """States of a layer's heads at a kept step, ``(heads,)``; None where none are known."""
        states = self.states[index] if self.steps else None
        return None if states is None else self.split(states)[self.layers.index(label)]

    def states_at(self, step: int) -> Tensor | None:
        """States of all heads at a step, ``(sum(heads),)``; None where that is not kept, or nothing is known."""
        return self.states[self.steps.index(step)] if step in self.steps else None

    def series(self, statistic: str) -> Tensor:
        """Every head over the kept steps, shape ``(points, sum(heads))``."""
        return torch.stack(self.values[statistic])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Split the last dimension of a flat tensor into one tensor a layer."""
        return list(flat.split(list(self.heads), dim=-1))

    def layer_series(self, statistic: str) -> Tensor:
        """Mean over the heads of each layer, heads without a value left out, shape ``(points, layers)``."""
        return torch.stack([part.nanmean(dim=-1) for part in self.split(self.series(statistic))], dim=-1)

    def grid(self, statistic: str, index: int = -1) -> Tensor:
        """One kept step as a picture, shape ``(layers, max(heads))``, NaN beyond a layer's last head."""
        out = torch.full((len(self.layers), max(self.heads)), torch.nan)
        for row, part in zip(out, self.split(self.values[statistic][index]), strict=True):
            row[: part.numel()] = part
        return out

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after a resume: plain values and tensors."""
        return {
            "layers": list(self.layers),
            "heads": list(self.heads),
            "max_points": self.max_points,
            "steps": list(self.steps),
            "values": {name: self.series(name) for name in self.values} if self.steps else {},
            "stride": self._stride,
            "seen": self._seen,
            "states": _packed(self.states, sum(self.heads)),
            "reasons": dict(self.reasons),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "History":
        """The history that :meth:`state_dict` described."""
        history = cls(state["layers"], state["heads"], state["max_points"])
        history.steps = [int(step) for step in state["steps"]]
        history.values = {name: list(value) for name, value in state["values"].items()}
        history._stride = int(state["stride"])
        history._seen = int(state["seen"])
        # Younger than the format.
        history.states = _unpacked(state.get("states"), len(history.steps), sum(history.heads))
        history.reasons = {str(label): str(reason) for label, reason in (state.get("reasons") or {}).items()}
        return history


_UNTOLD = -1


def _packed(states: Sequence[Tensor | None], heads: int) -> Tensor | None:
    """``(points, heads)``; None where no state is known."""
    if all(one is None for one in states):
        return None
    untold = torch.full((heads,), _UNTOLD, dtype=torch.int8)
    return torch.stack([untold if one is None else one for one in states])


def _unpacked(states: Any, points: int, heads: int) -> list[Tensor | None]:
    if not isinstance(states, Tensor) or tuple(states.shape) != (points, heads):
        return [None] * points
    return [None if bool((row == _UNTOLD).any()) else row.to(torch.int8).clone() for row in states]


HISTORIES = ("spectrum", "attention", "sinks", "position", "hidden")


class LayerShape(NamedTuple):
    """What a layer's spectra are compared and predicted with.

    Attributes:
        d_head: width of a head.
        d_model: width of what its projections read.
        scaling: the factor on ``q · k`` before the softmax.
    """

    d_head: int
    d_model: int
    scaling: float


@dataclass
class RunRecord:
    """What the report, the health table and the figures are made from.

    Attributes:
        spectrum: history of :class:`~lightning_qk.QKSpectrumMonitor`, or None.
        attention: history of :class:`~lightning_qk.AttentionMonitor`, or None.
        sinks: history of :class:`~lightning_qk.SinkMonitor`, or None.
        position: history of :class:`~lightning_qk.PositionMonitor`, or None.
        hidden: history of :class:`~lightning_qk.HiddenStateMonitor`, one "head" a layer, or None.
        eigenvalues: layer label → complex eigenvalues of W_QK, shape ``(heads, d_head)``, the newest ones.
        eigenvalues_step: the step that the eigenvalues belong to.
        snapshots: what is kept of a few steps only: ``"eigenvalues"``, complex ``(heads, d_head)``, and
            ``"linear_profile"``, the measured linear share by relative position of the key, ``(heads, bins)``.
        shapes: layer label → its widths and its softmax scale.
        points: step → what it is called, where steps stand for something else, such as models side by side.
        scalars: name → (steps, values) of run-level curves, such as ``locater/penalty``.
        events: (step, sentence) of what happened in the run: alarms, and what was done about them.
        info: facts about the run to print: model, parameters, versions.
        notes: sentences that a reader has to know, such as layers that were not captured.
    """

    spectrum: History | None = None
    attention: History | None = None
    sinks: History | None = None
    position: History | None = None
    hidden: History | None = None
    eigenvalues: dict[str, Tensor] = field(default_factory=dict)
    eigenvalues_step: int | None = None
    snapshots: dict[str, Snapshots] = field(default_factory=dict)
    shapes: dict[str, LayerShape] = field(default_factory=dict)
    points: dict[int, str] = field(default_factory=dict)
    scalars: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    events: list[tuple[int, str]] = field(default_factory=list)
    info: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def histories(self) -> dict[str, History]:
        """Name of the field → history, of those that there are."""
        found = {name: getattr(self, name) for name in HISTORIES}
        return {name: history for name, history in found.items() if history is not None}

    def save(self, path: str | Path) -> Path:
        """Write the record as one safetensors file, from which the report can be made again.

        The file appears whole or not at all.

        Raises:
            OSError: it cannot be written there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {
            "eigenvalues": list(self.eigenvalues),
            "eigenvalues_step": self.eigenvalues_step,
            "scalars": self.scalars,
            "events": self.events,
            "info": self.info,
            "notes": self.notes,
            "shapes": self.shapes,
            "points": self.points,
            "snapshots": {},
        }
        for index, value in enumerate(self.eigenvalues.values()):
            # A copy: layers may be views of one batched tensor, which safetensors refuses.
            tensors[f"eigenvalues/{index}"] = torch.view_as_real(value.to("cpu", torch.complex64)).clone(
                memory_format=torch.contiguous_format
            )
        for group, history in self.histories.items():
            state = history.state_dict()
            values, states = state.pop("values"), state.pop("states")
            meta[group] = {**state, "statistics": list(values), "has_states": states is not None}
            if states is not None:
                tensors[f"states/{group}"] = states.contiguous()
            tensors.update({f"{group}/{name}": value.contiguous() for name, value in values.items()})
        for kind, snapshots in self.snapshots.items():
            meta["snapshots"][kind] = {
                "max_points": snapshots.max_points,
                "steps": snapshots.steps,
                "labels": [list(values) for values in snapshots.values],
            }
            for point, values in enumerate(snapshots.values):
                for index, value in enumerate(values.values()):
                    plain = torch.view_as_real(value) if value.is_complex() else value
                    name = f"snapshots/{kind}/{point}/{index}{'/complex' if value.is_complex() else ''}"
                    tensors[name] = plain.clone(memory_format=torch.contiguous_format)
        path = Path(path)
        with whole_file(path) as partial:
            try:
                save_file(tensors, partial, metadata={"lightning_qk": json.dumps(meta)})
            except SafetensorError as error:  # how it tells a full disk, for one
                raise OSError(errno.EIO, str(error), str(path)) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no such record, or is damaged.
            OSError: it cannot be read.
        """
        from lightning_qk.record.record_file import read_record

        return read_record(path)
