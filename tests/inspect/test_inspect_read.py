"""What is read from a checkpoint is what the loaded model's own weights give."""

import json
from collections.abc import Callable
from pathlib import Path

import models
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qk import TransformerModule, head_projections
from lightning_qk.functional import qk_eigenvalues, qk_moments, qk_singular_values
from lightning_qk.inspect import Options, open_source
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.read import Reading, iterate_layers, read_checkpoint
from lightning_qk.inspect.skeleton import build_skeleton
from tools.coverage import catalogue
from tools.coverage.toy import LADDER, build, shrunk

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, num_key_value_heads=2))


def qwen3() -> nn.Module:
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)
    )
    for name, parameter in model.named_parameters():
        if "_norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def deepseek() -> nn.Module:
    config = transformers.DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = transformers.DeepseekV3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "a_layernorm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": models.llama,
    "gpt2": models.gpt2,
    "bert": models.bert,
    "t5": models.t5,
    "gemma2": models.gemma2,
    "phi3": phi3,
    "qwen3": qwen3,
    "deepseek": deepseek,
    "vit": vit,
}


def read(path: Path | str, options: Options | None = None, **how: object) -> Reading:
    how = {"fold_norm": False, **how}
    return read_checkpoint(open_source(str(path), options or Options())[0], **how)[0]  # type: ignore[arg-type]


@torch.no_grad()
def check(reading: Reading, model: nn.Module, *, tolerance: float = 1e-5, **how: object) -> None:
    """Compare with the projections of a model that has its weights, in float64."""
    heads = head_projections(model.double(), **how)
    # The skeleton may be the base model alone.
    names = {name: next(own for own in heads if own.endswith(name)) for name in reading.names}
    assert len(names) == len(heads)
    for place, (name, label) in enumerate(zip(reading.names, reading.labels, strict=True)):
        own = heads[names[name]]
        part = {statistic: reading.split(flat)[place] for statistic, flat in reading.values.items()}
        if not own.self_attention:
            want = qk_singular_values(own.query, own.key)[:, 0]
            torch.testing.assert_close(part["singular_max"], want.float(), rtol=tolerance, atol=tolerance)
            continue
        for statistic, value in qk_moments(own.query, own.key).items():
            torch.testing.assert_close(
                part[statistic], value.float(), rtol=1e-3, atol=tolerance * float(value.abs().max() + 1e-3)
            )
        eigenvalues = qk_eigenvalues(own.query, own.key)
        torch.testing.assert_close(
            part["spectral_radius"], eigenvalues[:, 0].abs().float(), rtol=1e-4, atol=1e-6
        )
        assert reading.eigenvalues[label].shape == eigenvalues.shape


