"""What inspect says of weights, against the dense form of the loaded model, norms folded by default."""

from pathlib import Path

import models
import pytest
import torch
from torch import Tensor, nn

from lightning_qk import head_projections
from lightning_qk.inspect import Options, open_source
from lightning_qk.inspect.layer_values import SOLVED_STATISTICS, TRACE_STATISTICS
from lightning_qk.inspect.read import Reading, read_checkpoint, record_of
from lightning_qk.record.statistics import describe
from lightning_qk.record.verdicts import head_health


def read(model: nn.Module, folder: Path, **how: bool) -> Reading:
    model.save_pretrained(folder)  # type: ignore[operator]
    return read_checkpoint(open_source(str(folder), Options())[0], **how)[0]


def stirred(model: nn.Module) -> nn.Module:
    """With gains of norms that differ from 1, and a coordinate that counts more."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.dim() == 1 and "norm" in name) or "ln_" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("fold_norm", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_statistics_are_those_of_the_dense_form(name: str, fold_norm: bool, tmp_path: Path) -> None:
    model = stirred(getattr(models, name)())
    found = read(model, tmp_path, fold_norm=fold_norm)
    assert found.facts["Norms in front"] == (
        "left out, as asked"
        if not fold_norm
        else "none feeds a layer that can be folded"
        if name == "bert"
        else "folded into the weights"
    )
    layers = head_projections(model.double(), fold_norm=fold_norm)
    for place, own in enumerate(layers.values()):
        key = own.key.repeat_interleave(own.heads // own.kv_heads, 0)
        form = (own.scaling * own.query.mT @ key).detach()
        width = form.shape[-1]

        def check(statistic: str, want: Tensor, place: int = place) -> None:
            got = found.split(found.values[statistic])[place].double()
            torch.testing.assert_close(
                got, want.double(), rtol=2e-3, atol=2e-5, msg=lambda m: f"{statistic} {m}"
            )

        eigenvalues = torch.linalg.eigvals(form)
        energy = torch.linalg.svdvals(form).square()
        share = energy / energy.sum(-1, keepdim=True)
        norm = form.square().sum((1, 2))
        check("logit_eig_mean", eigenvalues.real.mean(-1))
        check("logit_eig_var", (eigenvalues - eigenvalues.mean(-1, keepdim=True)).square().mean(-1).real)
        check("logit_sym_var", torch.linalg.eigvalsh((form + form.mT) / 2).var(-1, correction=0))
        check("symmetry", (form * form.mT).sum((1, 2)) / norm)
        check("positivity", eigenvalues.sum(-1).real / eigenvalues.abs().sum(-1))
        check("circle_ratio", eigenvalues.abs().amax(-1) / (norm / width).sqrt())
        check("stable_rank", norm / energy[:, 0])
        check("effective_rank_energy", torch.special.entr(share).sum(-1).exp())
        check("participation_rank", 1 / share.square().sum(-1))
        whole = form.sum(0)
        symmetry = (whole * whole.mT).sum() / whole.square().sum()
        assert float(found.layer_values["symmetry_summed"][place]) == pytest.approx(float(symmetry), abs=1e-5)


def test_moments_alone_need_no_eigenproblem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigvals", None)
    found = read(models.llama(), tmp_path, eigenvalues=False)
    assert set(found.values) == set(TRACE_STATISTICS)
    assert set(found.layer_values) == {"symmetry_summed", "directionality_summed"}


def test_cross_attention_has_ranks_alone(tmp_path: Path) -> None:
    found = read(models.t5(), tmp_path)
    place = found.self_attention.index(False)
    known = {name for name, flat in found.values.items() if found.split(flat)[place].isfinite().all()}
    assert known == {"singular_max", "stable_rank", "effective_rank_energy"}
    assert found.layer_values["symmetry_summed"][place].isnan()


def test_wide_layers_are_summed_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_qk.inspect.layer_values._CHEAP", 100)
    found = read(models.llama(), tmp_path)
    assert not found.layer_values
    assert any("--summed" in note for note in found.notes)
    assert read(models.llama(), tmp_path, summed=True).layer_values


def test_random_weights_are_fresh_and_others_not_judged(tmp_path: Path) -> None:
    fresh = read(models.gpt2(), tmp_path / "fresh")
    assert {row.verdict for row in head_health(record_of([fresh]))} == {"fresh"}
    model = models.gpt2()
    with torch.no_grad():
        for layer in head_projections(model).values():
            layer.key.copy_(layer.query)  # as symmetric as can be
    learnt = read(model, tmp_path / "learnt")
    assert {row.verdict for row in head_health(record_of([learnt]))} == {"not judged"}


def test_every_statistic_has_a_meaning() -> None:
    names = (*TRACE_STATISTICS, *SOLVED_STATISTICS, "symmetry_summed", "directionality_summed")
    assert all(describe(name, "spectrum").meaning for name in names)
    assert describe("sink_heads", "attention").meaning
