"""Layers stacked by shape, in batches of bounded size and in the order of memory."""

import models
import torch

from lightning_qk import head_projections
from lightning_qk.heads import reader as batches
from lightning_qk.heads.reader import ProjectionReader


def test_layers_of_one_shape_are_one_batch():
    projections = head_projections(models.t5())
    stacked = list(batches.layer_batches(projections))
    assert [name for batch in stacked for name in batch.names] == list(projections)
    assert len(stacked) == 1
    for index, name in enumerate(stacked[0].names):
        assert torch.equal(stacked[0].query[index], projections[name].query)
        assert torch.equal(stacked[0].key[index], projections[name].key)
        assert stacked[0].scaling[index] == projections[name].scaling


def test_a_batch_is_bounded(monkeypatch):
    projections = head_projections(models.t5())
    (head, *_) = projections.values()
    monkeypatch.setattr(batches, "LARGEST_BATCH", 2 * (head.query.numel() + head.key.numel()))
    sizes = [len(batch.names) for batch in batches.layer_batches(projections)]
    assert sizes == [2, 2, 2]
    monkeypatch.setattr(batches, "LARGEST_BATCH", 1)
    assert [len(batch.names) for batch in batches.layer_batches(projections)] == [1] * 6


def test_some_layers_of_a_reader():
    model = models.gpt2()
    reader = ProjectionReader(model)
    (name, *_) = reader
    (batch,) = batches.layer_batches(reader, [name])
    assert batch.names == (name,)
    # Conv1D keeps its weight by columns, and so does the stack.
    assert batch.query.stride(-2) == 1
    assert torch.equal(batch.query[0], reader[name].query)
