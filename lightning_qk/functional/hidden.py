r"""Hidden states of one layer: collapse of rank, alignment of tokens, massive activations.

A sequence is a matrix ``X`` of ``n`` tokens (rows) by ``d`` features. What needs one pass over it is taken of all
tokens; what needs pairs of tokens or singular values can be taken of a sample.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qk.functional.checks import boolean, dense, flags, floating, generator_of, integer
from lightning_qk.functional.chunks import sample_rows
from lightning_qk.functional.logits import CHUNK_ELEMENTS
from lightning_qk.functional.precision import are_safe, at_least_float32, full_precision, norms, scaled
from lightning_qk.functional.singular import effective_rank

MASSIVE_ABOVE = 100.0
"""An activation is massive above this modulus ..."""
MASSIVE_TO_MEDIAN = 1000.0
"""... if it also is this many times the median modulus."""

HIDDEN_MEANS = (
    "rank_residual",
    "rank_residual_relative",
    "cosine",
    "cosine_abs",
    "effective_rank",
    "singular_min",
    "singular_max",
    "token_norm",
    "activation_top_1",
    "activation_top_2",
    "activation_top_3",
    "activation_median",
    "massive_count",
    "massive_share",
)
"""Statistics that are means over sequences (over tokens or numbers for token_norm and massive_share)."""

HIDDEN_EXTREMES = ("activation_max",)
"""Statistics that are the largest of all sequences."""

HIDDEN_STATISTICS = (*HIDDEN_MEANS, *HIDDEN_EXTREMES)


class HiddenSums(NamedTuple):
    """Statistics in a form that can be added up over calls and ranks.

    Attributes:
        total: weighted sums, shape ``(len(HIDDEN_MEANS), batch)``.
        weight: what to divide them by, the same shape; 0 where a sequence has no such value.
        maximum: shape ``(len(HIDDEN_EXTREMES), batch)``; −inf where a sequence has no token.
    """

    total: Tensor
    weight: Tensor
    maximum: Tensor


def hidden_statistics(
    states: Tensor,
    *,
    mask: Tensor | None = None,
    tokens: int | None = None,
    per_sequence: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Collapse of rank, alignment of tokens and massive activations of a layer's hidden states.

    Args:
        states: hidden states, shape ``(batch, n, d)``, any floating dtype.
        mask: which tokens count, boolean or 0/1, shape ``(batch, n)``; None for all. The others may hold anything,
            NaN included.
        tokens: how many tokens of each sequence to sample without replacement for what needs pairs or singular
            values; None for all of them.
        per_sequence: return ``(batch,)`` instead of scalars.
        generator: where the sample is drawn from; None is torch's global generator.

    Returns:
        Scalars, means over the sequences that have a value, in float32 at least, in float64 for float64 input;
        NaN where none has. Of all tokens:

        - ``rank_residual``: ``μ(X) = ‖X − 1 x̄ᵀ‖_F`` with ``x̄`` the mean token, 0 where all tokens are the same.
          Wu et al. 2024 (arXiv 2405.18781) [V up to the formula], the residual of Dong et al. 2021.
        - ``rank_residual_relative``: over ``‖X‖_F``, in [0, 1].
        - ``cosine``: mean cosine of two different tokens, ``(‖Σ u‖² − m) / (m (m − 1))`` for ``m`` unit vectors
          ``u`` (tokens that are zero have none).
        - ``token_norm``: mean ``‖x‖₂`` over all tokens.
        - ``activation_top_1``, ``_2``, ``_3``: largest moduli of a sequence's numbers. Sun et al. 2024
          (arXiv 2402.17762) [V], as the next ones.
        - ``massive_count``: numbers of a sequence with modulus above 100 and at least 1000 times the median;
          ``massive_share``: their share of all numbers.
        - ``activation_max``: the largest modulus of all sequences.

        Of the sampled tokens:

        - ``cosine_abs``: mean modulus of the cosine of two different tokens. Pairs of a sample estimate that of
          all pairs without bias.
        - ``effective_rank``: see :func:`~lightning_qk.functional.effective_rank`, of ``X`` as it is, mean
          included. That of a sample is a number of its own, which is at most ``tokens``: compare it between steps
          and layers, not between sample sizes.
        - ``singular_min``, ``singular_max``: of the ``min(n, d)`` singular values that such a matrix can have; of
          a sample too.
        - ``activation_median``: median modulus of a sequence's numbers (the lower one of two); of a sample an
          estimate, which the test for massive activations then uses.

        Rank and cosine need two tokens; a sequence with fewer has no value there. Singular values come from the
        Gram matrix of the smaller side, in float64, since squares take half of the digits. Memory is linear in
        ``n`` with a sample, as is all that is not a Gram matrix.

    Raises:
        ValueError: states that are not floating ``(batch, n, d)``, a mask of another shape, or ``tokens`` below 2.

    Example:
        >>> same = torch.ones(1, 4, 8)
        >>> found = hidden_statistics(same)
        >>> found["rank_residual"].item(), round(found["cosine"].item(), 4)
        (0.0, 1.0)
    """
    boolean(per_sequence, "per_sequence")
    sums = hidden_sums(states, mask=mask, tokens=tokens, generator=generator)
    if not per_sequence:
        maximum = sums.maximum.amax(1) if states.shape[0] else sums.maximum.new_full((1,), -torch.inf)
        sums = HiddenSums(sums.total.sum(1), sums.weight.sum(1), maximum)
    return finish(sums)


