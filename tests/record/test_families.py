"""Every statistic, and every key that follows from it, belongs to one family."""

import pytest

from lightning_qk.record.families import FAMILIES, OTHER, checked_families
from lightning_qk.record.statistics import STATISTICS, describe, of_key


def test_every_statistic_is_in_a_family_and_every_family_has_one() -> None:
    assert {one.family for one in STATISTICS.values()} == set(FAMILIES) - {OTHER}


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("attn/health", "health"),
        ("attn/layer_03/head_05/entropy", "entropy"),
        ("attn/val/sink_first/mean/dataloader_idx_1", "sinks"),
        ("attn/heatmap/positional_share", "position"),
        ("qk/encoder_layer_03/eig_var", "spectrum"),
        ("qk/eigenvalues/modulus", "spectrum"),
        ("qk/offset_16/frobenius_sq/mean", "moments"),
        ("qk/effective_rank/max", "singular"),
        ("qk/update_delta2_norm/mean", "updates"),
        ("qk/tokens/offset_-1/eig_var/mean", "tokens"),
        ("pred/entropy/mean", "predictions"),
        ("hidden/embedding/effective_rank", "rank"),
        ("hidden/activation_max/max", "activations"),
        ("probe/heads/sink", "probes"),
        ("guard/entropy", "guard"),
        ("clip/a_name/max_logit/max", "interventions"),
        ("attn/decided/mean", "other"),
        ("train/loss", "other"),
    ],
)
def test_families_of_keys(key: str, family: str) -> None:
    assert getattr(of_key(key), "family", OTHER) == family


def test_statistics_of_others_are_in_none_of_ours() -> None:
    assert describe("decided", "attn").family == OTHER
    assert describe("offset_4/decided", "qk").family == OTHER
    assert describe("decided", "tokens").family == "tokens"
    assert describe("entropy_se", "attn").family == "entropy"


def test_names_are_checked() -> None:
    assert checked_families("families", "entropy") == ("entropy",)
    assert checked_families("families", ["rank", "entropy", "rank"]) == ("rank", "entropy")
    with pytest.raises(
        ValueError, match=r"expected exclude among health, .*got 'entropi': did you mean 'entropy'\?"
    ):
        checked_families("exclude", ["rank", "entropi"])
