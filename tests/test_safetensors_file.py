"""Safetensors files: read as the library of that name reads them, and refused where it refuses."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from schemas.errors import BadInput
from worker.adapters.safetensors_file import WEIGHT_TYPES, SafetensorsFile

TENSORS = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.float16),
    "empty": torch.empty(0, 4, dtype=torch.float64),
}


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(SafetensorsFile.open(path).read(hashlib.sha256()))


def stored(header: object, num_bytes: int = 8, *, padding: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += padding
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def tensor(start: int, end: int, dtype: str = "F32", **fields: object) -> dict[str, object]:
    shape = [(end - start) // 4]
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **fields}


def test_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file", {"made": "by hand"})
    found = read(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for key, expected in TENSORS.items():
        assert (found[key].dtype, found[key].shape) == (expected.dtype, expected.shape)
        assert found[key].equal(expected)


def test_the_hash_is_that_of_the_whole_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    digest = hashlib.sha256()
    for _ in SafetensorsFile.open(tmp_path / "file").read(digest):
        pass
    assert digest.digest() == hashlib.sha256((tmp_path / "file").read_bytes()).digest()


def test_a_file_that_is_cut_off_between_two_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    # More than what is read ahead.
    save_file({key: torch.ones(1 << 20) for key in "ab"}, path)
    tensors = SafetensorsFile.open(path).read(hashlib.sha256())
    next(tensors)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(BadInput, match="was changed while it was read; load it again"):
        next(tensors)


def test_a_file_that_has_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file(TENSORS, path)
    opened = SafetensorsFile.open(path)
    path.unlink()
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        SafetensorsFile.open(path)
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        next(opened.read(hashlib.sha256()))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(7),
        (1 << 63).to_bytes(8, "little"),
        stored({"a": tensor(0, 8)})[:20],
        stored({"a": tensor(0, 8)}, 7),
        stored({"a": tensor(0, 8)}, 9),
        stored({"a": tensor(4, 8)}),
        stored({"a": tensor(0, 8), "b": tensor(4, 8)}),
        stored({"a": tensor(0, 4), "b": tensor(8, 12)}, 12),
        stored({"a": tensor(0, 8, shape=[3])}),
        stored({"a": tensor(0, 8, shape=[-2])}),
        stored({"a": tensor(0, 8, shape=["2"])}),
        stored({"a": tensor(8, 0, shape=[2])}),
        stored({"a": tensor(0, 8, shape=[1 << 70])}),
        stored({"a": tensor(0, 8, dtype=None)}),
        stored({"a": {"dtype": "F32", "shape": [2]}}),
        stored({"a": 3}),
        stored([]),
        stored(b"{"),
        stored(b"\xff{}"),
        stored(b"[" * 100_000),
        stored({"__metadata__": {"a": 3}}, 0),
    ],
)
def test_what_the_library_refuses_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(SafetensorError):
        load(content)
    with pytest.raises(BadInput, match="file: is damaged or not completely copied: "):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    "header",
    [
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"\\udfff","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"a":"\xed\xa0\x80"}}',
        b'{"a":' * 100_000,
        json.dumps({"a": tensor(0, 8, shape=[2, *[1] * 100_000])}).encode(),
        json.dumps({"a": tensor(0, 8)}).encode() + b" " * 4_000_000,
    ],
)
def test_a_header_that_nobody_could_tell_of_or_wait_for_is_refused(
    tmp_path: Path, header: bytes
) -> None:
    (tmp_path / "file").write_bytes(stored(header))
    with pytest.raises(BadInput, match="file: is damaged or not completely copied: ") as error:
        read(tmp_path / "file")
    assert str(error.value).encode()


@given(seed=st.integers(0, 2**32), num_changes=st.integers(1, 3))
def test_bytes_changed_at_random_are_read_as_by_the_library_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: int, num_changes: int
) -> None:
    path, rng = tmp_path_factory.getbasetemp() / "changed", random.Random(seed)
    content = bytearray(save(TENSORS))
    for _ in range(num_changes):
        content[rng.randrange(len(content))] = rng.choice(b'\0\xff0189"{}[],:FBU ')
    path.write_bytes(content)
    try:
        opened = SafetensorsFile.open(path)
    except BadInput:
        return
    if any(tensor.dtype not in WEIGHT_TYPES for tensor in opened.tensors.values()):
        return  # Whoever opens it looks at that, and names the key.
    found = read(path)
    expected = load(bytes(content))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.shape == expected[key].shape
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), expected[key].view(-1).view(torch.uint8)
        )
