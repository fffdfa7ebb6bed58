"""The report in a real browser: it draws, it moves, it can be used from the keyboard, and it talks to nobody."""

import itertools
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_run import simulated_record
from test_report import large_record

from lightning_qk.cli.watch import serve
from lightning_qk.record.history import History, RunRecord
from lightning_qk.record.statistics import describe
from lightning_qk.report.colors import color_scale
from lightning_qk.report.report import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (extra test)")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
# A busy machine of two cores takes its time.
PATIENCE = 30_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a record's report; afterwards nothing was complained about, and nothing was asked of a network."""
    contexts, complaints, requests = [], [], []

    def open_report(record: RunRecord, **options: Any) -> Any:
        path = write_report(record, tmp_path / "report.html", live=options.pop("live", False))
        script = options.get("java_script_enabled", True)
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        if script:
            page.wait_for_selector("html[data-ready=yes]", state="attached")
        return page

    yield open_report
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []
    assert {Path(re.split("[?#]", url)[0]).name for url in requests} <= {"report.html"}
    for context in contexts:
        context.close()


def until(page: Any, condition: str) -> None:
    """Wait; the page's policy forbids what playwright's own waiting for a function does."""
    for _ in range(PATIENCE // 100):
        # A page that is being loaded again has no answer.
        with suppress(playwright.Error):
            if page.evaluate(condition):
                return
        page.wait_for_timeout(100)
    raise AssertionError(f"never: {condition}")


def bring(page: Any, selector: str) -> None:
    """Into the middle of the window, clear of the bar at its top, and drawn."""
    page.evaluate(f"document.querySelector('{selector}').scrollIntoView({{ block: 'center' }})")
    until(page, f"document.querySelector('{selector}').chart !== undefined")
    page.wait_for_timeout(200)


def cells(page: Any, name: str = "spectrum") -> list[list[float]]:
    """What a heatmap shows."""
    bring(page, f"#map-{name}")
    return page.evaluate(f"document.querySelector('#map-{name}').chart.marks[0].rows")


def box_of_cell(
    page: Any, layer: int, head: int, name: str = "spectrum", selector: str = ""
) -> tuple[float, float]:
    """Where a cell's centre is in the window."""
    return page.evaluate(
        """([selector, layer, head]) => {
            const plot = document.querySelector(selector);
            const box = plot.chart.svg.getBoundingClientRect(), { x, y } = plot.chart.axes;
            return [box.left + x.at(head), box.top + y.at(layer)];
        }""",
        [selector or f"#map-{name}", layer, head],
    )


def test_the_slider_moves_and_plays(opened: Any) -> None:
    page = opened(simulated_record(points=6))
    last = cells(page)
    assert page.locator("#step-name").inner_text() == "step 50 (6 of 6)"
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#step-name").inner_text() == "step 40 (5 of 6)"
    before = cells(page)
    assert before != last
    page.keyboard.press("Home")
    first = cells(page)
    record = simulated_record(points=6)
    assert first[1][2] == pytest.approx(float(record.spectrum.grid("sym_var", 0)[1, 2]), rel=1e-3)
    page.get_by_role("button", name="Play").click()
    until(page, "document.querySelector('#step').value === '5'")
    until(page, "document.querySelector('#play').textContent.includes('Play')")
    assert cells(page) == last


def test_a_click_opens_a_head_and_escape_closes_it(opened: Any) -> None:
    page = opened(simulated_record())
    cells(page)
    page.mouse.click(*box_of_cell(page, 1, 2))
    page.wait_for_selector("#panel:not([hidden])")
    assert page.locator("#panel-title").inner_text() == "layer_01, head 2"
    charts = page.locator("#panel .chart .chart-svg")
    assert charts.count() >= 10
    widths = [box["width"] for box in (charts.nth(i).bounding_box() for i in range(3))]
    assert max(widths) < 320  # two beside each other
    shown = page.evaluate("document.querySelector('#panel .chart').chart.marks.at(-1).y")
    want = simulated_record().spectrum.series("sym_var")[:, 6].tolist()
    assert shown == pytest.approx(want, rel=1e-3)
    page.get_by_role("button", name="Next head").click()
    assert page.locator("#panel-title").inner_text() == "layer_01, head 3"
    page.get_by_role("button", name="Next head").click()
    assert page.locator("#panel-title").inner_text() == "layer_02, head 0"
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()


def test_a_point_and_a_row_open_a_head(opened: Any) -> None:
    record = simulated_record()
    record.attention.values["max_abs_logit"][-1][5] = 250.0
    page = opened(record)
    row = page.locator("tr[data-head]").first
    assert "layer_01, head 1" in row.inner_text()
    assert "above 100, where Kimi K2 clips" in row.inner_text()
    row.locator(".why").click()
    page.wait_for_selector("#panel:not([hidden])")
    assert page.locator("#panel-title").inner_text() == "layer_01, head 1"
    assert "250" in page.locator("#panel-verdict").inner_text()
    page.keyboard.press("Escape")
    bring(page, "#entropy")
    x, y, head = page.evaluate(
        """() => {
            const { svg, axes, marks } = document.querySelector("#entropy").chart;
            const box = svg.getBoundingClientRect(), points = marks[0], { layer, index } = points.heads[7];
            return [
                box.left + axes.x.at(points.x[7]), box.top + axes.y.at(points.y[7]), `${layer}, head ${index}`,
            ];
        }"""
    )
    page.mouse.click(x, y)
    page.wait_for_selector("#panel:not([hidden])")
    assert page.locator("#panel-title").inner_text() == head


def test_the_keyboard_is_enough(opened: Any) -> None:
    record = simulated_record()
    record.attention.values["max_abs_logit"][-1][5] = 250.0
    page = opened(record)
    cells(page)
    page.locator("#map-spectrum").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert page.locator("#spoken").inner_text().startswith("layer_01, head 1: ")
    page.keyboard.press("Enter")
    assert page.locator("#panel-title").inner_text() == "layer_01, head 1"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "map-spectrum"
    page.locator("tr[data-head] button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#panel").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()


def test_every_figure_draws(opened: Any) -> None:
    page = opened(simulated_record())
    plots = page.locator("[data-plot]")
    for index in range(plots.count()):
        plots.nth(index).scroll_into_view_if_needed()
        plots.nth(index).locator(".chart-svg").wait_for()
    assert page.locator('[data-plot][aria-busy="true"]').count() == 0
    # The circle's radius, and the two curves over positions.
    assert page.evaluate("Math.max(...document.querySelector('#plane').chart.marks[2].x)") > 0
    names = page.evaluate(
        "document.querySelector('#propagation').chart.marks.map((one) => one.name).filter(Boolean)"
    )
    assert names == ["random walk, step 40", "measured, step 40"]


@pytest.mark.parametrize("width", [390, 1280])
def test_axes_say_what_they_are(opened: Any, width: int) -> None:
    """Titles stay in their drawing and say no word twice; steps are whole numbers, and no share passes 1."""
    record = simulated_record()
    record.spectrum.steps = [step // 10 for step in record.spectrum.steps]
    record.scalars = {"attn/health": ([0, 1, 2], [1.0, 1.0, 1.0]), "train/loss": ([0, 2], [3.0, 2.0])}
    predicted = History(record.attention.layers, record.attention.heads)
    measured = record.attention.values["entropy_normalized"][-1]
    predicted.append(record.attention.steps[-1], {"entropy_normalized": measured.square()})
    record.histories = {**record.histories, "pred": predicted}
    page = opened(record)
    page.set_viewport_size({"width": width, "height": 900})
    plots = page.locator("[data-plot]")
    for index in range(plots.count()):
        plots.nth(index).scroll_into_view_if_needed()
        plots.nth(index).locator(".chart-svg").wait_for()
    titles = page.evaluate(
        """[...document.querySelectorAll(".chart-svg .title")].map((one) => {
            const [own, all] = [one, one.closest("svg")].map((each) => each.getBoundingClientRect());
            const inside = own.left >= all.left - 1 && own.right <= all.right + 1;
            return [(one.querySelector("title") || one).textContent, inside];
        })"""
    )
    assert len(titles) > 10
    assert all(inside for _, inside in titles), titles
    assert not [words for words, _ in titles if re.search(r"\b(\w+) \1\b", words)]
    axes = page.evaluate(
        """[...document.querySelectorAll("[data-plot]")].filter((one) => one.chart).map((one) =>
            ({ x: one.chart.axes.x, y: one.chart.axes.y }))"""
    )
    steps = [tick["text"] for one in axes if one["x"]["title"] == "step" for tick in one["x"]["ticks"]]
    assert len(steps) > 4
    assert all(re.fullmatch("[0-9]+", text) for text in steps)
    (health,) = [one["y"] for one in axes if one["y"]["title"] == "health"]
    assert health["range"][1] < 1.1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened: Any, scheme: str) -> None:
    page = opened(simulated_record(), color_scheme=scheme)
    cells(page)

    def ground() -> int:
        return page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")

    def ink() -> int:
        color = "getComputedStyle(document.querySelector('#map-spectrum .xtick')).fill"
        return page.evaluate(f"parseInt({color}.match(/\\d+/)[0])")

    assert (ground() > 200) == (scheme == "light")
    assert (ink() < 100) == (scheme == "light")
    page.locator("#theme").click()
    assert (ground() > 200) == (scheme == "dark")
    assert (ink() < 100) == (scheme == "dark")


def test_on_paper_the_page_is_light(opened: Any) -> None:
    page = opened(simulated_record(), color_scheme="dark")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator('[data-plot][aria-busy="true"]').count() == 0  # those below the window too
    ink = "parseInt(getComputedStyle(document.querySelector('#map-spectrum .xtick')).fill.match(/[0-9]+/)[0])"
    assert page.evaluate(ink) < 100
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.documentElement.dataset.theme") is None
    cells(page)
    assert page.evaluate(ink) > 150


def test_a_narrow_window(opened: Any) -> None:
    page = opened(simulated_record())
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    bring(page, "#map-spectrum")
    page.mouse.click(*box_of_cell(page, 0, 1))
    page.wait_for_selector("#panel:not([hidden])")
    assert page.locator("#panel").bounding_box()["width"] <= 390


def test_numbers_in_cells_stay_apart(opened: Any) -> None:
    """A report of one step whose numbers are tiny."""
    record = simulated_record(heads=12, points=1)
    record.spectrum.values["sym_var"][0] *= 1e-7
    record.attention = None
    page = opened(record)
    assert page.locator("#stepbar").is_hidden()
    cells(page)
    boxes = page.evaluate(
        """() => Array.from(document.querySelectorAll("#map-spectrum .heatmap-label text"), (one) => {
            const box = one.getBoundingClientRect();
            return [Math.round(box.top), box.left, box.right];
        })"""
    )
    boxes.sort()
    assert len(boxes) == 36
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(boxes))
    assert "in units of 10⁻" in page.locator("#note-spectrum").inner_text()