@pytest.mark.parametrize("shards", ["one file", "shards", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_moments_are_those_of_the_loaded_model(name: str, shards: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    if shards == "torch":
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    else:
        model.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "shards" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "shards")
    check(read(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = deepseek().to(dtype)
    model.save_pretrained(tmp_path)
    check(read(tmp_path), model)


@pytest.mark.parametrize("name", ["radio", "mixtral", "detr"])
def test_weights_that_transformers_converts(name: str, tmp_path: Path) -> None:
    """RADIO's files hold q, k and v as one tensor, Mixtral's each expert alone, and DETR's other names."""
    pytest.importorskip(f"transformers.models.{name}")
    model = build(next(iter(catalogue.classes(name))), shrunk(catalogue.config(name), LADDER[0], name))
    model.save_pretrained(tmp_path)
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert set(file.keys()) - set(model.state_dict())
    check(read(tmp_path), model)


def test_biases_are_read_too(tmp_path: Path) -> None:
    model = models.gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    checkpoint = open_source(str(tmp_path), Options())[0]
    skeleton = build_skeleton(checkpoint.config)
    want = head_projections(model)
    for site, _, heads in iterate_layers(skeleton, checkpoint.weights(skeleton), fold_norm=False):
        assert heads is not None
        assert heads.query_bias is not None
        assert heads.key_bias is not None
        torch.testing.assert_close(heads.query_bias, want[site.name].query_bias)
        torch.testing.assert_close(heads.key_bias, want[site.name].key_bias)


def test_a_skeleton_takes_no_memory_and_is_left_as_it_was(tmp_path: Path) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path)
    _, skeleton, _ = read_checkpoint(open_source(str(tmp_path), Options())[0])
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert {name: tuple(own.shape) for name, own in skeleton.named_parameters()} == {
        name: tuple(own.shape) for name, own in model.named_parameters()
    }
    # Modules that are made afterwards have values again.
    assert not nn.Linear(2, 2).weight.is_meta


def test_the_norm_that_feeds_a_layer_is_folded_in(tmp_path: Path) -> None:
    model = models.llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path)
    folded = read(tmp_path, fold_norm=True)
    check(folded, model, fold_norm=True)
    assert not torch.allclose(folded.values["frobenius_sq"], read(tmp_path).values["frobenius_sq"])


def test_moments_alone_solve_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.llama().save_pretrained(tmp_path)

    def refuse(core: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("lightning_qk.metrics.eigenvalues.core_eigenvalues", refuse)
    reading = read(tmp_path, eigenvalues=False)
    assert not reading.eigenvalues
    assert "spectral_radius" not in reading.values
    # One eigenproblem that fails costs its head alone.
    assert all(values.isnan().all() for values in read(tmp_path).eigenvalues.values())


def module_checkpoint(path: Path, model: nn.Module, prefix: str, **extra: object) -> None:
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 7, **extra}, path)


def test_a_lightning_checkpoint_of_a_transformer_module(tmp_path: Path) -> None:
    fields = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": models.VOCABULARY}
    fields |= {"n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    module = TransformerModule(fields, lr=1e-3)
    run = models.trainer([], max_steps=2, enable_checkpointing=False, default_root_dir=tmp_path)
    ids = torch.randint(0, models.VOCABULARY, (8, 16))
    run.fit(module, DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4))
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    reading = read(path)
    assert reading.step == 2
    check(reading, module.network)


@pytest.mark.parametrize("prefix", ["", "net.", "student.encoder._orig_mod.", "model._fsdp_wrapped_module."])
def test_a_checkpoint_of_any_module(prefix: str, tmp_path: Path) -> None:
    model = models.bert()
    model.config.save_pretrained(tmp_path / "config")
    module_checkpoint(tmp_path / "a.ckpt", model, prefix)
    reading = read(tmp_path / "a.ckpt", Options(config=str(tmp_path / "config")))
    assert reading.step == 7
    check(reading, model)
    # Hyperparameters may name the model.
    module_checkpoint(
        tmp_path / "b.ckpt", model, prefix, hyper_parameters={"model_name": str(tmp_path / "config")}
    )
    check(read(tmp_path / "b.ckpt"), model)
    with pytest.raises(BadInput, match="--config"):
        read(tmp_path / "a.ckpt")


def test_layers_that_share_weights_with_others_are_read(tmp_path: Path) -> None:
    """T5's embeddings are tied, ALBERT's layers are one."""
    config = transformers.AlbertConfig(
        hidden_size=32, embedding_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32
    )
    model = transformers.AlbertForMaskedLM(config)
    model.save_pretrained(tmp_path)
    check(read(tmp_path), model)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[9, 3] = torch.nan
    model.save_pretrained(tmp_path)
    reading = read(tmp_path)
    assert reading.notes == ["weights are not finite in model.layers.1.self_attn (head 1)"]


def test_shards_without_query_and_key_weights_need_not_be_there(tmp_path: Path) -> None:
    model = models.llama()
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in index.items() if "q_proj" in name or "k_proj" in name}
    removed = 0
    for shard in set(index.values()) - needed:
        (tmp_path / shard).unlink()
        removed += 1
    assert removed > 3
    check(read(tmp_path), model)


def cached(cache: Path, name: str, model: nn.Module) -> None:
    """What the hub's library keeps of a model that was downloaded."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    model.save_pretrained(folder / "snapshots" / "abc", max_shard_size="20KB")


def test_a_model_of_the_hub_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = models.llama()
    cached(tmp_path, "someone/small", model)
    check(read("someone/small"), model)
    check(read("someone/small@main"), model)
    for name in ("someone/other", "someone/small@another"):
        with pytest.raises(BadInput, match=r"without HF_HUB_OFFLINE|expected a revision"):
            read(name)


def test_shards_that_are_not_in_the_cache_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "someone/small", models.llama())
    folder = tmp_path / "models--someone--small" / "snapshots" / "abc"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index["model.layers.1.self_attn.q_proj.weight"]
    (folder / shard).unlink()
    with pytest.raises(BadInput, match=shard):
        read("someone/small")
