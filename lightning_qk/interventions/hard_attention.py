"""Attention that takes the key of each row's largest logit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_qk.capture.call import AttentionCall, UnsupportedCallError
from lightning_qk.capture.conventions import soft_cap
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.capture.registry import Run
from lightning_qk.functional.hard_attention import hard_attention
from lightning_qk.functional.logits import ProductLogits
from lightning_qk.interventions.replaced import Replacements


class HardRetrieval:
    """Makes the attention of some modules hard within it; a context manager.

    See :func:`~lightning_qk.functional.hard_attention`. Dropout of attention weights is not applied: a row has
    one key only. Monitors leave these layers out, since there is no softmax in the forward pass.

    Args:
        names: the attention modules, and the name of each.
        cross: names of the layers whose keys are other tokens than the queries.
        model: what the modules are part of.

    Raises:
        ValueError: a layer whose call does not pass through transformers' interface, cannot be read, or has
            learnt sinks.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        *,
        cross: frozenset[str] = frozenset(),
        model: nn.Module | None = None,
    ) -> None:
        self._cross = cross
        self._replacements = Replacements(_compute, _no_softmax)
        self.steering = AttentionInterceptor(names, self._wrap, replaces=True, model=model)

    def __enter__(self) -> "HardRetrieval":
        self.steering.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.steering.remove()

    def _wrap(self, name: str, call: AttentionCall, run: Run) -> Any:
        if soft_cap(call) is not None:
            raise UnsupportedCallError("its logits are soft-capped: leave it out with modules=")
        return run(call._replace(function=self._replacements.of(call, is_cross=name in self._cross)))


def _no_softmax(module: nn.Module, logits: ProductLogits, extra: Any) -> ProductLogits:
    raise UnsupportedCallError(
        "hard attention takes one key of each row, without a softmax: it has no statistics"
    )


def _compute(module: nn.Module, logits: ProductLogits, value: Tensor, dropout: float, extra: Any) -> Tensor:
    if logits.sinks is not None:
        raise UnsupportedCallError("it has a learnt sink, which is no key: leave it out with modules=")
    return hard_attention(logits, value=value, training=True)
