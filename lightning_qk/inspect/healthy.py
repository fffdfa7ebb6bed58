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
