import pytest
import torch
from heads_oracle import project
from torch import nn

from lightning_qk.heads.reader import head_projections

pytestmark = pytest.mark.usefixtures("code_of_a_library")


class NormedAttention(nn.Module):
    """q and k of 2 heads, normalized per head or over the whole width; it stands for a class of transformers."""

    __module__ = "transformers.models.normed"

    def __init__(self, norm, full_width):
        super().__init__()
        self.num_heads, self.full_width = 2, full_width
        self.q_proj, self.k_proj = nn.Linear(6, 8), nn.Linear(6, 8)
        self.q_norm, self.k_norm = norm(8 if full_width else 4), norm(8 if full_width else 4)

    def queries(self, x):
        q = self.q_proj(x)
        q = self.q_norm(q) if self.full_width else self.q_norm(q.unflatten(-1, (2, 4))).flatten(-2)
        return q.unflatten(-1, (2, 4)).transpose(1, 2)


@pytest.mark.parametrize("full_width", [True, False])
@pytest.mark.parametrize("norm", [lambda d: nn.LayerNorm(d, bias=False), nn.RMSNorm])
def test_folded_weights_point_where_the_normalized_queries_point(norm, full_width):
    torch.manual_seed(0)
    attention = NormedAttention(norm, full_width)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    (heads,) = head_projections(attention).values()
    x = torch.randn(3, 5, 6)
    ours, theirs = project(heads.query, heads.query_bias, x), attention.queries(x)
    assert heads.qk_norm
    cosine = torch.cosine_similarity(ours, theirs, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-5)
    if full_width:
        # One factor a token for all heads.
        ratio = ours.norm(dim=-1) / theirs.norm(dim=-1)
        torch.testing.assert_close(ratio[:, 0], ratio[:, 1], rtol=1e-4, atol=0)


def test_gradients_reach_the_gains():
    attention = NormedAttention(nn.RMSNorm, False)
    (heads,) = head_projections(attention).values()
    (heads.query.square().sum() + heads.key.square().sum()).backward()
    assert attention.q_norm.weight.grad.abs().min() > 0
    assert attention.k_norm.weight.grad.abs().min() > 0


def test_an_identity_in_its_place_is_no_norm():
    attention = NormedAttention(nn.RMSNorm, False)
    attention.q_norm = attention.k_norm = nn.Identity()
    (heads,) = head_projections(attention).values()
    assert not heads.qk_norm
    assert heads.query.data_ptr() == attention.q_proj.weight.data_ptr()


@pytest.mark.parametrize("is_before", [True, False])
def test_a_norm_that_is_named_for_queries_may_act_on_the_layers_input(is_before):
    class Attention(nn.Module):
        """Width of the input and of all heads are the same: the norm's width does not tell."""

        __module__ = "transformers.models.normed"

        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.q_proj, self.k_proj = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.q_norm, self.k_norm = nn.RMSNorm(8), nn.RMSNorm(8)

        def forward(self, hidden_states, cross_attention_states=None):
            if is_before:
                query = self.q_proj(self.q_norm(hidden_states))
                return query, self.k_proj(self.k_norm(cross_attention_states))
            return self.q_norm(self.q_proj(hidden_states)), self.k_norm(self.k_proj(cross_attention_states))

        forward.__module__ = "transformers.models.normed"

    attention = Attention()
    nn.init.uniform_(attention.q_norm.weight, 0.5, 2.0)
    (heads,) = head_projections(attention).values()
    assert heads.qk_norm is not is_before
    assert torch.equal(heads.query.flatten(0, 1), attention.q_proj.weight) is is_before
