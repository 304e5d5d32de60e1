"""A JSONL file that is made block by block and goes on after a stop: complete under its name, or growing beside it."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.training.errors import UserError
from halfbyte.training.files import read_json, write_json


@dataclass(frozen=True)
class Blocks:
    """<out>.partial holds whole blocks of lines, <out>.json says what made them.

    Attributes:
        out: The file, which appears when it is complete.
        size: Lines of a block; the last one may have fewer.
    """

    out: Path
    size: int

    @property
    def partial(self) -> Path:
        """The file while it grows."""
        return self.out.with_name(f"{self.out.name}.partial")

    def open(self, made_by: dict[str, Any]) -> int:
        """Take up what an earlier start left, without a block that was only half written.

        Args:
            made_by: JSON values that decide about every line.

        Returns:
            Lines that are there.

        Raises:
            UserError: the lines there were made by something else, or the folder cannot be written.
        """
        description = self.out.with_name(f"{self.out.name}.json")
        if self.out.exists() or self.partial.exists():
            if not description.exists():
                raise UserError(f"{self.out}: already there, and made by something else; choose another file")
            before = read_json(description)
            for key in {**before, **made_by}:
                if before.get(key) != made_by.get(key):
                    raise UserError(
                        f"{self.out}: was made with {key} = {before.get(key)}, not {made_by.get(key)}; keep that value "
                        "or choose another file"
                    )
        write_json(description, made_by)
        with self._writing():
            if self.out.exists():
                return len(self.out.read_bytes().splitlines())
            return self._whole() if self.partial.exists() else 0

    def _whole(self) -> int:
        """Cut the growing file to whole blocks and count their lines."""
        lines = [line for line in self.partial.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        whole = len(lines) // self.size * self.size
        os.truncate(self.partial, sum(map(len, lines[:whole])))
        return whole

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Append a block.

        Raises:
            UserError: the disk is full or the folder is not writable.
        """
        with self._writing(), self.partial.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the file its name, now that all blocks are there; does nothing when it has it.

        Raises:
            UserError: the folder is not writable.
        """
        with self._writing():
            if not self.out.exists():
                self.partial.replace(self.out)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error.strerror}); choose another file") from error
