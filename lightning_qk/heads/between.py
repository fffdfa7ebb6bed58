"""What stands between projection and product in layers of known classes: clamps, and products over tokens."""

import inspect
import weakref
from typing import Any

import torch
from torch import nn

from lightning_qk.architecture.source_code import names_in, uses_interface
from lightning_qk.heads.errors import UnreadLayer
from lightning_qk.heads.probing import own_random_numbers
from lightning_qk.heads.running import Bench, constant
from lightning_qk.heads.trials import trials

CHANNELS = "it attends over channels: its products are sums over tokens, and its softmax is over channels"
_CLIP = "clip_qkv"

_KNOWN: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()


def configured_clip(module: nn.Module, config: Any) -> float | None:
    """The bound that a layer's forward clamps its projections to, as OLMo, MPT and DBRX call it; None without."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or _CLIP not in names_in(code):
        return None
    for owner in (module, config):
        value = getattr(owner, _CLIP, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return None


def attends_over_channels(module: nn.Module, config: Any = None) -> bool:
    """Whether the axis that a layer's products sum over grows with the number of tokens.

    Seen from a run of the layer alone, once for each class; False where it cannot be run.
    """
    kind: Any = type(module)
    if uses_interface(module) or isinstance(module, nn.MultiheadAttention):
        return False
    if kind not in _KNOWN:
        _KNOWN[kind] = _sums_over_tokens(module, config)
    return _KNOWN[kind]


def _sums_over_tokens(module: nn.Module, config: Any) -> bool:
    try:
        bench = Bench(module)
    except UnreadLayer:
        return False
    device = bench.device()
    if device.type == "meta" or not bench.emitters:
        return False
    emission = constant(torch.ones(bench.size))
    with torch.no_grad(), own_random_numbers(device):
        for place, trial in enumerate(trials(module, config, bench.widths()[:1], device)):
            if place > 6:
                break
            if trial.wider is None or trial.tokens == trial.wider.tokens or trial.tokens == 1:
                continue
            seen = [bench.run(own, emission) for own in (trial, trial.wider)]
            if not all(own.products for own in seen):
                continue
            widths = [{product.query.shape[-1] for product in own.products} for own in seen]
            return widths == [{trial.tokens}, {trial.wider.tokens}]
    return False
