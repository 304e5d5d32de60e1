"""`halfbyte plan`: counts against published ones, memory and time against what was measured, search and refusals."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.bench import plan as bench
from halfbyte.bench import plan_check
from halfbyte.bench.plan_cases import CASES
from halfbyte.bench.plan_measure import by_layout
from halfbyte.launch import cli
from halfbyte.launch.check import export_bytes
from halfbyte.launch.plan_memory import memory_per_rank, parameters_of_stage
from halfbyte.launch.plan_model import Architecture, Layout, named_model
from halfbyte.launch.plan_search import SPARE, best, judge, layout_problem
from halfbyte.launch.plan_served import exported, served, smallest_slice
from halfbyte.launch.plan_text import jobs_for, named_gpu
from halfbyte.launch.plan_time import step_flops, step_time
from halfbyte.training.config import Format, Method
from halfbyte.training.errors import OK, USAGE, RecipeError
from halfbyte.training.hardware import GPUS, MIG_SLICES, REACHED, gpu_of, mig_name
from halfbyte.training.model_rules import model_problems
from halfbyte.training.resolve import resolve
from halfbyte.training.rules import find_shape, problems
from halfbyte.training.shape import linear_sizes

RECIPES = Path(__file__).parent.parent / "recipes"
SPEED = Path(__file__).parent.parent / "docs/evidence/h200_speed.json"
MEASURED = json.loads(SPEED.read_text())


@pytest.mark.parametrize("arm", ["bf16", "nvfp4", "w4a16_nvfp4", "mxfp4", "fp8", "four_over_six"])
def test_one_h200_as_measured(arm):
    size = bench.Size(**MEASURED["size"])
    recipe = bench.recipe(size, bench.LAYOUTS["tp1"], bench.ARMS[arm])
    model = Architecture.dense("bench", bench.shape_of(size))
    found = MEASURED["steps"]["tp1"][arm]
    memory = sum(memory_per_rank(recipe, model, Layout.of(recipe)).values())
    assert memory == pytest.approx(found["peak_bytes"], rel=1e-3)
    seconds = step_time(recipe, model, Layout.of(recipe), GPUS["H200"]).seconds
    assert seconds == pytest.approx(found["median"], rel=0.1)
    assert step_flops(model, 4 * 4096, 4096) == pytest.approx(size.step_flops, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [  # model cards: 8.03 B and 70.6 B; arXiv 2407.21783: 405 B; 2402.16819: 15 B; 2406.11704: 340 B; 2412.19437: 671 B
        ("llama31_8b", 8_030_261_248, 8_030_261_248),
        ("llama33_70b", 70_553_706_496, 70_553_706_496),
        ("llama31_405b", 405.9e9, 405.9e9),
        ("nemotron4_15b", 15.6e9, 15.6e9),
        ("nemotron4_340b", 341e9, 341e9),
        ("deepseek_r1", 671e9, 36.7e9),
    ],
)
def test_counts_are_the_published_ones(name, parameters, active):
    model = named_model(name)
    assert model.parameters == pytest.approx(parameters, rel=2e-3)
    assert model.active == pytest.approx(active, rel=5e-3)
    assert (model.note is None) == name.startswith("llama")


def test_layouts_hold_all_parameters_once():
    model = named_model("llama33_70b")
    shape = model.sizes
    for tensor, pipeline, last in ((1, 1, None), (8, 4, None), (2, 8, 10)):
        layout = Layout(tensor, pipeline, 1, 1, False, tensor > 1, last)
        held = sum(sum(parameters_of_stage(model, layout, stage)) for stage in range(pipeline)) * tensor
        assert held == pytest.approx(model.parameters - (2 * shape.layers + 1) * shape.hidden, rel=1e-12)


def test_fp4_weights_are_those_of_the_export():
    for name in ("llama31_8b_nvfp4_qat", "smollm2_135m_mxfp4_qat"):
        recipe = resolve(name, [])
        shape, _ = find_shape(recipe)
        assert shape is not None
        weights = served(recipe, Architecture.dense(name, shape), recipe.quantize.format).weights
        assert weights == pytest.approx(export_bytes(recipe, shape), rel=1e-5)  # but for the scales per tensor


@pytest.mark.parametrize(("cache", "numbers"), [("none", 2.0), ("fp8", 1.0), ("nvfp4", 0.5625)])
def test_a_recipe_s_own_plan_is_served_as_it_is_exported(cache, numbers, capsys):
    words = ["quantize.layers={'*.mlp.*': fp8, '*.o_proj': bf16}", f"quantize.kv_cache={cache}"]
    recipe = resolve("llama31_8b_nvfp4_qat", words)
    shape, _ = find_shape(recipe)
    assert shape is not None
    found = exported(recipe, shape)
    assert found.weights == pytest.approx(export_bytes(recipe, shape), rel=1e-5)
    assert found.cache == 2 * 32 * 1024 * numbers
    assert cli.main(["plan", "llama31_8b_nvfp4_qat", *words]) == OK
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "this recipe  " in line]
    assert row.split()[2:4] == [f"{found.weights / 2**30:.1f}", f"{found.cache / 1024:.1f}"]


def test_where_a_model_fits():
    recipe = resolve("llama33_70b_nvfp4_qad", [])
    llama = named_model("llama33_70b")
    fp4, bf16 = served(recipe, llama, Format.nvfp4), served(recipe, llama, None)
    assert smallest_slice(fp4, GPUS["B200"]) == "2g.45gb"
    assert smallest_slice(bf16, GPUS["B200"]) == "7g.180gb"
    assert smallest_slice(served(recipe, named_model("llama31_405b"), Format.nvfp4), GPUS["B200"]) is None
    assert bf16.cache == 2 * fp4.cache == 2 * 2 * 80 * 8 * 128
    names = [mig_name(GPUS["H200"], slices) for slices in MIG_SLICES]
    assert names == ["1g.18gb", "2g.35gb", "3g.71gb", "7g.141gb"]


def test_the_search_returns_a_legal_layout_that_fits_and_says_why_others_do_not():
    recipe = resolve("llama33_70b_nvfp4_qad", [])
    model, gpu = named_model("llama33_70b"), GPUS["H100"]
    found, refused = best(recipe, model, gpu, 32)
    assert found is not None
    layout = found.layout
    assert layout.world == 32
    assert layout_problem(recipe, model.sizes, gpu, layout) is None
    assert sum(found.memory.values()) <= gpu.usable
    slower = step_time(recipe, model, replace(Layout.of(recipe), recompute=True), gpu)
    assert found.step.seconds < slower.seconds
    assert "gradients" in refused["TP1 PP1"]
    assert "NVLink, which joins 8" in refused["TP16 PP1"]
    assert "does not divide the model's 80 layers" in refused["TP1 PP32"]
    nothing, reasons = best(recipe, model, gpu, 2)
    assert nothing is None
    assert set(reasons) == {"TP1 PP1", "TP1 PP2", "TP2 PP1"}


def test_what_cannot_run_as_written_is_said(capsys):
    assert cli.main(["plan", "smollm2_135m_nvfp4_qat", "--model", "tiny"]) == OK
    assert "cannot run: parallel.last_stage_layers = 11: the other 1 pipeline stages" in capsys.readouterr().out
    assert cli.main(["plan", "llama31_8b_nvfp4_qat", "--model", "smollm2_135m"]) == OK
    assert "cannot run: parallel.tensor = 2: does not divide the model's attention heads (9)" in capsys.readouterr().out


def test_a_pipeline_that_is_not_filled_runs_but_is_not_searched():
    recipe = resolve("llama31_8b_nvfp4_qat", ["train.global_batch=8"])
    model, gpu = named_model("llama31_8b"), GPUS["H200"]
    assert layout_problem(recipe, model.sizes, gpu, Layout(1, 16, 1, 1, False, False)) is None
    _, refused = best(recipe, model, gpu, 16)
    assert refused["TP1 PP16"].startswith("train.global_batch gives a rank 8 micro-batches at most, too few for 16")


def test_the_search_suggests_nothing_that_a_recipe_s_rules_refuse():
    """Two micro-batches at once need tensor parallelism and pairs: fewer layouts than the model's sizes allow."""
    keys = ["train.micro_batches_at_once=2", "train.recompute=false", "train.cuda_graphs=always"]
    recipe = resolve("llama31_8b_nvfp4_qat", ["parallel.pipeline=1", "parallel.data=1", *keys])
    for gpus in (1, 4, 32):
        found, refused = best(recipe, named_model("llama31_8b"), GPUS["H200"], gpus)
        assert (found is None) == (gpus == 1)
        assert "TP1 PP1" in refused
        assert refused["TP1 PP1"].startswith("train.micro_batches_at_once = 2: hides what tensor-parallel ranks")
        assert found is None or problems(found.layout.written_into(recipe)) == []


