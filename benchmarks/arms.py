"""The rows of the accuracy table: each is the recipe smollm2_135m_accuracy with a few keys changed. Torch-free."""

from dataclasses import dataclass

RECIPE = "smollm2_135m_accuracy"


@dataclass(frozen=True)
class Row:
    """One row."""

    name: str
    title: str
    keys: tuple[str, ...]
    trained: bool = True
    """Whether seeds matter: the row is then measured once per seed."""


CONTROL = ("method=bf16", "train.learning_rate=1e-4")
QAT = ("method=qat", "train.learning_rate=1e-4")
PTQ = ("method=ptq", "evaluate.ptq=true")
TOP_K = ("distill.top_k=64",)
LONG = ("train.steps=1000", "train.warmup_steps=40")
REPEAT = ("train.steps=400", "train.global_batch=64", "train.warmup_steps=40", "train.learning_rate=7e-4")
MXFP4 = ("quantize.format=mxfp4",)
AWQ = ("quantize.smoothing=awq_lite",)
DUO = ("quantize.smoothing=awq_duo",)
MSE = ("quantize.block_scale=mse",)
GPTQ = ("quantize.weights=gptq",)
COMPENSATED = (*MSE, *GPTQ)
FP8_GATE_UP = ("quantize.layers={'*.gate_proj': fp8, '*.up_proj': fp8}",)
FOUR_OVER_SIX = ("quantize.block_scale=four_over_six",)
SCALES = ("train.block_scale_lr_mult=10",)
LORA = ("train.lora.rank=32", "train.lora.alpha=32", "train.learning_rate=2e-3")
MIX = ("distill.cross_entropy=0.1",)
MIX30 = ("distill.cross_entropy=0.3",)

