"""Safetensors files, read into memory: who maps a file is killed (SIGBUS) if it is cut short."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from schemas.errors import BadInput
from schemas.faults import first_fault
from worker.adapters.files import open_file

#: The types that weights of an adapter may have.
WEIGHT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

#: Bytes in front of the header that tell its length, little-endian.
_LENGTH_BYTES = 8

#: Of a header: the format allows 100 MB, and DoRA of all linear modules of 126 layers takes 0.4.
#: While one is parsed no other thread runs, 0.1 s for each MB.
_MAX_HEADER_BYTES = 4_000_000

#: Of a tensor's shape; an adapter's have two. Thousands of sizes take minutes to multiply.
_MAX_DIMENSIONS = 8


class StoredTensor(BaseModel):
    """What the header says of one tensor."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    dtype: str
    shape: Annotated[tuple[NonNegativeInt, ...], Field(max_length=_MAX_DIMENSIONS)]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]
    """First byte and end, behind the header."""

    @property
    def num_bytes(self) -> int:
        start, end = self.data_offsets
        return end - start


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, StoredTensor] = Field(init=False)

    metadata: dict[str, str] | None = Field(None, alias="__metadata__")


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header has been read and covers all of it."""

    path: Path
    header: bytes
    """Its length included."""
    tensors: dict[str, StoredTensor]
    """By key, in the order in which they stand in the file."""

    @classmethod
    def open(cls, path: Path) -> SafetensorsFile:
        """Raises BadInput for a file that cannot be read or is damaged."""
        try:
            with open_file(path) as file:
                header = _read_header(file)
                tensors = _parse(header, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise BadInput(f"{path}: is damaged or not completely copied: {error}.") from error
        return cls(path, header, tensors)

    def read(self, digest: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Key and tensor, each in memory of its own, one after the other; all of ``WEIGHT_TYPES``.

        Meanwhile the hash ``digest`` is updated with the whole file. It is ready, and the tensors
        may be changed, once the last one has been taken. Raises BadInput if the file has changed
        since its header was read, or cannot be read.
        """
        try:
            # Reading and hashing both take about 0.6 s a GB, and let other threads run.
            with open_file(self.path) as file, ThreadPoolExecutor(1) as hashing:
                if file.read(len(self.header)) != self.header:
                    raise self.changed()
                hashing.submit(digest.update, self.header)
                for key, stored in self.tensors.items():
                    data = torch.empty(stored.num_bytes, dtype=torch.uint8)
                    content = data.numpy().data
                    if file.readinto(content) < len(content):
                        raise self.changed()
                    hashing.submit(digest.update, content)
                    yield key, data.view(WEIGHT_TYPES[stored.dtype]).view(stored.shape)
        except OSError as error:
            raise BadInput(f"{self.path}: cannot be read: {error.strerror}") from error

    def changed(self) -> BadInput:
        return BadInput(f"{self.path}: was changed while it was read; load it again.")


def _read_header(file: BinaryIO) -> bytes:
    """Raises ValueError if the file ends before."""
    length = file.read(_LENGTH_BYTES)
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"its header would have {num_bytes} bytes")
    header = length + file.read(num_bytes)
    if len(header) < _LENGTH_BYTES + num_bytes:
        raise ValueError("it ends within its header")
    return header


def _parse(header: bytes, file_size: int) -> dict[str, StoredTensor]:
    """Raises ValueError unless the tensors fill the file from the header on to its end."""
    try:
        found = _Header.model_validate_json(header[_LENGTH_BYTES:]).__pydantic_extra__
    except ValidationError as error:
        raise ValueError(f"its header: {first_fault(error)}") from error
    end = 0
    tensors = dict(sorted(found.items(), key=lambda item: item[1].data_offsets))
    for key, tensor in tensors.items():
        start, expected = tensor.data_offsets[0], tensor.num_bytes
        if dtype := WEIGHT_TYPES.get(tensor.dtype):
            expected = math.prod(tensor.shape) * dtype.itemsize
        if start != end or tensor.num_bytes != expected:
            raise ValueError(f"{key} stands where it cannot, by its shape and its neighbours")
        end += expected
    if (size := len(header) + end) != file_size:
        raise ValueError(f"it has {file_size} bytes where its header tells of {size}")
    return tensors