def test_without_script_the_tables_remain(opened: Any) -> None:
    record = simulated_record()
    record.attention.values["max_abs_logit"][-1][5] = 250.0
    page = opened(record, java_script_enabled=False)
    assert page.get_by_text("The tables are complete").is_visible()
    assert page.locator("#layers tbody tr").count() == 3
    assert page.locator("tr[data-head]").first.is_visible()
    assert page.locator("#stepbar").is_hidden()


def test_a_browser_that_cannot_inflate_is_told(opened: Any, browser: Any, tmp_path: Path) -> None:
    path = write_report(simulated_record(), tmp_path / "old.html")
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(path.as_uri())
    assert "need a browser that can inflate" in page.locator("#loading").inner_text()
    page.close()


def test_a_large_model(opened: Any) -> None:
    page = opened(large_record(60))
    last = cells(page)
    assert (len(last), len(last[0])) == (32, 32)
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert cells(page) != last
    page.mouse.click(*box_of_cell(page, 31, 31))
    page.wait_for_selector("#panel:not([hidden])")
    assert page.locator("#panel-title").inner_text() == "layer_31, head 31"


def test_models_side_by_side(opened: Any) -> None:
    record = simulated_record(points=2)
    record.attention, record.snapshots = None, {}
    record.points = {0: "base", 10: "tuned"}
    page = opened(record)
    assert page.locator("#step-name").inner_text() == "tuned (2 of 2)"
    last = cells(page)
    page.locator("#change").check()
    assert cells(page) != last
    assert page.locator("#when-spectrum").inner_text() == "tuned minus base"


