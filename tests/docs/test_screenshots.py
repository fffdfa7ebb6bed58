"""The command that makes the screenshots of README and docs, on a record that is no run's."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from simulated_run import simulated_record

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_pictures_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "screenshots", script)
    spec.loader.exec_module(script)
    if not any(map(shutil.which, script.CHROMIUM)):
        pytest.skip("needs chromium: apt-get install chromium")
    record = simulated_record()
    record.attention.values["max_abs_logit"][-1][5] = 250.0
    script.main(["--record", str(record.save(tmp_path / "r.safetensors")), "--output", str(tmp_path)])
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert sizes == {f"report-{name}": view[:2] for name, view in script.VIEWS.items()}
    pixels = {
        name: Image.open(tmp_path / f"report-{name}.png").convert("L") for name in ("light", "dark", "head")
    }
    shade = {name: image.resize((1, 1)).getpixel((0, 0)) for name, image in pixels.items()}
    assert shade["light"] > 200
    assert shade["dark"] < 60
    assert pixels["head"].tobytes() != pixels["light"].tobytes()
