"""The training steps on which `halfbyte plan` is checked: real shapes, fewer layers where one GPU would not hold them.

Torch-free.
"""

from dataclasses import dataclass, replace

from halfbyte.launch.plan_model import named_model
from halfbyte.training.choices import CudaGraphs
from halfbyte.training.config import Format, Method, Model, Parallel, Quantize, Recipe, Run, Train
from halfbyte.training.shape import ModelShape

LAYOUTS = {
    "one": Parallel(),
    "tp2": Parallel(tensor=2, sequence=True),
    "pp2": Parallel(pipeline=2),
    "dp2": Parallel(data=2),
}


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        name: Of the case.
        model: A shape under recipes/shapes.
        layers: Of it; None takes all.
        method: As in a recipe.
        format: Of the linears, where the method quantizes.
        rows: Sequences of a micro-batch.
        sequence: Tokens of a sequence.
        count: Micro-batches of a rank and step.
        layout: One of LAYOUTS.
        recompute: As train.recompute.
        graphs: Whether CUDA graphs replay the passes.
    """

    name: str
    model: str
    layers: int | None
    method: Method = Method.qat
    format: Format = Format.nvfp4
    rows: int = 1
    sequence: int = 4096
    count: int = 4
    layout: str = "one"
    recompute: bool = False
    graphs: bool = False

    @property
    def gpus(self) -> int:
        """Processes it needs."""
        parallel = LAYOUTS[self.layout]
        return parallel.tensor * parallel.pipeline * parallel.data

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        whole = named_model(self.model).sizes
        return whole if self.layers is None else replace(whole, layers=self.layers)

    def recipe(self) -> Recipe:
        """The recipe that the step follows."""
        parallel = LAYOUTS[self.layout]
        return Recipe(
            run=Run(name="plan", dir="plan"),
            method=self.method,
            model=Model(path="none"),
            quantize=Quantize(format=self.format),
            parallel=replace(parallel),
            train=Train(
                steps=1000,
                global_batch=self.rows * self.count * parallel.data,
                micro_batch=self.rows,
                sequence_length=self.sequence,
                learning_rate=1e-6,
                recompute=self.recompute,
                cuda_graphs=CudaGraphs.always if self.graphs else CudaGraphs.never,
            ),
        )


CASES = (
    Case("llama8b-bf16", "llama31_8b", 4, method=Method.bf16),
    Case("llama8b-nvfp4", "llama31_8b", 4, graphs=True),
    Case("llama8b-mxfp4-recompute", "llama31_8b", 4, format=Format.mxfp4, rows=2, count=2, recompute=True),
    Case("llama8b-qad", "llama31_8b", 4, method=Method.qad),
    Case("llama70b-nvfp4", "llama33_70b", 1, count=2),
    Case("qwen3-8b-nvfp4", "qwen3_8b", 4, sequence=8192, count=2),
    Case("smollm2-nvfp4", "smollm2_135m", None, rows=32, sequence=1024, count=1, graphs=True),
    Case("smollm2-qad", "smollm2_135m", None, method=Method.qad, rows=16, sequence=1024, count=2),
    *(Case(f"llama8b-nvfp4-{name}", "llama31_8b", 8, count=8, layout=name) for name in ("tp2", "pp2", "dp2")),
    Case("llama8b-qad-tp2", "llama31_8b", 4, method=Method.qad, layout="tp2"),
)
"""Eight for one GPU, four for two."""
