"""Tensors that are not read are named: of adapters, of layers beyond the configuration, of second networks."""

import json
import shutil
import warnings
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_inspect_adapter import adapted
from test_inspect_read import check, read
from torch import Tensor, nn

from lightning_qk.inspect import Options
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.read import NOT_VERIFIED

ROOT = "base_model.model.model.layers"


def adapter_tensors(folder: Path, change: dict[str, Tensor | None]) -> None:
    """Add tensors to a saved adapter, or take some out."""
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def adapter_config(folder: Path, **change: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted(models.llama(), tmp_path, target_modules=["q_proj", "k_proj"])
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "name",
    [
        f"{ROOT}.7.self_attn.q_proj.lora_A.weight",
        f"{ROOT}.7.self_attn.q_proj.lora_B.weight",
        f"{ROOT}.0.self_attn.q_proj.lora_A.default.weight",
        f"{ROOT}.0.self_attn.k_projection.lora_B.weight",
        f"{ROOT}.0.self_attn.q_proj.lora_C.weight",
        f"{ROOT}.0.self_attn.q_proj.lora_B.bias",
        f"{ROOT}.7.self_attn.q_proj.weight",
        f"{ROOT}.0.self_attn.q_projection.weight",
        f"{ROOT}.0.self_attn.v_proj.lora_magnitude_vector",
        "anything",
    ],
)
def test_an_adapters_tensor_without_a_place_is_an_error_that_names_it(name: str, adapter: Path) -> None:
    adapter_tensors(adapter, {name: torch.zeros(4, 4)})
    with pytest.raises(BadInput) as raised:
        read(adapter)
    said = str(raised.value)
    assert name.removeprefix("base_model.model.") in said
    assert "--base" in said or "again" in said


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_half_a_product_is_an_error(half: str, adapter: Path) -> None:
    adapter_tensors(adapter, {f"{ROOT}.1.self_attn.k_proj.{half}.weight": None})
    with pytest.raises(BadInput, match="both factors"):
        read(adapter)


def test_an_adapter_of_nothing_is_an_error(adapter: Path) -> None:
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="got none"):
        read(adapter)


def test_a_classifier_beside_the_network_is_said_and_changes_nothing(adapter: Path) -> None:
    before = read(adapter)
    adapter_config(adapter, modules_to_save=["score"])
    adapter_tensors(adapter, {"base_model.model.score.weight": torch.zeros(2, 32)})
    reading = read(adapter)
    assert any("score.weight" in note for note in reading.notes)
    torch.testing.assert_close(reading.values["trace"], before.values["trace"])


def test_an_adapter_beside_attention_says_so(tmp_path: Path) -> None:
    adapted(models.llama(), tmp_path, target_modules=["up_proj"])
    reading = read(tmp_path / "adapter")
    assert any("changes no query or key weights" in note for note in reading.notes)
    adapted(models.llama(), tmp_path / "other", target_modules=["q_proj"])
    assert not any("changes no" in note for note in read(tmp_path / "other" / "adapter").notes)


def test_the_remedies_of_an_adapter_that_does_not_fit(adapter: Path, tmp_path: Path) -> None:
    """The right base with --base, or the merged model."""
    right = tmp_path / "right"
    merged = adapted(models.llama(), right, target_modules=["q_proj"])
    models.bert().save_pretrained(tmp_path / "bert")
    adapter_config(right / "adapter", base_model_name_or_path=str(tmp_path / "bert"))
    with pytest.raises(BadInput, match="--base"):
        read(right / "adapter")
    check(read(right / "adapter", Options(base=str(right / "base"))), merged)
    merged.save_pretrained(tmp_path / "merged")
    check(read(tmp_path / "merged"), merged)


@pytest.mark.parametrize(
    "pattern", ["model.layers.1.self_attn.k_proj", r"layers\.[1-9]\.self_attn\.(k|v)_proj", "k_proj"]
)
def test_patterns_are_matched_as_peft_does(pattern: str, tmp_path: Path) -> None:
    merged = adapted(
        models.llama(), tmp_path, target_modules=["q_proj", "k_proj"], alpha_pattern={pattern: 64}
    )
    check(read(tmp_path / "adapter"), merged)


def test_an_alpha_of_zero_and_a_missing_one(tmp_path: Path) -> None:
    """PEFT multiplies by nothing, and by its default of 8."""
    adapted(models.llama(), tmp_path, target_modules=["q_proj"])
    eight = read(tmp_path / "adapter").values["trace"]
    adapter_config(tmp_path / "adapter", lora_alpha=None)
    torch.testing.assert_close(read(tmp_path / "adapter").values["trace"], eight)
    adapter_config(tmp_path / "adapter", lora_alpha=0)
    base = read(tmp_path / "base").values["trace"]
    torch.testing.assert_close(read(tmp_path / "adapter").values["trace"], base)


