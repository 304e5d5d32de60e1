"""Names, shapes and fusing: split_fused against interleaving by hand, expected_shapes against transformers."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.training.errors import UserError
from halfbyte.training.hf_map import FUSED, expected_shapes, split_fused
from halfbyte.training.shape import ModelShape, read_shape


def make_shape(heads: int, kv_heads: int, head_dim: int, *, hidden: int = 24, ffn: int = 40) -> ModelShape:
    return ModelShape(
        layers=2,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=100,
        tied=False,
        max_positions=64,
        rope_theta=10000.0,
        rope_scaling_factor=None,
        norm_eps=1e-5,
    )


def numbered(rows: int, columns: int, start: int) -> np.ndarray:
    return np.arange(start, start + rows * columns, dtype=np.float64).reshape(rows, columns)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 6), (4, 2, 6), (8, 1, 3), (9, 3, 8), (1, 1, 24)])
def test_qkv_is_taken_apart_group_by_group(heads, kv_heads, head_dim):
    shape = make_shape(heads, kv_heads, head_dim)
    q = numbered(heads * head_dim, shape.hidden, 0)
    k, v = numbered(kv_heads * head_dim, shape.hidden, 10**6), numbered(kv_heads * head_dim, shape.hidden, 2 * 10**6)
    rows = []
    for group in range(kv_heads):  # Megatron: the group's queries, its key, its value
        for head in range(group * (heads // kv_heads), (group + 1) * (heads // kv_heads)):
            rows += [q[head * head_dim + i] for i in range(head_dim)]
        rows += [k[group * head_dim + i] for i in range(head_dim)]
        rows += [v[group * head_dim + i] for i in range(head_dim)]
    parts = split_fused("self_attention.linear_qkv", torch.from_numpy(np.stack(rows)), shape)
    assert list(parts) == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    for part, expected in zip(parts.values(), (q, k, v), strict=True):
        assert np.array_equal(part.numpy(), expected)


def test_gate_stands_over_up():
    shape = make_shape(4, 2, 6)
    gate, up = numbered(shape.ffn, shape.hidden, 0), numbered(shape.ffn, shape.hidden, 10**6)
    parts = split_fused("mlp.linear_fc1", torch.from_numpy(np.vstack([gate, up])), shape)
    assert list(parts) == ["mlp.gate_proj", "mlp.up_proj"]
    assert np.array_equal(parts["mlp.gate_proj"].numpy(), gate)
    assert np.array_equal(parts["mlp.up_proj"].numpy(), up)


@pytest.mark.parametrize(
    ("name", "part"), [("self_attention.linear_proj", "self_attn.o_proj"), ("mlp.linear_fc2", "mlp.down_proj")]
)
def test_single_linears_stay_as_they_are(name, part):
    weight = torch.randn(24, 40)
    parts = split_fused(name, weight, make_shape(4, 2, 6))
    assert list(parts) == [part]
    assert torch.equal(parts[part], weight)


@pytest.mark.parametrize("name", FUSED)
def test_parts_have_the_shapes_of_the_checkpoint(name):
    shape = make_shape(6, 2, 4)
    sizes = expected_shapes(shape)
    expected = {part: sizes[f"model.layers.1.{part}.weight"] for part in FUSED[name]}
    rows, columns = sum(n for n, _ in expected.values()), next(k for _, k in expected.values())
    parts = split_fused(name, torch.zeros(rows, columns), shape)
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == expected


CONFIGS = {
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "mha_tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa_wide_heads": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32},
    "smollm2_like": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "intermediate_size": 192},
}


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_expected_shapes_are_transformers_shapes(settings, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 130, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes | {"tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]} | settings)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())  # a tied lm_head appears once
    shape = read_shape(tmp_path / "config.json")
    assert expected_shapes(shape) == {name: tuple(tensor.shape) for name, tensor in parameters.items()}
    assert shape.parameters == sum(tensor.numel() for tensor in parameters.values())


@pytest.fixture
def weights(tiny_model, tmp_path):
    """A damaged copy of the tiny model's weights: damage(tensors) -> directory."""

    def damage(change) -> tuple:
        source = next(tiny_model.glob("*.safetensors"))
        tensors = load_file(source)
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path, read_shape(tiny_model / "config.json")

    return damage


@pytest.mark.slow  # imports Megatron-Core
def test_headers_are_compared_with_the_shapes(weights):
    from halfbyte.training.model import check_weights

    norm, embedding = "model.layers.3.post_attention_layernorm.weight", "model.embed_tokens.weight"
    check_weights(*weights(lambda tensors: None))
    with pytest.raises(UserError, match=f"{norm} is missing"):
        check_weights(*weights(lambda tensors: tensors.pop(norm)))
    with pytest.raises(UserError, match=rf"{embedding} has shape \[500, 128\], config.json asks for \[512, 128\]"):
        check_weights(*weights(lambda tensors: tensors.update({embedding: torch.zeros(500, 128)})))


@pytest.mark.slow
def test_unreadable_weights_are_one_line(tiny_model, tmp_path):
    from halfbyte.training.model import check_weights

    shape = read_shape(tiny_model / "config.json")
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        check_weights(tmp_path, shape)
    whole = next(tiny_model.glob("*.safetensors")).read_bytes()
    for damaged in (whole[:-100], whole[: len(whole) // 2], whole[:4], b"", b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="corrupt weight file") as caught:
            check_weights(tmp_path, shape)
        assert "\n" not in str(caught.value)


def test_every_linear_of_a_layer_is_in_the_map():
    shape = make_shape(4, 2, 6)
    named = {f"model.layers.0.{part}.weight" for parts in FUSED.values() for part in parts}
    matrices = {name for name, size in expected_shapes(shape).items() if ".layers.0." in name and len(size) == 2}
    assert named == matrices
