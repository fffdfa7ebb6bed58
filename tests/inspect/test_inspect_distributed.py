"""Folders of shards: as torch.distributed.checkpoint and Lightning write them, damaged and hostile ones."""

import os
import pickle
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.metadata import Metadata
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_qk import TextDataModule, TransformerModule, head_projections
from lightning_qk.functional import qk_moments
from lightning_qk.inspect import Options, open_source
from lightning_qk.inspect.documents import BadInput

pytestmark = pytest.mark.filterwarnings("ignore")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}


def llama() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA))


def read(target: Path, **options: object) -> dict[str, torch.Tensor]:
    """Name of each parameter → its values, as they are read from a checkpoint."""
    from lightning_qk.inspect.skeleton import build_skeleton

    [checkpoint] = open_source(str(target), Options(**options))
    model = build_skeleton(checkpoint.config, tensors=checkpoint.tensors, size=checkpoint.size)
    weights = checkpoint.weights(model)
    with weights.reading() as load:
        return {name: load([name], one.shape) for name, one in model.named_parameters() if weights.has(name)}


@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_are_put_together_from_shards(tmp_path: Path, wrapped: bool) -> None:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    state = model.state_dict()
    kept = {"model": state, "optimizer": optimizer.state_dict()} if wrapped else state
    dcp.save(kept, checkpoint_id=tmp_path / "shards", no_dist=True)
    model.config.save_pretrained(tmp_path / "config")

    found = read(tmp_path / "shards", config=str(tmp_path / "config"))

    named = dict(model.named_parameters())
    base = {name.removeprefix("model."): value for name, value in named.items()}
    assert len(found) >= len(base) - 1  # the configuration alone names the model without its head
    for name, value in found.items():
        torch.testing.assert_close(value, {**base, **named}[name], rtol=0, atol=0)


def test_lightning_s_own_sharded_checkpoint_has_the_spectra_of_its_weights(tmp_path: Path, capsys) -> None:
    from lightning_qk.cli import main

    module = TransformerModule(
        {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16}
    )
    data = TextDataModule(
        "stdlib",
        tokenizer="bytes",
        block_size=16,
        batch_size=2,
        max_characters=5_000,
        cache_dir=str(tmp_path),
    )
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        strategy=ModelParallelStrategy(save_distributed_checkpoint=True),
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    folder = tmp_path / "run" / "step=2.ckpt"
    trainer.save_checkpoint(folder)
    wanted = [
        qk_moments(head.query.detach(), head.key.detach())["trace_sq"]
        for head in head_projections(module).values()
    ]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

    [checkpoint] = open_source(str(folder), Options())
    assert checkpoint.step == 2
    assert checkpoint.config.model_type == "gpt2"
    found = read(folder)
    for layer, want in enumerate(wanted):
        fused = next(v for n, v in found.items() if n.endswith(f"h.{layer}.attn.c_attn.weight"))
        query, key, _ = fused.T.view(3, 2, 8, 16)
        torch.testing.assert_close(qk_moments(query, key)["trace_sq"], want, rtol=1e-6, atol=0)
    # By the command, alone and as one of a series.
    assert main(["inspect", str(folder)]) in (0, None)
    assert "step 2" in " ".join(capsys.readouterr().out.split())
    assert [one.step for one in open_source(str(tmp_path / "run"), Options())] == [2]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (pickle.dumps(Evil()), "holds an object of posix.system"),
        (pickle.dumps(Metadata({"a": Evil()})), "holds an object of posix.system"),
        (pickle.dumps({"a": 1}), "holds a dict"),
        (b"\x80\x04nonsense", "expected the index"),
        (b"", "expected the index"),
    ],
)
def test_an_index_that_is_none_is_refused_and_nothing_runs(tmp_path: Path, index: bytes, why: str) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / ".metadata").write_bytes(index)
    with pytest.raises(BadInput, match=why):
        open_source(str(folder), Options())
    assert not Path("evil").exists()


def changed(folder: Path, change) -> None:
    """Write the index of a folder again."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def huge(index: Metadata) -> None:
    for one in index.state_dict_metadata.values():
        one.size = torch.Size([2**20, 2**20])


def elsewhere(index: Metadata) -> None:
    for one in index.storage_data.values():
        one.relative_path = "../outside.distcp"


@pytest.mark.parametrize(
    ("change", "why"), [(huge, "that their files can hold"), (elsewhere, "outside of its folder")]
)
def test_what_an_index_says_is_checked_first(tmp_path: Path, change, why: str) -> None:
    folder = tmp_path / "shards"
    dcp.save(llama().state_dict(), checkpoint_id=folder, no_dist=True)
    (tmp_path / "outside.distcp").write_bytes(b"1")
    changed(folder, change)
    with pytest.raises(BadInput, match=why):
        open_source(str(folder), Options())


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    model = llama()
    folder = tmp_path / "shards"
    dcp.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
    model.config.save_pretrained(tmp_path)
    [shard] = folder.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(BadInput, match=r"expected whole shards|expected tensors that their files can hold"):
        read(folder, config=str(tmp_path))


def test_a_series_is_read_without_its_damaged_checkpoints(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        llama().save_pretrained(tmp_path / f"checkpoint-{step}")
    dcp.save(llama().state_dict(), checkpoint_id=tmp_path / "step=4.ckpt", no_dist=True)
    for name in ("checkpoint-1/model.safetensors", "step=4.ckpt/.metadata"):
        file = tmp_path / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    found = open_source(str(tmp_path), Options())

    assert [one.step for one in found] == [2, 3]
    notes = " ".join(found[-1].notes)
    assert "checkpoint-1 left out: expected a whole safetensors file" in notes
    assert "step=4.ckpt left out: expected the index" in notes
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="checkpoint-1"):
        open_source(str(tmp_path), Options())
