"""The sensitivity command: single layers against the hook itself, a planted bad layer, every layout, a usable plan."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy.special import rel_entr

from halfbyte.launch.check import plan_text
from halfbyte.launch.sensitivity import prepare
from halfbyte.training.allocation import groups
from halfbyte.training.config import Format, LayerFormat, Method, Quantize, Recipe, Smoothing
from halfbyte.training.errors import RecipeError, UserError
from halfbyte.training.resolve import resolve
from halfbyte.training.rules import find_shape
from halfbyte.training.scoring import Item

TOKENS = torch.arange(48).reshape(2, 24) * 7 % 64
BAD = "model.layers.2.mlp.down_proj"


# ---- before any process starts


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["sensitivity.bits=4.49"],
            "sensitivity.bits = 4.49: below 4.5, the fewest that the layers can have with nvfp4",
        ),
        (["sensitivity.bits=4.5", "quantize.format=fp8"], "sensitivity.bits = 4.5: below 8, the fewest"),
        (["sensitivity.bits=16"], "sensitivity.bits = 16: BF16 in every layer has 16; give less"),
        (["sensitivity.bits=17"], "sensitivity.bits = 17: BF16 in every layer has 16; give less"),
        (["method=bf16"], "method = bf16: the control quantizes nothing"),
        (["evaluate.tasks.english.kind=continuation"], "sensitivity.data = null: the recipe has no evaluation task"),
    ],
)
def test_what_cannot_be_measured_is_one_line(overrides, says):
    with pytest.raises(RecipeError) as caught:
        prepare(resolve("tiny", overrides))
    (line,) = caught.value.problems
    assert line.startswith(says)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sensitivity.bits=-1", "must be positive"),
        ("sensitivity.bits=six", "must be a number or null"),
        ("sensitivity.tokens=0", "must be positive"),
        ("sensitivity.data=nowhere.jsonl", "no such file"),
    ],
)
def test_bad_settings_are_recipe_errors(override, says):
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", [override])
    (line,) = caught.value.problems
    assert says in line


def test_the_measurement_has_a_folder_of_its_own_and_one_text():
    recipe = resolve("tiny", ["run.dir=runs/x", "method=qad"])
    measured = prepare(recipe)
    assert (measured.run.dir, measured.method) == ("runs/x/sensitivity", Method.ptq)
    assert [task.name for task in measured.evaluate.tasks] == ["english"]
    assert len(recipe.evaluate.tasks) == 2  # untouched: the run that follows evaluates both
    recipe.sensitivity.data = recipe.data.train
    assert [task.data for task in prepare(recipe).evaluate.tasks] == [recipe.data.train]


# ---- one process, a tiny model


@pytest.fixture(scope="module")
def world():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    with helpers["world_of_one"]() as runtime:
        yield lambda recipe: helpers["random_model"](runtime, recipe), helpers["SHAPE"], runtime


def forward(gpt: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return gpt(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)


@pytest.mark.slow
@pytest.mark.parametrize("default", [Format.nvfp4, Format.w4a16_nvfp4, Format.mxfp4, Format.fp8])
def test_a_variant_is_the_model_that_a_recipe_of_that_layer_alone_makes(world, default):
    from halfbyte.training import quantize, sensitivity

    build, shape, _ = world
    recipe = Recipe(quantize=Quantize(format=default))
    variants = sensitivity.Variants(build(recipe), recipe, forward)
    members = groups(shape, recipe)
    plain = forward(build(recipe))
    for group in (members[1], members[4]):
        for number_format in group.formats:
            layers = {group.pattern: LayerFormat(number_format.value), "*": LayerFormat.bf16}
            alone = Recipe(quantize=Quantize(format=default, layers=layers))
            gpt = build(alone)
            quantize.quantize(gpt, alone, forward)
            variants.choose({group: number_format})
            assert torch.equal(forward(variants.model), forward(gpt))
            assert not torch.equal(forward(variants.model), plain)
    variants.choose({})
    assert torch.equal(forward(variants.model), plain)


@pytest.mark.slow
def test_layers_are_smoothed_before_they_are_measured(world):
    from halfbyte.training import ptq, sensitivity

    build, shape, _ = world
    recipe = Recipe(quantize=Quantize(smoothing=Smoothing.smoothquant))
    variants = sensitivity.Variants(build(recipe), recipe, forward)
    gpt, unsmoothed = build(recipe), build(recipe)
    ptq.calibrate(gpt, recipe, forward)
    assert not torch.equal(
        variants.model.decoder.layers[0].mlp.linear_fc1.weight, unsmoothed.decoder.layers[0].mlp.linear_fc1.weight
    )
    variants.choose(dict.fromkeys(groups(shape, recipe), recipe.quantize.format))
    assert torch.equal(forward(variants.model), forward(gpt))
    variants.choose({})
    assert torch.equal(forward(variants.model), forward(unsmoothed))  # smoothing is exact
    planned = Recipe(quantize=Quantize(smoothing=Smoothing.smoothquant, layers={"*": LayerFormat.bf16}))
    with_plan = sensitivity.Variants(build(planned), planned, forward)
    for mine, theirs in zip(with_plan.model.parameters(), variants.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_the_comparison_is_the_mean_divergence_of_all_positions(world):
    from halfbyte.training import sensitivity

    build, shape, runtime = world
    recipe = Recipe()
    recipe.evaluate.tokens_per_batch = 50  # two texts a batch, and a batch that has to be filled up
    texts = [torch.arange(n) * 7 % 64 for n in (24, 9, 17)]
    items = [Item(i, tuple(text.tolist()), 1, 1) for i, text in enumerate(texts)]
    model = build(recipe)
    variants = sensitivity.Variants(model, recipe, forward)
    comparison = sensitivity.Comparison(recipe, runtime, items, pad_id=3)
    variants.choose({})
    assert comparison.run(model) == []
    before = [forward(model, text[None])[0, :-1].double().softmax(-1) for text in texts]
    assert comparison.run(model) == [0, 0, 0]
    variants.choose(dict.fromkeys(groups(shape, recipe), Format.nvfp4))
    after = [forward(model, text[None])[0, :-1].double().softmax(-1) for text in texts]
    expected = [rel_entr(p.numpy(), q.numpy()).sum() for p, q in zip(before, after, strict=True)]
    found = comparison.run(model)
    assert found == pytest.approx(expected, rel=1e-3)
    interval = comparison.interval(found)
    assert interval.estimate == pytest.approx(sum(found) / (23 + 8 + 16))
    assert interval.low < interval.estimate < interval.high
    with pytest.raises(UserError, match="non-finite logits"):
        comparison.interval([float("nan"), 1.0, 1.0])


@pytest.mark.slow
def test_texts_are_taken_until_there_are_enough_positions(world):
    from halfbyte.training.sensitivity import enough

    items = [Item(i, (0,) * 11, 1, 1) for i in range(9)]
    assert [len(enough(items, tokens)) for tokens in (1, 20, 21, 1000)] == [2, 2, 3, 9]
    long = [Item(i, (i,) * 1000, 1, 1) for i in range(99)]
    for tokens, texts, length in ((100, 4, 33), (1600, 16, 101), (99 * 999, 99, 1000)):
        assert [len(item.tokens) for item in enough(long, tokens)] == [length] * texts
    with pytest.raises(UserError, match="fewer than two texts"):
        enough(items[:1], 5)


# ---- the command


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model) -> Path:
    """A folder with the tiny model, one of whose linears FP4 wipes out: every block of 16 weights has an outlier.

    The outliers meet inputs that are always zero, so that they change nothing but the scales of their blocks.
    """
    folder = tmp_path_factory.mktemp("sensitivity")
    shutil.copytree(tiny_model, folder / "model")
    weights = load_file(folder / "model/model.safetensors")
    weights[f"{BAD}.weight"][:, ::16] = 60 * weights[f"{BAD}.weight"].abs().max()
    weights[f"{BAD.replace('down', 'gate')}.weight"][::16] = 0
    save_file(weights, folder / "model/model.safetensors", metadata={"format": "pt"})
    return folder


OPTIONS = ("model.path=model", "train.dtype=float64", "sensitivity.tokens=200", "quantize.calibration_samples=4")


@pytest.mark.slow
def test_a_planted_layer_is_found_and_spared(halfbyte, place):
    done = halfbyte("sensitivity", "tiny", *OPTIONS, "--bits", "5.5", "run.dir=runs/one", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((place / "runs/one/sensitivity.json").read_text())
    assert len(content["layers"]) == 32
    worst = content["layers"][0]
    assert (worst["layer"], worst["format"]) == (BAD, "nvfp4")
    assert worst["kl"] > 2 * content["layers"][1]["kl"]
    assert worst["interval"][0] > content["layers"][1]["interval"][1]
    assert worst["bits_saved"] == 11.5 * 128 * 256
    assert content["text"]["data"].endswith("english_heldout.jsonl.gz")
    assert 200 <= content["text"]["tokens"] < 300
    plan = content["variants"]["plan"]
    assert plan["bits_per_weight"] <= 5.5
    assert plan["interval"][0] <= plan["kl"] <= plan["interval"][1]
    assert plan["kl"] < content["variants"]["nvfp4 everywhere"]["kl"]
    assert content["plan"]["layers"][BAD] in ("fp8", "bf16")
    for shown in (f"{BAD} ", "sum of single KLs", "run it: halfbyte run tiny runs/one/sensitivity.yaml"):
        assert shown in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [("parallel.tensor=2", "parallel.sequence=true"), ("parallel.pipeline=2", "parallel.last_stage_layers=1")]
)
def test_every_layout_gives_the_same_table(halfbyte, place, layout):
    run = place / "runs" / layout[0]
    done = halfbyte("sensitivity", "tiny", *OPTIONS, *layout, "--bits", "5.5", f"run.dir={run}", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    mine, one = (json.loads((d / "sensitivity.json").read_text()) for d in (run, place / "runs/one"))
    costs = [{(entry["layer"], entry["format"]): entry["kl"] for entry in c["layers"]} for c in (mine, one)]
    assert costs[0] == pytest.approx(costs[1], abs=1e-6)
    assert mine["plan"] == one["plan"]
    for name, variant in one["variants"].items():
        assert mine["variants"][name]["kl"] == pytest.approx(variant["kl"], abs=1e-6)


@pytest.mark.slow
def test_the_plan_runs_as_it_is_written(halfbyte, place):
    fragment = place / "runs/one/sensitivity.yaml"
    plan = json.loads((place / "runs/one/sensitivity.json").read_text())
    written = yaml.safe_load(fragment.read_text())["quantize"]
    assert written == {"format": "nvfp4", "layers": plan["plan"]["layers"]}
    recipe = resolve("tiny", [str(fragment), f"model.path={place / 'model'}"])
    shape, _ = find_shape(recipe)
    assert shape is not None
    assert f"{plan['variants']['plan']['bits_per_weight']:.3f} bits per weight" in plan_text(recipe, shape)
    short = ("method=ptq", "evaluate.tasks.lambada.limit=2", "evaluate.tasks.english.limit=2", "verify.items=0")
    short += ("gate.perplexity_ratio=1e100",)  # two items of random weights
    # Into the very run.dir that was measured: the measurement has left no run there.
    options = (*short, "model.path=model", "run.wandb=disabled", "run.dir=runs/one")
    done = halfbyte("run", "tiny", fragment, *options, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    layers = json.loads((place / "runs/one/quantize.json").read_text())["layers"].values()
    counts = dict.fromkeys(plan["plan"]["counts"], 0)
    for layer in layers:
        counts[layer["format"]] += 1
    if "bf16" in counts:
        counts["bf16"] = 16 - len(layers)
    assert counts == plan["plan"]["counts"]
    assert {layer["format"] for layer in layers if BAD in layer["hf"]} <= {"fp8"}
    assert json.loads((place / "runs/one/verify.json").read_text())["ok"] is True
    report = (place / "runs/one/report.md").read_text()
    assert "Block scales of the weights" in report
    assert "over 28 linears" in report or "bf16" in counts  # FP8's scales among them
    assert "The histograms of scales: missing" not in report
