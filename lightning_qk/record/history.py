"""What a monitor remembers of a run: per-head statistics over steps, bounded in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk.record.forgotten import Forgotten
from lightning_qk.record.record_file import read_record, write_record
from lightning_qk.record.snapshots import Snapshots
from lightning_qk.record.states import pack_states, unpack_states


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
        # One entry a step: state of each head, int8 (record/states.py); None where unknown.
        self.states: list[Tensor | None] = []
        # Label → why a layer has no numbers.
        self.reasons: dict[str, str] = {}
        # Keeps points that thinning removes; None drops them.
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
            states: why, one of :mod:`lightning_qk.record.states` a head, shape ``(sum(heads),)``; None: unknown.

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
        total, flat = sum(self.heads), []
        for name, value in values.items():
            if value.numel() != total:
                raise ValueError(f"expected {total} values of {name!r}, one a head, got {value.numel()}")
            flat.append(value if value.dim() == 1 else value.reshape(-1))
        if len({(value.dtype, value.device) for value in flat}) > 1:
            flat = [value.to("cpu", torch.float32) for value in flat]
        # A copy: the caller may go on writing into its tensor.
        rows = torch.stack(flat).detach().to("cpu", torch.float32).unbind() if flat else ()
        return dict(zip(values, rows, strict=True))

    def _write(self, index: int, flat: Mapping[str, Tensor]) -> None:
        nothing = torch.full((sum(self.heads),), torch.nan)
        for name in flat:
            self.values.setdefault(name, [])
        for column in self.values.values():
            missing = len(self.steps) - len(column)
            column.extend([nothing] * missing)
        for name, value in flat.items():
            self.values[name][index] = value

    def _rewind(self, step: int) -> None:
        if not self.steps or step >= self.steps[-1]:
            return
        if self.forgotten is not None:
            self.forgotten.cut(step)
        while self.steps and self.steps[-1] >= step:
            self._drop(len(self.steps) - 1)
        # Only the last point could be off the stride, and it was removed.
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
        """Everything that a resumed run needs: plain values and tensors."""
        return {
            "layers": list(self.layers),
            "heads": list(self.heads),
            "max_points": self.max_points,
            "steps": list(self.steps),
            "values": {name: self.series(name) for name in self.values} if self.steps else {},
            "stride": self._stride,
            "seen": self._seen,
            "states": pack_states(self.states, sum(self.heads)),
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
        history.states = unpack_states(state.get("states"), len(history.steps), sum(history.heads))
        history.reasons = {str(label): str(reason) for label, reason in (state.get("reasons") or {}).items()}
        return history


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


GROUPS = ("spectrum", "attention", "sinks", "position", "hidden")
"""Histories that every record had from the start, in the order of the file and the page; others follow."""


def _named(group: str) -> Any:
    """A history of the record by its own name: None where there is none, and set to None to remove it."""

    def get(record: "RunRecord") -> History | None:
        return record.histories.get(group)

    def put(record: "RunRecord", history: History | None) -> None:
        kept: dict[str, History | None] = {**record.histories, group: history}
        record.histories = {
            name: one for name in dict.fromkeys((*GROUPS, *kept)) if (one := kept.get(name)) is not None
        }

    return property(get, put)


STATE = "State"
"""The fact of a record that says how the run ended, or that it is running."""


@dataclass(init=False)
class RunRecord:
    """Everything that is kept of a run: the report, the health table and the figures are made from it.

    ``spectrum``, ``attention``, ``sinks``, ``position`` and ``hidden`` are those histories by name, also as
    arguments; any other monitor adds its own to ``histories``.

    Attributes:
        histories: group → history of that monitor; hidden states have one "head" a layer. Groups other than those
            named above are the prefix of the monitor's log keys.
        eigenvalues: layer label → complex eigenvalues of W_QK, shape ``(heads, d_head)``, the newest ones.
        eigenvalues_step: the step that the eigenvalues belong to.
        snapshots: what is kept of a few steps only: ``"eigenvalues"``, complex ``(heads, d_head)``, and
            ``"linear_profile"``, the measured linear share by relative position of the key, ``(heads, bins)``.
        shapes: layer label → its widths and its softmax scale.
        points: step → what it is called, where steps are something else, such as models side by side.
        scalars: name → (steps, values) of run-level curves, such as ``locater/penalty``.
        events: (step, sentence) of what happened in the run: alarms, and what was done about them.
        info: facts about the run to print: model, parameters, versions.
        notes: sentences that a reader has to know, such as layers that were not captured.
    """

    histories: dict[str, History] = field(default_factory=dict)
    eigenvalues: dict[str, Tensor] = field(default_factory=dict)
    eigenvalues_step: int | None = None
    snapshots: dict[str, Snapshots] = field(default_factory=dict)
    shapes: dict[str, LayerShape] = field(default_factory=dict)
    points: dict[int, str] = field(default_factory=dict)
    scalars: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    events: list[tuple[int, str]] = field(default_factory=list)
    info: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    spectrum, attention, sinks, position, hidden = map(_named, GROUPS)

    def __init__(self, **parts: Any) -> None:
        for one in fields(self):
            setattr(self, one.name, None if one.default_factory is MISSING else one.default_factory())
        for name, value in parts.items():
            if not hasattr(self, name):
                raise TypeError(f"expected parts of a record, got {name!r}: correct it")
            setattr(self, name, value)

    def save(self, path: str | Path) -> Path:
        """Write the record as one safetensors file, which appears whole or not at all.

        Raises:
            OSError: it cannot be written there.
        """
        state = {one.name: getattr(self, one.name) for one in fields(self)}
        for name in ("histories", "snapshots"):
            state[name] = {key: value.state_dict() for key, value in state[name].items()}
        return write_record(path, state)

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file is no such record, or is damaged.
            OSError: it cannot be read.
        """
        state = read_record(path)
        state["histories"] = {key: History.from_state_dict(one) for key, one in state["histories"].items()}
        state["snapshots"] = {key: Snapshots.from_state_dict(one) for key, one in state["snapshots"].items()}
        state["shapes"] = {key: LayerShape(*one) for key, one in state["shapes"].items()}
        return cls(**state)
