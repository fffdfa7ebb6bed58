"""Callback: attention takes one key a row."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_qk.callbacks._layers import Patterns
from lightning_qk.callbacks.interventions._attention import Replacement, cross_names, layer_names
from lightning_qk.capture.intercept import AttentionInterceptor
from lightning_qk.heads.sites import AttentionLayer
from lightning_qk.interventions.replaced_attention import HardRetrieval


class HardAttention(Replacement):
    """Every row takes the value of its largest logit, with the gradient of softmax attention.

    In training and evaluation, by gather: see :func:`~lightning_qk.functional.hard_attention`. Dropout of
    attention weights is not applied. Monitors leave these layers out, since there is no softmax in the forward
    pass. When the trainer is done the model is as it was: use
    :class:`~lightning_qk.interventions.replaced_attention.HardRetrieval` to run it elsewhere.

    Source: hard retrieval, arXiv 2009.14658 [S].

    Args:
        modules: glob pattern or patterns on qualified names of attention layers; None for all.
        name: tells several of these callbacks in one trainer apart.

    Raises:
        TypeError: the trainer is one of the package ``pytorch_lightning``.
        ValueError: patterns match no layer; a layer has learnt sinks or a soft cap, another remedy replaces its
            function, or its call does not pass through transformers' interface or cannot be read.
    """

    group = "hard_attention"

    def __init__(self, *, modules: Patterns = None, name: str | None = None) -> None:
        super().__init__(modules, name)

    def make(
        self, sites: Sequence[AttentionLayer], pl_module: LightningModule
    ) -> tuple[AttentionInterceptor, str]:
        """Hard attention."""
        for site in sites:
            if isinstance(getattr(site.module, "sinks", None), Tensor):
                raise ValueError(
                    f"expected attention over keys alone, got {site.name}, which has a learnt sink: leave it out "
                    "with modules="
                )
            if getattr(site.module, "attn_logit_softcapping", None) is not None:
                raise ValueError(
                    f"expected logits without a soft cap, got {site.name}, which has one: leave it out with "
                    "modules="
                )
        hard = HardRetrieval(layer_names(sites), cross=cross_names(sites), model=pl_module)
        return hard.steering, "every row takes one key"
