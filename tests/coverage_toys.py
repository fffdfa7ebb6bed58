"""Toy models and what ran in them, made once."""

import functools

import torch
from torch import nn

from lightning_qk.heads.reader import find_attention
from lightning_qk.verification.trace import Event, Trace
from tools.coverage import catalogue
from tools.coverage.feed import feeds
from tools.coverage.toy import LADDER, build, shrunk


@functools.cache
def toy(model_type: str) -> nn.Module:
    """The smallest toy of a type that can be built."""
    for recipe in LADDER:
        try:
            config = shrunk(catalogue.config(model_type), recipe, model_type)
            return build(next(catalogue.classes(model_type)), config)
        except Exception:  # noqa: PERF203
            continue
    raise AssertionError(f"{model_type} cannot be built")


@functools.cache
def traced(model_type: str) -> tuple[nn.Module, dict[str, list[Event]]]:
    """A toy and the attentions of its first forward that runs, by layer."""
    model = toy(model_type)
    sites = find_attention(model)
    for given in feeds(model, model_type):
        trace = Trace(model)
        try:
            with torch.no_grad(), trace:
                model(**given)
        except Exception:
            continue
        events: dict[str, list[Event]] = {}
        for event in trace.events:
            name = next(frame.name for frame in reversed(event.frames) if frame.name in sites)
            events.setdefault(name, []).append(event)
        return model, events
    raise AssertionError(f"no forward of {model_type} ran")