def finish(sums: HiddenSums) -> dict[str, Tensor]:
    """Turn sums into means; NaN where nothing was counted."""
    out = dict(zip(HIDDEN_MEANS, sums.total / sums.weight, strict=True))
    out.update(
        zip(HIDDEN_EXTREMES, sums.maximum.masked_fill(sums.maximum == -torch.inf, torch.nan), strict=True)
    )
    return out


@torch.no_grad()
def hidden_sums(
    states: Tensor,
    *,
    mask: Tensor | None = None,
    tokens: int | None = None,
    sequences: int | None = None,
    generator: torch.Generator | None = None,
) -> HiddenSums:
    """The additive form of :func:`hidden_statistics`, for accumulation; same arguments, and one more.

    Args:
        states: this, ``mask``, ``tokens`` and ``generator`` as in :func:`hidden_statistics`.
        mask: tokens that count.
        tokens: sample size.
        sequences: how many of the batch to measure, drawn without replacement; None for all. Each then weighs
            ``batch / sequences``, so that sums over calls estimate those of all sequences without bias; maxima
            are lower bounds.
        generator: of the samples.

    Raises:
        ValueError: as :func:`hidden_statistics`, or ``sequences`` below 1.
    """
    valid = _check(states, mask, tokens, generator)
    if sequences is not None and integer(sequences, "sequences") < 1:
        raise ValueError(f"expected sequences to be at least 1, or None for all of them, got {sequences}")
    if sequences is not None and sequences < states.shape[0]:
        some, mask, stands_for = draw_sequences(states, None if mask is None else valid, sequences, generator)
        part = hidden_sums(some, mask=mask, tokens=tokens, generator=generator)
        return HiddenSums(part.total * stands_for, part.weight * stands_for, part.maximum)
    batch, n, d = states.shape
    with full_precision(states.device):
        x = at_least_float32(states)
        if mask is not None:
            x = torch.where(valid[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        if x.numel() == 0:
            empty = x.new_zeros(len(HIDDEN_MEANS), batch)
            return HiddenSums(empty, empty.clone(), x.new_full((len(HIDDEN_EXTREMES), batch), -torch.inf))
        count = valid.sum(1).to(x.dtype)
        has_pairs = count > 1
        values: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}

        def put(name: str, value: Tensor, counted: Tensor) -> None:
            values[name], weights[name] = value, counted.to(x.dtype)

        length = norms(x)
        # Squares of very large and of very small numbers leave the range of the type.
        safe = are_safe(torch.where(length == 0, 1.0, length))
        unit, size = (x, x.new_ones(1, 1, 1)) if safe else scaled(x, (1, 2))
        residual = _residual(unit, valid if mask is not None else None, count)
        whole = torch.linalg.vector_norm(unit.flatten(1), dim=1)
        put("rank_residual", residual * size[:, 0, 0], has_pairs)
        put("rank_residual_relative", (residual / whole).clamp_max(1), has_pairs & (whole != 0))
        del unit
        put("cosine", *_mean_cosine(x if safe else scaled(x, -1)[0]))
        put("token_norm", length.sum(1) / count, count)

        some, used = _sample(x, valid, tokens, generator)
        put("cosine_abs", *_mean_abs_cosine(some if safe else scaled(some, -1)[0]))
        singular = _singular_values(some)
        smallest = (used.sum(1).clamp(1, singular.shape[-1]) - 1)[:, None]
        rank = effective_rank(singular).to(x.dtype)
        put("effective_rank", rank, has_pairs & (singular[:, 0] != 0))
        put("singular_min", singular.gather(1, smallest)[:, 0].to(x.dtype), has_pairs)
        put("singular_max", singular[:, 0].to(x.dtype), has_pairs)

        modulus = x.abs().flatten(1)
        is_there = count > 0
        top = modulus.topk(min(3, n * d), dim=1).values
        for place in range(3):
            counted = is_there & (count * d > place)
            put(f"activation_top_{place + 1}", top[:, min(place, top.shape[1] - 1)], counted)
        median = some.abs().masked_fill(~used[..., None], torch.nan).flatten(1).nanmedian(1).values
        put("activation_median", median, is_there)
        massive = (modulus > MASSIVE_ABOVE) & (modulus >= MASSIVE_TO_MEDIAN * median[:, None])
        number = massive.sum(1).to(x.dtype)
        put("massive_count", number, is_there)
        put("massive_share", number / (count * d), count * d)

        weight = torch.stack([weights[name] for name in HIDDEN_MEANS])
        total = torch.stack([values[name] for name in HIDDEN_MEANS]) * weight
        # What is not counted may be 0 / 0.
        total = torch.where(weight > 0, total, torch.zeros_like(total))
        largest = torch.where(is_there, top[:, 0], torch.full_like(top[:, 0], -torch.inf))
        return HiddenSums(total, weight, largest[None])


def draw_sequences(
    states: Tensor, mask: Tensor | None, sequences: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor | None, float]:
    """Some sequences of a batch with their mask, drawn without replacement, and how many each stands for."""
    batch = states.shape[0]
    if sequences is None or sequences >= batch:
        return states, mask, 1.0
    device = "cpu" if generator is None else generator.device
    drawn = torch.randperm(batch, generator=generator, device=device)[:sequences].to(states.device)
    return states[drawn], None if mask is None else mask[drawn], batch / sequences


def _check(
    states: Tensor, mask: Tensor | None, tokens: int | None, generator: torch.Generator | None
) -> Tensor:
    """Which tokens count, boolean ``(batch, n)``."""
    floating(states, "hidden states (batch, n, d)")
    generator_of(generator)
    if tokens is not None and integer(tokens, "tokens") < 2:
        raise ValueError(f"expected tokens to be at least 2, or None for all tokens, got {tokens}")
    if states.dim() != 3:
        raise ValueError(
            f"expected floating hidden states (batch, n, d), got {states.dtype} of shape "
            f"{tuple(states.shape)}: give them one axis for the tokens and one for the features"
        )
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if dense(mask, "mask").shape != states.shape[:2]:
        raise ValueError(
            f"expected a mask of shape (batch, n) = {tuple(states.shape[:2])}, got {tuple(mask.shape)}: pass "
            "one entry a token, such as the batch's attention_mask"
        )
    return flags(mask, "mask").to(device=states.device, dtype=torch.bool)


def _residual(x: Tensor, valid: Tensor | None, count: Tensor) -> Tensor:
    """``‖X − 1 x̄ᵀ‖_F`` of each sequence. Centred before squaring: a collapsed layer is a small difference."""
    centred = x - (x.sum(1) / count.clamp_min(1)[:, None])[:, None]
    if valid is not None:
        centred = centred * valid[..., None]
    return torch.linalg.vector_norm(centred.flatten(1), dim=1)


def _mean_cosine(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of pairs of tokens that are not zero, and whether there are any; squares are in range."""
    length = torch.linalg.vector_norm(x, dim=-1)
    is_direction = length != 0
    number = is_direction.sum(1).to(x.dtype)
    # One product instead of unit vectors in memory.
    weight = torch.where(is_direction, length.reciprocal(), torch.zeros_like(length))
    resultant = (weight[:, None] @ x)[:, 0].square().sum(-1)
    return ((resultant - number) / (number * (number - 1))).clamp(-1, 1), number > 1


def _sample(
    x: Tensor, valid: Tensor, tokens: int | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Some tokens of each sequence, and which of them count; the others are zero."""
    if tokens is None or tokens >= x.shape[1]:
        return x, valid
    index = sample_rows(valid, tokens, generator)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2])), valid.gather(1, index)


