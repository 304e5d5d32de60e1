"""Our Megatron model against transformers: the same weights give the same logits under every layout."""

import copy
import json
from pathlib import Path

import pytest

from .export_tools import LLAMA3_SCALED

WORKER = Path(__file__).with_name("workers") / "parity.py"
SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 32}
MODELS = {
    "scaled_untied_gqa": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 500000.0, **LLAMA3_SCALED},
    },
    "plain_tied_mha": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-3,
    },
    "scaled_tied_gqa": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 10000.0, **LLAMA3_SCALED},
        "num_hidden_layers": 3,
    },
}
FAMILIES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "rope_parameters": PLAIN_ROPE}
MODELS |= {
    "mistral_untied": GQA | {"tie_word_embeddings": False, "sliding_window": None},
    "mistral_tied_wide_window": GQA | {"tie_word_embeddings": True, "sliding_window": 96},  # as long as the windows
    "qwen2_untied": GQA | {"tie_word_embeddings": False, "head_dim": None},
    "qwen2_tied": GQA | {"tie_word_embeddings": True, "head_dim": None},
    "qwen3_untied": GQA | {"tie_word_embeddings": False, "head_dim": 24},  # 4 heads of 24 beside 64 channels
    "qwen3_tied": GQA | {"tie_word_embeddings": True},
}
UNEVEN_ONLY = {"scaled_tied_gqa"}
"""Three layers do not split evenly over two stages."""
EXACT, SUMMED = 1e-5, 1e-4
"""Largest distance of a logit: the same arithmetic, and sums over tensor-parallel ranks in another order."""


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Random models with reference logits of two micro-batches [2, B, S], and how far each wrong model would be."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("parity")
    sensitivity = {}
    for seed, (name, settings) in enumerate(MODELS.items()):
        config_class, model_class = FAMILIES.get(name.split("_")[0], FAMILIES["llama"])
        sizes = {key: value for key, value in (SIZES | settings).items() if value is not None or key != "head_dim"}
        config = getattr(transformers, config_class)(
            **sizes | {"max_position_embeddings": 131072, "hidden_act": "silu"}, attn_implementation="eager"
        )
        reference = getattr(transformers, model_class)(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for part, parameter in sorted(reference.named_parameters()):
                center, std = (0.0, 0.1) if parameter.dim() == 2 else (1.0, 0.2)
                if part.endswith(".bias"):
                    center, std = 0.0, 0.5
                parameter.normal_(center, std, generator=generator)
        reference.save_pretrained(folder / name)
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 2, 96), generator=generator)
        with torch.no_grad():
            logits = torch.stack([reference(part).logits for part in tokens])
            second_half = reference(tokens[0][:, 48:]).logits
            wrong = reference(tokens[0], position_ids=torch.arange(96).expand(2, 96) // 8 * 8).logits
            unscaled = _without_scaling(reference)(tokens[0]).logits
            plain = _without_extras(reference)(tokens[0]).logits
        torch.save({"tokens": tokens, "logits": logits, "second_half": second_half}, (folder / name).with_suffix(".pt"))
        sensitivity[name] = {
            "positions": float((wrong - logits[0]).abs().max()),
            "scaling": float((unscaled - logits[0]).abs().max()),
            "isolation": float((logits[0][:, 48:] - second_half).abs().max()),
            "extras": float((plain - logits[0]).abs().max()),
        }
    return folder, sensitivity


def _without_scaling(reference):
    config = type(reference.config)(**reference.config.to_dict())
    config.rope_parameters = {"rope_type": "default", "rope_theta": reference.config.rope_parameters["rope_theta"]}
    plain = type(reference)(config)
    plain.load_state_dict(reference.state_dict())
    return plain


def _without_extras(reference):
    """The same without biases and without weights in the norms of q and k: what an import that skips them gives."""
    plain = copy.deepcopy(reference)
    for name, parameter in plain.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        if "q_norm" in name or "k_norm" in name:
            parameter.fill_(1.0)
    return plain


def _measure(references, forks, tmp_path_factory, processes: int) -> dict:
    out = tmp_path_factory.mktemp("measured") / "found.json"
    forks.script(WORKER, references[0], out, ranks=processes)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(references, forks, tmp_path_factory):
    return _measure(references, forks, tmp_path_factory, 1)


@pytest.fixture(scope="module")
def together(references, forks, tmp_path_factory):
    return _measure(references, forks, tmp_path_factory, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_reference_can_tell_a_wrong_model(references, name):
    found = references[1][name]
    assert found["positions"] > 1e-2
    assert found["isolation"] > 1e-2
    if "scaled" in name:
        assert found["scaling"] > 100 * SUMMED
    if "qwen" in name:
        assert found["extras"] > 100 * SUMMED


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["difference", "isolated"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_one_process(alone, name, measure):
    assert alone["tp1"][name][measure] <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["difference", "isolated"])
@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (layout, name)
        for layout in ("tp2_sp", "pp2", "pp2_uneven")
        for name in MODELS
        if layout != "pp2" or name not in UNEVEN_ONLY
    ],
)
def test_logits_of_two_processes(together, layout, name, measure):
    assert together[layout][name][measure] <= (SUMMED if layout == "tp2_sp" else EXACT)


@pytest.mark.slow
def test_distillation_over_vocabulary_shards(together):
    found = together["tp2_sp"]["distillation"]
    assert set(found) == {"value_1", "gradient_1", "value_2", "gradient_2"}
    assert max(found.values()) <= 1e-6


@pytest.mark.slow
def test_every_divergence_over_vocabulary_shards(together):
    found = together["tp2_sp"]["divergences"]
    assert len(found) == 3 * 5 + 1
    assert max(found.values()) <= 1e-10
