"""A sample as the members of a shard, and back: no pickle."""

from __future__ import annotations

import functools
import io
import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.sample import Sample

MEMBERS = ("tokens.npy", "loss_mask.npy", "cu_seqlens.npy", "meta.json")
_DTYPES = {"tokens.npy": np.int32, "loss_mask.npy": np.uint8, "cu_seqlens.npy": np.int32}


def encode_sample(sample: Sample) -> dict[str, bytes]:
    """The four members of a sample as bytes."""
    members = {
        "tokens.npy": _npy_bytes(sample.tokens.astype("<i4")),
        "loss_mask.npy": _npy_bytes(sample.loss_mask.astype("u1")),
        "cu_seqlens.npy": _npy_bytes(sample.cu_seqlens.astype("<i4")),
        "meta.json": json.dumps(sample.meta, sort_keys=True, separators=(",", ":")).encode(),
    }
    assert tuple(members) == MEMBERS
    return members


def decode_sample(members: dict[str, bytes], where: str) -> Sample:
    """A sample from its members.

    Raises:
        ValueError: a member of another type or shape.
    """
    arrays: dict[str, NDArray[Any]] = {}
    try:
        for part, dtype in _DTYPES.items():
            array = _npy_array(members[part])
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(
                    f"{part} is {array.dtype}{list(array.shape)}, not 1-D {dtype.__name__}"
                )
            arrays[part] = array
        meta = json.loads(members["meta.json"])
        if not isinstance(meta, dict):
            raise ValueError("meta.json is no object")
        return Sample(
            tokens=arrays["tokens.npy"],
            loss_mask=arrays["loss_mask.npy"],
            cu_seqlens=arrays["cu_seqlens.npy"],
            meta=meta,
        )
    except (ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{where} is broken: {error}; run stage=prepare again") from error


def _npy_bytes(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _npy_array(data: bytes) -> NDArray[Any]:
    """An array from the bytes of a .npy file; headers that have been seen are not parsed again.

    Raises:
        ValueError: no .npy of version 1, one of objects, or with other bytes than its shape says.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    dtype, shape = _npy_header(data[:start])
    if dtype.hasobject:
        raise ValueError("an array of objects")
    if len(data) - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(data)} bytes do not fit an array of shape {shape}")
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape).copy()


@functools.lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("a .npy file of another version")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran and len(shape) > 1:
        raise ValueError("an array in Fortran's order")
    return dtype, shape
