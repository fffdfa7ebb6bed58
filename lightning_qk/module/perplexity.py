"""Mean loss and perplexity over tokens, right for batches with different numbers of tokens."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Mean of per-batch mean losses, each weighted by the number of its terms.

    Unlike :class:`torchmetrics.MeanMetric` it lets NaN through: a broken model is not reported as fine.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: Tensor | int) -> None:
        """Add a batch.

        Args:
            loss: mean over the batch's terms, in nats.
            count: number of terms; a batch with none does not count, whatever its loss.
        """
        weight = torch.as_tensor(count, dtype=self.count.dtype, device=self.count.device)
        self.total += torch.where(weight > 0, loss.detach().to(self.total.dtype) * weight, 0.0)
        self.count += weight

    def compute(self) -> Tensor:
        """The mean over all terms of all batches and processes."""
        return self.total / self.count


class Perplexity(MeanLoss):
    """exp of the mean negative log-likelihood of a token."""

    higher_is_better = False

    def compute(self) -> Tensor:
        """The perplexity over all tokens of all batches and processes."""
        return super().compute().exp()