def test_an_address_opens_a_head(opened: Any) -> None:
    page = opened(simulated_record())
    page.evaluate("location.hash = '#head=layer_02/1'")
    page.reload()
    page.wait_for_selector("html[data-ready=yes]", state="attached")
    assert page.locator("#panel-title").inner_text() == "layer_02, head 1"


def kinds_of_records() -> dict[str, RunRecord]:
    """Records that hold one thing alone, and one with every monitor."""
    whole = simulated_record()
    for name, statistic in (("sinks", "sink_output"), ("position", "positional_share")):
        history = History(["layer_00", "layer_01"], [4, 2])
        history.append(0, {statistic: torch.rand(6)})
        setattr(whole, name, history)
    whole.hidden = History(["embedding", "layer_00"], [1, 1])
    for step in (0, 10):
        whole.hidden.append(step, {"cosine": torch.rand(2), "effective_rank": 5 * torch.rand(2)})
    alone = {
        name: RunRecord(**{name: getattr(whole, name)})
        for name in ("attention", "hidden", "scalars", "sinks")
    }
    weights = RunRecord(eigenvalues=whole.eigenvalues, eigenvalues_step=3)
    return {"whole": whole, **alone, "eigenvalues": weights}


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("attention", "scalars", "sinks")]


@pytest.mark.parametrize("kind", ["whole", "hidden", "eigenvalues", *SLOW])
def test_whatever_was_recorded_draws(opened: Any, kind: str) -> None:
    page = opened(kinds_of_records()[kind])
    plots = page.locator("[data-plot]")
    assert plots.count() > 0
    for index in range(plots.count()):
        plots.nth(index).scroll_into_view_if_needed()
        plots.nth(index).locator(".chart-svg").wait_for()
    if kind == "whole":
        page.evaluate("window.lightningQK.open({ layer: 'layer_01', index: 1 })")
        titles = page.locator("#panel h4").all_inner_texts()
        assert "output in the span of the sinks' values" in titles
        assert "logits explained by distance" in titles


