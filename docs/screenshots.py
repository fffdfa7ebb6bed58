"""The report as people see it: the screenshots of README and docs, of a real run.

    python docs/screenshots.py [--record RUN/lightning_qk_record.safetensors] [--output docs/images]

Without a record the sick run of ``docs/healthy_and_sick.py`` is trained, with CollapseGuard beside the monitors;
that takes a minute. Needs Chromium and the package playwright (extra ``test``). Writes report-light.png,
report-dark.png and report-head.png, 1280 pixels wide, and report-phone.png, 390 wide.
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

from lightning_qk import AttentionMonitor, CollapseGuard, QKSpectrumMonitor
from lightning_qk.record.history import RunRecord
from lightning_qk.report import write_report

sys.path.insert(0, str(Path(__file__).parent))
from healthy_and_sick import EVERY, fit

VIEWS = {
    "light": (1280, 900, "light", False),
    "dark": (1280, 900, "dark", False),
    "head": (1280, 900, "light", True),
    "phone": (390, 844, "light", False),
}
"""Name → width and height in pixels, colours, and whether the worst head is open."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def train(folder: Path, cache: str | None = None) -> Path:
    """The sick run, with its record.

    Args:
        folder: of the run.
        cache: folder for the prepared text; None is the usual one.
    """
    monitors = [AttentionMonitor(EVERY), QKSpectrumMonitor(EVERY), CollapseGuard(every_n_steps=EVERY)]
    fit("sick", monitors, folder, cache=cache)
    return folder / "lightning_qk_record.safetensors"


def shoot(page: Path, output: Path) -> list[Path]:
    """Pictures of a page.

    Args:
        page: a report.
        output: folder for the pictures.

    Raises:
        FileNotFoundError: there is no Chromium.
        RuntimeError: the page said something on the console.
    """
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        raise FileNotFoundError(f"expected one of {', '.join(CHROMIUM)} on the path, got none: install it")
    output.mkdir(parents=True, exist_ok=True)
    said: list[str] = []
    written = []
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        for name, (width, height, colors, is_open) in VIEWS.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colors)
            window = context.new_page()
            window.on("console", lambda message: said.append(message.text))
            window.on("pageerror", lambda error: said.append(str(error)))
            window.goto(page.resolve().as_uri())
            window.wait_for_selector("html[data-ready=yes]", state="attached")
            if is_open:
                worst = window.locator("tr[data-head]").first.get_attribute("data-head")
                window.evaluate("(head) => window.lightningQK.open(Page.headOf(head))", worst)
            window.wait_for_timeout(500)  # until what is near the window is drawn
            written.append(output / f"report-{name}.png")
            _keep(window.screenshot(), written[-1])
            context.close()
        browser.close()
    if said:
        raise RuntimeError(f"expected a page that says nothing on the console, got {said}")
    return written


def _keep(png: bytes, path: Path) -> None:
    """A picture of few colours in a third of the bytes."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)


def main(arguments: list[str] | None = None) -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, help="of another run, which has gone by")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = RunRecord.load(options.record or train(Path(folder)))
        for path in shoot(write_report(record, Path(folder) / "report.html"), options.output):
            print(path)


if __name__ == "__main__":
    main()
