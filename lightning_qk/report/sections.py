"""What the sections of the report say and show of a record, and what they miss."""

from collections.abc import Mapping
from typing import Any

from lightning_qk._version import __version__
from lightning_qk.record.history import STATE, History, RunRecord
from lightning_qk.record.predictions import agreement
from lightning_qk.record.statistics import describe
from lightning_qk.record.verdicts import HeadHealth, layer_health
from lightning_qk.report.findings import first_screen
from lightning_qk.report.payload import shown_statistics

PAPERS = (
    "Bao, Hataya, Karakida: Self-attention Networks Localize When QK-eigenspectrum Concentrates. ICML 2024",
    "Dong, Cordonnier, Loukas: Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially "
    "with Depth. ICML 2021",
    "Zhai et al.: Stabilizing Transformer Training by Preventing Attention Entropy Collapse. ICML 2023",
    "Wortsman et al.: Small-scale Proxies for Large-scale Transformer Training Instabilities. ICLR 2024",
    "Kimi Team: Kimi K2: Open Agentic Intelligence. 2025",
    "Gu et al.: When Attention Sink Emerges in Language Models: An Empirical View. ICLR 2025",
    "Sun et al.: Massive Activations in Large Language Models. 2024",
)
"""Papers that the page names."""

_COLUMNS = (
    ("eig_mean", "eigenvalue mean"),
    ("eig_var", "eigenvalue variance"),
    ("asymmetry", "asymmetry"),
    ("entropy_normalized", "normalized entropy"),
    ("sink_first", "first key"),
    ("max_abs_logit", "max |logit|"),
    ("linear_share", "linear share"),
)
_TIMES = {
    "spectrum": (
        "Query-key spectrum over time",
        "Each line is a layer: the mean of its heads, or their largest where that counts. The numbers come from "
        "the weights alone.",
    ),
    "attention": (
        "Attention over time",
        "Each line is a layer. The numbers are measured on the batches of the run.",
    ),
    "hidden": (
        "Hidden states over time",
        "Each line is a block's output, or what goes into the first block (embedding). The numbers are measured "
        "on the batches of the run.",
    ),
}
# Statistics of which the page says how well they were predicted.
_PREDICTED = ("entropy_normalized", "sink_first", "linear_share", "logit_std", "distance")
_MONITORS = {"spectrum": "QKSpectrumMonitor()", "attention": "AttentionMonitor()"}


def page_content(record: RunRecord, heads: list[HeadHealth]) -> dict[str, Any]:
    """What the template gets but for style, data and scripts.

    Args:
        record: the run.
        heads: verdicts, from :func:`~lightning_qk.record.head_health.head_health`.

    Returns:
        The template's names → values. ``missing`` has, for each section, sentences on what was not recorded and
        what to add to see it.
    """
    model = next((value for name, value in record.info.items() if name.lower() == "model"), "")
    missing: dict[str, list[str]] = {"heads": [], "theory": [], "eigenvalues": [], "times": []}
    times = _times(record, missing)
    content: dict[str, Any] = {
        "title": f"Attention report: {model}" if model else "Attention report",
        "lead": _lead(record),
        "info": {name: value for name, value in record.info.items() if name != STATE},
        **first_screen(record, heads),
        "maps": _maps(record, missing),
        "scatters": _scatters(record, missing),
        "curves": _has_curves(record, missing),
        "eigenvalues": _has_eigenvalues(record, missing),
        "times": times,
        "events": record.events,
        "scalars": [name for name, (steps, _) in record.scalars.items() if steps],
        "health": layer_health(record),
        "columns": _COLUMNS,
        "missing": missing,
        "papers": PAPERS,
        "version": __version__,
    }
    content["anchors"] = [
        ("worst", "Where to look"),
        ("heads", "Every head"),
        ("theory", "Theory and measurement"),
        ("eigenvalues", "Eigenvalues"),
        *((section["anchor"], section["title"]) for section in times),
        *([("curves", "Curves of the run")] if content["scalars"] else []),
        ("layers", "Every layer in numbers"),
        *([("events", "Alarms and remedies")] if record.events else []),
        ("run", "This run"),
    ]
    return content


