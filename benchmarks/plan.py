"""What is measured: the model, the layouts, the arms. Torch-free, so that `--help` and a skip are quick."""

from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import (
    BlockScale,
    Format,
    Method,
    Model,
    Parallel,
    Quantize,
    Recipe,
    Run,
    Train,
)
from halfbyte.training.shape import ModelShape


@dataclass(frozen=True)
class Layout:
    """A way to split the work of one global batch: one process per GPU."""

    name: str
    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def gpus(self) -> int:
        """Processes it needs."""
        return self.tensor * self.pipeline * self.data

    @property
    def exchanges(self) -> bool:
        """Whether nothing but tensor parallelism splits a micro-batch: two of them can run side by side."""
        return self.tensor > 1 and self.pipeline == 1 and self.data == 1

    def limit(self, micro_batches: int) -> float:
        """How many times as fast as one GPU a step can be at most, communication being free.

        A pipeline of p stages does m micro-batches in the time of m + p - 1 (arXiv 2104.04473, 2.2.1).

        Args:
            micro_batches: Of the global batch; each data-parallel rank takes its share of them, m.
        """
        own = micro_batches / self.data
        return self.gpus * own / (own + self.pipeline - 1)


LAYOUTS = {
    "tp1": Layout("tp1"),
    "tp2": Layout("tp2", tensor=2),
    "pp2": Layout("pp2", pipeline=2),
    "dp2": Layout("dp2", data=2),
    "tp4": Layout("tp4", tensor=4),
    "tp2pp2": Layout("tp2pp2", tensor=2, pipeline=2),
    "pp4": Layout("pp4", pipeline=4),
    "dp4": Layout("dp4", data=4),
}
"""All take the same global batch; tensor parallelism runs with sequence parallelism."""


@dataclass(frozen=True)
class Arm:
    """One thing to time: a format of ours (or none: BF16), or one of ModelOpt's own configurations."""

    name: str
    format: Format | None = None
    block_scale: BlockScale = BlockScale.amax
    modelopt: str | None = None
    """Name of a configuration in modelopt.torch.quantization; its kernels, its per-call path."""
    graphs: CudaGraphs = CudaGraphs.auto
    """As train.cuda_graphs; ModelOpt's arms run as they are, without."""
    at_once: int = 1
    """As train.micro_batches_at_once; layouts with tensor parallelism alone."""

    @property
    def plain(self) -> str:
        """The arm that computes the same on one GPU."""
        return self.name.removesuffix("_two").removesuffix("_four").removesuffix("_graphs")


ARMS = {
    "bf16": Arm("bf16"),
    **{number_format.value: Arm(number_format.value, format=number_format) for number_format in Format},
    "four_over_six": Arm("four_over_six", format=Format.nvfp4, block_scale=BlockScale.four_over_six),
    "bf16_eager": Arm("bf16_eager", graphs=CudaGraphs.never),
    "nvfp4_eager": Arm("nvfp4_eager", format=Format.nvfp4, graphs=CudaGraphs.never),
    "bf16_graphs": Arm("bf16_graphs", graphs=CudaGraphs.always),
    "nvfp4_graphs": Arm("nvfp4_graphs", format=Format.nvfp4, graphs=CudaGraphs.always),
    "bf16_two": Arm("bf16_two", at_once=2),
    "nvfp4_two": Arm("nvfp4_two", format=Format.nvfp4, at_once=2),
    "bf16_four": Arm("bf16_four", at_once=4),
    "nvfp4_four": Arm("nvfp4_four", format=Format.nvfp4, at_once=4),
    "modelopt_nvfp4": Arm("modelopt_nvfp4", modelopt="NVFP4_DEFAULT_CFG"),
    "modelopt_mxfp4": Arm("modelopt_mxfp4", modelopt="MXFP4_DEFAULT_CFG"),
    "modelopt_four_over_six": Arm("modelopt_four_over_six", modelopt="NVFP4_FOUR_OVER_SIX_CFG"),
}
"""bf16 is this project's own control: the same layers, the same schedule and optimizer, nothing quantized."""


@dataclass(frozen=True)
class Size:
    """Layers shaped as Llama-3-8B's, with a vocabulary that keeps the logits from dominating a few layers."""

    layers: int = 8
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000
    sequence: int = 4096
    micro_batches: int = 8

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's linears."""
        head = self.hidden // self.heads
        return self.hidden * (2 * self.hidden + 2 * self.kv_heads * head + 3 * self.ffn)

    @property
    def step_flops(self) -> float:
        """Model FLOPs of one step, forward and backward, without recomputation.

        6 per parameter and token (Kaplan et al. 2020, 2.1), and 6 S^2 h per layer and sequence for causal attention
        (two products of 2 S^2 h each, half of them masked, three times).
        """
        tokens = self.sequence * self.micro_batches
        linears = 6 * (self.layers * self.layer_parameters + self.vocab * self.hidden) * tokens
        return linears + 6 * self.layers * self.sequence**2 * self.hidden * self.micro_batches


def problems(size: Size, layouts: Iterable[Layout]) -> list[str]:
    """What of a size does not divide over a layout, a line each."""
    found = []
    for layout in layouts:
        if size.layers % layout.pipeline:
            found.append(f"--layers {size.layers}: {layout.name} needs a multiple of {layout.pipeline}")
        if size.micro_batches % layout.data:
            found.append(f"--micro-batches {size.micro_batches}: {layout.name} needs a multiple of {layout.data}")
    return found


def shape_of(size: Size) -> ModelShape:
    """The model's shape."""
    return ModelShape(
        layers=size.layers,
        hidden=size.hidden,
        ffn=size.ffn,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.hidden // size.heads,
        vocab=size.vocab,
        tied=False,
        max_positions=size.sequence,
        rope_theta=500000.0,
        rope_scaling_factor=None,
        norm_eps=1e-5,
    )


def recipe(size: Size, layout: Layout, arm: Arm) -> Recipe:
    """The recipe that an arm's step follows; ModelOpt's arms train as the BF16 control does, quantizers aside."""
    return Recipe(
        run=Run(name="bench", dir="bench"),
        method=Method.bf16 if arm.format is None else Method.qat,
        model=Model(path="none"),
        quantize=Quantize(format=arm.format or Format.nvfp4, block_scale=arm.block_scale),
        parallel=Parallel(tensor=layout.tensor, pipeline=layout.pipeline, data=layout.data, sequence=layout.tensor > 1),
        train=Train(
            steps=1000,
            global_batch=size.micro_batches,
            micro_batch=1,
            sequence_length=size.sequence,
            learning_rate=1e-4,  # enough for the loss to fall within a few steps of the same batch
            micro_batches_at_once=arm.at_once,
            cuda_graphs=arm.graphs if arm.modelopt is None else CudaGraphs.never,
        ),
    )
