"""The ready-made LightningModule."""

from lightning_qk.module.transformer import TransformerModule

__all__ = ["TransformerModule"]
