"""Mistral, Qwen2 and Qwen3 beside Llama: the same numbers under every layout, the same bytes, readable by transformers.

Logits against transformers are test_model.py's. Float64 where layouts are compared: FP4 rounding is discontinuous.
"""

import json
from pathlib import Path

import pytest
import torch

from halfbyte.export import hf
from halfbyte.export.decode import write_decoded
from halfbyte.export.served import decoded_model
from halfbyte.export.verify import verify
from halfbyte.training.config import Format, Method, Quantize, Recipe
from halfbyte.training.errors import RecipeError
from halfbyte.training.families import TINY
from halfbyte.training.fetch import fetch
from halfbyte.training.kv_format import KVCache
from halfbyte.training.model_rules import model_problems
from halfbyte.training.shape import planned_linears, read_shape

WORKER = Path(__file__).with_name("workers") / "layouts.py"
LAYOUTS = ("one", "tp2_sp", "pp2")
CASES = {
    "tiny_mistral": {"format": Format.w4a8_nvfp4_fp8, "kv_cache": KVCache.fp8},
    "tiny_qwen2": {},
    "tiny_qwen3": {"kv_cache": KVCache.nvfp4},
}
"""Model -> what it is quantized to, so that formats and caches go through the layouts as well."""


@pytest.fixture(scope="module")
def place(forks, tmp_path_factory) -> Path:
    """A folder with the models, and what the worker left of every case and layout."""
    folder = tmp_path_factory.mktemp("families")
    cases = {
        name: {"model": str(fetch(name, folder / name)), "quantize": quantize, "layouts": LAYOUTS}
        for name, quantize in CASES.items()
    }
    cases["tiny_qwen3"]["layouts"] = (*LAYOUTS, "tp2")  # without SP the norms of q and k are reduced by another rule
    (folder / "cases.json").write_text(json.dumps(cases))
    for ranks in (1, 2):
        forks.script(WORKER.with_name("start.py"), WORKER, folder, ranks=ranks)
    return folder


def losses(place: Path, case: str, layout: str) -> list[float]:
    return json.loads((place / f"{case}.{layout}" / "losses.json").read_text())


@pytest.fixture(scope="module")
def exports(place) -> dict[str, dict[str, Path]]:
    """Case -> layout -> the exported directory."""
    from halfbyte.training.retention import latest

    found: dict[str, dict[str, Path]] = {case: {} for case in CASES}
    for case in CASES:
        for layout in LAYOUTS:
            run = place / f"{case}.{layout}"
            last = latest(run / "checkpoints")
            assert last is not None
            out = found[case][layout] = run / "hf"
            weights = _weights(place, case, last)
            hf.write(weights, _recipe(case), model_dir=place / case, out=out, checkpoint=last.name, versions={})
    return found


def _recipe(case: str) -> Recipe:
    return Recipe(method=Method.qat, quantize=Quantize(**CASES[case]))


