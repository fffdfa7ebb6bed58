"""LocAteR: localized attention regularization, a penalty on the scale of QK-eigenspectra."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_qk.functional.spectrum import Support, qk_moments, support_size
from lightning_qk.heads.batch import stack_layers
from lightning_qk.heads.projections import HeadProjections
from lightning_qk.heads.reader import head_projections

Form = Literal["variance", "target"]
Target = float | Mapping[str, Tensor]


def locater_penalty(
    model_or_projections: nn.Module | Mapping[str, HeadProjections],
    *,
    form: Form = "variance",
    support: Support = "model",
    target: Target | None = None,
    nu: float = 1.0,
    modules: str | Sequence[str] | None = None,
    cross_attention: bool = False,
) -> Tensor:
    r"""The penalty that concentrates the QK-eigenspectrum of every head.

    LocAteR of Bao et al., ICML 2024 (arXiv 2402.02098), shrinks the spectrum's scale and keeps its mean. With
    S the symmetric part of ``W_QK`` and n the size of the support, the sum over heads of

    - ``form="variance"``: ``tr S²/n − (tr S/n)²``, which puts no pressure on a shift of all n eigenvalues;
    - ``form="target"``: ``tr S²/n + ν (tr S/n − c)²``, which pulls the mean to c.

    Eigenvalues that are all the same and eigenvalues that are all zero have no variance both: against a weak
    enough loss the variance form shrinks the mean with the scale, and the target form holds it.

    Both forms are ours (derived): the paper's coefficient and the way it holds the mean are not stated in
    the text at hand. The plain ``tr W_QK²`` would be unbounded below for a non-symmetric ``W_QK``.

    Add ``weight * locater_penalty(model)`` to a loss, or use the callback
    :class:`~lightning_qk.LocAteR`, whose gradient is the same.

    Args:
        model_or_projections: a module that contains transformers, or what
            :func:`~lightning_qk.head_projections` returned for it.
        form: ``"variance"`` or ``"target"``.
        support: ``"model"``: n = d_model, as in the paper. ``"head"``: n = d_head.
        target: the mean c for ``form="target"``: a number, or a tensor ``(heads,)`` for each layer by name.
        nu: ν, how strongly ``form="target"`` holds the mean, against 1 on the scale.
        modules: glob pattern or patterns on qualified names of attention layers, such as
            ``"*.layers.[0-3].*"``; None for all.
        cross_attention: also penalize cross-attention whose queries and keys have the same width. Its
            spectrum relates two spaces, so that it is left out unless asked for.

    Returns:
        A scalar, differentiable in the model's weights, float32 at least. Never negative.

    Raises:
        ValueError: unknown form or support, a target missing or given to the wrong form, patterns that match
            no layer, or a model without readable attention.
    """
    check_form(form, target)
    if isinstance(model_or_projections, nn.Module):
        model_or_projections = head_projections(model_or_projections)
    chosen = select_layers(model_or_projections, modules=modules, cross_attention=cross_attention)
    penalties = []
    for batch in stack_layers(chosen):
        moments = qk_moments(batch.query, batch.key, support=support)
        if form == "variance":
            penalties.append(moments["sym_var"].sum())
            continue
        assert target is not None  # check_form
        if isinstance(target, Mapping):
            aim = torch.stack([target[name].to(moments["eig_mean"]) for name in batch.names])
        else:
            aim = torch.as_tensor(target).to(moments["eig_mean"])
        mean = moments["eig_mean"]
        scale = (moments["trace_sq"] + moments["frobenius_sq"]) / (2 * support_size(batch.query, support))
        penalties.append((scale + nu * (mean - aim).square()).sum())
    # Layers may live on several devices; the sum is taken where the first one is.
    return torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).sum()


def check_form(form: str, target: object) -> None:
    """Raise ValueError unless form and target go together."""
    if form not in get_args(Form):
        raise ValueError(f"expected form to be 'variance' or 'target', got {form!r}: pass one of the two")
    if form == "target" and target is None:
        raise ValueError(
            "expected a target mean with form='target', got None: pass target=, a number or one tensor a layer"
        )
    if form == "variance" and target is not None:
        raise ValueError(
            f"expected no target with form='variance', which keeps the mean free, got {target!r}: leave "
            "target out or pass form='target'"
        )


def select_layers(
    projections: Mapping[str, HeadProjections],
    *,
    modules: str | Sequence[str] | None = None,
    cross_attention: bool = False,
) -> dict[str, HeadProjections]:
    """The layers that a penalty is on, by name pattern and kind.

    Raises:
        ValueError: nothing is left.
    """
    patterns = [modules] if isinstance(modules, str) else modules
    chosen = {
        name: head
        for name, head in projections.items()
        if (patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns))
        and (head.self_attention or (cross_attention and head.query.shape[-1] == head.key.shape[-1]))
    }
    if not chosen:
        names = ", ".join(list(projections)[:3])
        raise ValueError(
            f"expected modules={modules!r} to match at least one attention layer, but it matches none of "
            f"{len(projections)} ({names}, ...): use * for any part of a name"
        )
    return chosen
