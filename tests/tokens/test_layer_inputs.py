"""Tokens that enter attention layers: whose they are, and which are left out."""

import pytest
import torch

from lightning_qk.tokens import LayerInputs


@pytest.mark.parametrize("batch_first", [False, True])
def test_tokens_of_torchs_attention_leave_its_padding_out(batch_first):
    x, keep = torch.randn(3, 5, 16), torch.ones(3, 5, dtype=torch.bool)
    keep[0, 3:] = keep[2, 4:] = False
    model = torch.nn.MultiheadAttention(16, 2, batch_first=batch_first)
    entered = x if batch_first else x.transpose(0, 1)
    with LayerInputs(model, tokens=64) as inputs:
        model(entered, entered, entered, key_padding_mask=~keep)
    tokens, weight = inputs.inputs()[""]
    found = {tuple(row) for row in tokens[weight > 0].tolist()}
    # First tokens of sequences are left out too.
    assert found == {tuple(row) for row in x[:, 1:][keep[:, 1:]].tolist()}


@pytest.mark.parametrize("batch_first", [False, True])
def test_as_many_tokens_as_sequences_are_told_apart(batch_first):
    """Of a square batch no shape says which axis is which."""
    x, keep = torch.randn(4, 4, 16), torch.ones(4, 4, dtype=torch.bool)
    keep[1, 2:] = False
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    entered = x if batch_first else x.transpose(0, 1)
    with LayerInputs(model, tokens=64) as inputs:
        model(entered, src_key_padding_mask=~keep)
    (name,) = inputs.names
    tokens, weight = inputs.inputs()[name]
    found = {tuple(row) for row in tokens[weight > 0].tolist()}
    assert found == {tuple(row) for row in x[:, 1:][keep[:, 1:]].tolist()}
