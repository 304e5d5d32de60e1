"""Training methods under every layout: the losses are the same. Float64, as in test_layouts.py.

Data-parallel ranks compute as one process does, and that is held against plain torch in test_module.py.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("workers") / "methods.py"
BESIDE = ("lsq", "lora")
VARIANTS = ("forward_kl", "everything", "top_k", "files", *BESIDE)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the runs leave checkpoints for each other."""
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def found(tiny_model, forks, place) -> dict[str, dict[str, list[float]]]:
    """Layout -> variant -> losses."""
    forks.script(WORKER, tiny_model, place / "two.json", ranks=2)
    return json.loads((place / "two.json").read_text())


@pytest.fixture(scope="module")
def four(tiny_model, forks, place, found) -> dict[str, dict[str, list[float]]]:
    """The same of four processes, which find the checkpoints of two."""
    forks.script(WORKER, tiny_model, place / "four.json", ranks=4)
    return json.loads((place / "four.json").read_text())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_every_layout_gives_the_losses_of_data_parallelism(found, layout, variant):
    assert found[layout][variant] == pytest.approx(found["dp2"][variant], rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_move(found, variant):
    assert len(set(found["dp2"][variant])) == (3 if variant in BESIDE else 2)


def test_files_give_the_losses_of_their_teacher(found):
    assert found["dp2"]["files"] == pytest.approx(found["dp2"]["top_k"], rel=1e-12)


@pytest.mark.parametrize("variant", BESIDE)
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2"])
def test_what_is_beside_the_weights_goes_on_under_another_layout(found, layout, variant):
    """The checkpoint is the pipeline's, after one of two steps; the last number is made of all that is beside."""
    assert found[layout][f"{variant}, resumed"] == pytest.approx(found["dp2"][variant][1:], rel=1e-8)


@pytest.mark.parametrize("variant", BESIDE)
def test_it_goes_on_bit_for_bit_with_the_distributed_optimizer(found, variant):
    straight, resumed = found["dp2"][f"{variant}, float32"], found["dp2"][f"{variant}, float32, resumed"]
    assert straight[1:] == resumed
    assert straight == pytest.approx(found["dp2"][variant], rel=1e-2)


@pytest.mark.parametrize(("layout", "variant"), [("dp2", "lsq"), ("dp2", "lora"), ("tp2_dp2_sp", "lsq")])
def test_what_each_rank_stores_of_the_optimizer_is_what_megatron_gathers(found, four, place, layout, variant):
    """The ranks' stretches, which begin and end within rows, make the same tensors; and they are read back."""
    ours, theirs = (place / f"{variant}.{layout}.float32{how}" for how in ("", ".gathered"))
    cut, whole = tensors(ours), tensors(theirs)
    assert cut.keys() == whole.keys()
    assert all(torch.equal(cut[name], whole[name]) for name in cut)
    assert chunks(ours) > chunks(theirs)
    losses = (found if layout == "dp2" else four)[layout]
    assert losses[f"{variant}, float32"][1:] == losses[f"{variant}, float32, resumed"]


def chunks(folder: Path) -> int:
    """In how many parts a checkpoint's tensors are stored."""
    return sum(
        len(entry.chunks)
        for entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by its keys."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def test_inner_layers_are_compared_under_sequence_parallelism(found):
    assert found["tp2_sp"]["inner"] == pytest.approx(found["dp2"]["inner"], rel=1e-6)
    assert "inner" not in found["pp2"]


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        *(("pp2", name) for name in ("forward_kl", "files", "lsq")),
        *((n, "lsq") for n in ("tp2_pp2_sp", "pp4")),
        ("pp2_dp2", "forward_kl"),
    ],
)
def test_recorded_stages_are_the_plain_ones(found, four, layout, variant):
    """Bit for bit: the losses and the norm of the last gradient, whose passes were recorded."""
    of = (found if layout == "pp2" else four)[layout]
    assert of[f"{variant}, stages again"] == of[f"{variant}, stages"]
    assert of[f"{variant}, stages"][:2] == of[variant][:2]


@pytest.mark.parametrize("variant", ["forward_kl", "lsq", "lora"])
def test_micro_batches_side_by_side_are_those_one_after_the_other(found, variant):
    """Bit for bit, as above: each weight's gradient takes them in their order."""
    one = found["tp2_sp"][f"{variant}, turns"]
    assert found["tp2_sp"][f"{variant}, turns again"] == one
    assert found["tp2_sp"][f"{variant}, turns of four"] == one
    assert one[:2] == pytest.approx(found["tp2_sp"][variant][:2], rel=1e-2)


@pytest.mark.parametrize("layout", ["tp2_pp2_sp", "tp2_dp2_sp", "pp4", "pp2_dp2", "dp4"])
def test_four_processes_give_what_two_give(found, four, layout):
    """Also from the checkpoint of a pipeline of two."""
    values_of = {
        variant: values
        for variant, values in four[layout].items()
        if "float32" not in variant and "stages" not in variant
    }
    assert len(values_of) == {"pp4": 3, "pp2_dp2": 1}.get(layout, 5)
    for variant, values in values_of.items():
        assert values == pytest.approx(found["dp2"][variant.removesuffix(", resumed")][-len(values) :], rel=1e-6), (
            variant
        )
