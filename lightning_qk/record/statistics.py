"""How each statistic is shown, wherever it is: its name in words, its unit and its scale."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qk.record.history import History


@dataclass(frozen=True)
class Statistic:
    """How a statistic is shown.

    Attributes:
        title: what it is, in words.
        unit: its unit, or an empty string.
        share: it lies between 0 and 1, and is drawn on that scale.
        signed: zero is its middle, and is drawn as the middle colour.
        peak: of several heads the largest counts, not the mean.
    """

    title: str
    unit: str = ""
    share: bool = False
    signed: bool = False
    peak: bool = False

    @property
    def label(self) -> str:
        """Title and unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


STATISTICS = {
    "trace": Statistic("trace of W_QK", signed=True),
    "trace_sq": Statistic("trace of W_QK²", signed=True),
    "frobenius_sq": Statistic("squared Frobenius norm of W_QK"),
    "eig_mean": Statistic("eigenvalue mean", signed=True),
    "eig_var": Statistic("eigenvalue variance", signed=True),
    "sym_var": Statistic("variance of the symmetric part's eigenvalues"),
    "asymmetry": Statistic("asymmetry of W_QK", share=True),
    "concentration": Statistic("eigenvalue concentration", share=True),
    "propagation": Statistic("predicted signal propagation", "probability", share=True),
    "localization": Statistic("predicted localization", "late minus early", signed=True),
    "spectral_radius": Statistic("largest |eigenvalue|", peak=True),
    "singular_max": Statistic("largest singular value", peak=True),
    "sigma_1": Statistic("spectral norm of W_QK", peak=True),
    "energy_top_1": Statistic("energy of the first direction", share=True),
    "energy_top_4": Statistic("energy of the first four directions", share=True),
    "logit_bound": Statistic("bound on |logit| for tokens of norm √d", peak=True),
    "update_ratio": Statistic("update of W_QK against W_QK"),
    "entropy": Statistic("attention entropy", "nats"),
    "entropy_normalized": Statistic("normalized attention entropy", "entropy / log keys", share=True),
    "participation": Statistic("participation", "effective keys"),
    "max_prob": Statistic("largest attention probability", share=True),
    "max_logit": Statistic("largest logit", signed=True, peak=True),
    "max_abs_logit": Statistic("largest |logit|", peak=True),
    "query_norm": Statistic("norm of the queries"),
    "key_norm": Statistic("norm of the keys"),
    "logit_std": Statistic("standard deviation of logits"),
    "distance": Statistic("attention distance", "positions"),
    "distance_spread": Statistic("spread of attention distance", "positions"),
    "diagonal": Statistic("attention to the own position", "probability", share=True),
    "sink_first": Statistic("attention to the first key", "probability", share=True),
    "sink_rate": Statistic("share of keys that are sinks", share=True),
    "sink_learnt": Statistic("attention to the learnt sink", "probability", share=True),
    "sink_number": Statistic("sinks", "keys of a sequence"),
    "sink_share": Statistic("rows that attend to the strongest sink", share=True),
    "sink_output": Statistic("output in the span of the sinks' values", share=True),
    "waiver_rate": Statistic("share of keys with a short value", share=True),
    "waiver_mass": Statistic("attention to keys with a short value", "probability", share=True),
    "waiver_position": Statistic("waivers explained by position", "share of variance"),
    "positional_share": Statistic("logits explained by distance", "share of variance", share=True),
    "linear_share": Statistic("measured linear share", "share of pairs", share=True),
    "rank_residual_relative": Statistic("spread of tokens around their mean", "share of norm", share=True),
    "cosine": Statistic("cosine between tokens", signed=True),
    "cosine_abs": Statistic("|cosine| between tokens", share=True),
    "effective_rank": Statistic("effective rank", "directions"),
    "activation_max": Statistic("largest |activation|", peak=True),
}


def describe(statistic: str) -> Statistic:
    """How to show a statistic, also one that is not in the table and the standard error of one that is."""
    if statistic in STATISTICS:
        return STATISTICS[statistic]
    if statistic.endswith("_se"):
        base = describe(statistic.removesuffix("_se"))
        return Statistic(f"standard error of {base.title}", base.unit)
    return Statistic(statistic.replace("_", " "))


def by_layer(history: History, statistic: str) -> Tensor:
    """What is drawn over time, shape ``(points, layers)``, NaN where a layer has no finite value."""
    series = history.series(statistic).double()
    series = torch.where(series.isfinite(), series, torch.nan)
    if not describe(statistic).peak:
        return torch.stack([part.nanmean(dim=-1) for part in history.split(series)], dim=-1)
    largest = [part.nan_to_num(nan=-math.inf).amax(dim=-1) for part in history.split(series)]
    stacked = torch.stack(largest, dim=-1)
    return torch.where(stacked.isfinite(), stacked, torch.nan)


def spans_decades(values: Tensor, ratio: float = 100.0) -> bool:
    """Whether positive values lie so far apart that a logarithmic scale is wanted."""
    values = values[values.isfinite()]
    return bool(values.numel()) and bool(values.min() > 0) and bool(values.max() > ratio * values.min())
