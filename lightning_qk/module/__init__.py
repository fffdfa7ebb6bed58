"""The ready-made LightningModule around transformers' networks."""

from typing import TYPE_CHECKING

from lightning_qk._packages import lazy

if TYPE_CHECKING:
    from lightning_qk.module.predictions import PredictionFile
    from lightning_qk.module.transformer import TransformerModule

__all__ = ["PredictionFile", "TransformerModule"]

__getattr__, __dir__ = lazy(
    __name__, {"predictions": ["PredictionFile"], "transformer": ["TransformerModule"]}
)
