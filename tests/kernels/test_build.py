"""What was built, read from the module itself."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import sst_kernels
from sst_kernels import _C


def dynamic_section(path: Path) -> tuple[list[str], list[str]]:
    """(needed libraries, undefined symbols) of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    offset, size, count = (*struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58))
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]

    def text(start: int) -> str:
        return data[start : data.index(b"\0", start)].decode()

    def entries(kind: int, form: str) -> list[tuple[int, tuple]]:
        """(offset of the linked string table, entry) of every entry in sections of this type."""
        return [
            (sections[section[6]][4], entry)
            for section in sections
            if section[1] == kind
            for entry in struct.iter_unpack(form, data[section[4] : section[4] + section[5]])
        ]

    needed = [text(strings + value) for strings, (tag, value) in entries(6, "<qQ") if tag == 1]
    symbols = [(strings, entry) for strings, entry in entries(11, "<IBBHQQ")]
    undefined = [text(strings + entry[0]) for strings, entry in symbols if entry[3] == 0]
    return needed, undefined


def test_only_the_stable_abi_is_linked() -> None:
    needed, undefined = dynamic_section(Path(_C.__file__))
    assert "libtorch.so" in needed  # else a CUDA torch's stream symbol would not be found
    assert not [library for library in needed if "cuda" in library]
    assert any(name.startswith("aoti_torch_") for name in undefined)
    # at::… and c10::… as mangled, their type infos and vtables included
    assert not [name for name in undefined if re.match(r"_Z(T[A-Z])?N?K?(2at|3c10)", name)]


def test_build_info() -> None:
    info = sst_kernels.build_info()
    assert info["version"] == "0.1.0"
    assert info["instruction_set_in_use"] in info["instruction_sets"]
    assert (info["cuda"] is None) == (info["cuda_architectures"] == [])
    assert info["compiler"]


def test_import_needs_torch_and_numpy_only(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in {'scipy', 'transformers', 'peft', 'safetensors',\n"
        "                                  'yaml', 'matplotlib', 'tqdm'}:\n"
        "            raise ImportError(f'{name} is not allowed here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import sst_kernels\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("start", [0, 10**6, 2**40, 2**52])
def test_triangle_block_counts_every_block_once(start: int) -> None:
    for index in range(start, start + 3000):
        row = (math.isqrt(8 * index + 1) - 1) // 2
        assert _C.triangle_block(index) == (row, index - row * (row + 1) // 2)
