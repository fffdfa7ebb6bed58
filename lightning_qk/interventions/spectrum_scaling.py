"""Spectra of heads set to one size, for inference."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_qk.functional.precision import at_least_float32, full_precision
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.interventions.head_scaler import HeadScaler, head_scalers
from lightning_qk.interventions.layers import matching_layers

Statistic = Literal["frobenius_sq", "trace_sq"]


class SpectrumScaler:
    r"""Scales ``W_QK`` of every head by ``γ log(η + ε) / √η``, and undoes it exactly.

    After TAME (ICLR 2025), read in a summary only [S]: ``W_QK ← γ log(η + ε) W_QK / √η`` at inference, with η the
    size of a head's spectrum; its released code does something else, it scales logits by activations [V], so that
    neither the effect nor good values of γ and ε are known for this form. What η is beyond a symmetric ``W_QK`` is
    derived here: there ``tr(W_QK²) = ‖W_QK‖_F²``. For others ``tr(W_QK²)`` may be negative, where the formula has
    no value, so that ``‖W_QK‖_F²`` is the default, which is positive; the head is then divided by its own norm. η
    is that of ``W_QK`` itself, without the softmax scale.

    The queries take the whole factor, weight and biases: heads that share a key have one each. Logits are then
    scaled by it exactly, position biases aside.

    Args:
        model: any module that contains Hugging Face transformers, or its reader.
        gamma: γ.
        eps: ε.
        statistic: what η is: ``"frobenius_sq"`` or ``"trace_sq"``.
        modules: glob pattern or patterns on qualified names of attention layers; None for all.

    Attributes:
        factors: qualified layer name → factor of each head, ``(heads,)``, while it is applied.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an argument is out of range, patterns match no layer, a norm of queries or keys takes every
            scale out again, or weights that are no plain parameters of their own. While applying: a head with
            ``η ≤ 0``, or with ``log(η + ε) ≤ 0``, whose logits would vanish or change their sign.
    """

    def __init__(
        self,
        model: nn.Module | ProjectionReader,
        *,
        gamma: float = 1.0,
        eps: float = 1.0,
        statistic: Statistic = "frobenius_sq",
        modules: str | Sequence[str] | None = None,
    ) -> None:
        check_scaling(gamma, eps, statistic)
        self.gamma, self.eps, self.statistic = gamma, eps, statistic
        self._reader = model if isinstance(model, ProjectionReader) else ProjectionReader(model)
        names = matching_layers(self._reader, modules)
        for name in names:
            if self._reader.layers[name].normalizes:
                raise ValueError(
                    "expected logits that scale with the query weights, got a norm of queries or keys behind "
                    f"them in {name}, which takes every scale out again: leave the layer out with modules="
                )
        self._editors: dict[str, HeadScaler] = head_scalers(self._reader, names, trained=False)
        self._saved: list[tuple[nn.Parameter, Tensor]] = []
        self.factors: dict[str, Tensor] = {}

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError where a head cannot be scaled as the weights are now; nothing is changed."""
        for name in self._editors:
            self._factors(name)

    @torch.no_grad()
    def apply(self) -> dict[str, Tensor]:
        """Scale unless already scaled, and return the factors."""
        if self._saved:
            return self.factors
        # All of them first, so that nothing is scaled where one cannot be.
        self.factors = {name: self._factors(name) for name in self._editors}
        for name, editor in self._editors.items():
            # A fused weight is saved once, whole.
            self._saved += [(own, own.detach().clone()) for own in editor.parameters("query")]
            editor.scale(self.factors[name], None)
        return self.factors

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the values of the weights bit by bit."""
        saved, self._saved = self._saved, []
        for parameter, values in saved:
            parameter.copy_(values)
        self.factors = {}

    def _factors(self, name: str) -> Tensor:
        head = self._reader[name]
        if self.statistic == "trace_sq" and head.width[0] != head.width[1]:
            raise ValueError(
                f"expected queries and keys of one width for statistic='trace_sq', got {head.width} in "
                f"{name}: use 'frobenius_sq'"
            )
        eta = _eta(head.query, head.key, self.statistic)
        bad = (~(eta > 0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"expected η = {self.statistic} above 0 for every head, got {eta[bad[0]].item():.3g} for "
                f"head {bad[0]} of {name}, where γ log(η + ε)/√η has no value: use statistic='frobenius_sq', "
                "or leave the layer out with modules="
            )
        log = (eta + (self.eps - 1)).log1p()
        bad = (~(log > 0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"expected log(η + ε) above 0 for every head, got {log[bad[0]].item():.3g} for head {bad[0]} of "
                f"{name}, whose logits would vanish or change their sign: use a larger eps (1 is always enough)"
            )
        return self.gamma * log / eta.sqrt()


def _eta(query: Tensor, key: Tensor, statistic: Statistic) -> Tensor:
    """``‖W_QK‖_F²`` or ``tr(W_QK²)`` of each head, ``(heads,)``, from d_head × d_head products."""
    with full_precision(query.device):
        query, key = (at_least_float32(part.detach()) for part in (query, key))
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        if statistic == "frobenius_sq":
            return ((query @ query.mT) * (key @ key.mT)).sum((-2, -1))
        product = key @ query.mT
        return (product * product.mT).sum((-2, -1))


@contextmanager
def spectrum_scaling(
    model: nn.Module,
    *,
    gamma: float = 1.0,
    eps: float = 1.0,
    statistic: Statistic = "frobenius_sq",
    modules: str | Sequence[str] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Within this block the heads of a model are scaled, see :class:`SpectrumScaler` for arguments and errors.

    Yields:
        Qualified layer name → factor of each head, ``(heads,)``.
    """
    scaling = SpectrumScaler(model, gamma=gamma, eps=eps, statistic=statistic, modules=modules)
    try:
        yield scaling.apply()
    finally:
        scaling.undo()


def check_scaling(gamma: float, eps: float, statistic: str) -> None:
    """Raises ValueError where an argument is out of range."""
    if not math.isfinite(gamma) or gamma <= 0:
        raise ValueError(f"expected a finite gamma above 0, got {gamma}")
    if not math.isfinite(eps) or eps < 0:
        raise ValueError(f"expected a finite eps of at least 0, got {eps}")
    if statistic not in ("frobenius_sq", "trace_sq"):
        raise ValueError(f"expected statistic to be 'frobenius_sq' or 'trace_sq', got {statistic!r}")
