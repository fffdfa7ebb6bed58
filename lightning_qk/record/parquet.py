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

    Every key is a row group of its own (several where it has more than 4 million values), so that
    ``pandas.read_parquet(path, filters=[("key", "==", "qk/eig_var")])`` reads no others. The file appears whole or
    not at all.

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
            writer.write_table(table, row_group_size=2**22)
    return path


def _tables(record: RunRecord, schema: "pa.Schema") -> "Iterator[pa.Table]":
    for field, history in record.histories.items():
        for statistic in history.statistics:
            yield _of_heads(
                history, statistic, f"{RUN_GROUPS.get(field, field)}/{statistic}", field != "hidden", schema
            )
    for key, (steps, values) in record.scalars.items():
        yield _of_run(key, steps, values, schema)


def _of_heads(history: History, statistic: str, key: str, has_heads: bool, schema: "pa.Schema") -> "pa.Table":
    """All heads' values of one statistic that are numbers, by step, layer and head."""
    import numpy as np
    import pyarrow as pa

    steps, values = _whole_series(history, statistic)
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


def _whole_series(history: History, statistic: str) -> "tuple[np.ndarray, np.ndarray]":
    """Steps, and values of all heads at each, with what thinning took out."""
    import numpy as np

    steps, values = np.asarray(history.steps, dtype=np.int64), history.series(statistic).numpy()
    if history.forgotten is None:
        return steps, values
    earlier, taken_out = history.forgotten.series(statistic, values.shape[1])
    steps = np.concatenate([np.asarray(earlier, dtype=np.int64), steps])
    order = np.argsort(steps, kind="stable")
    return steps[order], np.concatenate([taken_out.numpy(), values])[order]


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
