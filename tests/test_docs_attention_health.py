"""The page on attention health names what there is, and says what was measured."""

import json
import re
from pathlib import Path

import lightning_qk.callbacks
from lightning_qk import functional

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "attention-health.md").read_text(encoding="utf-8")


def test_every_callback_is_on_the_page():
    callbacks = set(lightning_qk.callbacks.__all__)
    assert callbacks - {name for name in callbacks if f"`{name}" in PAGE or f"{name}(" in PAGE} == set()


def test_every_function_of_the_table_exists():
    rows = re.findall(
        r"^\| [^|]+ \| [^|]* \| ([^|]*) \| [^|]+ \|$", PAGE.split("## One table")[0], re.MULTILINE
    )
    names = [
        name for row in rows for name in re.findall(r"`([\w.]+)`", row) if not name.startswith("probes.")
    ]
    assert len(names) > 15
    assert [
        name for name in names if name != "lightning_qk.functional" and not hasattr(functional, name)
    ] == []


def test_the_guards_figures_are_those_of_its_benchmark():
    found = json.loads((ROOT / "benchmarks" / "collapse" / "results.json").read_text())["reported_on"]
    text = " ".join(PAGE.split())
    assert f"in {found['warned_before']} of {found['failing']} failing runs" in text
    assert f"a median lead of {found['median_lead']:.2f} of" in text
    assert f"{found['false_alarms']} false alarms in {found['healthy']} healthy runs" in text
    assert f"brought {found['rescued']} of the {found['failing']} within 10 %" in text


def test_what_the_guard_says_of_them_now_is_on_the_page():
    found = json.loads((ROOT / "benchmarks" / "collapse" / "results.json").read_text())["again"]
    text = " ".join(PAGE.split())
    assert f"warns of {found['warned_before']} of {found['failing']}, at a median lead of" in text
    rest = f"with {found['false_alarms']} false alarms in {found['healthy']}"
    assert f"lead of {found['median_lead']:.2f}, {rest}" in text
