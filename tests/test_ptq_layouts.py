"""Calibration gives the same scales and the same quantized model under every layout: float64, one and two processes."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("workers") / "ptq.py"
VARIANTS = ("clipped", "searched", "duo")


def measure(model: Path, out: Path, forks, processes: int) -> dict:
    forks.script(WORKER, model, out, ranks=processes)
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tiny_model, forks, tmp_path_factory) -> dict:
    return measure(tiny_model, tmp_path_factory.mktemp("ptq") / "one.json", forks, 1)["one"]


@pytest.fixture(scope="module")
def together(tiny_model, forks, tmp_path_factory) -> dict:
    return measure(tiny_model, tmp_path_factory.mktemp("ptq") / "two.json", forks, 2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_scales_and_logits_do_not_depend_on_the_layout(alone, together, layout, variant):
    mine, one = together[layout][variant], alone[variant]
    assert mine["layers"].keys() == one["layers"].keys()
    for key, entry in one["layers"].items():
        assert mine["layers"][key]["scale_2"] == entry["scale_2"], key
        assert mine["layers"][key]["amax"] == pytest.approx(entry["amax"], rel=1e-6), key
        assert mine["layers"][key].get("smoothing") == entry.get("smoothing"), key
        outputs = entry.get("output_relative_rms_error")
        assert mine["layers"][key].get("output_relative_rms_error") == (outputs and pytest.approx(outputs, rel=1e-6)), (
            key
        )
        error = entry["weight_relative_rms_error"]
        assert mine["layers"][key]["weight_relative_rms_error"] == pytest.approx(error, rel=1e-6), key
    for ours, theirs in zip(mine["logits"], one["logits"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