def test_any_number_of_gpus_is_searched_at_once():
    """By divisors, which are found without counting to the number: this one would take hours."""
    layout, refused = best(resolve("llama31_8b_nvfp4_qat", []), named_model("llama31_8b"), GPUS["H200"], 10**12)
    assert layout is None
    assert len({name for name in refused if name.endswith(" PP1")}) == 13 * 13  # 10^12 = 2^12 5^12


def test_links_carry_what_the_layout_sends():
    recipe, model = resolve("llama31_8b_nvfp4_qat", []), named_model("llama31_8b")
    h200 = GPUS["H200"]

    def step(tensor, pipeline, data, sequence=False):
        return step_time(recipe, model, Layout(tensor, pipeline, data, 1, False, sequence), h200)

    alone = step(1, 1, 1)
    assert (alone.nvlink_bytes, alone.network_bytes, alone.tensor, alone.data, alone.bubble) == (0, 0, 0, 0, 0)
    held = model.parameters - 65 * 4096
    assert step(1, 1, 8).nvlink_bytes == pytest.approx(6 * held * 7 / 8)  # FP32 gradients out, BF16 weights back
    over = step(1, 1, 16)
    assert (over.nvlink_bytes, over.network_bytes) == (0, pytest.approx(6 * held * 15 / 16))
    assert step(1, 4, 1).bubble > step(1, 2, 1).bubble > 0
    assert step(4, 1, 1, sequence=True).tensor > 0


