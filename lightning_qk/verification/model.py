"""Check one model by one batch."""

from typing import Any

from torch import nn

from lightning_qk.architecture.dry_run import call, quietly
from lightning_qk.heads.reader import ProjectionReader
from lightning_qk.verification.check import SelfCheck, Verified


def verify(model: nn.Module, batch: Any) -> dict[str, Verified]:
    """Run a model once and check whether what is read of its weights is what its attention received.

    At the first attention call of every layer, queries and keys are compared with ``W x + b``, where W and b are
    those of :func:`~lightning_qk.head_projections` and x is what entered the layer. What rotations by position
    leave is compared under those; behind norms of queries and keys, their directions are. The model runs without
    gradients, in its own mode; it is left as it was, and so are the global generators of random numbers.

    Args:
        model: any module.
        batch: what it is called with: a mapping is passed by name, a list or tuple by position, anything else
            as the only argument.

    Returns:
        Qualified layer name → what was found, in the model's order.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model contains no attention.

    Example:
        >>> import torch
        >>> from transformers import AutoConfig, AutoModel
        >>> config = AutoConfig.for_model("bert", num_hidden_layers=1, hidden_size=32, num_attention_heads=4)
        >>> found = verify(AutoModel.from_config(config), {"input_ids": torch.arange(8)[None]})
        >>> found["encoder.layer.0.attention.self"].ok
        True
    """
    reader = ProjectionReader(model, allow_empty=True)
    with SelfCheck(model, reader).looking() as check, quietly(model):
        call(model, batch)
        return check.conclude()
