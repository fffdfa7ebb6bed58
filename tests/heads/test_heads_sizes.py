import pytest
import torch
from torch import nn

from lightning_qk.heads.facts import layer_sizes, softmax_scaling
from lightning_qk.heads.layouts import CONTIGUOUS, SEPARATE
from lightning_qk.heads.projections import Sizes, UnreadLayer


class Bag:
    """Attributes by name."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def layer(**attributes):
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("attributes", "config", "rows", "order", "sizes"),
    [
        ({"num_heads": 4}, None, (32, 32), SEPARATE, (4, 4, 8)),
        ({"head_dim": 8}, None, (32, 16), SEPARATE, (4, 2, 8)),
        ({"n_heads": 4, "head_dim": 12}, Bag(num_attention_heads=2), (48, 12), SEPARATE, (4, 1, 12)),
        ({}, Bag(num_attention_heads=4, num_key_value_heads=2), (32, 16), SEPARATE, (4, 2, 8)),
        ({"head_dim": 8}, Bag(num_attention_heads=4, num_key_value_heads=2), (64, 64), CONTIGUOUS, (4, 2, 8)),
        ({"num_heads": 4}, Bag(num_key_value_heads=4), (48, 48), CONTIGUOUS, (4, 4, 4)),
        ({"num_heads": 4, "num_key_value_heads": 2}, None, (64, 64), CONTIGUOUS, (4, 2, 8)),
        # A number that is no head count of one layer.
        ({"num_heads": nn.ModuleList()}, Bag(num_attention_heads=4), (32, 32), SEPARATE, (4, 4, 8)),
        ({"heads": [2, 4]}, Bag(num_attention_heads=4), (32, 32), SEPARATE, (4, 4, 8)),
    ],
)
def test_sizes_explain_the_rows(attributes, config, rows, order, sizes):
    assert layer_sizes(layer(**attributes), config, rows, order.blocks) == Sizes(*sizes)


@pytest.mark.parametrize(
    ("attributes", "rows", "message"),
    [
        ({}, (32, 32), "neither it nor its config says"),
        ({"num_heads": 4, "head_dim": 8}, (64, 32), "64 and 32 rows, which heads = 4 and d_head = 8"),
        ({"num_heads": 4, "head_dim": 8}, (32, 24), "do not explain"),
        ({"head_dim": 64}, (32, 32), "d_head = 64 do not explain"),
    ],
)
def test_sizes_that_do_not_explain_the_rows_are_refused(attributes, rows, message):
    with pytest.raises(UnreadLayer, match=message):
        layer_sizes(layer(**attributes), None, rows, SEPARATE.blocks)


@pytest.mark.parametrize(
    ("attributes", "scaling"),
    [
        ({}, 0.25),
        ({"scaling": 0.1}, 0.1),
        ({"scaling": 1}, 1.0),
        ({"scale": torch.tensor(0.3)}, 0.3),
        ({"scale": True}, 0.25),
        ({"scale": False}, 1.0),
        ({"softmax_scale": 0.2}, 0.2),
        ({"scale_attn": 5.0}, 0.2),
        ({"norm_factor": torch.tensor(5.0)}, 0.2),
        ({"relative_attention_num_buckets": 32}, 1.0),
        # On q and on k.
        ({"scaling": 16**-0.25}, 0.25),
    ],
)
def test_scaling_by_attribute(attributes, scaling):
    assert softmax_scaling(layer(**attributes), 16) == pytest.approx(scaling)
