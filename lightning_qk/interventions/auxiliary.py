"""Penalties of attention calls that reach the gradient without being a term of the user's loss.

The penalty of a call hangs on the call's output: the output passes through unchanged, and when a gradient comes
back the penalty gets one too, a constant. So it counts once for each backward pass, also where a checkpoint
computes the call twice, and not at all where no gradient is asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.capture.registry import Run
from lightning_qk.capture.verify import attention_logits
from lightning_qk.functional.logits import ProductLogits


class Penalty(NamedTuple):
    """Of one call.

    Attributes:
        value: differentiable scalar.
        logged: name → scalar, what is to be known of it.
    """

    value: Tensor
    logged: dict[str, Tensor]


Measure = Callable[[str, ProductLogits], Penalty | None]
"""``measure(name, logits)``: of one call, with gradients."""


class Auxiliary:
    """Penalties that are attached to outputs, on their way to the gradient.

    Args:
        weight: coefficient of the mean over layers.
        layers: how many there are.

    Attributes:
        weight: may be changed at any time; read in the backward pass.
        scale: what the loss was multiplied by before its backward pass: the factor of a gradient scaler, or
            one over the number of micro-batches that are accumulated. Read in the backward pass.
        enabled: whether calls get a penalty.
    """

    steering: AttentionInterceptor
    """What stands before the layers' attention, set by whatever installs the penalties."""

    def __init__(self, weight: float, layers: int) -> None:
        self.weight = weight
        self.scale: float | Tensor = 1.0
        self.enabled = True
        self._layers = layers
        self._seen: list[dict[str, Tensor]] = []

    def attach(self, output: Any, penalty: Penalty) -> Any:
        """The output of an attention function, unchanged, that brings the penalty a gradient."""
        first = output[0] if isinstance(output, tuple) else output
        first = _Attach.apply(first, penalty.value, penalty.logged, self)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def take(self) -> dict[str, Tensor]:
        """Means of what was seen in backward passes since the last call of this, over calls; empty if none."""
        seen, self._seen = self._seen, []
        names = dict.fromkeys(name for one in seen for name in one)
        return {name: torch.stack([one[name] for one in seen if name in one]).nanmean() for name in names}

    def _reached(self, logged: dict[str, Tensor], like: Tensor) -> Tensor:
        """A backward pass came by: the gradient of a call's penalty."""
        self._seen.append(logged)
        return like * (self.weight / self._layers) * self.scale


class AttentionPenalty(Auxiliary):
    """Adds ``weight`` times the mean over layers of a penalty to the gradient of the loss.

    A context manager: within it, every backward pass through the layers' attention adds the penalty's
    gradient, as if ``loss + weight * penalty`` were the loss. Calls without autograd cost nothing, outputs
    are bit-identical. A layer whose output does not reach the loss gets no penalty; several calls of one layer
    in one forward add up.

    Args:
        names: the attention modules, and the name of each.
        measure: the penalty of one call, or None where it has none.
        weight: its coefficient.
        cross: names of the layers whose keys are other tokens than the queries.
        model: what the modules are part of; see :class:`~lightning_qk.capture.intercept.AttentionInterceptor`.

    Raises:
        ValueError: a layer whose call does not pass through transformers' interface, or cannot be read.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        measure: Measure,
        weight: float,
        *,
        cross: frozenset[str] = frozenset(),
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(weight, len(names))
        self._measure = measure
        self._cross = cross
        self.steering = AttentionInterceptor(names, self._wrap, model=model)

    def __enter__(self) -> "AttentionPenalty":
        self.steering.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.steering.remove()

    def _wrap(self, name: str, call: AttentionCall, run: Run) -> Any:
        output = run(call)
        if not self.enabled or not torch.is_grad_enabled():
            return output
        if not (call.query.requires_grad or call.key.requires_grad):
            return output
        try:
            logits, _ = attention_logits(call, self_attention=name not in self._cross)
            penalty = self._measure(name, logits)
        except Exception as error:
            # What the call has returned stands: dropout is not drawn a second time.
            if not self.steering.tolerates(name, error):
                raise
            return output
        return output if penalty is None else self.attach(output, penalty)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, penalty: Tensor, logged: dict[str, Tensor], owner: Auxiliary
    ) -> Tensor:
        ctx.one = torch.ones_like(penalty)
        ctx.logged = {name: value.detach() for name, value in logged.items()}
        ctx.owner = owner
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, ctx.owner._reached(ctx.logged, ctx.one), None, None
