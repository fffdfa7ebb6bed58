"""What the heads of a trained network do on real tokens, and what their layers' inputs are like.

Attention is taken at the attention calls by the package's own capture, as its monitor does it; the inputs of the
projections by a hook.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qk.capture.capture import AttentionCapture
from lightning_qk.capture.captured import CapturedCall
from lightning_qk.functional.attention import attention_sums
from lightning_qk.heads.reader import find_attention
from lightning_qk.metrics.attention import AttentionStatistics

LAGS = (1, 2, 4, 8, 16, 32)


@dataclass
class Tokens:
    """Moments of what enters a layer's projections, over all tokens of all sequences, in float64.

    Attributes:
        mean: shape ``(d,)``.
        covariance: around the mean of all tokens, ``(d, d)``.
        second_moment: ``(d, d)``.
        increments: second moment of ``x_t − x_{t−1}``, ``(d, d)``.
        growth: ``E|x_{t+k} − x_t|² / E|x_{t+1} − x_t|²`` for each lag k of ``LAGS``: k for a random walk, 1 for
            independent tokens.
    """

    mean: Tensor
    covariance: Tensor
    second_moment: Tensor
    increments: Tensor
    growth: list[float]


@dataclass
class Observed:
    """What one network did.

    Attributes:
        statistics: layer → statistic of :func:`lightning_qk.functional.attention_statistics` → ``(heads,)``.
        by_theta: layer → share of pairs in the linear window by relative position of the key, ``(bins, heads)``.
        tokens: layer → moments of its inputs.
        is_causal: keys come before their query.
    """

    statistics: dict[str, dict[str, Tensor]]
    by_theta: dict[str, Tensor]
    tokens: dict[str, Tokens]
    is_causal: bool


def linear_by_theta(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    is_causal: bool,
    bins: int,
    min_keys: int = 16,
) -> tuple[Tensor, Tensor]:
    """Pairs in the linear window, and all pairs, by relative position θ of the key among those that a row sees.

    Rows see all keys, or those up to their own position; rows with fewer than ``min_keys`` are left out.

    Returns:
        Two tensors ``(bins, heads)`` of counts over sequences and rows.
    """
    groups = query.shape[1] // key.shape[1]
    logits = scaling * query.double() @ key.double().repeat_interleave(groups, 1).mT
    n = logits.shape[-1]
    place = torch.arange(n)
    if is_causal:
        seen = place <= place[:, None]
    else:
        seen = torch.ones(n, n, dtype=torch.bool)
    number = seen.sum(-1, keepdim=True)
    mean = (logits * seen).sum(-1, keepdim=True) / number
    window = (1 + logits - mean) / number
    inside = (window > 0) & (window < 1)
    counted = seen & (number >= min_keys)
    which = ((place + 0.5) / number * bins).long().clamp_max(bins - 1)
    linear, total = (torch.zeros(bins, query.shape[1], dtype=torch.float64) for _ in range(2))
    for index in range(bins):
        here = counted & (which == index)
        linear[index] = (inside & here).sum((0, 2, 3))
        total[index] = here.sum() * query.shape[0]
    return linear, total


class _Sums:
    """Running sums of a layer's inputs."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Any = 0.0
        self.second: Any = 0.0
        self.steps = 0
        self.increments: Any = 0.0
        self.moved = torch.zeros(len(LAGS), dtype=torch.float64)
        self.pairs = torch.zeros(len(LAGS), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        x = x.detach().double()
        flat = x.flatten(0, 1)
        self.count += len(flat)
        self.first = self.first + flat.sum(0)
        self.second = self.second + flat.mT @ flat
        steps = (x[:, 1:] - x[:, :-1]).flatten(0, 1)
        self.steps += len(steps)
        self.increments = self.increments + steps.mT @ steps
        for place, lag in enumerate(LAGS):
            if lag < x.shape[1]:
                moved = (x[:, lag:] - x[:, :-lag]).square().sum(-1)
                self.moved[place] += moved.sum()
                self.pairs[place] += moved.numel()

    def moments(self) -> Tokens:
        mean, second = self.first / self.count, self.second / self.count
        far = self.moved / self.pairs
        return Tokens(
            mean,
            second - torch.outer(mean, mean),
            second,
            self.increments / self.steps,
            (far / far[0]).tolist(),
        )


@torch.no_grad()
def observe(network: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, bins: int = 16) -> Observed:
    """Run a network on batches without padding and pool what its heads do.

    Raises:
        RuntimeError: an attention call that could not be read.
    """
    modules = find_attention(network)
    sums: dict[str, list[Any]] = {name: [] for name in modules}
    linear: dict[str, Any] = dict.fromkeys(modules, 0.0)
    total: dict[str, Any] = dict.fromkeys(modules, 0.0)
    inputs = {name: _Sums() for name in modules}
    causal = set()

    def hear(name: str, call: CapturedCall) -> None:
        given = call.logits(self_attention=True)
        sums[name].append(attention_sums(given))
        if given.mask is not None:
            raise ValueError("expected batches without padding")
        found = linear_by_theta(
            given.query,
            given.key,
            scaling=given.scaling,
            is_causal=given.is_causal,
            bins=bins,
        )
        causal.add(given.is_causal)
        linear[name], total[name] = linear[name] + found[0], total[name] + found[1]

    def take(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name].add(args[0] if args else kwargs["hidden_states"])

        return hook

    capture = AttentionCapture({module: name for name, module in modules.items()}, hear, model=network)
    hooks = [
        module.register_forward_pre_hook(take(name), with_kwargs=True) for name, module in modules.items()
    ]
    was_training = network.training
    network.eval()
    capture.install()
    try:
        capture.enabled = True
        for batch in batches:
            network(**batch)
    finally:
        capture.remove()
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    if capture.problems:
        raise RuntimeError(f"expected calls that can be read, got {capture.problems}")
    metric = AttentionStatistics({name: calls[0].total.shape[-1] for name, calls in sums.items()})
    metric.update(sums)
    values = {statistic: metric.split(flat.reshape(-1)) for statistic, flat in metric.compute().items()}
    return Observed(
        {name: {statistic: split[name] for statistic, split in values.items()} for name in modules},
        {name: linear[name] / total[name] for name in modules},
        {name: inputs[name].moments() for name in modules},
        causal == {True},
    )
