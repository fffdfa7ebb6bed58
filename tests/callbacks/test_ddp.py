"""Two processes on gloo against one."""

from pathlib import Path

import pytest
import torch
from processes import run_script

from lightning_qk.callbacks.monitors._report import REPORT_NAME

# Of six monitors at a measured step: all sums, all maxima, and what one process could not compute.
COLLECTIVES = 3


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    for processes in (1, 2):
        run_script(Path(__file__).with_name("ddp_job.py"), folder, processes, processes=processes)
    return {name: torch.load(folder / f"{name}.pt") for name in ("1_0", "2_0", "2_1")} | {"folder": folder}


def error(got: dict, want: dict) -> float:
    return max(((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-12)).item() for name in want)


def test_the_callbacks_gradient_is_that_of_a_loss_term(results):
    for rank in ("2_0", "2_1"):
        assert error(results[rank]["callback"], results[rank]["term"]) < 1e-5
    # And the same as in one process with the whole batch.
    assert error(results["2_0"]["callback"], results["1_0"]["callback"]) < 1e-4


@pytest.mark.parametrize("case", ["share by tokens", "limit"])
def test_tokens_and_share_of_the_penalty_are_those_of_all_ranks(results, case):
    one, other, alone = (results[run][case] for run in ("2_0", "2_1", "1_0"))
    for name, gradient in one.items():
        assert torch.equal(gradient, other[name]), name
    assert error(one, alone) < 1e-4
    assert error(one, results["2_0"]["callback"]) > 0.01


def test_collective_calls_of_a_step(results):
    assert results["2_0"]["collectives"] == results["2_1"]["collectives"]
    # The first step has the check of what is read, the first measurement settles shapes, the fourth step ends an
    # epoch; of the others every second one is measured. Lightning sends a word on signals at each.
    ordinary, measured = results["2_0"]["collectives"][4:6]
    assert ordinary == {"broadcast": 1}
    assert measured.keys() == {"broadcast", "all_reduce"}
    assert measured["broadcast"] == 1
    assert measured["all_reduce"] == COLLECTIVES


def test_attention_is_pooled_over_ranks(results):
    for rank in ("2_0", "2_1"):
        for name, want in results["1_0"]["attention"].items():
            torch.testing.assert_close(
                results[rank]["attention"][name], want, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name
            )


def test_hidden_states_are_pooled_over_ranks(results):
    assert results["1_0"]["hidden"]["rank_residual"].isfinite().all()
    for rank in ("2_0", "2_1"):
        for name, want in results["1_0"]["hidden"].items():
            torch.testing.assert_close(
                results[rank]["hidden"][name], want, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
            )


def test_sinks_and_positions_are_pooled_over_ranks(results):
    for rank in ("2_0", "2_1"):
        for name, want in results["1_0"]["sinks"].items():
            got = results[rank]["sinks"][name]
            if name == "waiver_position":  # compares the sequences of one process
                assert got.isfinite().any()
                continue
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
        # One function of the distance is fitted to the sequences of one process.
        got, want = (results[one]["position"]["positional_share"] for one in (rank, "1_0"))
        torch.testing.assert_close(got, want, rtol=0, atol=0.1)
    for group in ("sinks", "position"):
        for name, value in results["2_0"][group].items():
            assert torch.equal(value.nan_to_num(7.0), results["2_1"][group][name].nan_to_num(7.0))


def test_token_moments_are_pooled_over_ranks_and_each_predicts_its_share(results):
    assert results["1_0"]["tokens"]["trace"].isfinite().all()
    assert results["1_0"]["pred"]["semantic_share"].isfinite().all()
    for rank in ("2_0", "2_1"):
        for group in ("tokens", "pred"):
            for name, want in results["1_0"][group].items():
                # The surrogate's softmax is that of slightly other moments.
                torch.testing.assert_close(
                    results[rank][group][name], want, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
                )


def test_spectra_and_logged_values_agree(results):
    for rank in ("2_0", "2_1"):
        for name, want in results["1_0"]["spectrum"].items():
            torch.testing.assert_close(
                results[rank]["spectrum"][name], want, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
            )
    assert results["2_0"]["metrics"].keys() == results["2_1"]["metrics"].keys()
    for key, value in results["2_0"]["metrics"].items():
        if key.startswith(("attn/", "qk/", "hidden/", "pred/")):
            assert value == pytest.approx(results["2_1"]["metrics"][key], rel=1e-5, abs=1e-7)


def test_validation_is_pooled_over_ranks(results):
    keys = [key for key in results["1_0"]["metrics"] if key.startswith("attn/val/")]
    assert "attn/val/entropy/mean" in keys
    # These two compare the sequences of one process.
    apart = ("waiver_position", "positional_share")
    for key in (key for key in keys if not any(name in key for name in apart)):
        for rank in ("2_0", "2_1"):
            got, want = results[rank]["metrics"][key], results["1_0"]["metrics"][key]
            assert got == pytest.approx(want, rel=1e-3, abs=1e-5), key


def test_one_report(results):
    assert len(list((results["folder"] / "lightning_logs" / "2").rglob(REPORT_NAME))) == 1
