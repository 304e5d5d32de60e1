"""A tokenized corpus: packed windows in memory, or in .npy files that are complete or absent.

Shapes: L = sequence length in tokens, n = windows.
"""

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib import format as npy

from halfbyte.training import config
from halfbyte.training.errors import UserError
from halfbyte.training.packing import Packer, PackingReport, Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LAYOUT_VERSION = 2
"""Part of every key: raise it when packing changes what it writes."""
EDGE_BYTES = 1 << 16
"""Bytes at either end of a corpus that enter its key (hashing all of a large corpus would cost a read)."""
ARRAYS = {"tokens": np.int32, "loss_mask": np.uint8, "segments": np.int32}
"""File stem -> element type; the attributes of `packing.Window`."""
DIGEST_WINDOWS = 4096
"""Enough to notice another text; all of a large corpus would cost a read at every start."""
DOCUMENTS = np.int32
"""Element type of documents.npy, which is one file for all windows."""


@dataclass(frozen=True)
class PackedDataset:
    """A tokenized corpus; the arrays may be memory-mapped and are read-only.

    Attributes:
        tokens: int32 [n, L+1]; inputs are [:, :-1], labels [:, 1:].
        loss_mask: uint8 [n, L]; 1 where the label carries loss.
        segments: int32 [n, L]; index of the input token's document inside the window.
        isolate_documents: Whether attention must stay inside a segment.
        report: What was read, dropped and cut.
        path: The JSONL file.
        documents: int32 [m, 2]: a window, a line of the file that it has tokens of; windows rising. Empty if they
            are not from a file.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    segments: np.ndarray
    isolate_documents: bool
    report: PackingReport
    path: Path
    documents: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.tokens)

    @property
    def sequence_length(self) -> int:
        """L, tokens."""
        return self.tokens.shape[1] - 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the number of windows and of DIGEST_WINDOWS of them, evenly spread; of all if there are fewer."""
        total = hashlib.sha256(f"{self.tokens.shape}".encode())
        for row in np.linspace(0, len(self) - 1, min(len(self), DIGEST_WINDOWS)).astype(np.int64):
            total.update(self.tokens[row].tobytes())
        return total.hexdigest()

    def filled(self, window: int) -> int:
        """How many of a window's L inputs stand before its padding, which is a last segment without any loss."""
        segments = self.segments[window]
        last = segments == segments[-1]
        padded = not last.all() and not self.loss_mask[window][last].any()
        return len(segments) - int(last.sum()) if padded else len(segments)

    def lines(self, window: int) -> list[int]:
        """The lines of the file that a window has tokens of, from 1."""
        first, last = np.searchsorted(self.documents[:, 0], [window, window + 1])
        return self.documents[first:last, 1].tolist()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model has no embedding for.

        Args:
            vocab_size: Rows of the model's embedding.

        Raises:
            UserError: an id is too large; the line names where it first occurs.
        """
        if self.report.largest_token >= vocab_size:
            raise UserError(
                f"{self.path}:{self.report.largest_token_line}: token id {self.report.largest_token} is outside the "
                f"model's vocabulary of {vocab_size}; tokenizer and weights in model.path do not belong together"
            )


def tokenize_corpus(
    path: Path,
    tokenizer: "PreTrainedTokenizerFast",
    data: config.Data,
    sequence_length: int,
) -> PackedDataset:
    """Tokenize and pack a corpus in memory.

    Text documents are joined with EOS and cut into windows of L+1 tokens with stride L. Conversations are rendered
    with the chat template and packed whole; padding carries no loss.

    Args:
        path: JSONL or JSONL.gz.
        tokenizer: Fast tokenizer of the model.
        data: Format, keys and policy for long conversations.
        sequence_length: L, tokens.

    Raises:
        UserError: the file, one of its lines (named), the tokenizer or the amount of text is unusable.
    """
    packer = Packer(Path(path), tokenizer, data, sequence_length)
    windows = list(packer.windows())
    return PackedDataset(
        np.stack([w.tokens for w in windows]),
        np.stack([w.loss_mask for w in windows]),
        np.stack([w.segments for w in windows]),
        data.isolate_documents,
        packer.report,
        packer.path,
        np.concatenate([_documents(number, window) for number, window in enumerate(windows)]),
    )


def _documents(number: int, window: Window) -> np.ndarray:
    """A window's rows of PackedDataset.documents."""
    return np.array([(number, line) for line in window.lines], DOCUMENTS)


