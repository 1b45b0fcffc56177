"""Arrays out of a shard: plain numbers of a known shape, or an error."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.format.npy import read_npy, write_npy

SHAPE = (2, 4, 3, 3)


def read(data: bytes) -> np.ndarray:
    return read_npy(data, SHAPE, ("float16", "float32"), "shard: sample")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read_to_the_bit(dtype: str):
    array = np.random.default_rng(0).normal(size=SHAPE).astype(dtype)
    found = read(write_npy(array))
    assert found.dtype == array.dtype
    assert (found == array).all()


class Bomb:
    """Leaves a mark where it is unpickled."""

    exploded = False

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return setattr, (Bomb, "exploded", True)


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def stated(header: bytes, version: bytes = b"\x01\x00", size: int = 2) -> bytes:
    return b"\x93NUMPY" + version + len(header).to_bytes(size, "little") + header


def typed(dtype: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(SHAPE, dtype=dtype))
    return buffer.getvalue()


HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4, 1000000, 1000000), }\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickled(), "holds object"),
        (pickle.dumps(Bomb()), "is not a plain .npy file"),
        (b"", "is not a plain .npy file"),
        (stated(HUGE), r"has the shape \(2, 4, 1000000, 1000000\)"),
        (stated(b"{'descr': '<f4'," + b" " * 100_000 + b"}", b"\x02\x00", 4), "is not a plain .npy file"),
        (stated(b"{'descr': __import__('os'), 'fortran_order': False, 'shape': ()}\n"), "is not a plain .npy file"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "is not a plain .npy file"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "version"),
        (typed("float64"), "holds float64, not float16 or float32"),
        (typed(">f4"), "holds >f4"),
        (write_npy(np.zeros((2, 4, 3, 4), dtype=np.float32)), r"has the shape \(2, 4, 3, 4\)"),
        (write_npy(np.zeros(SHAPE, dtype=np.float32))[:-1], "has 287 bytes"),
        (write_npy(np.zeros(SHAPE, dtype=np.float32)) + b"x", "has 289 bytes"),
    ],
    ids=range(13),
)
def test_anything_else_is_refused(data: bytes, message: str):
    pickle.loads(pickle.dumps(Bomb()))
    assert Bomb.exploded, "the bomb works"
    Bomb.exploded = False
    with pytest.raises(UserError, match=f"shard: sample: .*{message}"):
        read(data)
    assert not Bomb.exploded
