"""Weights that are kept as factors: those of normalizations, of pruning, and of SigmaReparam."""

import copy
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import save_file
from test_inspect_read import check, read
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lightning_qk.inspect.documents import BadInput
from lightning_qk.interventions import add_sigma_reparam

Change = Callable[[nn.Module], object]


def projections(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for name, module in model.named_modules()
        if name.endswith((".q_proj", ".k_proj", ".c_attn", ".query", ".key"))
    ]


def each(change: Change) -> Change:
    return lambda model: [change(module) for module in projections(model)]


def with_spectral_norm(module: nn.Module) -> None:
    spectral_norm(module)
    module(torch.randn(3, module.in_features))


FORMS: dict[str, Change] = {
    "weight_norm": each(weight_norm),
    "weight_norm, columns": each(lambda module: weight_norm(module, dim=1)),
    "weight_norm, whole": each(lambda module: weight_norm(module, dim=None)),
    "parametrizations.weight_norm": each(parametrizations.weight_norm),
    "parametrizations.weight_norm, whole": each(
        lambda module: parametrizations.weight_norm(module, dim=None)
    ),
    "spectral_norm": each(with_spectral_norm),
    "parametrizations.spectral_norm": each(parametrizations.spectral_norm),
    "pruning": each(lambda module: prune.random_unstructured(module, "weight", amount=0.3)),
    "SigmaReparam": add_sigma_reparam,
}


def moved(model: nn.Module) -> nn.Module:
    """Parameters that training has moved off what the form began with."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("weight_g", "original0", "gain")):
                parameter.mul_(1 + torch.rand_like(parameter))
            elif name.endswith(("weight_v", "original1", "original", "weight_orig")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def plain(model: nn.Module) -> dict[str, Tensor]:
    """Weights that act, by the model's own computation."""
    effective = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_orig") or hasattr(module, "weight_v"):
            for hook in module._forward_pre_hooks.values():
                hook(module, ())  # what a forward does first
        if (
            hasattr(module, "weight_orig")
            or hasattr(module, "weight_v")
            or parametrize.is_parametrized(module)
        ):
            effective[f"{name}.weight"] = module.weight.detach().clone()
    return effective


@pytest.mark.parametrize("kind", ["folder", ".ckpt"])
@pytest.mark.parametrize("form", FORMS)
def test_spectra_are_those_of_the_weights_that_act(form: str, kind: str, tmp_path: Path) -> None:
    model = models.llama()
    wanted = copy.deepcopy(model)
    FORMS[form](model)
    moved(model)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    acting = plain(model)
    assert len(acting) == len(projections(wanted)) == 4
    difference = max(
        float((value - wanted.get_parameter(name)).abs().max()) for name, value in acting.items()
    )
    assert difference > 1e-3
    wanted.load_state_dict({**wanted.state_dict(), **acting})
    wanted.config.save_pretrained(tmp_path)
    if kind == "folder":
        save_file(state, tmp_path / "model.safetensors")
        reading = read(tmp_path)
    else:
        wrapped = {f"model._orig_mod.{name}": value for name, value in state.items()}
        torch.save({"state_dict": wrapped}, tmp_path / "a.ckpt")
        reading = read(tmp_path / "a.ckpt")
    check(reading, wanted, tolerance=1e-6)
    assert not reading.notes


def test_sigma_reparam_of_a_fused_projection(tmp_path: Path) -> None:
    model = models.gpt2()
    add_sigma_reparam(model)
    moved(model)
    acting = plain(model)
    state = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    wanted = models.gpt2()
    wanted.load_state_dict({**state, **acting}, strict=False)
    wanted.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors")
    check(read(tmp_path), wanted, tolerance=1e-6)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def twice(module: nn.Module) -> None:
    parametrizations.weight_norm(module)
    parametrize.register_parametrization(module, "weight", Doubled())


REFUSED: dict[str, tuple[Change, dict[str, Tensor | None], str]] = {
    "another parametrization": (
        each(lambda module: parametrize.register_parametrization(module, "weight", Doubled())),
        {},
        "formula is not known",
    ),
    "an orthogonal one": (each(parametrizations.orthogonal), {}, "also holds|formula is not known"),
    "half of it": (
        each(parametrizations.spectral_norm),
        {"model.layers.0.self_attn.q_proj.parametrizations.weight.0._v": None},
        "lacks",
    ),
    "beside a plain weight": (
        each(weight_norm),
        {"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 32)},
        "also holds",
    ),
    "gains of another length": (
        each(weight_norm),
        {"model.layers.0.self_attn.q_proj.weight_g": torch.ones(5, 1)},
        "gains",
    ),
    "vectors of another length": (
        each(parametrizations.spectral_norm),
        {"model.layers.0.self_attn.q_proj.parametrizations.weight.0._u": torch.ones(5)},
        "vectors",
    ),
    "parts that do not exist": (
        add_sigma_reparam,
        {"model.layers.0.self_attn.q_proj.parametrizations.weight.0.part": torch.full((32, 1), 9)},
        "no gain",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    change, tensors, said = REFUSED[case]
    model = models.llama()
    model.config.save_pretrained(tmp_path)
    change(model)
    state = {**model.state_dict(), **tensors}
    torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "a.pt")
    with pytest.raises(BadInput, match=said) as raised:
        read(tmp_path / "a.pt")
    assert "q_proj" in str(raised.value)
    assert "remove the parametrization" in str(raised.value)


def test_a_model_that_has_a_form_itself_keeps_it(tmp_path: Path) -> None:
    """wav2vec2's positions are a convolution with weight normalization."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from lightning_qk.inspect import Options, open_source
    from lightning_qk.inspect.skeleton import build_skeleton, fill

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    model = Wav2Vec2Model(config)
    model.save_pretrained(tmp_path)
    [checkpoint] = open_source(str(tmp_path), Options())
    skeleton = build_skeleton(checkpoint.config)
    assert fill(skeleton, checkpoint.weights(skeleton)) == []
    for name, value in skeleton.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
