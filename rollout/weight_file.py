"""One file of weights in shared memory: the tensors' bytes, then a JSON footer with a checksum over those bytes.

    data     tensor after tensor
    footer   {"version": [incarnation, step], "checksum": "...", "tensors": [[name, dtype, shape, offset, bytes], ...]}
    8 bytes  length of the footer, little endian

Written in one pass, as the tensors come (ZeRO-3 gathers them one by one). Not safetensors: the receiver checksums the
bytes it maps before it uses them, and learns which version they belong to. The checksum is there to find torn and stale
bytes, not forged ones: a fast hash will do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import xxhash

from rltk.errors import InfrastructureError, WeightMismatchError


def write(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], version: tuple[int, int]) -> str:
    """Write atomically (temporary name, then rename). Returns the checksum of the data bytes."""
    digest, entries, offset = xxhash.xxh3_128(), [], 0
    temporary = path.with_name(f"{path.name}.tmp")
    with _removed_on_failure(temporary), open(temporary, "wb") as out:
        for name, tensor in tensors:
            data = memoryview(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
            out.write(data)
            digest.update(data)
            entries.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, len(data)])
            offset += len(data)
        footer = json.dumps({"version": version, "checksum": digest.hexdigest(), "tensors": entries}).encode()
        out.write(footer + len(footer).to_bytes(8, "little"))
    os.replace(temporary, path)
    return digest.hexdigest()


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(path.parent).free
        raise InfrastructureError(
            f"{path.parent} is full ({free / 2**30:.2f} GiB free): a copy of the weights must fit. "
            "Fix: more shared memory (docker run --shm-size=...)."
        ) from error


def read(path: str | Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The checksum of the bytes actually mapped, and the tensors (views of the mapping). Raises on a torn file."""
    with open(path, "rb") as source:
        mapping = memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY))
    length = int.from_bytes(mapping[-8:], "little")
    if not 0 < length <= len(mapping) - 8:
        raise WeightMismatchError(f"weight file {path} is torn: its footer is said to have {length} bytes")
    footer = json.loads(bytes(mapping[-8 - length : -8]))
    data = mapping[: -8 - length]
    expected = sum(entry[4] for entry in footer["tensors"])
    if len(data) != expected:
        raise WeightMismatchError(f"weight file {path} holds {len(data)} bytes of data, its footer says {expected}")
    tensors = {}
    for name, dtype, shape, offset, size in footer["tensors"]:
        flat = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=offset)
        tensors[name] = flat.view(getattr(torch, dtype)).view(shape)
    return xxhash.xxh3_128(data).hexdigest(), tensors
