"""Memory and time do not grow with what is not asked for: the benchmark, at a smaller size."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

# Layers as wide as those of 7 B.
WIDE = {"layers": 8, "width": 4096, "heads": 32, "kv_heads": 8, "mlp": 8192, "vocabulary": 128256}
LAYER = 4 * (4096 * 4096 + 1024 * 4096)
PEAKS = """
import json, pathlib, re, sys
from lightning_qk.inspect.read import read_checkpoint
from lightning_qk.inspect import Options, open_source

peaks = []
def progress(count, total):
    # Not getrusage: its maximum begins at what the process that started this one had.
    status = pathlib.Path("/proc/self/status").read_text()
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)

read_checkpoint(open_source(sys.argv[1], Options())[0], eigenvalues=False, progress=progress)
print("PEAKS", json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def inspection() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "inspection.py"
    spec = importlib.util.spec_from_file_location("inspection", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_no_more_than_a_layer_is_in_memory(inspection: ModuleType, tmp_path: Path) -> None:
    """Four times as many layers need no more, and none needs the memory of the embeddings, which are 2 GB.

    What an allocator keeps, and what of the files is mapped, differs by most of a layer from machine to machine:
    were layers kept, it would be six.
    """
    assert inspection.write_checkpoint(tmp_path, WIDE) == WIDE["layers"] * LAYER / 2
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=inspection.environment(1),
    )
    peaks = json.loads(done.stdout.rpartition("PEAKS")[2])
    assert len(peaks) == WIDE["layers"]
    assert peaks[-1] < peaks[1] + 2 * LAYER
    assert peaks[-1] < 1.5e9


@pytest.mark.slow
def test_seven_billion_parameters(inspection: ModuleType) -> None:
    """The bar: 1.5 GB, and twice the time of reading the weights and solving for their eigenvalues."""
    found = inspection.compare(inspection.SHAPES["7B"], repeats=2)
    assert found["peak"]["inspect"] < 1.5e9
    assert found["peak"]["moments"] < 1.5e9
    # Of the processor, since other programs make the clock's time longer.
    assert found["ratio_work"] < 2
