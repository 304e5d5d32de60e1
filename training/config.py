"""The recipe schema: one dataclass per stage, typed, with a unit in every field's docstring.

`resolve.py` merges defaults < YAML < key=value into a `Recipe` and checks it. Nothing here imports torch, so that the
command line stays fast. OmegaConf 2.3 has no Literal fields, hence the string enums.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from halfbyte.training.choices import Activations, BlockScale, SecondScale, Smoothing, Weights
from halfbyte.training.config_commands import Generate, Sensitivity
from halfbyte.training.config_distill import Distill
from halfbyte.training.config_export import Export, Verify
from halfbyte.training.config_launch import Checkpoint, Launch
from halfbyte.training.config_telemetry import Telemetry
from halfbyte.training.config_train import Train
from halfbyte.training.kv_format import KVCache


class Method(StrEnum):
    """How accuracy is won back: not at all, by cross-entropy, by distillation; or no quantization (the control)."""

    ptq = "ptq"
    qat = "qat"
    qad = "qad"
    bf16 = "bf16"


class Format(StrEnum):
    """Number formats by the names that serving runtimes use (`quant_algo`); formats.py says what each one is."""

    nvfp4 = "nvfp4"
    """W4A4: E2M1 elements, block 16, E4M3 block scale, FP32 second-level scale per tensor."""
    w4a16_nvfp4 = "w4a16_nvfp4"
    """Weights as nvfp4, activations not quantized."""
    w4a8_nvfp4_fp8 = "w4a8_nvfp4_fp8"
    """Weights as nvfp4 with block 32, activations as fp8."""
    mxfp4 = "mxfp4"
    """W4A4: E2M1 elements, block 32, E8M0 block scale."""
    w4a16_mxfp4 = "w4a16_mxfp4"
    """Weights as mxfp4, activations not quantized."""
    fp8 = "fp8"
    """W8A8: E4M3 elements, one FP32 scale per tensor."""


class LayerFormat(StrEnum):
    """What quantize.layers may give a layer: a Format, or BF16."""

    nvfp4 = "nvfp4"
    w4a16_nvfp4 = "w4a16_nvfp4"
    w4a8_nvfp4_fp8 = "w4a8_nvfp4_fp8"
    mxfp4 = "mxfp4"
    w4a16_mxfp4 = "w4a16_mxfp4"
    fp8 = "fp8"
    bf16 = "bf16"


class DataFormat(StrEnum):
    """auto decides from the first line: a `messages` list is chat, a text field is text."""

    auto = "auto"
    text = "text"
    chat = "chat"


class TooLong(StrEnum):
    """What to do with a conversation longer than train.sequence_length; plain text spans windows."""

    error = "error"
    truncate = "truncate"
    skip = "skip"


class TaskKind(StrEnum):
    """What the items of a task are and how they are scored."""

    continuation = "continuation"
    """Log-likelihood and greedy match of a gold continuation."""
    text = "text"
    """Rolling log-likelihood of a text."""
    lm_eval = "lm_eval"
    """A task of lm-evaluation-harness, with its own prompts and metrics."""


class GateRule(StrEnum):
    """bf16: within the thresholds of BF16. better_than_ptq: perplexity and KL below PTQ's, no score clearly lower."""

    bf16 = "bf16"
    better_than_ptq = "better_than_ptq"


class Correction(StrEnum):
    """bonferroni: all intervals of a verdict hold together at gate.confidence; none: each one by itself."""

    bonferroni = "bonferroni"
    none = "none"


class Inconclusive(StrEnum):
    """What an inconclusive verdict means: nothing is released, or the checkpoint is, with the verdict in its files."""

    hold = "hold"
    release = "release"


class Judges(StrEnum):
    """Which scores the gate judges: of the checkpoint decoded from its exported files, or of the model in training."""

    exported = "exported"
    trained = "trained"


