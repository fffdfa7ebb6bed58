"""A plausible record of a run, for the tests of what is made from one."""

import math

import torch

from lightning_qk.record.history import History, LayerShape, RunRecord
from lightning_qk.record.snapshots import Snapshots


def simulated_record(
    layers: int = 3, heads: int = 4, points: int = 5, d_head: int = 8, d_model: int = 64
) -> RunRecord:
    """Spectra of real random heads that grow over the steps, and attention that sharpens with them."""
    generator = torch.Generator().manual_seed(0)
    labels = [f"layer_{i:02d}" for i in range(layers)]
    total = layers * heads
    spectrum, attention = History(labels, [heads] * layers), History(labels, [heads] * layers)
    query = torch.randn(total, d_head, d_model, generator=generator) / math.sqrt(d_model)
    key = torch.randn(total, d_head, d_model, generator=generator) / math.sqrt(d_model)
    spread = torch.rand(total, generator=generator)
    eigenvalues, profile = Snapshots(), Snapshots()
    theta = (torch.arange(10) + 0.5) / 10
    for point in range(points):
        product = (1 + point) * key @ query.mT
        trace = product.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace_sq = (product * product.mT).sum((-1, -2))
        frobenius_sq = (1 + point) ** 2 * ((query @ query.mT) * (key @ key.mT)).sum((-1, -2))
        spectrum.append(
            10 * point,
            {
                "trace": trace,
                "trace_sq": trace_sq,
                "frobenius_sq": frobenius_sq,
                "eig_mean": trace / d_model,
                "eig_var": trace_sq / d_model - (trace / d_model) ** 2,
                "sym_var": (trace_sq + frobenius_sq) / 2 / d_model - (trace / d_model) ** 2,
                "asymmetry": (frobenius_sq - trace_sq) / (2 * frobenius_sq),
                "localization": spread - 0.5,
                "propagation": 0.5 + 0.3 * spread,
                "spectral_radius": torch.linalg.eigvals(product).abs().amax(-1),
            },
        )
        if point in (0, points // 2, points - 1):
            spectra = torch.linalg.eigvals(product).split(heads)
            eigenvalues.append(10 * point, dict(zip(labels, spectra, strict=True)))
        if point % 2 == 0:
            curves = (0.5 + 0.4 * spread[:, None] * (theta - 0.2)).split(heads)
            profile.append(10 * point, dict(zip(labels, curves, strict=True)))
            entropy = 0.9 - 0.05 * point * spread
            attention.append(
                10 * point,
                {
                    "entropy": entropy * math.log(64),
                    "entropy_normalized": entropy,
                    "max_abs_logit": 3 + 2 * point * spread,
                    "sink_first": 0.2 * spread,
                    "sink_learnt": torch.full((total,), torch.nan),
                    "linear_share": 0.5 + 0.3 * spread.square(),
                    "entropy_se": torch.full((total,), 0.01),
                },
            )
    return RunRecord(
        spectrum=spectrum,
        attention=attention,
        eigenvalues=dict(eigenvalues.values[-1]),
        eigenvalues_step=spectrum.steps[-1],
        snapshots={"eigenvalues": eigenvalues, "linear_profile": profile},
        shapes={label: LayerShape(d_head, d_model, d_head**-0.5) for label in labels},
        scalars={"locater/penalty": ([0, 10, 20], [3.0, 2.0, 1.5]), "locater/weight": ([0, 10], [0.0, 1e-3])},
        info={"Model": "GPT2LMHeadModel", "parameters": "124,439,808"},
        notes=["layer_02 was captured without its mask."],
    )
