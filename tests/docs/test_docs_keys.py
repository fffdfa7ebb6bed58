"""Keys that README and docs tell people to look at are logged by default, or the page names what logs them."""

import re
from pathlib import Path
from typing import Any

import models
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from pages import ROOT

from lightning_qk import (
    AttentionMonitor,
    AttentionProbes,
    CollapseGuard,
    HiddenStateMonitor,
    LocAteR,
    PositionMonitor,
    QKClip,
    QKSpectrumMonitor,
    SinkMonitor,
    TokenMonitor,
    UpdateCap,
)

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "how-to").glob("*.md"))
_KEY = re.compile(
    r"(?<![\w/*-])(?:attn|qk|pred|hidden|probe|guard|locater|clip|update_cap|train)/(?:[\w/…]|<\w+>)+"
)
# A table below such a title has the rest of keys in its first column.
_TITLE = re.compile(r"^#+ .*?`(?P<group>[a-z/]+/)…`", re.MULTILINE)
# Keys that are logged when asked for, and what a page has to name with them.
_OPTIONS = {
    r"^qk/effective_rank_energy|^attn/sink_heads": "inspect",
    r"^qk/(energy_|effective_rank|logit_bound)": "singular=True",
    r"^qk/update_": "updates=True",
    r"/offset_\d": "offsets",
    r"/head_\d": "per_head=True",
    r"^probe/": "AttentionProbes",
    r"^update_cap/": "UpdateCap",
    # Of files, not of runs.
    r"^qk/(logit_|symmetry|directionality|positivity|circle_ratio|stable_rank|participation_rank)": "inspect",
    # Of models that have some.
    r"^attn/sink_learnt": "learnt sinks",
    r"^qk/singular_max": "cross-attention",
    # For loggers that take pictures: tests/loggers/test_wandb_runs.py has them.
    r"/heatmap/|/eigenvalues/": "histograms|heatmap",
}
_NOT_A_RUN = ("inspect", "learnt sinks", "cross-attention", "histograms|heatmap")


class Keys(DummyLogger):
    """Remembers what it is asked to log."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def log_metrics(self, metrics: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.seen |= set(metrics)


def logged(callbacks: list[Callback], folder: Path) -> set[str]:
    """Keys that a run with these callbacks logs in training, validation and test."""
    logger = Keys()
    trainer = models.trainer(callbacks, max_steps=2, logger=logger, default_root_dir=folder)
    job = models.Job(models.llama())
    job.test_step = job.validation_step  # type: ignore[method-assign]
    trainer.fit(job, models.tokens(8), models.tokens(4))
    trainer.test(job, models.tokens(4), verbose=False)
    return logger.seen


@pytest.fixture(scope="module")
def default_keys(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Those of every monitor, the guard, LocAteR and QKClip, each without options."""
    monitors = [
        QKSpectrumMonitor(),
        AttentionMonitor(),
        SinkMonitor(),
        PositionMonitor(),
        HiddenStateMonitor(),
    ]
    others = [TokenMonitor(), CollapseGuard(), LocAteR(0.05), QKClip()]
    return logged([*monitors, *others], tmp_path_factory.mktemp("default"))


@pytest.fixture(scope="module")
def more_keys(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Those of the options that pages name."""
    callbacks = [
        QKSpectrumMonitor(singular=True, updates=True, offsets=(16,), per_layer=True),
        AttentionMonitor(per_layer=True, per_head=True),
        TokenMonitor(offsets=(16,)),
        AttentionProbes((*AttentionProbes().probes, "irrelevant"), irrelevant=list(range(10))),
        UpdateCap(0.5),
    ]
    return logged(callbacks, tmp_path_factory.mktemp("more"))


def keys_of(page: str) -> set[str]:
    """Keys that a page names, whole or as a table of their ends."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = {key.rstrip("./") for key in _KEY.findall(text)}
    for title in _TITLE.finditer(text):
        section = re.split(r"^#{1,2} ", text[title.end() :], maxsplit=1, flags=re.MULTILINE)[0]
        for cell in re.findall(r"^\| ([^|]*`[^|]*) \|", section, re.MULTILINE):
            names = re.findall(r"`([\w/…<>]+)`", cell)
            found |= {name if "/" in name else f"{title['group']}{name}" for name in names if name != "…"}
    # Such as `…_sigma_1`, which goes on from the name before it.
    return {key for key in found if "/…_" not in key}


def pattern(key: str) -> str:
    """What a key has to look like that is meant by one on a page."""
    group, _, rest = key.partition("/")
    text = re.escape(rest).replace("…", ".*").replace("<statistic>", r"\w+")
    text = re.sub(r"layer_\d+", r"layer_\\d+", re.sub(r"head_\d+", r"head_\\d+", text))
    return rf"{group}/(layer_\d+/)?(embedding/)?{text}(/(mean|min|max))?"


@pytest.mark.parametrize("page", PAGES)
def test_keys_are_logged_or_the_page_says_how(page: str, default_keys: set[str], more_keys: set[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    wrong = []
    for key in sorted(keys_of(page)):
        wanted = re.compile(pattern(key))
        if any(wanted.fullmatch(one) for one in default_keys):
            continue
        named = next((words for found, words in _OPTIONS.items() if re.search(found, key)), None)
        if named is None or not re.search(named, text):
            wrong.append(f"{key}: {named or 'logged by nothing'}")
        elif named not in _NOT_A_RUN and not any(wanted.fullmatch(one) for one in more_keys):
            wrong.append(f"{key}: {named} does not log it")
    assert not wrong


def test_a_key_that_is_not_logged_is_found(default_keys: set[str]) -> None:
    assert {"qk/sym_var", "attn/max_abs_logit", "hidden/cosine_abs", "qk/tokens/eig_mean"} <= keys_of(
        "docs/numbers.md"
    )
    assert "locater/penalty" in keys_of("docs/how-to/finetune-with-locater.md")
    for key in ("qk/sym_variance", "attn/layer_03/entropie", "attn/entropy/median"):
        assert not any(re.fullmatch(pattern(key), one) for one in default_keys)
