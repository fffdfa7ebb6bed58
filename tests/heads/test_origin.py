"""Whose classes are known."""

import functools

import pytest
import transformers
from heads_zoo import GQA
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrizations
from transformers.models.llama.modeling_llama import LlamaAttention

from lightning_qk.architecture.source_code import is_known


def _layer(kind=LlamaAttention):
    return kind(transformers.LlamaConfig(**GQA), 0)


class Renamed(LlamaAttention):
    """Nothing but another way to build it."""

    def __init__(self, config, index):
        super().__init__(config, index)
        self.extra = 1


class Overriding(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Helping(LlamaAttention):
    def rotate(self):
        return None


class Mixin:
    def forward(self, x):
        return x


class Mixed(Mixin, LlamaAttention):
    pass


@pytest.mark.parametrize("kind", [LlamaAttention, Renamed])
def test_library_classes_are_known(kind):
    assert is_known(_layer(kind))
    assert is_known(nn.MultiheadAttention(8, 2))


@pytest.mark.parametrize("kind", [Overriding, Helping, Mixed])
def test_classes_that_say_what_is_computed_are_not(kind):
    assert not is_known(_layer(kind))


def test_classes_that_are_made_while_the_program_runs_are_known_by_their_bases():
    sharded = type(
        "FSDPLlamaAttention", (FSDPModule, LlamaAttention), {"__module__": "torch.distributed.fsdp"}
    )
    layer = _layer()
    layer.__class__ = sharded
    assert is_known(layer)
    assert is_known(parametrizations.orthogonal(nn.MultiheadAttention(8, 2), "in_proj_weight"))
    mine = _layer()
    mine.__class__ = type("FSDPMine", (FSDPModule, Overriding), {"__module__": "torch.distributed.fsdp"})
    assert not is_known(mine)


def test_a_forward_of_the_instance_counts():
    layer = _layer()
    layer.forward = lambda x: x
    assert not is_known(layer)
    layer = _layer()
    layer._old_forward = layer.forward
    layer.forward = functools.partial(lambda own, x: x, layer)
    assert is_known(layer)


def test_a_forward_that_was_replaced_in_the_class_counts(monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, x: x)
    assert not is_known(_layer())
