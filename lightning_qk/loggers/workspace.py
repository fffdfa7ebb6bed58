"""A W&B workspace for runs with these callbacks: which charts, in which order."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_qk.loggers.loggers import WANDB_STEP
from lightning_qk.record.statistics import describe, of_key

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "Attention health"
"""How the workspace is called where no other name is given."""


@dataclass(frozen=True)
class Chart:
    """One panel.

    Attributes:
        title: what stands above it.
        keys: the log keys that it draws as lines over the step, or the images that it shows.
        regex: draws every key that matches this, in place of ``keys``.
        log: whether the values lie on a logarithmic axis.
        images: whether the keys are images.
    """

    title: str
    keys: tuple[str, ...] = ()
    regex: str | None = None
    log: bool = False
    images: bool = False


@dataclass(frozen=True)
class Group:
    """A section of the workspace.

    Attributes:
        title: its name.
        charts: its panels, in order.
        is_open: whether it is unfolded at first.
    """

    title: str
    charts: tuple[Chart, ...]
    is_open: bool = False


def _chart(title: str, *keys: str) -> Chart:
    one = of_key(keys[0])
    return Chart(title, keys, log=one is not None and one.log, images="/heatmap/" in keys[0])


def _layers(title: str, group: str, statistic: str) -> Chart:
    regex = f"^{group}/[^/]*(layer|embedding)[^/]*/{statistic}$"
    return Chart(title, regex=regex, log=describe(statistic, group).log)


def _over_heads(prefix: str, *reductions: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{reduction}" for reduction in reductions)


def _predicted(title: str, statistic: str) -> Chart:
    return _chart(title, f"pred/{statistic}/mean", f"attn/{statistic}/mean")


GROUPS: tuple[Group, ...] = (
    Group(
        "1 Health",
        (
            _chart("Share of heads that are not flagged (1: all is well)", "attn/health"),
            _chart("Collapse score (alarm from 1)", "guard/score"),
            _chart(
                "Scores of the detectors",
                *(f"guard/{name}" for name in ("loss", "logits", "entropy", "rank", "spectrum")),
            ),
            _chart("Largest logit (100: where Kimi K2 clips)", "attn/max_logit/max", "clip/max_logit/max"),
            _chart(
                "Normalized entropy: least, mean, most",
                *_over_heads("attn/entropy_normalized", "min", "mean", "max"),
            ),
            _chart(
                "Residual of rank: towards 0 is rank collapse",
                *_over_heads("hidden/rank_residual_relative", "min", "mean"),
            ),
            _chart("Spectral radius of W_QK", *_over_heads("qk/spectral_radius", "mean", "max")),
        ),
        is_open=True,
    ),
    Group(
        "2 Every head",
        (
            _chart("Normalized entropy", "attn/heatmap/entropy_normalized"),
            _chart("Mean distance", "attn/heatmap/distance"),
            _chart("Attention to the first token", "attn/heatmap/sink_first"),
            _chart("Spectral variance (symmetric part)", "qk/heatmap/sym_var"),
            _chart("Mean eigenvalue", "qk/heatmap/eig_mean"),
            _chart("Asymmetry", "qk/heatmap/asymmetry"),
        ),
        is_open=True,
    ),
    Group(
        "3 Layers",
        (
            _layers("Entropy", "attn", "entropy"),
            _layers("Largest logit", "attn", "max_logit"),
            _layers("Spectral variance", "qk", "eig_var"),
            _layers("Residual of rank", "hidden", "rank_residual_relative"),
        ),
        is_open=True,
    ),
    Group(
        "4 Where attention goes",
        (
            _chart(
                "Entropy, training and validation",
                "attn/entropy_normalized/mean",
                "attn/val/entropy_normalized/mean",
            ),
            _chart("Mean distance", "attn/distance/mean", "attn/val/distance/mean"),
            _chart("Largest probability", "attn/max_prob/mean", "attn/val/max_prob/mean"),
            _chart("Share of pairs that pass signal", *_over_heads("attn/linear_share", "min", "mean")),
            _chart("Positional share", *_over_heads("attn/positional_share", "min", "mean", "max")),
            _chart("Norms of queries and keys", "attn/query_norm/mean", "attn/key_norm/mean"),
        ),
    ),
    Group(
        "5 Spectrum of W_QK",
        (
            _chart("Mean eigenvalue", *_over_heads("qk/eig_mean", "min", "mean", "max")),
            _chart("Spectral variance", *_over_heads("qk/eig_var", "min", "mean", "max")),
            _chart("Variance of the symmetric part", *_over_heads("qk/sym_var", "mean", "max")),
            _chart("Asymmetry of W_QK", *_over_heads("qk/asymmetry", "mean")),
            _chart("Asymmetry", "qk/asymmetry/mean"),
            _chart("Modulus of the eigenvalues", "qk/eigenvalues/modulus"),
        ),
    ),
    Group(
        "6 Sinks",
        (
            _chart("Attention to the first token", *_over_heads("attn/sink_first", "mean", "max")),
            _chart("Share of heads with a sink", "attn/sink_rate/mean"),
            _chart("What sinks write", *_over_heads("attn/sink_output", "mean", "max")),
            _chart("Waived attention", *_over_heads("attn/waiver_mass", "mean", "max")),
            _chart("What sinks write, every head", "attn/heatmap/sink_output"),
            _chart("Waived attention, every head", "attn/heatmap/waiver_mass"),
        ),
    ),
    Group(
        "7 Hidden states",
        (
            _chart("Effective rank", *_over_heads("hidden/effective_rank", "min", "mean")),
            _chart("Cosine of two tokens", *_over_heads("hidden/cosine_abs", "mean", "max")),
            _chart("Largest activation", *_over_heads("hidden/activation_max", "mean", "max")),
            _chart("Massive activations", *_over_heads("hidden/massive_count", "mean", "max")),
        ),
    ),
    Group(
        "8 Interventions",
        (
            _chart("LocAteR's penalty", "locater/penalty"),
            _chart("LocAteR's weight", "locater/weight"),
            _chart("Smallest factor of QK-Clip", "clip/gamma/min"),
            _chart("Clipped heads", "clip/clipped_heads"),
        ),
    ),
    Group(
        "9 Over the layer's own tokens",
        (
            _chart("Mean eigenvalue, in logits", *_over_heads("qk/tokens/eig_mean", "min", "mean", "max")),
            _chart(
                "Variance of logits between tokens", *_over_heads("qk/tokens/frobenius_sq", "mean", "max")
            ),
            _chart("Variance of the symmetric part", *_over_heads("qk/tokens/sym_var", "mean", "max")),
            _chart("Asymmetry", "qk/tokens/asymmetry/mean"),
            _layers("Spectral variance", "qk/tokens", "eig_var"),
            _chart("Mean eigenvalue, every head", "qk/tokens/heatmap/eig_mean"),
            _chart("Variance of the symmetric part, every head", "qk/tokens/heatmap/sym_var"),
        ),
    ),
    Group(
        "10 Predicted from token moments, and measured",
        (
            _predicted("Normalized entropy", "entropy_normalized"),
            _predicted("Attention to the first token", "sink_first"),
            _predicted("Mean distance", "distance"),
            _predicted("Share of pairs that pass signal", "linear_share"),
            _predicted("Largest probability", "max_prob"),
            _chart("What moments do not explain", *_over_heads("pred/semantic_share", "mean", "max")),
        ),
    ),
)
"""The sections, health first."""


def build_workspace(entity: str, project: str, name: str = NAME) -> "Workspace":
    """The workspace as ``wandb-workspaces`` has it; needs no network and no account.

    Args:
        entity: user or team.
        project: the project.
        name: how the workspace is to be called.

    Raises:
        ModuleNotFoundError: ``wandb-workspaces`` is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("wandb_workspaces"):
            raise
        raise ModuleNotFoundError(
            'expected the package wandb-workspaces, got none: pip install "lightning-qk[wandb]"',
            name=error.name,
        ) from error
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section(
                name=group.title,
                panels=[_panel(chart) for chart in group.charts],
                is_open=group.is_open,
                layout_settings=ws.SectionLayoutSettings(columns=3, rows=2),
            )
            for group in GROUPS
        ],
        settings=ws.WorkspaceSettings(x_axis=WANDB_STEP, sort_panels_alphabetically=False),
        # What else the project logs, such as its loss, follows below.
        auto_generate_panels=True,
    )


def _panel(chart: Chart) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if chart.images:
        return wr.MediaBrowser(title=chart.title, media_keys=list(chart.keys), num_columns=1)
    return wr.LinePlot(
        title=chart.title,
        x=WANDB_STEP,
        y=list(chart.keys),
        metric_regex=chart.regex,
        log_y=chart.log or None,
        title_x="optimizer step",
    )


def workspace_json(workspace: "Workspace") -> str:
    """What would be sent to W&B, as JSON; needs no network and no account."""
    import json

    spec = workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    return json.dumps(json.loads(spec), indent=2, ensure_ascii=False)


def workspace_outline(name: str = NAME) -> str:
    """The sections with their charts, as text."""
    lines = [name]
    for group in GROUPS:
        lines.append(f"  {group.title}{'' if group.is_open else ' (folded)'}")
        for chart in group.charts:
            what = f"keys that match {chart.regex}" if chart.regex else ", ".join(chart.keys)
            lines.append(f"    {chart.title}: {what}")
    return "\n".join(lines)
