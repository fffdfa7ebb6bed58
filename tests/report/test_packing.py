"""Numbers that travel in the page: rounded by little, nothing lost."""

import math

import numpy as np
import torch
from packed import unpack

from lightning_qk.report.packing import Pack


def test_numbers_survive() -> None:
    pack = Pack()
    values = torch.cat(
        [torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.tensor([0.0, 1.0, 0.99999994])]
    )
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 3.4028e38, -1e-45])
    where = [pack.add(values), pack.add(special)]
    content, numbers = unpack(pack.text({"where": where, "name": "χ"}))
    assert content == {"where": where, "name": "χ"}
    start, size = content["where"][0]
    np.testing.assert_allclose(numbers[start : start + size], values.numpy(), rtol=2.0**-12)
    got = numbers[where[1][0] :]
    assert math.isnan(got[0])
    assert got[1:3].tolist() == [math.inf, -math.inf]
    assert got[4] > 3.4e38


def test_nothing_is_packed_too() -> None:
    content, numbers = unpack(Pack().text({}))
    assert content == {}
    assert len(numbers) == 0


def test_the_same_numbers_make_the_same_text() -> None:
    texts = set()
    for _ in range(2):
        pack = Pack()
        pack.add(torch.arange(10))
        texts.add(pack.text({"a": 1}))
    assert len(texts) == 1


def test_random_numbers_take_less_than_three_letters() -> None:
    pack = Pack()
    pack.add(torch.randn(100_000))
    assert len(pack.text({})) < 100_000 * 2.75
