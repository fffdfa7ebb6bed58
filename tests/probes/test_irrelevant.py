"""Attention on marked tokens against the models' own maps."""

import models
import pytest
import torch

from lightning_qk.probes import irrelevant_mass

IDS = torch.randint(3, models.VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
MARKED = torch.zeros(2, 10, dtype=torch.bool)
MARKED[0, [1, 2, 7]] = True
MARKED[1, [0, 5, 6]] = True  # one of them padding


@pytest.mark.parametrize("kind", ["gpt2", "bert", "mistral", "gpt_oss"])
def test_mass_of_the_rows_that_can_choose(kind):
    model = getattr(models, kind)(attn_implementation="eager").eval()
    given = {"input_ids": IDS, "attention_mask": MASK}
    got = irrelevant_mass(model, given, MARKED)
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    for mass, each in zip(got.values(), maps, strict=True):
        want = [[] for _ in range(4)]
        for b in range(2):
            for h in range(4):
                for i in range(10):
                    row = each[b, h, i].double()
                    visible = row > 0
                    if MASK[b, i] and not MARKED[b, i] and (visible & MARKED[b]).any():
                        want[h].append(row[MARKED[b]].sum())
        want = torch.stack([torch.stack(rows).mean() for rows in want])
        torch.testing.assert_close(mass.double(), want, atol=1e-6, rtol=1e-5)


def test_nothing_marked_and_everything():
    model = models.bert()
    for marked in (torch.zeros_like(MARKED), torch.ones_like(MARKED)):
        out = irrelevant_mass(model, {"input_ids": IDS}, marked)
        assert all(mass.isnan().all() for mass in out.values())


def test_marks_of_another_form():
    for marked in (MARKED.long(), MARKED[0], [1]):
        with pytest.raises(ValueError, match="irrelevant as a boolean tensor"):
            irrelevant_mass(models.bert(), {"input_ids": IDS}, marked)
    with pytest.raises(ValueError, match="are not the 9 tokens of 2"):
        irrelevant_mass(models.bert(), {"input_ids": IDS}, MARKED[:, :9])