def _weights(place: Path, case: str, checkpoint_dir: Path):
    from halfbyte.training.saved_weights import read_weights

    shape = read_shape(place / case / "config.json")
    return read_weights(checkpoint_dir, shape, planned_linears(shape, _recipe(case)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same_under_every_layout(place, case):
    reference = losses(place, case, "one")
    assert len(set(reference)) == 3  # the weights move
    for layout in LAYOUTS[1:]:
        assert losses(place, case, layout)[:3] == pytest.approx(reference, abs=1e-6)
    trained, restarted = losses(place, case, "pp2")[2:]
    assert trained == restarted


@pytest.mark.slow
def test_norms_of_heads_train_under_tensor_parallelism_without_sequence_parallelism(place):
    assert losses(place, "tiny_qwen3", "tp2") == pytest.approx(losses(place, "tiny_qwen3", "one"), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_export_is_the_same_bytes_whatever_the_layout(place, exports, case):
    one = exports[case]["one"]
    for layout in LAYOUTS[1:]:
        out = exports[case][layout]
        for name in ("model.safetensors", "config.json", "hf_quant_config.json"):
            assert (out / name).read_bytes() == (one / name).read_bytes(), (layout, name)
    last = place / f"{case}.one" / "checkpoints" / "step_00000002"
    report = verify(one, _weights(place, case, last), _recipe(case))
    assert report["problems"] == []
    assert report["ok"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_export_says_what_it_is_and_holds_all_tensors(place, exports, case):
    from safetensors import safe_open

    source, out = (json.loads((folder / "config.json").read_text()) for folder in (place / case, exports[case]["one"]))
    for key in ("architectures", "model_type", "head_dim", "tie_word_embeddings"):
        assert out.get(key) == source.get(key)
    with safe_open(exports[case]["one"] / "model.safetensors", "pt") as tensors:
        dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    attention = "model.layers.3.self_attn."
    extras = {
        "tiny_mistral": set(),
        "tiny_qwen2": {f"{attention}{name}.bias" for name in ("q_proj", "k_proj", "v_proj")},
        "tiny_qwen3": {f"{attention}{name}.weight" for name in ("q_norm", "k_norm")},
    }[case]
    assert {name for name in dtypes if attention in name and ("bias" in name or "norm" in name)} == extras
    assert {dtypes[name] for name in extras} <= {"BF16"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_decoded_files_load_in_transformers(exports, case, tmp_path):
    from transformers import AutoModelForCausalLM

    write_decoded(exports[case]["one"], tmp_path / "decoded")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "decoded", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    served = decoded_model(exports[case]["one"])
    assert type(served) is type(loaded)
    mine, theirs = dict(served.named_parameters()), dict(loaded.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
}
MISTRAL, QWEN2, QWEN3 = TINY["tiny_mistral"], TINY["tiny_qwen2"], TINY["tiny_qwen3"]


def write(tmp_path: Path, *changes: dict) -> Path:
    config = CONFIG.copy()
    for change in changes:
        config |= change
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return path


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ((MISTRAL, {"sliding_window": 256}), 256),
        ((MISTRAL, {"sliding_window": None}), None),
        ((QWEN2, {"sliding_window": 256}), None),
        ((QWEN2, {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 2}), None),
        ((QWEN2, {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 1}), 256),
        (
            (
                QWEN3,
                {"sliding_window": 256, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
            ),
            None,
        ),
        ((TINY["tiny"], {"architectures": ["LlamaForCausalLM"], "sliding_window": 256}), None),
    ],
)
def test_a_sliding_window_ends_the_sequence(tmp_path, changes, window):
    shape = read_shape(write(tmp_path, *changes))
    assert (shape.sliding_window, shape.max_positions) == (window, window or 4096)
    recipe = Recipe()
    found = [line for line in model_problems(recipe, shape) if "sequence_length" in line]
    assert len(found) == (window is not None)
    if window is not None:
        assert "train.sequence_length = 512" in found[0]
        assert "sliding window of 256 tokens" in found[0]
        recipe.train.sequence_length = window
        assert not [line for line in model_problems(recipe, shape) if "sequence_length" in line]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ((QWEN3, {"head_dim": "absent"}), "head_dim is missing"),  # transformers would take 128
        ((QWEN2, {"num_key_value_heads": "absent"}), "num_key_value_heads is missing"),  # transformers would take 32
        ((QWEN3, {"attention_bias": True}), "attention_bias = true"),
        ((MISTRAL, {"sliding_window": "4k"}), "sliding_window = 4k"),
        ((QWEN3, {"architectures": ["Qwen3MoeForCausalLM"]}), "Qwen3MoeForCausalLM: only LlamaForCausalLM, Mistral"),
    ],
)
def test_what_a_family_lacks_is_one_line(tmp_path, changes, says):
    with pytest.raises(RecipeError) as caught:
        read_shape(write(tmp_path, *changes))
    assert [says in line for line in caught.value.problems] == [True]


@pytest.mark.parametrize("case", list(TINY))
def test_shapes_are_those_of_transformers(case, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from halfbyte.training.hf_map import expected_shapes

    path = write(tmp_path, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, TINY[case])
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(path.read_text())))
    shape = read_shape(path)
    expected = {name: tuple(parameter.shape) for name, parameter in reference.named_parameters()}
    assert expected_shapes(shape) == expected
    assert shape.parameters == reference.num_parameters()
