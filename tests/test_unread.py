"""Keys that change nothing: refused where another key switches them off, said where the method reads none."""

import pytest

from halfbyte.training.errors import RecipeError
from halfbyte.training.resolve import load, resolve
from halfbyte.training.unread import unread


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.lora.alpha=8"], "train.lora.alpha = 8: train.lora.rank = 0 trains no adapters; give a rank, or"),
        (["method=qad", "train.lora.targets=['*.o_proj']"], "train.lora.targets = [*.o_proj]: train.lora.rank = 0"),
        (["method=qad", "distill.beta=0.3"], "distill.beta = 0.3: is read under distill.loss=jensen_shannon only"),
    ],
)
def test_a_key_that_another_key_switches_off_is_one_line(overrides, says):
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", overrides)
    (line,) = caught.value.problems
    assert line.startswith(says)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method=qad", "distill.top_k=8", "distill.loss=jensen_shannon", "distill.beta=0.3"], []),
        (["method=qat", "distill.top_k=8", "distill.cross_entropy=1"], ["qat", "distill.top_k, distill.cross_entropy"]),
        (["method=bf16", "quantize.format=mxfp4", "train.steps=3"], ["bf16", "quantize.format"]),
        (["method=ptq", "train.lora.alpha=8", "train.seed=5"], ["ptq", "train.steps, train.lora.alpha"]),
    ],
)
def test_keys_that_the_method_does_not_read_are_said(tmp_path, overrides, says):
    (tmp_path / "base.yaml").write_text("model: {path: m}\ntrain: {steps: 7, dtype: float32, sequence_length: 64}\n")
    found = unread(load(tmp_path / "base.yaml", overrides))
    assert found == ([f"note: method {says[0]} does not read {says[1]}"] if says else [])