@pytest.mark.parametrize("cycle", [1, 2])
def test_adapters_that_are_each_others_base(cycle: int, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    adapter_config(adapter, base_model_name_or_path=str(adapter if cycle == 1 else other))
    adapter_config(other, base_model_name_or_path=str(adapter))
    with pytest.raises(BadInput, match="bases are adapters again"):
        read(adapter)
    check(read(adapter, Options(base=str(tmp_path / "base"))), merged_by_peft(adapter, tmp_path / "base"))


def merged_by_peft(adapter: Path, base: Path) -> nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        merged: nn.Module = model.merge_and_unload()
    return merged


def set_config(folder: Path, **change: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer", "bert": "num_hidden_layers"}


@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpoint_deeper_than_its_configuration(name: str, tmp_path: Path) -> None:
    model = getattr(models, name)()
    model.save_pretrained(tmp_path / "model")
    whole = read(tmp_path / "model")
    assert not any("deeper" in note for note in whole.notes)
    count = len(whole.labels)
    set_config(tmp_path / "model", **{LAYERS[name]: count - 1})
    reading = read(tmp_path / "model")
    assert len(reading.labels) == count - 1
    torch.testing.assert_close(reading.values["trace"], whole.values["trace"][: sum(whole.heads[:-1])])
    (note,) = [note for note in reading.notes if "deeper" in note]
    assert reading.notes[0] == note
    assert whole.names[-1].removeprefix("bert.").removeprefix("transformer.") in note
    assert "1 attention layer " in note
    # The remedy.
    set_config(tmp_path / "model", **{LAYERS[name]: count})
    check(read(tmp_path / "model"), model)


@pytest.mark.parametrize("name", LAYERS)
def test_a_checkpoint_shallower_than_its_configuration(name: str, tmp_path: Path) -> None:
    model = getattr(models, name)()
    model.save_pretrained(tmp_path / "model")
    count = len(read(tmp_path / "model").labels)
    set_config(tmp_path / "model", **{LAYERS[name]: count + 2})
    with pytest.raises(BadInput, match=rf"expected {count + 2} attention layers.* got {count} ") as raised:
        read(tmp_path / "model")
    assert "number of layers" in str(raised.value)
    set_config(tmp_path / "model", **{LAYERS[name]: count})
    check(read(tmp_path / "model"), model)


def test_tensors_of_attention_that_the_model_does_not_have(tmp_path: Path) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    extra = {f"model.layers.{layer}.self_attn.q_norm.weight": torch.ones(8) for layer in range(2)}
    save_file({**load_file(path), **extra, "other.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    reading = read(tmp_path / "model")
    (note,) = [note for note in reading.notes if "belong" in note]
    assert note.startswith("2 tensors of attention")
    assert "q_norm" in note
    assert "other" not in note
    check(reading, model)


def two(first: nn.Module, second: nn.Module, prefixes: tuple[str, str]) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}": value.clone()
        for prefix, model in zip(prefixes, (first, second), strict=True)
        for name, value in model.state_dict().items()
    }


def pair() -> tuple[nn.Module, nn.Module]:
    first, second = models.llama(), models.llama()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    return first, second


@pytest.mark.parametrize("kind", [".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "prefixes",
    [("student.", "teacher."), ("", "ema."), ("net.backbone.", "ema.module.")],
    ids=["student", "ema", "nested"],
)
def test_of_two_networks_one_is_read_and_the_other_named(
    kind: str, prefixes: tuple[str, str], tmp_path: Path
) -> None:
    models_of = pair()
    models_of[0].config.save_pretrained(tmp_path)
    tensors = two(*models_of, prefixes)
    path = tmp_path / f"both{kind}"
    if kind == ".ckpt":
        torch.save({"state_dict": tensors}, path)
    else:
        save_file(tensors, path)
    reading = read(path)
    check(reading, models_of[0])
    (note,) = [note for note in reading.notes if "networks" in note]
    other = prefixes[1].rstrip(".")
    assert f"--prefix {other.removesuffix('.module')}" in note
    assert prefixes[0].rstrip(".") in note
    assert reading.notes[0] == note
    chosen = read(path, Options(prefix=other))
    check(chosen, models_of[1])
    assert not any("networks" in note for note in chosen.notes)
    with pytest.raises(BadInput, match=r"prefix 'nobody'.* such as"):
        read(path, Options(prefix="nobody"))


@pytest.mark.parametrize("keys", [("student", "teacher"), ("state_dict", "ema_state_dict")])
def test_networks_side_by_side_in_one_dictionary(keys: tuple[str, str], tmp_path: Path) -> None:
    models_of = pair()
    models_of[0].config.save_pretrained(tmp_path)
    torch.save(
        {key: model.state_dict() for key, model in zip(keys, models_of, strict=True)}, tmp_path / "both.pt"
    )
    reading = read(tmp_path / "both.pt")
    check(reading, models_of[0])
    assert f"--prefix {keys[1]}" in reading.notes[0]
    check(read(tmp_path / "both.pt", Options(prefix=keys[1])), models_of[1])


def test_one_network_has_no_second(tmp_path: Path) -> None:
    model = models.llama()
    model.config.save_pretrained(tmp_path)
    torch.save({"state_dict": two(model, model, ("net.", ""))}, tmp_path / "one.ckpt")
    tensors = {f"net.{name}": value for name, value in model.state_dict().items()}
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    torch.save({"state_dict": tensors, "optimizer_states": [optimizer]}, tmp_path / "one.ckpt")
    assert not any("networks" in note for note in read(tmp_path / "one.ckpt").notes)


def test_a_configuration_that_is_given_is_taken_for_a_folder_too(tmp_path: Path) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").rename(tmp_path / "config.json")
    check(read(tmp_path / "model", Options(config=str(tmp_path))), model)


def test_a_reading_says_that_nothing_was_run(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path)
    assert read(tmp_path).verification == NOT_VERIFIED
