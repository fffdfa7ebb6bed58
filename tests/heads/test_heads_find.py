import pytest
import torch
from heads_zoo import BERT, build
from torch import nn

from lightning_qk.heads.reader import find_attention, head_projections, unread
from lightning_qk.heads.sites import attention_sites

pytestmark = pytest.mark.usefixtures("code_of_a_library")


class Projections(nn.Module):
    """Has the children of attention; what it does depends on its subclass.

    It stands for a class of transformers, whose names tell what it does.
    """

    __module__ = "transformers.models.tiny"

    def __init__(self, **attributes):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.num_heads = 2
        for name, value in attributes.items():
            setattr(self, name, value)


class TinyAttention(Projections):
    __module__ = "transformers.models.tiny"


class TinyRecurrence(Projections):
    pass


def test_projections_named_q_and_k_are_not_attention_by_themselves():
    model = nn.ModuleList([TinyAttention(), TinyRecurrence()])
    assert list(find_attention(model)) == ["0"]


def test_wrappers_and_outputs_of_attention_are_not_attention():
    assert [name.rsplit(".", 1)[-1] for name in find_attention(build("bert"))] == ["self", "self"]


def test_a_shared_layer_is_found_once_by_its_first_name():
    layer = TinyAttention()
    model = nn.ModuleDict({"a": nn.ModuleList([layer]), "b": layer})
    assert list(head_projections(model)) == ["a.0"]


@pytest.mark.parametrize(
    ("path", "cross"),
    [
        ("layers.0.self_attn", False),
        ("layers.0.encoder_attn", True),
        ("block.0.layer.1.EncDecAttention", True),
        ("layer.0.crossattention.self", True),
        ("cross_encoder.layer.0.attention.self", False),
        ("encoder.layers.0.attn", False),
    ],
)
def test_cross_attention_is_told_by_the_names_within_the_layer(path, cross):
    root = parent = nn.Module()
    *above, last = path.split(".")
    for name in above:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(last, TinyAttention())
    (site,) = attention_sites(root)
    assert site.name == path
    assert site.is_cross is cross


@pytest.mark.parametrize("flag", [True, False])
def test_the_layers_own_flag_decides(flag):
    model = nn.ModuleDict({"crossattention": TinyAttention(is_cross_attention=flag)})
    (heads,) = head_projections(model).values()
    assert heads.self_attention is not flag


def test_keys_of_another_width_make_it_cross_attention():
    (heads,) = head_projections(TinyAttention(k_proj=nn.Linear(12, 8))).values()
    assert heads.key.shape == (2, 4, 12)
    assert not heads.self_attention


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"q_conv1d": nn.Conv1d(8, 8, 4)}, "linear attention"),
        ({"A_log": nn.Parameter(torch.zeros(2))}, "linear attention"),
        ({"sampling_offsets": nn.Linear(8, 4)}, "deformable attention"),
        ({"w_g": nn.Parameter(torch.zeros(2))}, "additive attention"),
        ({"query_stride": 4}, "maxima over neighbouring tokens"),
        ({"assign_eps": 1.0}, "softmax over queries"),
        ({"qkv": nn.Linear(8, 24), "groups": 2}, "over channels"),
        ({"is_kv_shared_layer": True}, "keys of an earlier layer"),
        ({"k_sconv": nn.Conv1d(8, 8, 4)}, "'k_sconv' stands between"),
        ({"q_norm": nn.BatchNorm1d(4)}, "no RMSNorm or LayerNorm"),
        ({"num_heads": None}, "how many heads"),
    ],
)
def test_what_is_not_softmax_of_its_own_q_and_k_is_left_out(attributes, reason):
    model = nn.ModuleList([TinyAttention(**attributes), TinyAttention()])
    assert reason in unread(model)["0"]
    assert list(head_projections(model)) == ["1"]


def test_what_gives_its_input_back_stands_between_nothing():
    model = TinyAttention(q_activation=nn.Identity(), k_activation=nn.Identity())
    assert unread(model) == {}
    assert "'k_activation' stands between" in unread(TinyAttention(k_activation=nn.ReLU()))[""]


def test_a_layer_is_found_by_its_call_of_attention_functions_where_its_name_does_not_tell():
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig

    class Mixer(LlamaAttention):
        pass

    layer = Mixer(LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=2), 0)
    layer.q_proj, layer.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
    assert list(find_attention(nn.ModuleList([layer, TinyRecurrence()]))) == ["0"]


def test_the_nearest_config_counts():
    from transformers import BertConfig

    model = nn.ModuleDict({"inner": nn.ModuleList([TinyAttention(num_heads=None)])})
    model.config, model.inner.config = BertConfig(**{**BERT, "num_attention_heads": 1}), BertConfig(**BERT)
    assert next(iter(head_projections(model).values())).heads == 4