def test_only_what_is_trained_is_reduced_and_updated():
    model, eight = named_model("llama31_8b"), Layout(1, 1, 8, 1, False, False)

    def step(*words, layout=eight):
        return step_time(resolve("llama31_8b_nvfp4_qat", list(words)), model, layout, GPUS["H200"])

    held, rank = model.parameters - 65 * 4096, 16
    beside = rank * sum(map(sum, linear_sizes(model.sizes).values()))
    whole, lora = step(), step(f"train.lora.rank={rank}")
    assert lora.nvlink_bytes == pytest.approx(8 * beside * 7 / 8)  # FP32 gradients out, FP32 adapters back
    assert lora.data < whole.data / 10
    assert lora.compute < whole.compute
    scales = step("train.block_scale_lr_mult=1").nvlink_bytes
    assert scales == pytest.approx((6 * held + 8 * model.linears / 16) * 7 / 8)
    alone = Layout(1, 1, 1, 1, False, False)
    reached = GPUS["H200"].memory * REACHED.memory
    updates = [step(*words, layout=alone).optimizer for words in ((), (f"train.lora.rank={rank}",))]
    assert updates[0] == pytest.approx((46 * held + 4 * model.linears) / reached)
    merging = 16 * (rank + 2) + 12
    assert updates[1] == pytest.approx((46 * beside + (4 + 12 + merging) * model.linears) / reached)


