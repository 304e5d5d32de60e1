"""The second reader: its tables, its independence, and damaged containers."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.export import reader
from halfbyte.training.errors import UserError


def test_tables_are_the_formats():
    codes = torch.arange(256, dtype=torch.uint8)
    e4m3 = codes.view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(reader.E4M3, e4m3, equal_nan=True)
    e8m0 = codes.view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(reader.E8M0, e8m0, equal_nan=True)
    assert reader.E2M1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (reader.E2M1[8:] == -reader.E2M1[:8]).all()


def test_reader_imports_neither_torch_nor_safetensors():
    script = "import sys; from halfbyte.export import reader; print({'torch', 'safetensors'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def broken_file(content: bytes, tmp_path: Path) -> str:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError) as error:
        reader.open_checkpoint(tmp_path)
    assert "model.safetensors" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def container(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_damaged_containers(tmp_path: Path):
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert "no safetensors header" in broken_file(b"", tmp_path)
    assert "no safetensors header" in broken_file(struct.pack("<Q", 1 << 60) + b"{}", tmp_path)
    assert "damaged safetensors header" in broken_file(struct.pack("<Q", 4) + b"{{{{", tmp_path)
    assert "damaged safetensors header" in broken_file(container({"a": {"dtype": "F32"}}), tmp_path)
    negative = container({"a": tensor | {"shape": [-1, -2]}}, b"12345678")
    assert "whole numbers" in broken_file(negative, tmp_path)
    assert "truncated" in broken_file(container({"a": tensor}, b"1234"), tmp_path)
    assert "do not fit F32 [3]" in broken_file(container({"a": tensor | {"shape": [3]}}, b"12345678"), tmp_path)
    assert "dtype C64" in broken_file(container({"a": tensor | {"dtype": "C64"}}, b"12345678"), tmp_path)
    overlap = {"a": tensor, "b": tensor | {"data_offsets": [4, 12]}}
    assert "b: bytes 4..12" in broken_file(container(overlap, b"x" * 12), tmp_path)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=80))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    folder = tmp_path_factory.mktemp("fuzz")
    broken_file(content, folder)
    broken_file(struct.pack("<Q", len(content)) + content + b"1", folder)
