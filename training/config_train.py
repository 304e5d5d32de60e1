"""The recipe's section `train`: how the quantized model is optimized. Torch-free, as config.py."""

from dataclasses import dataclass, field

from halfbyte.training.choices import CudaGraphs, Dtype


@dataclass
class Lora:
    """Low-rank adapters instead of all weights: W + alpha / rank x B A is quantized, and only A and B are trained."""

    rank: int = 0
    """Columns of B; 0 trains the weights themselves."""
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: ["*"])
    """fnmatch patterns on Hugging Face module names; which quantized linears get an adapter. q/k/v share one, as
    gate/up do: all members or none."""


@dataclass
class Train:
    """Optimization. Tokens per step = global_batch x sequence_length."""

    steps: int = 100
    """Optimizer steps."""
    seed: int = 1234
    global_batch: int = 8
    """Sequences per optimizer step, over all data-parallel ranks."""
    micro_batch: int = 1
    """Sequences per forward pass of one rank."""
    sequence_length: int = 512
    """Tokens."""
    dtype: Dtype = Dtype.auto
    learning_rate: float = 1e-5
    min_learning_rate: float = 0.0
    warmup_steps: int = 0
    """Steps of linear warmup; cosine to min_learning_rate afterwards."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Global gradient norm over all ranks; 0 switches clipping off."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks (float64 always uses the plain optimizer)."""
    recompute: bool = False
    """Recompute every layer's activations in the backward pass."""
    cuda_graphs: CudaGraphs = CudaGraphs.auto
    """In a pipeline each micro-batch in flight keeps memory of its own. No graph with recompute, whatever this says;
    without a pipeline none with distill.teacher, with one none with distill.hidden."""
    micro_batches_at_once: int = 1
    """2 or 4: under tensor parallelism so many of a rank's micro-batches run side by side, and one computes while the
    others' ranks exchange; takes the activations of all. On GPUs; elsewhere one runs after the other."""
    freeze: list[str] = field(default_factory=list)
    """fnmatch patterns on Hugging Face module names (*norm*, lm_head, model.layers.0.mlp.*) that are not trained.
    q/k/v, gate/up and tied embeddings are one parameter each: all members or none."""
    block_scale_lr_mult: float = 0.0
    """Learned block scales of FP4 weights (LSQ): the log2 of each is trained, at learning_rate times this; 0 leaves
    scales to quantize.block_scale at every step."""
    lora: Lora = field(default_factory=Lora)
    fake_quant_after_steps: int = 0
    """The first N steps train in BF16; the scales are those of the calibration before them."""
