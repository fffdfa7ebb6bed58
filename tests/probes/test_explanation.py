"""Attention as explanation: one token at a time, the model's own maps, scipy's τ."""

import models
import pytest
import torch
from scipy.stats import kendalltau

from lightning_qk.probes import attention_as_explanation

MASK = torch.tensor([[1] * 10, [1] * 7 + [0] * 3])
IDS = torch.randint(3, models.VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))


def brute(model, *, last: bool, mask_token: int | None, from_last: bool = False) -> list[list[float]]:
    """τ by layer and head over every token that may be masked."""
    model = model.eval()
    taus = None
    for ids, mask in zip(IDS, MASK, strict=True):
        n = int(mask.sum())
        ids = ids[:n][None]
        with torch.no_grad():
            out = model(input_ids=ids, output_attentions=True)
            places = range(n - 1) if last else range(n)
            effects = []
            for place in places:
                if mask_token is None:
                    hidden = torch.ones(1, n, dtype=torch.long)
                    hidden[0, place] = 0
                    other = model(input_ids=ids, attention_mask=hidden).logits
                else:
                    changed = ids.clone()
                    changed[0, place] = mask_token
                    other = model(input_ids=changed).logits
                each = (out.logits.double().softmax(-1) - other.double().softmax(-1)).abs().sum(-1)[0] / 2
                read = [n - 1] if last else [i for i in range(n) if i != place]
                effects.append(each[read].mean().item())
        one = []
        for layer in out.attentions:
            one.append([])
            for head in layer[0].double():
                rows = head[-1:] if from_last else head
                attention = [(rows[:, j].sum() / (rows[:, j] > 0).sum()).item() for j in places]
                one[-1].append(kendalltau(attention, effects).statistic)
        taus = [one] if taus is None else [*taus, one]
    return torch.tensor(taus).nanmean(0)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama"])
@pytest.mark.parametrize("mask_token", [None, 1])
def test_every_token_by_brute_force(kind, mask_token):
    model = getattr(models, kind)(attn_implementation="eager")
    got = attention_as_explanation(
        model, {"input_ids": IDS, "attention_mask": MASK}, tokens=10, mask_token_id=mask_token
    )
    want = brute(model, last=kind != "bert", mask_token=mask_token)
    assert [name.split(".")[-1] for name in got] == [
        {"gpt2": "attn", "bert": "self"}.get(kind, "self_attn")
    ] * 2
    torch.testing.assert_close(torch.stack(list(got.values())), want.float(), atol=1e-5, rtol=0)


def test_the_last_row_and_all_positions():
    model = models.gpt2(attn_implementation="eager")
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    got = attention_as_explanation(model, given, tokens=10, mask_token_id=1, rows="last")
    want = brute(model, last=True, mask_token=1, from_last=True)
    torch.testing.assert_close(torch.stack(list(got.values())), want.float(), atol=1e-5, rtol=0)
    everywhere = attention_as_explanation(model, given, tokens=10, mask_token_id=1, read="all")
    want = brute(model, last=False, mask_token=1)
    torch.testing.assert_close(torch.stack(list(everywhere.values())), want.float(), atol=1e-5, rtol=0)


class Headless(torch.nn.Module):
    """Returns hidden states alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.bert(attn_implementation="eager").bert
        self.config = self.model.config

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_without_a_head_and_sampled_tokens():
    model = Headless()
    given = {"input_ids": IDS, "attention_mask": MASK}
    first, again = (attention_as_explanation(model, given, tokens=5) for _ in range(2))
    for name, tau in first.items():
        assert tau.shape == (4,)
        assert (tau.abs() <= 1).all()
        assert torch.equal(tau, again[name])
    other = attention_as_explanation(model, given, tokens=5, generator=torch.Generator().manual_seed(7))
    assert any(not torch.equal(first[name], other[name]) for name in first)
    few = torch.zeros(2, 10, dtype=torch.bool)
    few[0, 2:4] = True  # two tokens of the first sequence, none of the second
    taus = torch.stack(list(attention_as_explanation(model, given, candidates=few).values()))
    assert (taus.abs() == 1).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_row_that_sees_nothing_any_more_is_no_trouble(kind):
    """The first token of a causal model sees itself alone, until it is masked."""
    taus = []
    for implementation in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = getattr(models, kind)(attn_implementation=implementation)
        taus.append(
            torch.stack(list(attention_as_explanation(model, {"input_ids": IDS}, tokens=10).values()))
        )
    assert taus[0].isfinite().all()
    torch.testing.assert_close(*taus)


def test_what_is_refused():
    given = {"input_ids": IDS}
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*pass its encoder"):
        attention_as_explanation(models.t5(), given)
    with pytest.raises(ValueError, match="tokens to be at least 2"):
        attention_as_explanation(models.gpt2(), given, tokens=1)
    with pytest.raises(ValueError, match="GPT2LMHeadModel with input_ids or inputs_embeds"):
        attention_as_explanation(models.gpt2(), {})
    with pytest.raises(TypeError, match="mapping of the model's keyword arguments, got Tensor"):
        attention_as_explanation(models.gpt2(), IDS)
    with pytest.raises(ValueError, match="candidates as a boolean tensor"):
        attention_as_explanation(models.gpt2(), given, candidates=torch.ones(2, 10))
