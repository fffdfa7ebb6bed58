import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lightning_qk.heads.module_projection import projection_of
from lightning_qk.heads.projections import UnreadLayer


class OwnLinear(nn.Module):
    """A linear map of a model's own, stored either way."""

    def __init__(self, transposed, width=4):
        super().__init__()
        self.transposed = transposed
        self.weight, self.bias = nn.Parameter(torch.randn(4, width)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(x, self.weight.T if self.transposed else self.weight, self.bias)


class Gated(nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("module", [nn.Linear(3, 5), Conv1D(5, 3), OwnLinear(False), OwnLinear(True)])
def test_the_map_is_the_modules_own(module):
    width = 4 if isinstance(module, OwnLinear) else 3
    x = torch.randn(2, width)
    weight, bias = projection_of(module, "q").read()
    torch.testing.assert_close(F.linear(x, weight, bias), module(x))
    assert weight.data_ptr() == module.weight.data_ptr()


def test_a_linear_map_without_bias():
    assert projection_of(nn.Linear(3, 5, bias=False), "q").read().bias is None


def test_a_module_that_does_more_is_refused():
    with pytest.raises(UnreadLayer, match="'q' is a Gated, which does more than multiply"):
        projection_of(Gated(3, 5), "q").read()
