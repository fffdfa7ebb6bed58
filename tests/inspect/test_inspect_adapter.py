"""A PEFT adapter with its base is read as the merged model."""

import json
import warnings
from pathlib import Path

import models
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from test_inspect_read import check, read
from torch import nn

from lightning_qk.inspect import Options
from lightning_qk.inspect.documents import BadInput

VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"k_proj": 64}},
}


def adapted(base: nn.Module, where: Path, **options: object) -> nn.Module:
    """An adapter far from zero, saved beside its base; the merged model."""
    base.save_pretrained(where / "base")
    base.name_or_path = str(where / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, **options))  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(where / "adapter")
        return model.merge_and_unload()


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_on_separate_projections(variant: str, tmp_path: Path) -> None:
    merged = adapted(models.llama(), tmp_path, target_modules=["q_proj", "k_proj"], **VARIANTS[variant])
    before = read(tmp_path / "base")
    reading = read(tmp_path / "adapter")
    assert reading.title.endswith("adapter on " + str(tmp_path / "base"))
    check(reading, merged)
    assert not torch.allclose(before.values["trace"], reading.values["trace"], rtol=0.01)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_lora_on_a_fused_transposed_projection(variant: str, tmp_path: Path) -> None:
    merged = adapted(models.gpt2(), tmp_path, target_modules=["c_attn"], **VARIANTS[variant])
    check(read(tmp_path / "adapter"), merged)


def test_the_base_may_be_given(tmp_path: Path) -> None:
    merged = adapted(models.llama(), tmp_path, target_modules=["q_proj"])
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(BadInput, match="--base"):
        read(tmp_path / "adapter")
    check(read(tmp_path / "adapter", Options(base=str(tmp_path / "moved"))), merged)


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    adapted(models.llama(), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, said in (
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(BadInput, match=said):
            read(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        get_peft_model(models.llama(), other).save_pretrained(tmp_path / "ia3")
    with pytest.raises(BadInput, match="IA3"):
        read(tmp_path / "ia3")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapted(models.llama(), tmp_path, target_modules=["q_proj"])
    models.bert().save_pretrained(tmp_path / "bert")
    with pytest.raises(BadInput, match="does not have"):
        read(tmp_path / "adapter", Options(base=str(tmp_path / "bert")))
