"""One table of what each head of a run or a checkpoint is."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qk._printable import print_lines
from lightning_qk.heads.sites import attention_labels
from lightning_qk.probes.head_classes import HELPERS, KINDS, NUMBERS, HeadThresholds, classify
from lightning_qk.probes.head_numbers import measure_heads, relative
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.verdicts import format_value, is_one_key

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"dead": "red", "saturated": "red", "unknown": "dim"}
_COLUMNS = (
    ("layer", "layer"),
    ("head", "head"),
    ("class", "kind"),
    ("entropy", "entropy_normalized"),
    ("max prob", "max_prob"),
    ("sink", "sink"),
    ("position", "positional_share"),
    ("output", "output"),
    ("why", "reason"),
)


@dataclass(frozen=True)
class HeadRow:
    """One head. Numbers are means over query rows where nothing else is stated; NaN is unknown.

    Attributes:
        layer: label of the layer.
        head: index in the layer.
        kind: one of ``lightning_qk.probes.head_classes.KINDS``.
        reason: why, with the number that decided.
        entropy_normalized: entropy over the log of the number of keys, in [0, 1].
        max_prob: largest probability of a row.
        logit_std: standard deviation of a row's logits.
        sink_first: attention to the first key.
        sink_top: attention that the key with the most of a sequence receives, mean over the rows that see it and
            over sequences; keys seen by fewer than a quarter as many rows as the most-seen one are left out.
        sink_rate: share of keys that receive more than 0.3.
        positional_share: share of the logits' variance that the offset explains.
        output: root mean square norm of attention times values, over that of the layer's largest head.
        weight: Frobenius norm of W_QK, over that of the layer's largest head.
        eig_var: eigenvalue variance of W_QK.
    """

    layer: str
    head: int
    kind: str
    reason: str
    entropy_normalized: float = math.nan
    max_prob: float = math.nan
    logit_std: float = math.nan
    sink_first: float = math.nan
    sink_top: float = math.nan
    sink_rate: float = math.nan
    positional_share: float = math.nan
    output: float = math.nan
    weight: float = math.nan
    eig_var: float = math.nan

    @property
    def sink(self) -> float:
        """The larger of ``sink_first`` and ``sink_top``."""
        known = [value for value in (self.sink_first, self.sink_top) if not math.isnan(value)]
        return max(known, default=math.nan)


@dataclass(frozen=True)
class HeadReport:
    """What each head is: positional, semantic, sharp, sink, diffuse, dead or saturated, and the numbers by which.

    The rules and their order: :class:`~lightning_qk.probes.head_classes.HeadThresholds`. Classes describe, they do
    not prove, and depend on the data that the heads were measured on.

    Example:
        >>> from transformers import AutoConfig, AutoModel
        >>> model = AutoModel.from_config(AutoConfig.for_model("bert", num_hidden_layers=1))
        >>> report = HeadReport.from_model(model, [model.dummy_inputs])
        >>> sum(report.counts().values())  # a class for every head
        12

    Attributes:
        rows: one a head, in the model's order.
        thresholds: that they were classed by.
        left_out: layer → why its heads are not in the table.
    """

    rows: list[HeadRow]
    thresholds: HeadThresholds = field(default_factory=HeadThresholds)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        batches: Iterable[Mapping[str, Any] | Tensor],
        *,
        thresholds: HeadThresholds | None = None,
    ) -> "HeadReport":
        """Run a few batches and class every head that is captured.

        One forward pass a batch, in evaluation mode without gradients; the model is left as it was. A batch of
        several hundred tokens is enough for the classes, more make the numbers steadier.

        Args:
            model: a transformers model, or a module that is called like one.
            batches: mappings of the model's keyword arguments, or tensors of input ids.
            thresholds: None for the defaults.

        Raises:
            TypeError: a batch is neither.
            ValueError: no batch, or no attention that can be captured.
        """
        values, collector = measure_heads(model, batches)
        limits = thresholds or HeadThresholds()
        labels = attention_labels(model, collector.self_attention)
        rows = _rows({labels[name]: numbers for name, numbers in values.items()}, limits)
        return cls(rows, limits, dict(collector.left_out))

    @classmethod
    def from_history(cls, record: RunRecord, *, thresholds: HeadThresholds | None = None) -> "HeadReport":
        """Class every head by the newest numbers of QKSpectrumMonitor, AttentionMonitor and PositionMonitor.

        They know less than a run of the model: nothing of a head's values, so that it is dead where its W_QK is.
        Without a PositionMonitor, what is neither dead, saturated, diffuse, a sink nor sharp is unknown.

        Args:
            record: of a run, or what :meth:`~lightning_qk.record.history.RunRecord.load` read.
            thresholds: None for the defaults.

        Raises:
            ValueError: the monitors recorded nothing.
        """
        spectrum, attention = _newest(record.spectrum), _newest(record.attention)
        position = _newest(record.position)
        labels = list(dict.fromkeys([*spectrum, *attention]))
        if not labels:
            raise ValueError(
                "expected a record with a step of QKSpectrumMonitor or AttentionMonitor, got none: train with them"
            )
        values = {}
        for label in labels:
            numbers = {**spectrum.get(label, {}), **attention.get(label, {}), **position.get(label, {})}
            if "frobenius_sq" in numbers:
                numbers["weight"] = relative(numbers["frobenius_sq"].sqrt())
            values[label] = numbers
        limits = thresholds or HeadThresholds()
        return cls(_rows(values, limits), limits)

    def counts(self) -> dict[str, int]:
        """How many heads are of each class; all classes, in the order of the rules."""
        found = Counter(row.kind for row in self.rows)
        return {kind: found[kind] for kind in KINDS}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: counts, thresholds, heads and what is left out; None for what is unknown."""
        heads = [{name: _plain(value) for name, value in asdict(row).items()} for row in self.rows]
        return {
            "counts": self.counts(),
            "thresholds": asdict(self.thresholds),
            "heads": heads,
            "left_out": dict(self.left_out),
        }

    def to_csv(self, path: str | Path) -> Path:
        """Write one line a head; unknown numbers are empty.

        Returns:
            The path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [each.name for each in fields(HeadRow)])
            writer.writeheader()
            for row in self.rows:
                writer.writerow({k: "" if _plain(v) is None else v for k, v in asdict(row).items()})
        return path

    def print(self, console: "Console | None" = None) -> None:
        """Print the table, and below it how many heads are of each class.

        Args:
            console: where to print. Default: standard output.
        """
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = console or Console()
        table = Table(title="Heads", title_justify="left", pad_edge=False)
        for title, name in _COLUMNS:
            is_text = name in ("layer", "kind", "reason")
            table.add_column(title, justify="left" if is_text else "right", no_wrap=name != "reason")
        for row in self.rows:
            style = _STYLES.get(row.kind, "green")
            cells = []
            for _, name in _COLUMNS:
                value = getattr(row, name)
                shown = format_value(value) if isinstance(value, float) else str(value)
                cells.append(Text(shown, style=style if name == "kind" else ""))
            table.add_row(*cells)
        console.print(table)
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts().items() if count)
        left_out = (f"{layer} left out: {reason}" for layer, reason in self.left_out.items())
        print_lines(console, [f"{len(self.rows)} heads: {counts}", *left_out])


def _rows(values: Mapping[str, Mapping[str, Tensor]], limits: HeadThresholds) -> list[HeadRow]:
    rows = []
    for label, own in values.items():
        lists = {name: value.reshape(-1).double().tolist() for name, value in own.items()}
        alike = is_one_key(lists, collapsed=limits.collapsed, one_key=limits.saturated)
        count = next(iter(own.values())).numel()
        numbers = {**own, "in_one_key": torch.full((count,), float(alike))}
        names = [name for name in (*NUMBERS, *HELPERS) if name in numbers]
        table = torch.stack([numbers[name].reshape(-1).double().cpu() for name in names]).T.tolist()
        for head, row in enumerate(table):
            known = dict(zip(names, row, strict=True))
            kind, reason = classify(known, limits)
            kept = {name: known[name] for name in NUMBERS if name in known}
            rows.append(HeadRow(label, head, kind, reason, **kept))
    return rows


def _newest(history: History | None) -> dict[str, dict[str, Tensor]]:
    """Layer → statistic → newest value of each head."""
    if history is None or not history.steps:
        return {}
    newest = {name: history.split(column[-1]) for name, column in history.values.items()}
    return {
        label: {name: parts[index].to(torch.float64) for name, parts in newest.items()}
        for index, label in enumerate(history.layers)
    }


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
