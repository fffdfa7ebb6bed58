"""Options that monitors share are documented once, and still shown and checked one by one on the command line."""

import io
from contextlib import redirect_stdout

import jsonargparse
import lightning as L
import pytest

import lightning_qk
from lightning_qk import AttentionMonitor, AttentionProbes, CollapseGuard, LocAteR, QKSpectrumMonitor
from lightning_qk.callbacks.callback import arguments

SHARED = ("per_layer", "modules", "on_unreadable")
MONITORS = {
    "AttentionMonitor": (
        "per_head",
        "figures_every",
        "report",
        "seed",
        "every_n_eval_batches",
        "cached_calls",
    ),
    "AttentionProbes": ("per_head", "seed"),
    "HiddenStateMonitor": ("report", "seed", "cached_calls"),
    "PositionMonitor": (
        "per_head",
        "figures_every",
        "report",
        "seed",
        "every_n_eval_batches",
        "cached_calls",
    ),
    "QKSpectrumMonitor": ("per_head", "figures_every", "report"),
    "SinkMonitor": ("per_head", "figures_every", "report", "seed", "every_n_eval_batches", "cached_calls"),
    "TokenMonitor": ("per_head", "figures_every", "report", "seed", "every_n_eval_batches", "cached_calls"),
}


def parser():
    made = jsonargparse.ArgumentParser(exit_on_error=False)
    made.add_subclass_arguments(L.Callback, "callback")
    return made


@pytest.mark.parametrize("name", MONITORS)
def test_the_command_line_shows_all_options_with_help_and_defaults(name):
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        parser().parse_args([f"--callback.help=lightning_qk.{name}"])
    for option in (*SHARED, *MONITORS[name]):
        assert f"--callback.{option}" in shown.getvalue()
    assert "default: warn" in shown.getvalue()
    assert "watches the rest" in " ".join(shown.getvalue().split())
    got = parser().parse_args([f"--callback=lightning_qk.{name}"]).callback.init_args
    assert {*SHARED, *MONITORS[name]} <= set(vars(got))


@pytest.mark.parametrize("argument", ["per_head=perhaps", "on_unreadable=ignore", "per_heads=true"])
def test_the_command_line_checks_them(argument):
    with pytest.raises(jsonargparse.ArgumentError):
        parser().parse_args(["--callback=lightning_qk.SinkMonitor", f"--callback.{argument}"])


def test_settings_are_the_arguments():
    monitor = QKSpectrumMonitor(5, offsets=(0, 1), per_layer="eig_mean", modules=["*.0.*"])
    assert monitor.settings() == {
        "every_n_steps": 5,
        "support": "model",
        "fold_norm": False,
        "offsets": [0, 1],
        "singular": False,
        "updates": False,
        "per_layer": ["eig_mean"],
        "per_head": False,
        "families": None,
        "exclude": [],
        "figures_every": 10,
        "report": True,
        "report_every": None,
        "modules": ["*.0.*"],
        "on_unreadable": "warn",
    }
    assert AttentionProbes(["irrelevant"], irrelevant=len).settings()["irrelevant"] == "len"
    assert LocAteR(2.0).settings()["weight"] == 2.0
    assert CollapseGuard("locater").settings()["action"] == "LocAteR"


def test_an_option_that_there_is_not_is_refused():
    assert "cached_calls" in arguments(AttentionMonitor)
    for name in MONITORS:
        with pytest.raises(TypeError, match="per_heads"):
            getattr(lightning_qk, name)(per_heads=True)
