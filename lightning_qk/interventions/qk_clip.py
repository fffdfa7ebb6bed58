"""QK-Clip: query and key weights scaled down where their logits have grown too large."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_qk._deprecated import old_spellings
from lightning_qk.heads.reader import ProjectionReader, kept_reader
from lightning_qk.interventions.head_scaler import HeadScaler, head_scalers
from lightning_qk.interventions.layers import matching_layers


@old_spellings(tau="cap")
def clip_qk(
    model: nn.Module | ProjectionReader,
    max_logits: Mapping[str, Tensor],
    cap: float = 100.0,
    alpha: float = 0.5,
) -> dict[str, Tensor]:
    r"""Scale the query and key weights of heads whose largest logit is above ``cap``, in place.

    After Kimi K2 (arXiv 2507.20534 [V]) and Megatron-LM's form of it [V]. With S_h the largest
    ``scaling q·k`` of a head, and ``γ = min(1, cap / max S_h)`` over the heads that share a key, the key's weight
    and bias are multiplied by ``γ^(1−α)`` and those of all its queries by ``γ^α``: all products of the group,
    those of heads that were below ``cap`` among them, become γ times what they were, whatever rotation follows.
    Eigenvalues of W_QK are scaled by γ, and their variance by γ². In latent attention (DeepSeek's) one part of the
    keys is shared by all heads: it stays, and the queries' part that it meets is multiplied by γ (as Kimi K2
    does); what expands the latents is scaled elsewhere.

    Only products of queries and keys are scaled: neither position biases nor ALiBi, nor learnt sinks. A soft
    cap acts on what is scaled here.

    Args:
        model: any module that contains Hugging Face transformers, or its reader.
        max_logits: qualified layer name → S_h, ``(heads,)``, see :func:`~lightning_qk.functional.max_logits`.
            A head whose S_h is not finite is left alone, and so is its group.
        cap: the largest logit that is left as it is.
        alpha: share of the queries.

    Returns:
        Qualified layer name → γ of each key head, ``(kv_heads,)``: 1 where nothing was changed.

    Raises:
        ValueError: a layer that the model lacks, weights that are not plain trainable parameters of the layer
            (adapters, quantization, parametrizations, FSDP's first version, sharing), or a layer with a norm
            between the projections and the products; shapes that do not fit; cap or alpha out of range.
    """
    check_clip(cap, alpha)
    reader = model if isinstance(model, ProjectionReader) else kept_reader(model)
    unknown = [name for name in max_logits if name not in reader.layers]
    if unknown:
        raise ValueError(
            f"expected names of attention layers such as {next(iter(reader))!r}, got {unknown[0]!r}: take "
            "those of head_projections(model)"
        )
    editors = clip_editors(reader, max_logits)
    factors = {}
    for name, editor in editors.items():
        if max_logits[name].shape != (editor.heads,):
            raise ValueError(
                f"expected max_logits[{name!r}] of shape {(editor.heads,)}, one a query head, got "
                f"{tuple(max_logits[name].shape)}"
            )
        factors[name] = clip_factors(max_logits[name], editor.kv_heads, cap)
    for name, gamma in factors.items():
        apply_clip(editors[name], gamma, alpha)
    return factors


def clip_factors(max_logits: Tensor, kv_heads: int, cap: float) -> Tensor:
    """γ of each key head.

    Args:
        max_logits: of the query heads, ``(heads,)``.
        kv_heads: number of key heads; heads that share one follow each other.
        cap: the largest logit that is left as it is.

    Returns:
        Shape ``(kv_heads,)``: in (0, 1].
    """
    largest = max_logits.detach().reshape(kv_heads, -1)
    usable = ~(largest.isnan() | largest.isposinf()).any(1)
    largest = largest.amax(1)
    return torch.where(usable & (largest > cap), cap / largest, 1.0)


def apply_clip(editor: HeadScaler, gamma: Tensor, alpha: float) -> None:
    """Scale one layer by γ of its key heads; nothing is touched where all are 1."""
    if bool((gamma == 1).all()):
        return
    by_head = gamma.repeat_interleave(editor.heads // editor.kv_heads)
    query = (by_head**alpha)[:, None].repeat(1, editor.d_head)
    if editor.shared:
        query[:, editor.d_head - editor.shared :] = by_head[:, None]
    editor.scale(query, gamma ** (1 - alpha))


def clip_editors(
    reader: ProjectionReader, names: Iterable[str], *, trained: bool = True
) -> dict[str, HeadScaler]:
    """What scales the heads of the named layers; with ``trained``, frozen weights are refused.

    Raises:
        ValueError: a layer that cannot be clipped exactly.
    """
    names = list(names)
    for name in names:
        plan = reader.layers[name]
        if plan.normalizes:
            raise ValueError(
                "expected logits that scale with the query and key weights, got a norm of queries or keys "
                f"behind them in {name}, which takes every scale out again and bounds the logits: drop "
                "QK-Clip, or leave the layer out with modules="
            )
        if plan.is_capped:
            raise ValueError(
                f"expected logits that are q · k, got {name}, which bounds them by a function of its own, "
                "behind which their size is not known: leave the layer out with modules="
            )
        if plan.position == "relative product":
            raise ValueError(
                "expected logits that are q · k and what does not depend on them, got products of q with "
                f"embeddings of positions in {name}, which would be scaled by another power: leave the layer "
                "out with modules="
            )
    return head_scalers(reader, names, trained=trained)


def clippable_layers(
    reader: ProjectionReader, modules: str | Sequence[str] | None = None, *, trained: bool = True
) -> dict[str, HeadScaler]:
    """What scales the heads of the layers that patterns match, see :func:`clip_editors`."""
    return clip_editors(reader, matching_layers(reader, modules), trained=trained)


def check_clip(cap: float, alpha: float) -> None:
    """Raises ValueError unless ``cap`` is finite and above 0 and ``alpha`` in [0, 1]."""
    if not math.isfinite(cap) or cap <= 0:
        raise ValueError(f"expected a finite cap above 0, got {cap}: Kimi K2 uses 100")
    if not 0 <= alpha <= 1:
        raise ValueError(f"expected alpha between 0 and 1, got {alpha}: 0.5 shares γ evenly")