def alarmed(points: int = 5) -> RunRecord:
    """A run with a loss, two alarms and a head at fault."""
    record = simulated_record(points=points)
    record.attention.values["max_abs_logit"][-1][5] = 250.0
    steps = record.spectrum.steps
    record.scalars = {"train/loss": (steps, [3.0 - 0.1 * i for i in range(len(steps))]), **record.scalars}
    record.events = [
        (10, "CollapseGuard: the largest logit of head 2 of layer_01 has gone from 1 to 40 in 7 readings"),
        (20, "CollapseGuard: the loss has risen"),
    ]
    record.info["State"] = f"running at step {steps[-1]}"
    return record


def test_the_first_screen_is_the_answer(opened: Any) -> None:
    page = opened(alarmed())
    assert page.locator("#state").inner_text() == "Running at step 40"
    assert (
        page.locator(".headline").inner_text()
        == "1 of 12 heads is at fault now, and the guard gave 2 alarms."
    )
    until(page, "document.querySelector('#loss').chart && document.querySelector('#verdicts').chart")
    # All of it lies in the first window.
    for name in (".headline", ".finding .do", "#loss", "#verdicts"):
        box = page.locator(name).first.bounding_box()
        assert box["y"] + box["height"] < 900, name
    marks = page.evaluate("document.querySelector('#loss').chart.marks.map(({ x, y }) => [x, y])")
    assert marks[1] == [[10, 20], pytest.approx([2.9, 2.8], rel=1e-3)]
    assert "layer_01, head 2" in page.locator(".finding", has_text="by the guard").inner_text()
    # A cell of the picture of all heads opens the head.
    until(page, "document.querySelector('#verdicts').chart !== undefined")
    page.mouse.click(*box_of_cell(page, 1, 1, "verdicts", "#verdicts"))
    page.wait_for_selector("#panel:not([hidden])")
    assert page.locator("#panel-title").inner_text() == "layer_01, head 1"


def test_like_heads_are_one_row_that_opens(opened: Any) -> None:
    record = simulated_record(layers=12, heads=3)
    record.attention.values["sink_first"][-1][:] = 0.95
    page = opened(record)
    found = page.locator(".finding")
    assert found.count() == 1
    assert "sink" in found.inner_text()
    assert "all 36 heads" in found.inner_text()
    assert not page.locator("tr[data-head]").first.is_visible()
    found.locator("summary").click()
    rows = found.locator("tr[data-head]")
    assert rows.count() == 36
    rows.nth(35).locator("button").click()
    assert page.locator("#panel").is_visible()


