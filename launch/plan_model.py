"""What planning knows of a model and of a layout; some models can be planned only. Torch-free."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from halfbyte.training.config import Recipe
from halfbyte.training.errors import RecipeError
from halfbyte.training.families import FAMILIES
from halfbyte.training.files import at_home
from halfbyte.training.model_config import read_config
from halfbyte.training.shape import MOST_LAYERS, ModelShape, is_size, linear_sizes, shape_of
from halfbyte.training.side_by_side_rules import side_by_side_problems

NEMOTRON, DEEPSEEK = "NemotronForCausalLM", "DeepseekV3ForCausalLM"
ONLY_PLANNED = {
    NEMOTRON: "Nemotron-4 (squared ReLU, LayerNorm) can be planned, not trained: training/model.py has no such layer",
    DEEPSEEK: "DeepSeek-V3 (mixture of experts, latent attention) is planned by its parameter counts; not trained here",
}

_ALL = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
SIZES = {
    NEMOTRON: (*_ALL, "num_key_value_heads", "max_position_embeddings"),
    DEEPSEEK: (
        *_ALL,
        *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
        *("first_k_dense_replace", "moe_intermediate_size", "n_routed_experts", "n_shared_experts"),
        "num_experts_per_tok",
    ),
}
"""Keys that a config.json of each must have as positive numbers."""
CONTAINED = (
    ("num_attention_heads", "hidden_size"),
    ("num_key_value_heads", "num_attention_heads"),
    ("first_k_dense_replace", "num_hidden_layers"),
    ("num_experts_per_tok", "n_routed_experts"),
)
"""The first of two sizes is at most the second."""


@dataclass(frozen=True)
class Architecture:
    """A model on paper.

    Attributes:
        name: Where its sizes come from.
        shape: Sizes of a dense model; None where only counts are known.
        gated: Whether the MLP has a gate (SwiGLU) beside its up projection.
        parameters: All of them; a tied lm_head counts once.
        active: Parameters that a token is multiplied with: without the experts that it does not use and without the
            table of embeddings, of which it takes a row. Of a dense model, all.
        linears: Parameters of the decoder's linears, experts included: what FP4 makes small.
        cached: Numbers per token in the key/value cache, all layers.
        note: Why it cannot be trained; None if it can.
    """

    name: str
    shape: ModelShape | None
    gated: bool
    parameters: int
    active: int
    linears: int
    cached: int
    note: str | None = None

    @classmethod
    def dense(cls, name: str, shape: ModelShape, *, gated: bool = True, note: str | None = None) -> "Architecture":
        """A dense decoder. Without a gate each layer has one [F, H] matrix less."""
        gates = 0 if gated else shape.layers * shape.ffn * shape.hidden
        parameters = shape.parameters - gates
        linears = sum(n * k for n, k in linear_sizes(shape).values()) - gates
        cached = 2 * shape.layers * shape.kv_heads * shape.head_dim
        return cls(name, shape, gated, parameters, parameters, linears, cached, note)

    @property
    def sizes(self) -> ModelShape:
        """The shape, where it has to be known."""
        assert self.shape is not None
        return self.shape


def named_model(name: str) -> Architecture:
    """The model of `halfbyte plan --model`: a name under recipes/shapes, or the path of a config.json.

    Raises:
        RecipeError: neither, or the file describes a model that nobody here knows.
    """
    folder = Path(str(importlib.resources.files("halfbyte.recipes"))) / "shapes"
    shipped = {path.stem: path for path in sorted(folder.glob("*.json"))}
    path = at_home(name)
    if not path.is_file():
        if name not in shipped:
            raise RecipeError([f"--model {name}: not known; give a config.json or one of {', '.join(shipped)}"])
        path = shipped[name]
    return read_architecture(path, name)


def read_architecture(path: Path, name: str) -> Architecture:
    """Read a Hugging Face config.json of a model that is trained here, of Nemotron-4 or of DeepSeek-V3.

    Raises:
        RecipeError: the file cannot be read, lacks a key or describes another model.
    """
    config = read_config(path)
    try:
        kind = config["architectures"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise RecipeError([f"{path}: lacks {error}; take the model's own config.json"]) from error
    if kind in ONLY_PLANNED:
        _check(config, path, [*SIZES[kind], *(["head_dim"] if config.get("head_dim") else [])])
    if kind == NEMOTRON:
        return Architecture.dense(name, _nemotron(config), gated=False, note=ONLY_PLANNED[kind])
    if kind == DEEPSEEK:
        return _deepseek(config, name)
    if kind not in FAMILIES:
        known = ", ".join((*FAMILIES, *ONLY_PLANNED))
        raise RecipeError([f"{path}: architectures = {kind}: only {known} can be planned"])
    return Architecture.dense(name, shape_of(config, str(path)))


def _check(config: dict, path: Path, keys: Sequence[str]) -> None:
    """Raise RecipeError where one of the sizes is none, or they contradict each other."""
    wrong = [key for key in keys if not is_size(config.get(key))]
    if wrong:
        reason = "is missing or no positive number; take the model's own config.json"
        raise RecipeError([f"{path}: {key} {reason}" for key in wrong])
    for less, more in CONTAINED:
        if less in keys and more in keys and config[less] > config[more]:
            raise RecipeError([f"{path}: {less} = {config[less]}: more than {more}; take the model's own config.json"])
    if config["num_hidden_layers"] > MOST_LAYERS:
        raise RecipeError([f"{path}: num_hidden_layers = {config['num_hidden_layers']}: more than {MOST_LAYERS}"])


def _nemotron(config: dict) -> ModelShape:
    """Sizes of a Nemotron-4 model; what does not count on paper (rotary base, epsilon) is left at zero."""
    heads = config["num_attention_heads"]
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=config["max_position_embeddings"],
        rope_theta=0.0,
        rope_scaling_factor=None,
        norm_eps=0.0,
    )


def _deepseek(config: dict, name: str) -> Architecture:
    """Counts of a DeepSeek-V3 model (arXiv 2412.19437, section 2.1): latent attention, shared and routed experts.

    The cache holds the latent vector and one rotated key per token and layer. The prediction module that the
    published files carry beside the model is not counted.
    """
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    queries, latent = config["q_lora_rank"], config["kv_lora_rank"]
    plain, rotated, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    attention = hidden * queries + queries * heads * (plain + rotated)
    attention += hidden * (latent + rotated) + latent * heads * (plain + value) + heads * value * hidden
    dense, sparse = config["first_k_dense_replace"], layers - config["first_k_dense_replace"]
    expert = 3 * hidden * config["moe_intermediate_size"]
    router = hidden * config["n_routed_experts"]
    always = layers * attention + dense * 3 * hidden * config["intermediate_size"]
    always += sparse * config["n_shared_experts"] * expert
    linears = always + sparse * config["n_routed_experts"] * expert
    active = always + sparse * config["num_experts_per_tok"] * expert
    others = 2 * config["vocab_size"] * hidden + sparse * router + (2 * layers + 1) * hidden
    others += layers * (queries + latent)
    cached = layers * (latent + rotated)
    active += others - config["vocab_size"] * hidden
    return Architecture(name, None, True, linears + others, active, linears, cached, ONLY_PLANNED[DEEPSEEK])


@dataclass(frozen=True)
class Layout:
    """How a training step is spread over GPUs, and what of it is a choice."""

    tensor: int
    pipeline: int
    data: int
    micro_batch: int
    recompute: bool
    sequence: bool
    last_stage_layers: int | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "Layout":
        """The recipe's."""
        parallel, train = recipe.parallel, recipe.train
        return cls(
            parallel.tensor,
            parallel.pipeline,
            parallel.data,
            train.micro_batch,
            train.recompute,
            parallel.sequence,
            parallel.last_stage_layers,
        )

    def written_into(self, recipe: Recipe) -> Recipe:
        """The recipe with this layout in the place of its own."""
        parallel = replace(
            recipe.parallel,
            tensor=self.tensor,
            pipeline=self.pipeline,
            data=self.data,
            sequence=self.sequence,
            last_stage_layers=self.last_stage_layers,
        )
        train = replace(recipe.train, micro_batch=self.micro_batch, recompute=self.recompute)
        return replace(recipe, parallel=parallel, train=train)

    @property
    def world(self) -> int:
        """GPUs."""
        return self.tensor * self.pipeline * self.data

    def micro_batches(self, recipe: Recipe) -> int:
        """Micro-batches of one rank and step."""
        return recipe.train.global_batch // (self.micro_batch * self.data)

    def at_once(self, recipe: Recipe) -> int:
        """Micro-batches that run side by side (training/side_by_side.py)."""
        problem = next(side_by_side_problems(self.written_into(recipe)), None)
        return recipe.train.micro_batches_at_once if problem is None else 1

    def layers(self, shape: ModelShape, stage: int) -> float:
        """Layers of a pipeline stage, counted from 0."""
        fixed = self.last_stage_layers
        if fixed is None or self.pipeline == 1:
            return shape.layers / self.pipeline
        return fixed if stage == self.pipeline - 1 else (shape.layers - fixed) / (self.pipeline - 1)

    def stages(self) -> tuple[int, ...]:
        """The stages that differ: first, last and, between them, the second."""
        return tuple(sorted({0, min(1, self.pipeline - 1), self.pipeline - 1}))

    def words(self) -> str:
        """As a line of a plan."""
        parts = [f"TP{self.tensor} PP{self.pipeline} DP{self.data}", f"micro-batch {self.micro_batch}"]
        parts += ["sequence parallel"] * self.sequence + ["recompute"] * self.recompute
        return ", ".join(parts)