def _mean_abs_cosine(some: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`_mean_cosine`, of the modulus, a few rows of the matrix of pairs at a time."""
    length = torch.linalg.vector_norm(some, dim=-1, keepdim=True)
    unit = torch.where(length != 0, some / length, torch.zeros_like(some))
    batch, n, _ = unit.shape
    rows = max(1, CHUNK_ELEMENTS // max(1, batch * n))
    total = unit.new_zeros(batch)
    for part in unit.split(rows, dim=1):
        total += (part @ unit.mT).abs().sum((1, 2))
    number = (length != 0).sum((1, 2)).to(unit.dtype)
    return ((total - number) / (number * (number - 1))).clamp(0, 1), number > 1


def _singular_values(some: Tensor) -> Tensor:
    """In descending order, ``(batch, min(n, d))``, float64; NaN for a sequence that is not finite."""
    device = some.device
    if device.type == "mps":  # has no float64
        some = some.cpu()
    wide, size = scaled(some.double(), (1, 2))
    # A mask leaves rows of zeros, which add singular values of zero.
    gram = wide @ wide.mT if wide.shape[1] <= wide.shape[2] else wide.mT @ wide
    finite = gram.isfinite().all(-1).all(-1)
    gram = torch.where(finite[:, None, None], gram, torch.zeros_like(gram))
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sqrt() * size[:, 0]
    values = torch.where(finite[:, None], values, torch.full_like(values, torch.nan))
    return values.to(device) if device.type != "mps" else values.float().to(device)