def test_colours_for_one_step_are_found_as_for_all(opened: Any) -> None:
    """The page's own limits are those of color_scale."""
    record = simulated_record(layers=4, heads=8, points=3)
    for values in record.attention.values["max_abs_logit"]:
        values[7] = 60.0
    page = opened(record)
    for name, statistic in (
        ("attention", "max_abs_logit"),
        ("spectrum", "eig_mean"),
        ("spectrum", "sym_var"),
    ):
        history = getattr(record, name)
        want = color_scale(history.series(statistic), describe(statistic, name))
        found = page.evaluate(
            """([name, statistic]) => {
                const one = window.lightningQK.histories[name].statistics.get(statistic);
                const steps = one.history.steps.map((_, i) => one.history.allValues(one, i));
                return [one.scale, one.limits, Scale.limits(steps, one.scale)];
            }""",
            [name, statistic],
        )
        assert found[0] == want.kind
        assert found[1] == pytest.approx([want.low, want.high])
        assert found[2] == pytest.approx([want.low, want.high], rel=2e-3)
    page.select_option("#pick-attention", "max_abs_logit")
    cells(page, "attention")
    assert page.locator("#map-attention .beyond").count() == 1
    assert "One head lies beyond" in page.locator("#note-attention").inner_text()


def test_what_is_under_the_pointer_is_said(opened: Any) -> None:
    evil = "<img src=x onerror=alert(1)>"
    record = simulated_record(layers=2)
    for history in (record.spectrum, record.attention):
        history.layers = (evil, "b")
    record.eigenvalues, record.shapes, record.snapshots = {}, {}, {}
    page = opened(record)
    cells(page)
    page.mouse.move(*box_of_cell(page, 0, 2))
    assert page.locator("#map-spectrum .tip").inner_text().startswith(f"{evil}, head 2")
    assert page.locator("img").count() == 0
    assert page.evaluate("document.querySelector('#map-spectrum .ytick title').textContent") == evil


def test_a_page_that_is_open_follows_the_run(opened: Any, tmp_path: Path) -> None:
    """From a file, without network: a newer version is loaded where the older one was."""
    page = opened(alarmed(5), live=True)
    assert "written" in page.locator("#state").inner_text()
    page.evaluate("window.lightningQK.follower.look()")
    page.wait_for_timeout(500)  # the same version: nothing happens
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    page.select_option("#pick-attention", "max_abs_logit")
    page.evaluate("window.lightningQK.open({ layer: 'layer_01', index: 2 })")
    page.evaluate("window.scrollTo(0, 900)")
    page.wait_for_timeout(300)
    place = page.evaluate("scrollY")
    assert page.locator("#step-name").inner_text() == "step 30 (4 of 5)"
    write_report(alarmed(8), tmp_path / "report.html")
    page.evaluate("window.lightningQK.follower.look()")
    until(page, "document.documentElement.dataset.ready === 'yes' && window.lightningQK.steps.length === 8")
    assert page.locator("#step-name").inner_text() == "step 30 (4 of 8)"
    assert page.locator("#panel-title").inner_text() == "layer_01, head 2"
    assert page.evaluate("document.querySelector('#pick-attention').value") == "max_abs_logit"
    assert page.evaluate("scrollY") == pytest.approx(place, abs=2)
    # The last one looks for nothing.
    assert page.evaluate("window.lightningQK.follower.timer") is None


def test_who_looks_at_the_newest_step_gets_the_newest(opened: Any, tmp_path: Path) -> None:
    page = opened(alarmed(5), live=True)
    write_report(alarmed(6), tmp_path / "report.html", live=True)
    page.evaluate("window.lightningQK.follower.look()")
    until(page, "document.documentElement.dataset.ready === 'yes' && window.lightningQK.steps.length === 6")
    assert page.locator("#step-name").inner_text() == "step 50 (6 of 6)"


def test_the_served_page_follows_too(browser: Any, tmp_path: Path) -> None:
    path = write_report(alarmed(5), tmp_path / "lightning_qk_report.html", live=True)
    server = serve(tmp_path, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    complaints: list[str] = []
    page = browser.new_page()
    try:
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        write_report(alarmed(6), path)
        until(
            page, "document.documentElement.dataset.ready === 'yes' && window.lightningQK.steps.length === 6"
        )
        assert [text for text in complaints if "favicon" not in text] == []
    finally:
        page.close()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
def test_the_first_paint_of_a_large_model(browser: Any, tmp_path: Path) -> None:
    """The best of three, so that other work of the machine counts little."""
    path = write_report(large_record(60), tmp_path / "report.html")
    assert path.stat().st_size < 3_000_000
    found = []
    for _ in range(3):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]", state="attached")
        until(page, "performance.getEntriesByName('first-contentful-paint').length")
        found.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        page.close()
    print(f"first paint after {min(found):.0f} ms, {path.stat().st_size / 1e6:.2f} MB")
    assert min(found) < 1000
