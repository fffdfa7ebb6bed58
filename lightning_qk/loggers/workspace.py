"""A W&B workspace for runs with these callbacks: which charts, in which order."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_qk.loggers.loggers import WANDB_STEP

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


def _over_heads(prefix: str, *reductions: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{reduction}" for reduction in reductions)


def _of_layers(group: str, statistic: str) -> str:
    return f"^{group}/[^/]*(layer|embedding)[^/]*/{statistic}$"


GROUPS: tuple[Group, ...] = (
    Group(
        "1 Health",
        (
            Chart("Collapse score (alarm from 1)", ("guard/score",)),
            Chart(
                "Scores of the detectors",
                tuple(f"guard/{name}" for name in ("loss", "logits", "entropy", "rank", "spectrum")),
            ),
            Chart(
                "Largest logit (100: where Kimi K2 clips)",
                ("attn/max_logit/max", "clip/max_logit/max"),
                log=True,
            ),
            Chart(
                "Normalized entropy: least, mean, most",
                _over_heads("attn/entropy_normalized", "min", "mean", "max"),
            ),
            Chart(
                "Residual of rank: towards 0 is rank collapse",
                _over_heads("hidden/rank_residual_relative", "min", "mean"),
            ),
            Chart("Spectral radius of W_QK", _over_heads("qk/spectral_radius", "mean", "max"), log=True),
        ),
        is_open=True,
    ),
    Group(
        "2 Every head",
        (
            Chart("Normalized entropy", ("attn/heatmap/entropy_normalized",), images=True),
            Chart("Mean distance", ("attn/heatmap/distance",), images=True),
            Chart("Attention to the first token", ("attn/heatmap/sink_first",), images=True),
            Chart("Spectral variance (symmetric part)", ("qk/heatmap/sym_var",), images=True),
            Chart("Mean eigenvalue", ("qk/heatmap/eig_mean",), images=True),
            Chart("Asymmetry", ("qk/heatmap/asymmetry",), images=True),
        ),
        is_open=True,
    ),
    Group(
        "3 Layers",
        (
            Chart("Entropy", regex=_of_layers("attn", "entropy")),
            Chart("Largest logit", regex=_of_layers("attn", "max_logit"), log=True),
            Chart("Spectral variance", regex=_of_layers("qk", "eig_var")),
            Chart("Residual of rank", regex=_of_layers("hidden", "rank_residual_relative")),
        ),
        is_open=True,
    ),
    Group(
        "4 Where attention goes",
        (
            Chart(
                "Entropy, training and validation",
                ("attn/entropy_normalized/mean", "attn/val/entropy_normalized/mean"),
            ),
            Chart("Mean distance", ("attn/distance/mean", "attn/val/distance/mean")),
            Chart("Largest probability", ("attn/max_prob/mean", "attn/val/max_prob/mean")),
            Chart("Share of pairs that pass signal", _over_heads("attn/linear_share", "min", "mean")),
            Chart("Positional share", _over_heads("attn/positional_share", "min", "mean", "max")),
            Chart("Norms of queries and keys", ("attn/query_norm/mean", "attn/key_norm/mean"), log=True),
        ),
    ),
    Group(
        "5 Spectrum of W_QK",
        (
            Chart("Mean eigenvalue", _over_heads("qk/eig_mean", "min", "mean", "max")),
            Chart("Spectral variance", _over_heads("qk/eig_var", "min", "mean", "max")),
            Chart("Variance of the symmetric part", _over_heads("qk/sym_var", "mean", "max")),
            Chart("Localization, predicted", _over_heads("qk/localization", "min", "mean", "max")),
            Chart("Asymmetry", ("qk/asymmetry/mean",)),
            Chart("Modulus of the eigenvalues", ("qk/eigenvalues/modulus",)),
        ),
    ),
    Group(
        "6 Sinks",
        (
            Chart("Attention to the first token", _over_heads("attn/sink_first", "mean", "max")),
            Chart("Share of heads with a sink", ("attn/sink_rate/mean",)),
            Chart("What sinks write", _over_heads("attn/sink_output", "mean", "max")),
            Chart("Waived attention", _over_heads("attn/waiver_mass", "mean", "max")),
            Chart("What sinks write, every head", ("attn/heatmap/sink_output",), images=True),
            Chart("Waived attention, every head", ("attn/heatmap/waiver_mass",), images=True),
        ),
    ),
    Group(
        "7 Hidden states",
        (
            Chart("Effective rank", _over_heads("hidden/effective_rank", "min", "mean")),
            Chart("Cosine of two tokens", _over_heads("hidden/cosine_abs", "mean", "max")),
            Chart("Largest activation", _over_heads("hidden/activation_max", "mean", "max"), log=True),
            Chart("Massive activations", _over_heads("hidden/massive_count", "mean", "max")),
        ),
    ),
    Group(
        "8 Interventions",
        (
            Chart("LocAteR's penalty", ("locater/penalty",)),
            Chart("LocAteR's weight", ("locater/weight",)),
            Chart("Smallest factor of QK-Clip", ("clip/gamma/min",)),
            Chart("Clipped heads", ("clip/clipped_heads",)),
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