def prepare(
    path: Path,
    tokenizer: "PreTrainedTokenizerFast",
    data: config.Data,
    sequence_length: int,
    cache_dir: Path,
) -> PackedDataset:
    """As `tokenize_corpus`, streamed to .npy files that are memory-mapped and found again by the next run.

    The cache entry is renamed into place when complete. Ranks that call this at the same time do the same work and
    the first one's result stays; call it on one rank first to do the work once.

    Args:
        path: JSONL or JSONL.gz.
        tokenizer: Fast tokenizer of the model.
        data: Format, keys and policy for long conversations.
        sequence_length: L, tokens.
        cache_dir: Folder for the cache entries; made if missing.

    Raises:
        UserError: as `tokenize_corpus`; or the cache cannot be written (disk full).
    """
    packer = Packer(Path(path), tokenizer, data, sequence_length)
    try:
        entry = Path(cache_dir) / _cache_key(packer)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path in the recipe") from error
    if not entry.is_dir():
        try:
            _write_entry(entry, packer)
        except OSError as error:
            reason = f"{cache_dir}: the token cache cannot be written ({error.strerror}); free space there"
            raise UserError(reason) from error
    try:
        report = PackingReport(**json.loads((entry / "report.json").read_text()))
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in (*ARRAYS, "documents")}
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{entry}: damaged token cache ({error}); delete this folder, the next run makes it") from error
    return PackedDataset(**arrays, isolate_documents=data.isolate_documents, report=report, path=packer.path)


def _cache_key(packer: Packer) -> str:
    """Name of the cache entry: a hash of the corpus' identity, the tokenizer and every setting that shapes windows.

    Args:
        packer: Not yet streamed.

    Returns:
        32 hexadecimal digits.

    Raises:
        OSError: the corpus cannot be opened.
    """
    tokenizer = packer.tokenizer
    parts = {
        "layout": LAYOUT_VERSION,
        "corpus": _fingerprint(packer.path),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template],
        "settings": asdict(packer.data) | {"train": None},  # the corpus is known by its content, not by its path
        "sequence_length": packer.sequence_length,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write_entry(entry: Path, packer: Packer) -> None:
    """Stream a corpus into `entry`: one .npy per array and report.json. A failure leaves nothing at `entry`.

    Args:
        entry: Folder to make; if another process completes it first, that one stays and this work is dropped.
        packer: Not yet streamed.

    Raises:
        UserError: as Packer.windows.
        OSError: the folder cannot be written.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(_GrowingNpy(temporary / f"{name}.npy", dtype))
                for name, dtype in ARRAYS.items()
            }
            documents = stack.enter_context(_GrowingNpy(temporary / "documents.npy", DOCUMENTS))
            for number, window in enumerate(packer.windows()):
                for name, file in files.items():
                    file.append(vars(window)[name])
                for row in _documents(number, window):
                    documents.append(row)
        (temporary / "report.json").write_text(json.dumps(asdict(packer.report)))
        try:
            temporary.rename(entry)
        except OSError:
            if not entry.is_dir():  # where it is, another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _GrowingNpy:
    """A 2-D .npy file written row by row; numpy reserves room in the header for a larger first dimension."""

    def __init__(self, path: Path, dtype: type[np.generic]):
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)
        self._rows = self._width = 0
        self._data_start = self._write_header()

    def __enter__(self) -> "_GrowingNpy":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.seek(0)
            if self._write_header() != self._data_start:
                raise ValueError(f"{self._file.name}: the header grew over the data")
        finally:
            self._file.close()

    def append(self, row: np.ndarray) -> None:
        self._width = len(row)
        self._rows += 1
        self._file.write(row.astype(self._dtype, copy=False).tobytes())

    def _write_header(self) -> int:
        shape = (self._rows, self._width)
        header = {"descr": npy.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(self._file, header)
        return self._file.tell()


def _fingerprint(path: Path) -> list[object]:
    stat = path.stat()
    with path.open("rb") as file:
        head = file.read(EDGE_BYTES)
        file.seek(max(0, stat.st_size - EDGE_BYTES), os.SEEK_SET)
        tail = file.read(EDGE_BYTES)
    return [stat.st_size, stat.st_mtime_ns, hashlib.sha256(head).hexdigest(), hashlib.sha256(tail).hexdigest()]