ROWS = (
    Row("nvfp4_max", "NVFP4 PTQ, max", PTQ, trained=False),
    Row("nvfp4_mse", "NVFP4 PTQ, MSE", (*PTQ, *MSE), trained=False),
    Row("nvfp4_46", "NVFP4 PTQ, Four-Over-Six", (*PTQ, *FOUR_OVER_SIX), trained=False),
    Row("nvfp4_awq", "NVFP4 PTQ, AWQ-lite", (*PTQ, *AWQ), trained=False),
    Row("nvfp4_duo", "NVFP4 PTQ, AWQ-duo", (*PTQ, *DUO), trained=False),
    Row("nvfp4_mixed", "NVFP4 PTQ, AWQ-duo, gate and up in FP8", (*PTQ, *DUO, *FP8_GATE_UP), trained=False),
    Row("nvfp4_gptq", "NVFP4 PTQ, GPTQ", (*PTQ, *GPTQ), trained=False),
    Row(
        "nvfp4_all",
        "NVFP4 PTQ, AWQ-lite + MSE + GPTQ",
        (*PTQ, *AWQ, *COMPENSATED),
        trained=False,
    ),
    Row("nvfp4_all_duo", "NVFP4 PTQ, AWQ-duo + MSE + GPTQ", (*PTQ, *DUO, *COMPENSATED), trained=False),
    Row("nvfp4_kv", "NVFP4 PTQ, max, FP8 KV cache", (*PTQ, "quantize.kv_cache=fp8"), trained=False),
    Row("w4a16", "NVFP4 W4A16 PTQ, max", (*PTQ, "quantize.format=w4a16_nvfp4"), trained=False),
    Row("w4a8", "NVFP4 W4A8 PTQ, max", (*PTQ, "quantize.format=w4a8_nvfp4_fp8"), trained=False),
    Row("mxfp4_max", "MXFP4 PTQ, max", (*PTQ, *MXFP4), trained=False),
    Row("mxfp4_mse", "MXFP4 PTQ, MSE", (*PTQ, *MXFP4, *MSE), trained=False),
    Row("mxfp4_awq", "MXFP4 PTQ, AWQ-lite", (*PTQ, *MXFP4, *AWQ), trained=False),
    Row("mxfp4_duo", "MXFP4 PTQ, AWQ-duo", (*PTQ, *MXFP4, *DUO), trained=False),
    Row("mxfp4_gptq", "MXFP4 PTQ, GPTQ", (*PTQ, *MXFP4, *GPTQ), trained=False),
    Row("mxfp4_all_duo", "MXFP4 PTQ, AWQ-duo + MSE + GPTQ", (*PTQ, *MXFP4, *DUO, *COMPENSATED), trained=False),
    Row("control", "BF16, trained on the same text", CONTROL),
    Row("nvfp4_qat", "NVFP4 QAT, cross-entropy", QAT),
    Row("nvfp4_qad", "NVFP4 QAD, full KL", ()),
    Row("nvfp4_qad_topk", "NVFP4 QAD, top-64 KL", TOP_K),
    Row("nvfp4_qad_46", "NVFP4 QAD, full KL, Four-Over-Six", FOUR_OVER_SIX),
    Row("nvfp4_qad_awq", "NVFP4 QAD, full KL, from AWQ-lite", AWQ),
    Row("nvfp4_qad_fast", "NVFP4 QAD, full KL, from AWQ-lite, LR 1e-3", (*AWQ, "train.learning_rate=1e-3")),
    Row("nvfp4_qad_mix", "NVFP4 QAD, full KL + 0.1 CE, from AWQ-lite", (*AWQ, *MIX)),
    Row(
        "nvfp4_qad_mix30",
        "NVFP4 QAD, full KL + 0.3 CE, from AWQ-lite",
        (*AWQ, *MIX30),
    ),
    Row("nvfp4_qad_lsq", "NVFP4 QAD, full KL, learned scales, from AWQ-lite", (*AWQ, *SCALES)),
    Row(
        "nvfp4_qad_lsq30",
        "NVFP4 QAD, full KL, learned scales (LR x 30), from AWQ-lite",
        (*AWQ, "train.block_scale_lr_mult=30"),
    ),
    Row(
        "nvfp4_qad_clip",
        "NVFP4 QAD, full KL, learned scales, clipped gradient, from AWQ-lite",
        (*AWQ, *SCALES, "quantize.clip_gradient=true"),
    ),
    Row("nvfp4_qad_duo", "NVFP4 QAD, full KL, learned scales, from AWQ-duo", (*DUO, *SCALES)),
    Row("nvfp4_qad_mixed", "NVFP4 QAD, full KL, from AWQ-duo, gate and up in FP8", (*DUO, *FP8_GATE_UP)),
    Row(
        "nvfp4_qad_all",
        "NVFP4 QAD, full KL + 0.1 CE, from AWQ-duo + MSE + GPTQ",
        (*MIX, *DUO, *COMPENSATED),
    ),
    Row("nvfp4_qad_lora", "NVFP4 QAD, full KL, LoRA of rank 32, from AWQ-lite", (*AWQ, *LORA)),
    Row("mxfp4_qat", "MXFP4 QAT, cross-entropy", (*QAT, *MXFP4)),
    Row("mxfp4_qad", "MXFP4 QAD, full KL", MXFP4),
    Row("mxfp4_qad_awq", "MXFP4 QAD, full KL, from AWQ-lite", (*MXFP4, *AWQ)),
    Row("mxfp4_qad_lsq", "MXFP4 QAD, full KL, learned scales, from AWQ-lite", (*MXFP4, *AWQ, *SCALES)),
    Row("mxfp4_qad_duo", "MXFP4 QAD, full KL, learned scales, from AWQ-duo", (*MXFP4, *DUO, *SCALES)),
    Row(
        "mxfp4_qad_all",
        "MXFP4 QAD, full KL + 0.1 CE, from AWQ-duo + MSE + GPTQ",
        (*MIX, *MXFP4, *DUO, *COMPENSATED),
    ),
    Row(
        "mxfp4_qad_repeat",
        "MXFP4 QAD, full KL + 0.2 CE, from AWQ-lite, 26 M tokens",
        (*REPEAT, "distill.cross_entropy=0.2", *MXFP4, *AWQ),
    ),
    Row(
        "nvfp4_qad_long",
        "NVFP4 QAD, full KL + 0.1 CE, learned scales, from AWQ-lite, wide text, 33 M tokens",
        (*LONG, *MIX, *AWQ, *SCALES),
    ),
    Row(
        "mxfp4_qad_long",
        "MXFP4 QAD, full KL + 0.1 CE, learned scales, from AWQ-lite, wide text, 33 M tokens",
        (*LONG, *MIX, *MXFP4, *AWQ, *SCALES),
    ),
    Row(
        "nvfp4_qad_best",
        "NVFP4 QAD, full KL + 0.1 CE, learned scales, from AWQ-duo, wide text, 33 M tokens",
        (*LONG, *MIX, *DUO, *SCALES),
    ),
    Row(
        "mxfp4_qad_best",
        "MXFP4 QAD, full KL + 0.1 CE, learned scales, from AWQ-duo, wide text, 33 M tokens",
        (*LONG, *MIX, *MXFP4, *DUO, *SCALES),
    ),
    Row(
        "nvfp4_qad_best30",
        "NVFP4 QAD, full KL + 0.3 CE, learned scales, from AWQ-duo, wide text, 33 M tokens",
        (*LONG, *MIX30, *DUO, *SCALES),
    ),
    Row(
        "mxfp4_qad_best20",
        "MXFP4 QAD, full KL + 0.2 CE, learned scales, from AWQ-duo, wide text, 33 M tokens",
        (*LONG, *MXFP4, *DUO, *SCALES, "distill.cross_entropy=0.2"),
    ),
    Row("nvfp4_qad_wide", "NVFP4 QAD, full KL, learned scales, from AWQ-lite, wide text", (*AWQ, *SCALES)),
)
