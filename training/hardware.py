"""THE table of GPUs: memory, peak rates, links, each with its source; and what share is reached. Torch-free.

Units: bytes, bytes per second, FLOP per second; links are per GPU and direction. Tensor-core rates are without
sparsity, of which NVIDIA's sheets print the double.
"""

from dataclasses import dataclass

GIB = 1 << 30
RESERVE_GIB = 3.3
"""Memory of a GPU that tensors cannot have: driver, CUDA context, libraries' buffers. 2.8 to 3.2 GiB on one H200."""


@dataclass(frozen=True)
class Gpu:
    """One GPU and what joins it to others.

    Attributes:
        name: As `halfbyte plan --gpu` takes it.
        memory_gib: GiB; NVIDIA's "GB" of memory are 2^30 bytes.
        bf16: BF16 tensor-core FLOP/s.
        memory: Bandwidth of its memory, bytes/s.
        nvlink: NVLink, bytes/s each way.
        domain: GPUs that NVLink joins.
        per_node: GPUs of one host.
        network: Network, bytes/s each way.
        device: What torch.cuda.get_device_name() contains.
        source: Where the numbers come from.
    """

    name: str
    memory_gib: float
    bf16: float
    memory: float
    nvlink: float
    domain: int
    per_node: int
    network: float
    device: str
    source: str

    @property
    def usable(self) -> float:
        """Bytes that tensors can have."""
        return self.usable_share(1.0)

    def usable_share(self, share: float) -> float:
        """The same of a MIG instance with a share of the memory, which needs a context of its own."""
        return (self.memory_gib * share - RESERVE_GIB) * GIB


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            *("A100", 80, 312e12, 2.039e12, 300e9, 8, 8, 25e9, "A100"),
            "NVIDIA A100 80GB SXM data sheet; DGX A100 data sheet (200 Gb/s per GPU)",
        ),
        Gpu(
            *("H100", 80, 989.4e12, 3.35e12, 450e9, 8, 8, 50e9, "H100"),
            "NVIDIA H100 SXM data sheet; DGX H100 data sheet (400 Gb/s per GPU)",
        ),
        Gpu(
            *("H200", 141, 989.4e12, 4.8e12, 450e9, 8, 8, 50e9, "H200"),
            "NVIDIA H200 SXM data sheet; DGX H200 data sheet (400 Gb/s per GPU)",
        ),
        Gpu(
            *("B200", 180, 2250e12, 7.7e12, 900e9, 8, 8, 50e9, "B200"),
            "NVIDIA Blackwell data sheet, HGX B200; MIG user guide (180 GB); DGX B200 data sheet (400 Gb/s per GPU)",
        ),
        Gpu(
            *("GB200-NVL72", 186, 2500e12, 8.0e12, 900e9, 72, 4, 50e9, "GB200"),
            "NVIDIA Blackwell data sheet, GB200 NVL72 (a 72nd part of the rack); MIG user guide (186 GB)",
        ),
    )
}

MIG_SLICES = {1: 1 / 8, 2: 2 / 8, 3: 4 / 8, 7: 1.0}
"""Compute slices of a MIG instance -> its share of the memory (NVIDIA MIG user guide; the same on all of the above)."""


def mig_name(gpu: Gpu, slices: int) -> str:
    """NVIDIA's name of a MIG profile, such as 1g.18gb: compute slices, memory rounded to GB."""
    return f"{slices}g.{int(gpu.memory_gib * MIG_SLICES[slices] + 0.5)}gb"


def gpu_of(device: str) -> Gpu | None:
    """The entry of a torch device name such as `NVIDIA H200`; None for a GPU that the table lacks."""
    found = [gpu for gpu in GPUS.values() if gpu.device in device]
    return max(found, key=lambda gpu: len(gpu.device), default=None)  # GB200 contains B200


@dataclass(frozen=True)
class Reached:
    """Shares of the peaks that training reaches, and what Python needs. docs/evidence/plan.md says how far they hold.

    Attributes:
        gemm: Of the BF16 peak, before the operands' own traffic is added: an 8192^3 GEMM that takes its FLOPs at this
            rate plus its 403 MB at `memory` comes to the 742 TFLOP/s measured on an H200.
        attention: Of the BF16 peak, in torch's fused attention, forward and backward; fitted to whole steps.
        memory: Of the memory bandwidth: Adam's 28 bytes a parameter took 9.8 ms for 1.13 G parameters on an H200.
        nvlink: Of NVLink's rate, in collectives of some ten MB; fitted to whole steps on two H200.
        hidden: Of the time of tensor-parallel collectives, what micro-batches side by side hide; fitted to two at once
            at TP2 on two H200, where they took 165 ms from a step.
        network: Of the network's rate. An assumption: nothing was measured over a network.
        layer: Seconds of Python per layer and micro-batch, forward and backward, where no CUDA graph replays them, on
            the slow cores of the machines that were measured; the GPU waits when it is faster. Fitted to SmolLM2.
        update: Seconds of Python per layer and step, in the optimizer and the rounding of weights; likewise.
    """

    gemm: float = 0.818
    attention: float = 0.33
    memory: float = 0.676
    nvlink: float = 0.40
    hidden: float = 0.66
    network: float = 0.80
    layer: float = 2.3e-3
    update: float = 0.8e-3


REACHED = Reached()
