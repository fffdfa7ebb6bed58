"""Numbers of healthy real models, head by head, which a user's model is set beside.

``benchmarks/atlas.py`` of the repository measures them and writes the files that the package carries.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.read import Reading
from lightning_qk.record.atomic_write import whole_file

_FOLDER = Path(__file__).parent / "references"


@dataclass(frozen=True)
class Reference:
    """What was read of a healthy model, and measured on text.

    Attributes:
        name: of the reference, such as ``"smollm2"``.
        facts: of the model, the text, and the versions of libraries.
        layers: label of each head's layer.
        heads: number of each head in its layer.
        values: statistic → one number a head, float64, NaN where it has none: names as ``lightning-qk inspect
            --csv`` has them; a number of a layer is repeated for each of its heads.
    """

    name: str
    facts: Mapping[str, str]
    layers: list[str]
    heads: list[int]
    values: Mapping[str, Tensor]

    def by_layer(self, statistic: str, *, peak: bool = False) -> Tensor:
        """Means over each layer's heads that have a value, or the largest; ``(layers,)``."""
        flat, labels = self.values[statistic], list(dict.fromkeys(self.layers))
        owner = torch.tensor([labels.index(label) for label in self.layers])
        parts = [flat[(owner == place) & ~flat.isnan()] for place in range(len(labels))]
        return torch.stack([part.max() if peak else part.mean() for part in parts if len(part)])

    def share_below(
        self, statistic: str, value: float, *, of_layers: bool = False, peak: bool = False
    ) -> float:
        """Share of the reference's heads, or layers, that lie lower; equal ones count half. NaN if not known."""
        if statistic not in self.values or value != value:
            return float("nan")
        known = self.by_layer(statistic, peak=peak) if of_layers else self.values[statistic]
        known = known[~known.isnan()]
        if not len(known):
            return float("nan")
        return float(((known < value).double() + 0.5 * (known == value).double()).mean())


def reference_names() -> list[str]:
    """The references that the package carries."""
    return sorted(path.stem for path in _FOLDER.glob("*.parquet"))


def reference(name: str) -> Reference:
    """Numbers of a healthy model.

    Args:
        name: one of :func:`reference_names`.

    Raises:
        BadInput: there is no such reference.
    """
    import pyarrow.parquet as pq

    path = _FOLDER / f"{name}.parquet"
    if name not in reference_names():
        raise BadInput(f"expected a reference, one of {', '.join(reference_names())}, got {name!r}")
    table = pq.read_table(path)
    columns = table.to_pydict()
    layers, heads = columns.pop("layer"), columns.pop("head")
    values = {
        key: torch.tensor([float("nan") if one is None else one for one in column], dtype=torch.float64)
        for key, column in columns.items()
    }
    facts = json.loads(table.schema.metadata[b"lightning_qk"])
    return Reference(name, facts, layers, heads, values)


def write_reference(
    reading: Reading, path: Path, *, more: Mapping[str, Tensor] | None = None, facts: Mapping[str, str]
) -> None:
    """Write what was read as a table of one row a head.

    Args:
        reading: of the model.
        path: of the file.
        more: further numbers, one a head.
        facts: beside those of the reading.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [label for label, count in zip(reading.labels, reading.heads, strict=True) for _ in range(count)]
    columns: dict[str, object] = {
        "layer": pa.array(labels).dictionary_encode(),
        "head": pa.array([head for count in reading.heads for head in range(count)], pa.int32()),
    }
    numbers = {
        **reading.values,
        **reading.attention,
        **{f"predicted/{name}": flat for name, flat in reading.predicted.items()},
        **{
            name: flat.repeat_interleave(torch.tensor(reading.heads))
            for name, flat in reading.layer_values.items()
        },
        **(more or {}),
    }
    for name, flat in numbers.items():
        values = [None if one != one else one for one in flat.double().tolist()]
        if any(value is not None for value in values):
            columns[name] = pa.array(values, pa.float32())
    table = pa.table(columns)
    about = json.dumps({**reading.facts, **facts})
    table = table.replace_schema_metadata({"lightning_qk": about})
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd", use_dictionary=["layer"])
