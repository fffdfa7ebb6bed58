"""Readings as JSON, CSV and HTML. A file appears whole or not at all."""

import csv
import io
import json
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qk._printable import cell, did_you_mean
from lightning_qk._version import __version__
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.read import Reading, record_of
from lightning_qk.record.atomic_write import whole_file
from lightning_qk.record.verdicts import HeadHealth, LayerHealth, head_health, layer_health


def check_targets(paths: Sequence[Path | None]) -> None:
    """Raises for files that cannot be written, before anything is read.

    Raises:
        BadInput: a target is a folder, or its folder cannot be written to.
    """
    for path in paths:
        if path is None or str(path) == "-":
            continue
        with _writing(path):
            if path.is_dir():
                raise BadInput(f"expected a file to write, got the folder {path}: add a name")
            folder = next(one for one in path.parents if one.exists())
            may_be = os.access(folder, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
            if not folder.is_dir() or not may_be:
                raise BadInput(f"expected a file that may be written, got {path}: pick another place")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns errors of the system, such as a name that is too long, into one sentence."""
    try:
        yield
    except BadInput:
        raise
    except (OSError, ValueError) as error:
        raise BadInput(
            f"expected a file that may be written, got {path} "
            f"({getattr(error, 'strerror', None) or error}): pick another place"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file under another name first; ``-`` is standard output.

    Raises:
        BadInput: it cannot be written.
    """
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with _writing(path), whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def as_json(
    sources: Sequence[Sequence[Reading]],
    differences: Sequence[dict[str, Any]] = (),
    *,
    eigenvalues: bool = False,
) -> str:
    """What was read, as one object on one line.

    Args:
        sources: readings of each source, by step.
        differences: from :func:`difference`.
        eigenvalues: all of them too, which are many.
    """
    content: dict[str, Any] = {
        "version": __version__,
        "checkpoints": [_plain(reading, eigenvalues) for readings in sources for reading in readings],
    }
    if differences:
        content["differences"] = list(differences)
    return json.dumps(content, allow_nan=False) + "\n"


def _plain(reading: Reading, with_eigenvalues: bool) -> dict[str, Any]:
    judged_layers, judged_heads = _verdicts(reading)
    layers = []
    for place, label in enumerate(reading.labels):
        heads: dict[str, list[Any]] = {
            name: [_number(value) for value in reading.split(flat)[place].tolist()]
            for name, flat in _named(reading).items()
        }
        if reading.attention:
            heads["verdict"] = [judged_heads[label, head].verdict for head in range(reading.heads[place])]
        spectrum = reading.eigenvalues.get(label) if with_eigenvalues else None
        pairs = [] if spectrum is None else torch.view_as_real(spectrum).tolist()
        layers.append(
            {
                "label": label,
                "name": reading.names[place],
                "heads": reading.heads[place],
                "self_attention": reading.self_attention[place],
                **({"verdict": judged_layers[label].verdict} if reading.attention else {}),
                **{name: _number(float(flat[place])) for name, flat in reading.layer_values.items()},
                "per_head": heads,
                **(
                    {"eigenvalues": [[[*map(_number, pair)] for pair in head] for head in pairs]}
                    if pairs
                    else {}
                ),
            }
        )
    aggregates = {key: _number(value) for key, value in logged_values(reading).items() if "/head_" not in key}
    return {
        "checkpoint": reading.title,
        "step": reading.step,
        "facts": reading.facts,
        "verification": reading.verification,
        "values": aggregates,
        "layers": layers,
        "notes": reading.notes,
    }


def _verdicts(reading: Reading) -> tuple[dict[str, LayerHealth], dict[tuple[str, int], HeadHealth]]:
    """Verdicts by layer and by head, which need attention that was measured."""
    if not reading.attention:
        return {}, {}
    record = record_of([reading])
    layers = {row.label: row for row in layer_health(record)}
    return layers, {(row.label, row.head): row for row in head_health(record)}


def _named(reading: Reading) -> dict[str, Tensor]:
    """All numbers of heads by name, predicted ones as ``predicted/<statistic>``."""
    predicted = {f"predicted/{name}": flat for name, flat in reading.predicted.items()}
    return {**reading.values, **reading.attention, **predicted}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def difference(first: Reading, other: Reading) -> dict[str, Any]:
    """Difference of two models by key, as plain data."""
    before, after = logged_values(first), logged_values(other)
    return {
        "checkpoint": other.title,
        "minus": first.title,
        "values": {
            key: _number(value - before[key])
            for key, value in after.items()
            if key in before and "/head_" not in key
        },
    }


def as_csv(sources: Sequence[Sequence[Reading]]) -> str:
    """One line a head of every checkpoint; empty where a head has no value.

    A name that a spreadsheet would take for a formula has an apostrophe before it.
    """
    out = io.StringIO()
    all_readings = [reading for readings in sources for reading in readings]
    names = list(dict.fromkeys(name for reading in all_readings for name in _named(reading)))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["checkpoint", "step", "layer", "name", "head", *map(cell, names), "verdict"])
    for reading in all_readings:
        split = {name: reading.split(flat) for name, flat in _named(reading).items()}
        _, judged = _verdicts(reading)
        for place, label in enumerate(reading.labels):
            for head in range(reading.heads[place]):
                values = [float(split[name][place][head]) if name in split else math.nan for name in names]
                row = judged.get((label, head))
                writer.writerow(
                    [
                        cell(reading.title),
                        "" if reading.step is None else reading.step,
                        cell(label),
                        cell(reading.names[place]),
                        head,
                        *("" if math.isnan(value) else f"{value:.9g}" for value in values),
                        "" if row is None else row.verdict,
                    ]
                )
    return out.getvalue()


