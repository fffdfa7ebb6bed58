"""Labels of attention layers: short, unique, in order."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qk.architecture.labels import layer_labels


def t5(layers: int = 2) -> list[str]:
    return [f"model.encoder.block.{i}.layer.0.SelfAttention" for i in range(layers)] + [
        f"model.decoder.block.{i}.layer.{j}.{name}"
        for i in range(layers)
        for j, name in ((0, "SelfAttention"), (1, "EncDecAttention"))
    ]


def labels(names: list[str], cross: tuple[str, ...] = ()) -> list[str]:
    return list(layer_labels(names, cross).values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.h.0.attn", "model.h.1.attn"], ["layer_00", "layer_01"]),
        (["m.0.h.7.attn", "m.0.h.8.attn"], ["layer_07", "layer_08"]),
        (["h.99.attn", "h.100.attn"], ["layer_099", "layer_100"]),
        (["stages.0.blocks.0.attn", "stages.0.blocks.1.attn", "stages.1.blocks.0.attn"],
         ["layer_00_00", "layer_00_01", "layer_01_00"]),
        (["student.h.0.attn", "teacher.h.0.attn"], ["student_layer_00", "teacher_layer_00"]),
        (["h.0.attn", "teacher.h.0.attn"], ["layer_00", "teacher_layer_00"]),
        (["net.attention"], ["attention"]),
        (["left.attention", "right.attention"], ["left", "right"]),
        (["a b.attn", "a/b.attn"], ["a_b", "a_b_2"]),
        ([""], ["attention"]),
        (["h.1.attn", "h.01.attn"], ["layer_01", "layer_01_2"]),
        ([], []),
    ],
)  # fmt: skip
def test_examples(names: list[str], expected: list[str]) -> None:
    assert labels(names) == expected


@pytest.mark.parametrize("layers", [1, 2])
def test_encoder_decoder(layers: int) -> None:
    names = t5(layers)
    found = layer_labels(names, cross=[name for name in names if "EncDec" in name])
    assert list(found) == names
    assert [found[name] for name in names[:layers]] == [f"encoder_layer_{i:02d}" for i in range(layers)]
    for i in range(layers):
        assert found[f"model.decoder.block.{i}.layer.0.SelfAttention"] == f"decoder_layer_{i:02d}"
        assert found[f"model.decoder.block.{i}.layer.1.EncDecAttention"] == f"decoder_cross_layer_{i:02d}"


def test_encoder_decoder_twice() -> None:
    names = [f"{side}.{name}" for side in ("student", "teacher") for name in t5(1)]
    found = labels(names, tuple(name for name in names if "EncDec" in name))
    one = ["encoder_layer_00", "decoder_layer_00", "decoder_cross_layer_00"]
    assert found == [f"{side}_{label}" for side in ("student", "teacher") for label in one]


def test_decoder_only_with_cross_attention() -> None:
    names = [f"bert.layer.{i}.{kind}.self" for i in range(2) for kind in ("attention", "crossattention")]
    found = labels(names, tuple(names[1::2]))
    assert found == ["layer_00", "cross_layer_00", "layer_01", "cross_layer_01"]


words = st.one_of(
    st.sampled_from(["a", "b", "layer", "cross", "00", "0", "1", "01", "x y", "ü", ""]), st.text(max_size=3)
)
module_names = st.lists(st.lists(words, min_size=1, max_size=5).map(".".join), max_size=12)


@given(module_names, st.data())
def test_labels_are_unique_safe_ordered_and_deterministic(names: list[str], data: st.DataObject) -> None:
    cross = data.draw(st.sets(st.sampled_from(names))) if names else set()
    found = layer_labels(names, cross)
    assert list(found) == list(dict.fromkeys(names))
    assert len(set(found.values())) == len(found)
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", label) for label in found.values())
    assert found == layer_labels(names, cross)


def test_the_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, lightning_qk.architecture.labels\n"
        "print([m for m in ('torch', 'numpy', 'lightning', 'matplotlib') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