def _lead(record: RunRecord) -> str:
    parts = []
    names = (("weights", record.spectrum), ("attention", record.attention), ("hidden states", record.hidden))
    for name, history in names:
        if history is not None and len(history):
            steps, heads = len(history), sum(history.heads)
            of_heads = "" if history is record.hidden else f"{heads} heads in "
            what = f"{name} of {of_heads}{len(history.layers)} layers"
            if record.points:
                named = (record.points.get(step, str(step)) for step in history.steps)
                parts.append(f"{what} in {', '.join(named)}")
            elif steps == 1:
                parts.append(f"{what} at step {history.steps[0]}")
            else:
                parts.append(f"{what}, {steps} kept steps up to {history.steps[-1]}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else "Nothing was recorded in this run."


def _maps(record: RunRecord, missing: dict[str, list[str]]) -> list[dict[str, str]]:
    titles = {
        "spectrum": "the weights",
        "attention": "attention",
        "sinks": "sinks",
        "position": "positions",
        "tokens": "the weights over the layer's own tokens",
        "pred": "predicted attention",
    }
    found = [
        {"name": name, "title": titles.get(name, name)}
        for name in record.histories
        if name != "hidden" and _is_drawn(record, name)
    ]
    for name, monitor in _MONITORS.items():
        if not _is_drawn(record, name):
            missing["heads"].append(f"No {name} statistics were recorded: {_advice(monitor)}.")
    return found


def _advice(monitor: str) -> str:
    return f"add {monitor} to the trainer's callbacks" + (
        ", or pass --text to lightning-qk inspect, to see them"
        if monitor.startswith("Attention")
        else " to see them"
    )


def _is_drawn(record: RunRecord, name: str) -> bool:
    history = record.histories.get(name)
    return history is not None and bool(history.steps) and bool(shown_statistics(name, history))


def _shared(record: RunRecord) -> bool:
    """Whether both monitors saw the same layers."""
    spectrum, attention = record.spectrum, record.attention
    return bool(spectrum and attention and set(spectrum.layers) & set(attention.layers))


def _scatters(record: RunRecord, missing: dict[str, list[str]]) -> list[dict[str, str]]:
    has = {
        name: shown_statistics(name, history, secondary=False)
        for name, history in record.histories.items()
        if history.steps
    }
    x = next((s for s in has.get("spectrum", ()) if s in ("sym_var", "eig_var")), None)
    y = next((s for s in has.get("attention", ()) if s in ("entropy_normalized", "entropy")), None)
    found = []
    if x and y and _shared(record):
        found.append(
            {
                "plot": "entropy",
                "title": "Entropy against spectral variance",
                "x": x,
                "y": y,
                "alt": f"Scatter plot of {describe(y).title} against {describe(x).title}, one point a head",
                "meaning": "Each point is a head. In the model of Bao et al. attention localizes, without its "
                "entropy collapsing, where the eigenvalues concentrate. Over the heads of a pretrained model "
                "the two are loosely related (rank correlation −0.36 in SmolLM2 and −0.51 in MiniLM with norms "
                "folded in, 0.11 in SmolLM2 without): tokens count as much as weights.",
                "worry": "over a run the cloud moves down and to the right together (entropy collapse).",
            }
        )
    else:
        missing["theory"].append(
            "Entropy against spectral variance needs both monitors on the same layers: add QKSpectrumMonitor() "
            "and AttentionMonitor() to the trainer's callbacks, or pass --text to lightning-qk inspect."
        )
    found += _predictions(record, has)
    return found


def _predictions(record: RunRecord, has: Mapping[str, list[str]]) -> list[dict[str, str]]:
    """Entropy as token moments predict it against the measured one, and how well all statistics are predicted."""
    name = "entropy_normalized"
    if name not in has.get("pred", ()) or name not in has.get("attention", ()):
        return []
    found = {own: agreement(record, own) for own in _PREDICTED}
    words = "; ".join(
        f"{describe(own, 'attn').title} {known.words}" for own, known in found.items() if known is not None
    )
    if not words:
        return []
    return [
        {
            "plot": "predicted",
            "title": "Attention, predicted by token moments and measured",
            "x": name,
            "y": name,
            "alt": "Scatter plot of measured against predicted normalized entropy, one point a head",
            "meaning": "Each point is a head. Predicted is the attention of independent Gaussian tokens with the "
            "layer's own moments of queries and keys. On the dashed diagonal the moments explain the entropy; "
            "what a head off it does follows from what tokens say to each other. Rank correlation over heads and "
            f"mean absolute error at the newest step that has both: {words}.",
            "worry": "",
        }
    ]


def _has_curves(record: RunRecord, missing: dict[str, list[str]]) -> bool:
    measured = "linear_profile" in record.snapshots and len(record.snapshots["linear_profile"]) > 0
    spectrum = record.spectrum
    predicted = bool(record.shapes) and spectrum is not None and bool(spectrum.steps)
    predicted = predicted and {"trace", "trace_sq", "frobenius_sq"} <= set(
        spectrum.values if spectrum else ()
    )
    if not predicted:
        missing["theory"].append(
            "Signal propagation of a random walk needs moments and softmax scale, which this record lacks: add "
            "QKSpectrumMonitor() to the trainer's callbacks and run again."
        )
    if not measured:
        missing["theory"].append(
            "The linear share by position was not recorded: train with AttentionMonitor() in the trainer's "
            "callbacks to see it."
        )
    return measured or predicted


def _has_eigenvalues(record: RunRecord, missing: dict[str, list[str]]) -> bool:
    kept = record.snapshots.get("eigenvalues")
    spectra = [record.eigenvalues, *(kept.values if kept is not None else ())]
    if any(bool(v.isfinite().any()) for values in spectra for v in values.values()):
        return True
    missing["eigenvalues"].append(
        "No eigenvalues were recorded: add QKSpectrumMonitor() to the trainer's callbacks, or inspect without "
        "--moments-only, to see them."
    )
    return False


def _times(record: RunRecord, missing: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Curves of the layers, of histories of more than one step."""
    sections = []
    for name, (title, text) in _TIMES.items():
        history: History | None = record.histories.get(name)
        if history is None or len(history) < 2:
            continue
        plots = []
        for statistic in shown_statistics(name, history, secondary=False):
            one = describe(statistic, name)
            alt = f"Line chart of {one.title} over steps, one line a layer"
            plots.append(
                {
                    "name": statistic,
                    "title": one.label,
                    "meaning": one.meaning,
                    "worry": one.worry,
                    "alt": alt,
                }
            )
        if plots:
            sections.append(
                {"anchor": f"time-{name}", "history": name, "title": title, "text": text, "plots": plots}
            )
    if not sections:
        missing["times"].append(
            "One step is no history: log more steps, or inspect a folder of checkpoints, to see curves over time."
        )
    return sections
