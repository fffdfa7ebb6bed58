"""The whole per-head history of a run as one Parquet file, of which the loggers' scalars are aggregates."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_qk.record.atomic_write import whole_file
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.statistics import RUN_GROUPS

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

HISTORY_NAME = "lightning_qk_history.parquet"

_MOST_VALUES = 2**20
"""Values of a row group; it takes some 50 bytes of memory for each of them while it is written."""


def write_history(record: RunRecord, path: str | Path) -> Path:
    """Write what a run's monitors remember as one tidy table: a row for each value of each head.

    ============= ======= =====================================================================
    column        type    what
    ============= ======= =====================================================================
    step          int64   optimizer step, as in the loggers; −1 before the first one
    layer         string  label as in the log keys, such as ``layer_03``; null for curves of the run
    layer_index   int32   place of the layer in the model, among those of its key
    head          int32   head of the layer, from 0; null for hidden states and curves of the run
    key           string  what it is, such as ``qk/eig_var`` or ``attn/entropy``
    value         float   32 bits; a head without a value has no row
    ============= ======= =====================================================================

    Every key is a row group of its own (several where it has more than a million values), so that
    ``pandas.read_parquet(path, filters=[("key", "==", "qk/eig_var")])`` reads no others. No more than one group is
    in memory. The file appears whole or not at all.

    Args:
        record: the run. Its histories keep at most 256 steps each, evenly thinned in longer runs; the steps in
            between are added while the process that measured them lives.
        path: the file to write. Its folder is created.

    Returns:
        The path of the file.

    Raises:
        OSError: the file cannot be written there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    schema = pa.schema(
        [
            ("step", pa.int64()),
            ("layer", pa.dictionary(pa.int32(), pa.string())),
            ("layer_index", pa.int32()),
            ("head", pa.int32()),
            ("key", pa.dictionary(pa.int32(), pa.string())),
            ("value", pa.float32()),
        ]
    )
    with whole_file(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for table in _tables(record, schema):
            writer.write_table(table, row_group_size=_MOST_VALUES)
    return path


def _tables(record: RunRecord, schema: "pa.Schema") -> "Iterator[pa.Table]":
    for field, history in record.histories.items():
        for statistic in history.statistics:
            key = f"{RUN_GROUPS.get(field, field)}/{statistic}"
            for steps, values in _pieces(history, statistic):
                yield _of_heads(history, key, steps, values, field != "hidden", schema)
    for name, curve in record.scalars.items():
        yield _of_run(name, *curve, schema)


def _of_heads(
    history: History,
    key: str,
    steps: "np.ndarray",
    values: "np.ndarray",
    has_heads: bool,
    schema: "pa.Schema",
) -> "pa.Table":
    """All heads' values at some steps that are numbers, by step, layer and head."""
    import numpy as np
    import pyarrow as pa

    point, place = np.nonzero(~np.isnan(values))
    layers = np.repeat(np.arange(len(history.layers)), history.heads)[place].astype(np.int32)
    heads = np.concatenate([np.arange(count) for count in history.heads])[place].astype(np.int32)
    columns = [
        pa.array(steps[point]),
        pa.DictionaryArray.from_arrays(pa.array(layers), pa.array(history.layers, pa.string())),
        pa.array(layers),
        pa.array(heads) if has_heads else pa.nulls(len(place), pa.int32()),
        _constant(key, len(place)),
        pa.array(values[point, place]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _pieces(history: History, statistic: str) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Steps, and values of all heads at each, with what thinning took out, a bounded number at a time."""
    import numpy as np

    heads, column = sum(history.heads), history.values[statistic]
    steps, places = np.asarray(history.steps, dtype=np.int64), np.arange(len(column))
    forgotten = history.forgotten
    if forgotten is not None:
        # A place below zero is one in the file.
        earlier, there = forgotten.places(statistic, heads)
        steps, places = np.concatenate([earlier, steps]), np.concatenate([-1 - there, places])
        order = np.argsort(steps, kind="stable")
        steps, places = steps[order], places[order]
    at_once = max(1, _MOST_VALUES // heads)
    for start in range(0, len(steps), at_once):
        own = slice(start, start + at_once)
        values = np.full((len(steps[own]), heads), np.nan, dtype=np.float32)
        for row, place in zip(values, places[own].tolist(), strict=True):
            found = (
                column[place].numpy()
                if place >= 0 or forgotten is None
                else forgotten.read(-1 - place, heads)
            )
            if found is not None:
                row[:] = found
        yield steps[own], values


def history_size(record: RunRecord) -> int:
    """About how many bytes :func:`write_history` writes of a run; measured numbers hardly shrink."""
    return 4 * sum(
        len(history.statistics)
        * sum(history.heads)
        * (len(history) + (0 if history.forgotten is None else len(history.forgotten)))
        for history in record.histories.values()
    )


def _of_run(key: str, steps: list[int], values: list[float], schema: "pa.Schema") -> "pa.Table":
    import numpy as np
    import pyarrow as pa

    known = ~np.isnan(np.asarray(values, dtype=np.float32))
    count = int(known.sum())
    columns = [
        pa.array(np.asarray(steps, dtype=np.int64)[known]),
        pa.nulls(count, schema.field("layer").type),
        pa.nulls(count, pa.int32()),
        pa.nulls(count, pa.int32()),
        _constant(key, count),
        pa.array(np.asarray(values, dtype=np.float32)[known]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _constant(word: str, count: int) -> "pa.DictionaryArray":
    import numpy as np
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, dtype=np.int32)), pa.array([word]))