class Wandb(StrEnum):
    """Weights & Biases: written to the run folder, sent to the server, or not at all."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class Run:
    """Where the run lives and how it is logged."""

    name: str = "halfbyte"
    """Name of the experiment in logs and W&B."""
    dir: str = "runs/${run.name}"
    """Run folder; an existing one is resumed."""
    wandb: Wandb = Wandb.offline
    project: str = "halfbyte"
    """W&B project."""


@dataclass
class Model:
    """The model to start from: in BF16 or in a quantized layout that `halfbyte export` writes."""

    path: str = "???"
    """Hugging Face directory: config.json, *.safetensors, tokenizer."""
    fetch: str | None = None
    """What `halfbyte fetch` makes at `path` if nothing is there: smollm2 | tiny | tiny_mistral | tiny_qwen2 |
    tiny_qwen3."""
    reference: str | None = None
    """Where model.path is quantized: the BF16 model that it was made from, QAD's teacher and what the gate compares
    with. None takes the decoded weights of model.path for both."""
    config: str | None = None
    """A config.json to plan with (`halfbyte check`) while the weights are not at `path`."""


@dataclass
class Quantize:
    """Which layers are quantized, and how."""

    format: Format = Format.nvfp4
    """Of every layer that `layers` says nothing about."""
    layers: dict[str, LayerFormat] = field(default_factory=dict)
    """fnmatch pattern on Hugging Face module names -> format of the layers it matches; the first match wins.
    `exclude` comes before it. q/k/v and gate/up are one layer each and take one format."""
    scale_2: SecondScale = SecondScale.pow2
    block_scale: BlockScale = BlockScale.amax
    """Of FP4 weights. The last two leave head-room: NVFP4's tensor scale is then amax/1536 instead of amax/2688."""
    activations: Activations = Activations.max
    percentile: float = 99.99
    """Percent of an input's magnitudes that activations=percentile does not clip."""
    smoothing: Smoothing = Smoothing.none
    smoothing_alpha: float = 0.5
    """SmoothQuant's exponent, 0 .. 1: at 1 all input channels get the same maximum, at 0 all weight channels do."""
    weights: Weights = Weights.round
    clip_gradient: bool = False
    """The straight-through gradient is zero where a value exceeds what the calibrated scale can represent, or what its
    block's scale can where that is learned."""
    kv_cache: KVCache = KVCache.none
    """Of keys (after their rotation) and values, in every layer; quantize.exclude and quantize.layers do not apply."""
    exclude: list[str] = field(default_factory=lambda: ["lm_head", "model.embed_tokens"])
    """fnmatch patterns on Hugging Face module names (model.layers.0.mlp.down_proj) that stay unquantized.
    q/k/v and gate/up are one layer each at training time: exclude all members or none."""
    calibration_data: str | None = None
    """JSONL for calibration; none means data.train."""
    calibration_samples: int = 512
    """Number of windows of `calibration_length` tokens."""
    calibration_length: int | None = None
    """Tokens per calibration window; none means train.sequence_length."""


@dataclass
class Parallel:
    """The layout: world size = tensor x pipeline x data processes, one per GPU."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage, which also computes the logits; none splits evenly."""
    sequence: bool = False
    """Sequence parallelism: activations between blocks are split over the tensor-parallel ranks."""


@dataclass
class Data:
    """Training text."""

    train: str | None = None
    """JSONL or JSONL.gz, one document per line."""
    format: DataFormat = DataFormat.auto
    text_key: str = "text"
    chat_key: str = "messages"
    answer_only: bool = True
    """Chat: only assistant tokens carry loss."""
    isolate_documents: bool = False
    """Attention stays inside a document of a packed window, in calibration too (a dense mask: slower)."""
    too_long: TooLong = TooLong.error


@dataclass
class Task:
    """One evaluation data set."""

    name: str = "???"
    data: str = "???"
    """JSONL or JSONL.gz; for lm_eval the task's YAML."""
    kind: TaskKind = TaskKind.continuation
    context_key: str = "context"
    """Dotted path to the prompt (continuation tasks)."""
    continuation_key: str = "continuation"
    """Dotted path to the gold continuation (continuation tasks)."""
    text_key: str = "text"
    """Dotted path to the text (text tasks)."""
    first: int = 0
    """Items to skip from the start of the file."""
    limit: int | None = None
    """Number of items; none means all."""
    max_tokens: int | None = None
    """Text tasks: only the first N tokens of each text are scored; none means up to train.sequence_length."""


@dataclass
class Evaluate:
    """Scores per item, the same items for every stage."""

    tasks: list[Task] = field(default_factory=list)
    tokens_per_batch: int = 2048
    """Padded tokens of one forward pass."""
    ptq: bool = True
    """Score the calibrated model before QAT or QAD trains it; false saves one pass over all tasks."""
    kl_positions: int = 32
    """At most this many scored positions of an item, evenly spread, enter the KL to BF16; 0 means no KL."""


@dataclass
class Gate:
    """When the result may ship."""

    rule: GateRule = GateRule.bf16
    threshold_pp: float = 0.2
    """Largest tolerated loss on accuracy-like scores against BF16, percentage points."""
    perplexity_ratio: float = 1.01
    """Largest tolerated perplexity against BF16, as a ratio."""
    confidence: float = 0.95
    """Level of the paired intervals that must lie inside the thresholds together (see correction); 0.5 to 0.9999."""
    thresholds_pp: dict[str, float] = field(default_factory=dict)
    """Task name -> its own threshold_pp; gate.thresholds_pp.NAME=0.5 on the command line."""
    kl: float | None = None
    """Largest tolerated mean KL to BF16, nats per token; none does not bound it."""
    agreement: float | None = None
    """Smallest tolerated top-1 agreement with BF16, 0 .. 1; none does not bound it."""
    correction: Correction = Correction.bonferroni
    inconclusive: Inconclusive = Inconclusive.hold
    judges: Judges = Judges.exported
    control: str | None = None
    """Run folder of a BF16 model trained on the same data (method bf16) to compare with; none is the original model."""


@dataclass
class Recipe:
    """Everything a run needs. One YAML file holds what differs from these defaults."""

    description: str = ""
    run: Run = field(default_factory=Run)
    method: Method = Method.qat
    model: Model = field(default_factory=Model)
    quantize: Quantize = field(default_factory=Quantize)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    distill: Distill = field(default_factory=Distill)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    gate: Gate = field(default_factory=Gate)
    export: Export = field(default_factory=Export)
    verify: Verify = field(default_factory=Verify)
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    generate: Generate = field(default_factory=Generate)
    telemetry: Telemetry = field(default_factory=Telemetry)
    launch: Launch = field(default_factory=Launch)

    @property
    def world_size(self) -> int:
        """Processes of the whole layout."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.data