def test_bad_words_are_named(capsys):
    for words, line in (
        (["--gpu", "H300"], "--gpu H300: not known; use one of A100, H100, H200, B200, GB200-NVL72"),
        (["--nodes", "0"], "--nodes 0: must be positive; give at least 1"),
        (
            ["--nodes", "200000"],
            "--nodes 200000: 1,600,000 GPUs are more than a plan is made for; give at most 1,000,000",
        ),
        (["parallel.data=4000000", "train.global_batch=4000000"], "parallel: 8,000,000 GPUs are more than a plan is"),
        (["--model", "gpt5"], "--model gpt5: not known; give a config.json or one of deepseek_r1, "),
        (["parallel.tensor=3"], "parallel.tensor = 3: does not divide the model's"),
    ):
        assert cli.main(["plan", "llama31_8b_nvfp4_qat", *words]) == USAGE
        assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_config_that_nobody_knows_is_refused(tmp_path):
    path = tmp_path / "config.json"
    for text, reason in (
        ("{", "not valid JSON"),
        ("{}", "lacks 'architectures'"),
        ('{"architectures": []}', "lacks"),
        ('{"architectures": ["MambaForCausalLM"]}', "architectures = MambaForCausalLM: only LlamaForCausalLM"),
        ('{"architectures": ["NemotronForCausalLM"]}', "num_attention_heads is missing or no positive number"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=reason):
            named_model(str(path))


@pytest.mark.parametrize("name", ["tiny", "qwen3_8b", "nemotron4_15b", "deepseek_r1"])
def test_no_value_of_a_config_breaks_a_plan(name, tmp_path):
    """Lines for those that no model has; counts that make sense for the others."""
    recipe = resolve("llama31_8b_nvfp4_qat", [])
    path, base = tmp_path / "config.json", json.loads((RECIPES / f"shapes/{name}.json").read_text())
    for key in base:
        for value in (0, -1, 1.5, "8", None, [], {}, math.nan, 2**70, True, 3):
            path.write_text(json.dumps(base | {key: value}))
            try:
                found, lines = named_model(str(path)), []
            except RecipeError as error:
                found, lines = None, error.problems
            assert len(set(lines)) == len(lines)
            assert all(line.startswith(f"{path}: ") for line in lines), (key, value)
            if found is not None:
                assert found.parameters > found.linears > 0, (key, value)
                assert all(served(recipe, found, of).cache > 0 for of in (None, Format.nvfp4)), (key, value)


@pytest.mark.parametrize(
    "words",
    [
        ["llama31_8b_nvfp4_qat"],
        ["llama31_8b_bf16_control", "--gpu", "h100", "--nodes", "2"],
        ["smollm2_135m_nvfp4_ptq"],
        ["llama33_70b_nvfp4_qad", "--model", "llama31_405b", "--gpu", "GB200-NVL72", "--nodes", "18"],
        ["llama33_70b_nvfp4_qad", "--model", "nemotron4_340b", "--nodes", "1"],
        ["llama33_70b_nvfp4_qad", "--model", "deepseek_r1", "--gpu", "B200"],
    ],
    ids=" ".join,
)
def test_every_part_is_printed(words, capsys):
    assert cli.main(["plan", *words]) == OK
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 260
    assert "source: NVIDIA" in out
    assert "NVL72" in out
    if "deepseek_r1" in words:
        assert "planned by its parameter counts" in out
    elif "smollm2_135m_nvfp4_ptq" in words:
        assert "best       nothing to search: method ptq only calibrates" in out
        assert "optimizer" not in out
    elif "nemotron4_340b" in words:
        assert "best       none: no layout fits" in out
    else:
        assert "GPU-hours" in out
        assert "best       TP" in out


@pytest.mark.parametrize(("limit", "share"), [("1:00:00", 3480), ("0:10:00", 480), ("0", None), ("30-0", None)])
def test_a_training_longer_than_the_time_limit_is_told_its_jobs(limit, share, capsys):
    """Of each job the last two minutes are for saving."""
    plan = ["plan", "llama31_8b_bf16_control", "train.recompute=false", f"launch.time={limit}"]
    assert cli.main([*plan, "train.steps=100000"]) == OK
    out = capsys.readouterr().out
    step = float(re.search(r"step ([\d.]+) s:", out)[1])  # three digits of it
    said = [int(jobs) for jobs in re.findall(r"halfbyte submit --jobs (\d+) puts them in a row", out)]
    if share is None:
        assert said == []
    else:
        assert said[0] == pytest.approx(100_000 * step / share, rel=0.01)
        assert f"launch.time = {limit}: {said[0]:,} jobs" in out
    assert cli.main([*plan, "train.steps=20"]) == OK
    assert "submit --jobs" not in capsys.readouterr().out


def test_one_second_beyond_a_limit_is_another_job():
    assert [jobs_for(seconds, "1:00:00") for seconds in (1, 3480, 3481, 6960, 6961)] == [1, 1, 2, 2, 3]
    assert jobs_for(1e9, "0") == 1


@pytest.mark.parametrize(("dtype", "state"), [("bfloat16", 2 + 4 + 12), ("float32", 4 + 4 + 8), ("float64", None)])
def test_a_plan_counts_in_the_recipe_s_type_and_times_in_bf16_only(dtype, state, capsys):
    layout = ["parallel.pipeline=2", "parallel.data=1"]
    assert cli.main(["plan", "llama31_8b_bf16_control", f"train.dtype={dtype}", *layout]) == OK
    out = capsys.readouterr().out
    assert ("GPU-hours" in out) == (dtype == "bfloat16")
    if state is None:
        assert "cannot run: train.dtype = float64: only for layout tests on the CPU; use bfloat16" in out
        return
    parts = dict(re.findall(r"(weights|gradients|optimizer) ([\d.]+)", out.split("evaluation")[0]))
    share = named_model("llama31_8b").parameters / 4 / 2**30  # two stages of two ranks, the first as full as the last
    assert sum(map(float, parts.values())) == pytest.approx(state * share, rel=5e-3)
    if dtype == "float32":
        assert "no step time: rates are known in BF16, not in train.dtype = float32" in out
        assert "best       nothing to search: train.dtype = float32, layouts are compared by time in BF16" in out


def test_names_of_gpus():
    assert gpu_of("NVIDIA H200") is GPUS["H200"]
    assert gpu_of("NVIDIA GB200") is GPUS["GB200-NVL72"]
    assert gpu_of("NVIDIA B200") is GPUS["B200"]
    assert gpu_of("Radeon") is None
    assert named_gpu("gb200-nvl72") is GPUS["GB200-NVL72"]


def test_the_check_reads_both_kinds_of_measurement(tmp_path, capsys):
    measured = {"cases": {"llama8b-bf16": {"median": 0.3, "peak_allocated": 45e9}, "llama8b-qad": {"failed": "memory"}}}
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    assert plan_check.main([str(SPEED), str(tmp_path / "measured.json")]) == OK
    out = capsys.readouterr().out
    assert "| tp1 nvfp4 | 25.48 | 25.47 | +0.0% |" in out
    assert "| llama8b-bf16 | " in out
    assert "qad" not in out
    assert "modelopt" not in out
    (tmp_path / "measured.json").write_text("[")
    assert plan_check.main([str(tmp_path / "measured.json")]) == USAGE


def test_the_check_plans_graphs_where_they_were_replayed():
    """Entries say so since pipelines replay by themselves; in older ones only arms that asked for it did."""
    entry, said = {"peak_bytes": 1e9, "median": 1.0}, {}
    arms = {"bf16": entry | {"graphs": True}, "bf16_eager": entry | {"graphs": False}}
    for name, found in {"now": arms, "then": dict.fromkeys(("bf16", "bf16_graphs"), entry)}.items():
        measured = {"size": {"micro_batches": 32}, "steps": {"pp4": found}}
        said |= {(name, row.name): row.memory for row in plan_check.of_steps(measured, GPUS["H200"])}
    assert said["now", "pp4 bf16"] == said["then", "pp4 bf16_graphs"] > said["then", "pp4 bf16"]
    assert said["now", "pp4 bf16_eager"] == said["then", "pp4 bf16"]


def test_misses_are_bold_and_counted():
    rows = [plan_check.Compared("near", 1.09e9, 1e9, 0.19, 0.2), plan_check.Compared("far", 0.8e9, 1e9, 0.25, 0.2)]
    text = plan_check.table(rows)
    assert "| near | 1.09 | 1.00 | +9.0% | 190.0 | 200.0 | -5.0% |" in text
    assert "| far | 0.80 | 1.00 | **-20.0%** | 250.0 | 200.0 | **+25.0%** |" in text
    assert "Memory within 10%: 1 of 2; step time within 20%: 1 of 2." in text


def test_cases_of_the_check():
    assert len({case.name for case in CASES}) == len(CASES)
    layouts = by_layout(list(CASES))
    assert [group[0].gpus for group in layouts] == [1, 2, 2, 2]
    assert sum(map(len, layouts)) == len(CASES)
    for case in CASES:
        assert model_problems(case.recipe(), case.shape) == []
        memory = memory_per_rank(case.recipe(), Architecture.dense("", case.shape), Layout.of(case.recipe()))
        assert sum(memory.values()) < 0.8 * GPUS["H200"].usable  # whatever the plan forgets, the measurement fits


def test_adapters_take_gradients_of_their_weights_and_no_state_of_others():
    few = "evaluate.tokens_per_batch=64"  # else calibration of so small a model takes more than its training
    recipe = resolve("tiny", ["train.lora.rank=4", "train.lora.targets=['*.down_proj']", few])
    shape, _ = find_shape(recipe)
    plain = resolve("tiny", ["train.block_scale_lr_mult=1", few])
    lora, scales = (memory_per_rank(one, Architecture.dense("", shape), Layout.of(one)) for one in (recipe, plain))
    down = shape.layers * shape.ffn * shape.hidden
    assert lora["gradients"] == 4 * down
    assert lora["optimizer"] == 0
    assert lora["beside"] == 16 * shape.layers * 4 * (shape.ffn + shape.hidden)
    assert scales["beside"] == sum(n * k for n, k in linear_sizes(shape).values())  # a scale in 16 bytes per 16 weights
    assert scales["optimizer"] == 3 * scales["gradients"] == 6 * scales["weights"]


def test_gptq_of_a_large_model_does_not_fit_where_its_training_does():
    """Every tensor-parallel rank holds the Hessians of its stage's whole inputs: 4 (3 x 8192^2 + 28672^2) a layer."""
    said = {}
    for weights in ("round", "gptq"):
        recipe = resolve("llama33_70b_nvfp4_qad", [f"quantize.weights={weights}"])
        shape, _ = find_shape(recipe)
        assert shape is not None
        said[weights] = judge(recipe, Architecture.dense("", shape), Layout.of(recipe), GPUS["H100"])
    assert said["round"].problem is None
    assert "most of it Hessians" in (said["gptq"].problem or "")
    work = 8 * (4 * 28672**2 + 2 * 8192 * 28672 / 8)
    assert said["gptq"].memory["Hessians"] == 20 * 4 * (3 * 8192**2 + 28672**2) + work


def test_what_an_evaluation_needs_is_part_of_what_fits(capsys):
    words = ["evaluate.tokens_per_batch=400000", "parallel.pipeline=2", "parallel.data=2"]
    assert cli.main(["plan", "llama31_8b_nvfp4_qat", *words]) == OK
    out = capsys.readouterr().out
    assert "needs 150 GiB per GPU of 138 while it evaluates; lower evaluate.tokens_per_batch = 400000" in out
    assert "not TP2 PP1, TP2 PP2, TP2 PP4: needs 147 GiB per GPU of 138 while it evaluates" in out


def test_the_remedy_is_another_number_of_gpus_where_none_divides(capsys):
    assert cli.main(["plan", "smollm2_135m_nvfp4_qad", "--gpu", "GB200-NVL72", "--nodes", "5"]) == OK
    said = "best       none: no layout divides; take another number of GPUs (--nodes) or another batch\n"
    assert said in capsys.readouterr().out


def test_small_models_are_told_in_small_units(capsys):
    assert cli.main(["plan", "tiny"]) == OK
    out = capsys.readouterr().out
    assert re.search(r"on 1 GPU\n +memory per GPU 14.7 MiB, fits 138 GiB: weights 1.38, gradients 2.75, ", out)
    assert re.search(r"step 0.00\d+ s: kernels [\d.]+, optimizer [\d.]+ ms\n", out)


def test_planning_needs_no_torch(environment):
    code = "import sys; from halfbyte.launch.cli import main; main(['plan', 'tiny']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


@pytest.mark.parametrize(("name", "stages"), [("tp2", 1), ("pp2", 2), ("tp2pp2", 2)])
def test_a_replayed_pipeline_waits_for_python_for_its_teacher_only(name, stages):
    """The student's passes are replayed; without a pipeline the teacher's are part of the same graph."""
    size, waits = bench.Size(), {}
    recipe, slow = bench.recipe(size, bench.LAYOUTS[name], bench.ARMS["nvfp4"]), replace(REACHED, layer=1.0)
    for method in (Method.qat, Method.qad):
        recipe.method = method
        model = Architecture.dense("", bench.shape_of(size))
        waits[method] = step_time(recipe, model, Layout.of(recipe), GPUS["H200"], slow).waiting
    teacher = 0.5 * size.layers / stages * size.micro_batches
    assert waits == {Method.qat: 0, Method.qad: pytest.approx(teacher, rel=0.02) if stages > 1 else 0}


def test_a_step_that_waits_for_python_says_what_graphs_would_make_of_it(capsys):
    """Data-parallel ranks of one host replay graphs by default; of two they do not."""
    words = ["plan", "smollm2_135m_nvfp4_qat", "parallel.pipeline=1", "train.global_batch=32"]
    said = []
    for ranks in (8, 16):
        assert cli.main([*words, f"parallel.data={ranks}"]) == OK
        out = capsys.readouterr().out
        said.append(re.search(r"step ([\d.]+) s: .*waiting.*; ([\d.]+) s with train.cuda_graphs=always", out))
    assert said[0] is None
    assert said[1] is not None
    assert float(said[1][2]) < 0.5 * float(said[1][1])


@pytest.mark.parametrize(
    "name",
    [
        "llama31_8b_nvfp4_qat",
        "llama31_8b_bf16_control",
        "llama31_8b_nvfp4_qad",
        "qwen3_8b_nvfp4_qad",
        "llama33_70b_nvfp4_qad",
    ],
)
def test_a_shipped_recipe_is_not_far_from_the_best_layout(name):
    """On the eight, or 32, 80 GB GPUs that it is written for, with a tenth of their memory to spare."""
    recipe = resolve(name, [])
    shape, _ = find_shape(recipe)
    assert shape is not None
    model, gpu = Architecture.dense("", shape), GPUS["H100"]
    mine = judge(recipe, model, Layout.of(recipe), gpu)
    found, _ = best(recipe, model, gpu, recipe.world_size)
    assert mine.problem is None
    assert sum(mine.memory.values()) < 0.9 * gpu.usable
    assert found is not None
    assert mine.step.seconds < 1.15 * found.step.seconds


def test_the_search_leaves_memory_that_a_plan_may_be_short_of(capsys):
    recipe, gpu = resolve("qwen3_8b_nvfp4_qad", []), GPUS["H200"]
    shape, _ = find_shape(recipe)
    assert shape is not None
    found, _ = best(recipe, Architecture.dense("", shape), gpu, 8)
    assert found is not None
    assert SPARE <= found.spare(gpu) < 0.5
    tight = ["parallel.tensor=1", "parallel.data=8", "parallel.sequence=false", "train.micro_batch=2"]
    assert cli.main(["plan", "qwen3_8b_nvfp4_qad", "--gpu", "H200", *tight]) == OK
    out = capsys.readouterr().out
    assert re.search(r"fits 138 GiB with 0\.\d% to spare, less than the plan can promise: ", out.split("best")[0])
    assert "to spare" not in out.split("best")[1]
