"""GGUF files: the numbers are those that their codes stand for, under transformers' names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_qk.inspect import Options, open_source
from lightning_qk.inspect.documents import BadInput
from lightning_qk.inspect.skeleton import build_skeleton

gguf = pytest.importorskip("gguf")

HEADS, GROUPS, LAYERS, WIDTH, D_HEAD = 4, 2, 2, 64, 16


def names(layer: int) -> dict[str, str]:
    """Name in the file → name in transformers, of one layer's attention."""
    own = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    own |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    own |= {
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return {f"blk.{layer}.{key}.weight": f"model.layers.{layer}.{value}.weight" for key, value in own.items()}


def llama() -> torch.nn.Module:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=WIDTH,
        vocab_size=8,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, which rotates neighbours: pairs in place of halves."""
    return weight.reshape(heads, 2, D_HEAD // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: torch.nn.Module, kind: str = "F32") -> dict[str, torch.Tensor]:
    """Write a model, and give what its query and key weights are once dequantized."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("toy")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_vocab_size(8)
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    wanted = {}
    for layer in range(LAYERS):
        for own, name in names(layer).items():
            value = state[name]
            heads = HEADS if "attn_q." in own else GROUPS
            if "attn_q." in own or "attn_k." in own:
                value = permuted(value, heads)
            if kind == "F32" or value.ndim == 1:
                writer.add_tensor(own, np.ascontiguousarray(value))
                continue
            code = gguf.GGMLQuantizationType[kind]
            codes = gguf.quantize(np.ascontiguousarray(value), code)
            writer.add_tensor(own, codes, raw_dtype=code)
            if "attn_q." in own or "attn_k." in own:
                plain = torch.tensor(gguf.dequantize(codes, code))
                wanted[name] = plain.view(heads, D_HEAD // 2, 2, -1).transpose(1, 2).reshape(plain.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted or {n: torch.tensor(v) for n, v in state.items() if "q_proj" in n or "k_proj" in n}


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("by_folder", [False, True])
def test_numbers_are_those_of_the_codes(tmp_path: Path, kind: str, by_folder: bool) -> None:
    wanted = write(tmp_path / "toy.gguf", llama(), kind)
    [checkpoint] = open_source(str(tmp_path if by_folder else tmp_path / "toy.gguf"), Options())
    assert checkpoint.config.num_key_value_heads == GROUPS
    model = build_skeleton(checkpoint.config, tensors=checkpoint.tensors, size=checkpoint.size)
    weights = checkpoint.weights(model)
    with weights.reading() as load:
        for name, want in wanted.items():
            assert weights.shape(name) in (None, tuple(want.shape))
            torch.testing.assert_close(load([name], want.shape), want, rtol=1e-6, atol=0)
    assert any("codes" in note for note in checkpoint.notes) == (kind != "F32")


def test_spectra_are_those_of_the_safetensors(tmp_path: Path, capsys) -> None:
    from lightning_qk.cli import main

    model = llama()
    write(tmp_path / "toy.gguf", model)
    model.save_pretrained(tmp_path / "plain")
    found = []
    for name in ("toy.gguf", "plain"):
        assert main(["inspect", str(tmp_path / name), "--json", str(tmp_path / f"{name}.json")]) in (0, None)
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    capsys.readouterr()

    both = [result["checkpoints"][0]["layers"] for result in found]
    for own, plain in zip(*both, strict=True):
        assert {"trace", "trace_sq", "frobenius_sq"} <= own["per_head"].keys() == plain["per_head"].keys()
        for key in ("trace", "trace_sq", "frobenius_sq", "spectral_radius"):
            assert own["per_head"][key] == pytest.approx(plain["per_head"][key], rel=1e-5, abs=1e-9), key


@pytest.mark.parametrize("damage", ["cut", "empty", "architecture"])
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "toy.gguf"
    write(path, llama())
    data = path.read_bytes()
    path.write_bytes(
        {
            "cut": data[: len(data) // 2],
            "empty": b"",
            "architecture": data.replace(b"llama", b"lamma"),
        }[damage]
    )
    with pytest.raises(BadInput, match="expected a whole GGUF file"):
        open_source(str(path), Options())
