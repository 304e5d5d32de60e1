"""What was measured, as a Markdown document."""

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.bench.plan import ARMS, LAYOUTS, Layout, Size

HEAD = (
    *("layout", "arm", "step ms", "/ BF16", "spread", "first step s", "peak GB", "+ GB", "utilisation"),
    *("of one GPU", "at most", "loss, from one GPU"),
)
NOTE = (
    "Peak: of the fullest GPU. Utilisation: model FLOPs per second over what the 8192^3 BF16 GEMM reaches on as many "
    "of these GPUs. At most: the number of GPUs, less what a pipeline's bubble takes. Loss: the largest "
    "difference in nats at any step from the same arm on one GPU, with the same weights and tokens; the curves are in "
    "the JSON beside this file."
)


def document(
    size: Size,
    measured: Mapping[str, Any],
    kernels: Mapping[str, Any],
    about: Mapping[str, str],
    skipped: Sequence[str],
) -> str:
    """The whole document.

    Args:
        size: The model.
        measured: Layout -> what worker.measure returned.
        kernels: What kernels.measure returned.
        about: Versions, hardware, command: a line each.
        skipped: What was not measured, with the reason.
    """
    lines = ["# What training in FP4 costs", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += [f"- {line}" for line in skipped]
    lines += [
        "",
        f"{size.layers} layers shaped as Llama-3-8B's (hidden {size.hidden}, ffn {size.ffn}, "
        f"{size.heads}/{size.kv_heads} heads), vocabulary {size.vocab}, {size.micro_batches} micro-batches of "
        f"{size.sequence} tokens. A step is the whole schedule with clipping and the optimizer's update. Medians; arms "
        "in turn in one set of processes.",
        "",
        *_steps(size, measured, kernels["gemm_flops"]),
        "",
        *_profiles(measured),
        *_kernels(kernels),
    ]
    return "\n".join(lines) + "\n"


def _steps(size: Size, measured: Mapping[str, Any], gemm_flops: float) -> list[str]:
    rows = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for layout, arms in measured.items():
        for name, arm in arms.items():
            if "failed" in arm:
                rows.append(f"| {layout} | {name} | failed | {arm['failed']} |" + " |" * (len(HEAD) - 4))
                continue
            one = measured.get("tp1", {}).get(ARMS[name].plain, {}) if layout != "tp1" else {}
            spread = (max(arm["seconds"]) - min(arm["seconds"])) / arm["median"]
            used = size.step_flops / arm["median"] / (gemm_flops * LAYOUTS[layout].gpus)
            cells = [
                layout,
                name,
                f"{arm['median'] * 1000:.1f}",
                f"{arm['median'] / arms['bf16']['median']:.3f}",
                f"{100 * spread:.1f} %",
                f"{arm['first_step']:.1f}",
                f"{arm['peak_bytes'] / 1e9:.2f}",
                f"{(arm['peak_bytes'] - arms['bf16']['peak_bytes']) / 1e9:+.2f}",
                f"{100 * used:.1f} %",
                *_against_one_gpu(LAYOUTS[layout], size, arm, one),
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return [*rows, "", NOTE]


def _against_one_gpu(layout: Layout, size: Size, arm: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """Speed-up, its limit, and how far the loss curve is from that of the same arm on one GPU; empty without one."""
    if one.get("median") is None:
        return ["", "", ""]
    return [
        f"{one['median'] / arm['median']:.2f}x",
        f"{layout.limit(size.micro_batches):.2f}x",
        f"{largest_difference(arm['losses'], one['losses']):.1e}",
    ]


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Of two loss curves: the largest difference at any step, in nats.

    Not relative: the arms learn their few batches by heart, and of a loss of 1e-4 nats any rounding is a large part.
    """
    return max(abs(mine - other) for mine, other in zip(losses, reference, strict=True))


def _profiles(measured: Mapping[str, Any]) -> list[str]:
    """Where one step's time went, for what was traced; nothing where nothing was."""
    rows = []
    for layout, arms in measured.items():
        for name, arm in arms.items():
            if "profile" in arm:
                found = arm["profile"]
                shares = [found[key] for key in ("extent_ms", "computing_ms", "exposed_ms", "idle_ms")]
                cells = [layout, name, *(f"{share:.1f}" for share in shares), str(found["launches"])]
                rows.append("| " + " | ".join(cells) + " |")
    if not rows:
        return []
    head = ["layout", "arm", "one step ms", "computing ms", "collectives alone ms", "idle ms", "launches"]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows, ""]


def _kernels(kernels: Mapping[str, Any]) -> list[str]:
    copy = kernels["kernels"]["copy"]["bytes_per_second"]
    rows = ["| kernel, 8192 x 14336 BF16 | us | GB/s | of a copy |", "|---|---|---|---|"]
    for name, entry in kernels["kernels"].items():
        rate = entry["bytes_per_second"]
        rows.append(f"| {name} | {entry['microseconds']:.1f} | {rate / 1e9:.0f} | {100 * rate / copy:.0f} % |")
    return [*rows, "", f"BF16 GEMM 8192^3: {kernels['gemm_flops'] / 1e12:.0f} TFLOP/s."]
