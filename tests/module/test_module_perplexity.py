"""Mean loss and perplexity over tokens."""

import math

import torch

from lightning_qk.module.transformer import MeanLoss, Perplexity


def test_batches_count_by_their_tokens() -> None:
    losses = [torch.rand(count) for count in (3, 10, 1)]
    mean, perplexity = MeanLoss(), Perplexity()
    for loss in losses:
        mean.update(loss.mean(), len(loss))
        perplexity.update(loss.mean(), torch.tensor(len(loss)))

    expected = torch.cat(losses).double().mean().item()
    assert math.isclose(mean.compute().item(), expected, rel_tol=1e-6)
    assert math.isclose(perplexity.compute().item(), math.exp(expected), rel_tol=1e-6)


def test_a_batch_without_tokens_does_not_count_and_nan_does() -> None:
    metric = MeanLoss()
    metric.update(torch.tensor(2.0), 5)
    metric.update(torch.tensor(math.nan), 0)
    assert metric.compute().item() == 2.0
    metric.update(torch.tensor(math.nan), 1)
    assert math.isnan(metric.compute().item())


def test_two_processes_are_summed() -> None:
    first, second, both = Perplexity(), Perplexity(), Perplexity()
    for metric in (first, both):
        metric.update(torch.tensor(1.0), 4)
    for metric in (second, both):
        metric.update(torch.tensor(3.0), 1)
    first.total += second.total
    first.count += second.count
    assert first._reductions["total"] is first._reductions["count"]
    assert torch.equal(first.compute(), both.compute())
