"""Files that a second thread writes, flushes and hashes while the caller makes the next tensors."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from halfbyte.export.container import TensorFile
from halfbyte.export.layout import Stored
from halfbyte.export.record import file_entry

THREADS = 2
"""One writes the next tensors while the other flushes and hashes a full file; neither holds the interpreter's lock."""


class Filling:
    """Safetensors files that are filled tensor by tensor; a context manager.

    A file is flushed to disk and hashed as soon as it is full, by the process that wrote it: files of several
    processes reach the disk together, and their pages are still in memory. One group of tensors waits to be written
    at most.
    """

    def __init__(self, layouts: Mapping[Path, Mapping[str, Stored]]):
        """Create the files.

        Args:
            layouts: File -> the tensors that it will hold.

        Raises:
            OSError: a file cannot be made.
        """
        self._files: dict[Path, TensorFile] = {}
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="export")
        self._writing: Future[None] | None = None
        self._full: dict[Path, Future[dict[str, Any]]] = {}
        for path, layout in layouts.items():
            self._files[path] = TensorFile(path, layout)

    def put(self, path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        """Have tensors written; waits until those before are.

        Args:
            path: A file of the layouts.
            tensors: Name -> bits, as TensorFile.write takes them; not to be changed any more.

        Raises:
            ValueError: One is not as planned.
            OSError: Writing what came before failed.
        """
        for name, bits in tensors.items():
            self._files[path].check(name, bits)
        self._wait()
        self._writing = self._threads.submit(self._write, path, tensors)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Wait for all files: name -> SHA-256 and bytes, as halfbyte.json lists them.

        Raises:
            ValueError: Tensors were never written.
            OSError: Writing failed.
        """
        self._wait()
        for path, file in self._files.items():
            if path not in self._full:
                file.close()  # says what is missing
        return {path.name: entry.result() for path, entry in self._full.items()}

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, path: Path, tensors: Mapping[str, np.ndarray]) -> None:
        file = self._files[path]
        for name, bits in tensors.items():
            file.write(name, bits)
        if file.full:
            self._full[path] = self._threads.submit(_finish, path, file)

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.abandon()


def _finish(path: Path, file: TensorFile) -> dict[str, Any]:
    file.close()
    return file_entry(path)
