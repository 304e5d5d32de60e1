"""vLLM loads what is exported and computes what the files say; needs a GPU and vLLM. Not run yet (docs/evidence)."""

from pathlib import Path
from statistics import mean

import pytest
import torch
from export_tools import UNTIED, export, recipe

from halfbyte.export.convert import convert
from halfbyte.training.choices import Container
from halfbyte.training.config import Format

# every size a multiple of 128: what vLLM's FP4 kernels (Marlin, CUTLASS) take
CONFIG = UNTIED | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
PROMPTS = [[1, *range(start, start + 24 * step, step)] for start, step in ((5, 3), (17, 11), (400, 2), (200, 7))]
TOKENS = 8

BF16_NATS, FP4_NATS = 0.05, 1.5
"""Tolerated mean difference of a token's log-probability: computed in BF16, and with inputs rounded to FP4 as well.

In transformers on the CPU, outputs rounded to BF16 move this model by 0.015 on average, FP4 inputs by 0.7 to 1.0;
weights of every down_proj doubled by 0.44, those of one up_proj with each pair of columns swapped by 4.2.
"""


def generated(folder: Path) -> list[list[tuple[int, float]]]:
    """What vLLM continues each prompt with, greedily: tokens and their log-probabilities, nats."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        gpu_memory_utilization=0.2,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=1, ignore_eos=True, detokenize=False)
    requests = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling, use_tqdm=False)
    answers = [request.outputs[0] for request in requests]
    return [
        [(token, said[token].logprob) for token, said in zip(answer.token_ids, answer.logprobs, strict=True)]
        for answer in answers
    ]


def differences(folder: Path, answers: list[list[tuple[int, float]]]) -> list[float]:
    """How far each log-probability is from that of the decoded weights, in FP32 in transformers."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = [token for token, _ in answer]
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found += [abs(said - expected[place, token].item()) for place, (token, said) in enumerate(answer)]
    return found


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("container", [None, Container.compressed_tensors])
@pytest.mark.parametrize("number_format", [Format.w4a16_nvfp4, Format.nvfp4])
def test_vllm_computes_what_the_files_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number_format: Format, container: Container | None
):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # pytest cannot be started again as a child process
    out = export(tmp_path, CONFIG, recipe(number_format))
    convert(out, Container.dequantized, tmp_path / "dequantized", ranks=1)
    served = out
    if container is not None:
        served = tmp_path / container.value
        convert(out, container, served, ranks=1)
    answers = generated(served)
    assert [len(answer) for answer in answers] == [TOKENS] * len(PROMPTS)
    rounds_inputs = number_format is Format.nvfp4 and torch.cuda.get_device_capability() >= (10, 0)  # else Marlin
    assert mean(differences(tmp_path / "dequantized", answers)) <= (FP4_NATS if rounds_inputs else BF16_NATS)