def write_html(path: Path, sources: Sequence[Sequence[Reading]]) -> None:
    """The report of the checkpoints of one model, or of several models side by side.

    Raises:
        BadInput: their layers differ, or the file cannot be written.
    """
    from lightning_qk.report.report import write_report

    if len(sources) == 1:
        record = record_of(list(sources[0]))
    else:
        record = record_of([source[-1] for source in sources], side_by_side=True)
    with _writing(path):
        write_report(record, path)


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"^\s*(?P<key>[^\s<>=]+)\s*(?P<operator>>=|<=|>|<)\s*(?P<number>\S+)\s*$")


class Condition(NamedTuple):
    """A bound on one number.

    Attributes:
        text: as it was given.
        key: of the number, as monitors log it.
        operator: ``>``, ``>=``, ``<`` or ``<=``.
        bound: what it is compared with.
    """

    text: str
    key: str
    operator: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether it holds; of a number that is not known, it does."""
        return math.isnan(value) or _OPERATORS[self.operator](value, self.bound)


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        BadInput: it is no condition.
    """
    found = _CONDITION.match(text)
    try:
        if found is None:
            raise ValueError
        bound = float(found["number"])
        if math.isnan(bound):
            raise ValueError
    except ValueError:
        raise BadInput(
            f"expected a condition such as 'qk/eig_var/max>3' after --fail-on, got {text!r}: give a key, one "
            "of >, >=, <, <=, and a number, in quotes"
        ) from None
    return Condition(text.strip(), found["key"], found["operator"], bound)


def logged_values(reading: Reading) -> dict[str, float]:
    """Every number of a reading under the key that the monitors log it by.

    ``qk/eig_var/mean``, ``/min`` and ``/max`` over all heads; ``qk/layer_03/eig_var``, the mean over the layer's
    heads; ``qk/layer_03/head_05/eig_var``; likewise ``attn/…``. Statistics that a layer cannot have are left out;
    a number that is not finite where there should be one is NaN or infinite in its aggregates.
    """
    out: dict[str, float] = {}
    groups = (("qk", reading.values), ("attn", reading.attention), ("pred", reading.predicted))
    for group, statistics in groups:
        for name, flat in statistics.items():
            layers = [
                (label, part)
                for place, (label, part) in enumerate(zip(reading.labels, reading.split(flat), strict=True))
                if reading.has_value(name, place)
            ]
            numbers = [value for _, part in layers for value in part.tolist()]
            if not numbers:
                continue
            unknown = any(math.isnan(value) for value in numbers)
            out[f"{group}/{name}/mean"] = sum(numbers) / len(numbers)
            out[f"{group}/{name}/min"] = math.nan if unknown else min(numbers)
            out[f"{group}/{name}/max"] = math.nan if unknown else max(numbers)
            for label, part in layers:
                out[f"{group}/{label}/{name}"] = float(part.double().mean())
                for head, value in enumerate(part.tolist()):
                    out[f"{group}/{label}/head_{head:02d}/{name}"] = value
    for name, flat in reading.layer_values.items():
        group = "attn" if name == "sink_heads" else "qk"
        known = {
            label: value
            for label, value in zip(reading.labels, flat.tolist(), strict=True)
            if not math.isnan(value)
        }
        out |= {f"{group}/{label}/{name}": value for label, value in known.items()}
        if known:
            out[f"{group}/{name}/mean"] = sum(known.values()) / len(known)
            out[f"{group}/{name}/min"], out[f"{group}/{name}/max"] = min(known.values()), max(known.values())
    return out


def check_condition(condition: Condition, values: Mapping[str, float]) -> float | None:
    """The number for which a condition holds, or None where it does not.

    Raises:
        BadInput: there is no such number.
    """
    if condition.key not in values:
        hint = did_you_mean(condition.key, values) or "; --json lists the keys"
        raise BadInput(f"expected a key that was read after --fail-on, got {condition.key!r}{hint}")
    value = values[condition.key]
    return value if condition.holds(value) else None
