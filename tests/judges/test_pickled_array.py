import codecs
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from lit_safety.core.errors import UserError
from lit_safety.judges.q16 import read_pickled_array


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back_as_pickle_would_give_them(tmp_path: Path, protocol: int, dtype: str, order: str) -> None:
    array = np.asarray(np.arange(6).reshape(2, 3) + 200, dtype=dtype, order=order)
    (tmp_path / "a.p").write_bytes(pickle.dumps(array, protocol=protocol))
    found = read_pickled_array(tmp_path / "a.p")
    assert found.shape == (2, 3)
    assert found.tolist() == array.tolist()


def test_the_names_that_older_numpy_wrote(tmp_path: Path) -> None:
    """NumPy 1 wrote numpy.core, NumPy 2 writes numpy._core."""
    data = pickle.dumps(np.ones((2, 2), np.float32), protocol=2)
    assert b"numpy._core.multiarray" in data
    (tmp_path / "a.p").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert read_pickled_array(tmp_path / "a.p").tolist() == [[1, 1], [1, 1]]


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_it_is_executed(tmp_path: Path, protocol: int) -> None:
    for number, content in enumerate([Bomb(tmp_path / "ran"), np.array([Bomb(tmp_path / "ran")])]):
        (tmp_path / f"{number}.p").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(UserError, match="code was not run"):
            read_pickled_array(tmp_path / f"{number}.p")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_array_of_numbers(tmp_path: Path) -> None:
    whole = pickle.dumps(np.ones((2, 3), np.float32), protocol=2)
    contents = [
        b"", b"\x80", b"no pickle", whole[:-30], pickle.dumps([1, 2]), pickle.dumps("text"), b"N" * 5000 + b".",
        pickle.dumps(np.array(["a"])), pickle.dumps(np.array([1j])), whole.replace(b"K\x02K\x03", b"K\xffK\xff"),
    ]  # fmt: skip
    for content in contents:
        (tmp_path / "a.p").write_bytes(content)
        with pytest.raises(UserError, match="not a plain NumPy array"):
            read_pickled_array(tmp_path / "a.p")
    (tmp_path / "a.p").write_bytes(bytes(2 << 20))
    with pytest.raises(UserError, match="larger than"):
        read_pickled_array(tmp_path / "a.p")
    with pytest.raises(UserError, match="cannot be read"):
        read_pickled_array(tmp_path / "absent.p")


class Encoded:
    """Bytes as protocol 2 writes them, of something that is not a text."""

    def __reduce__(self):
        return codecs.encode, (5, "latin1")


class Forged:
    """An array whose type or bytes are something else."""

    def __init__(self, kind: object, raw: object) -> None:
        self.kind, self.raw = kind, raw

    def __reduce__(self):
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (2, 3), self.kind, False, self.raw)


class Kind:
    """A type whose code is whatever it is given."""

    def __init__(self, code: object) -> None:
        self.code = code

    def __reduce__(self):
        return np.dtype, (self.code, False, True), (3, "<", None, None, None, -1, -1, 0)


def test_tuples_in_tuples_take_no_time(tmp_path: Path) -> None:
    """A pair of twice what there was, a hundred times: a few hundred bytes, 2^100 leaves to hash or to write out."""
    nested: tuple = ()
    for _ in range(100):
        nested = (nested, nested)
    tail = pickle.dumps(nested, protocol=2)[2:-1]  # without its first and last instruction
    contents = [
        tail + b".", b"(U\x04call" + tail + b"NNt.", tail + b"N\x85R.", b"(U\x06global" + tail + b"tN\x85R.",
        pickle.dumps(Forged(Kind(nested), b"")), pickle.dumps(Forged(nested, b"")),
        b"}" + tail + b"Ns.", b"cnumpy\ndtype\n" + tail + b"b.", b"N" + b"p999999999\n" + b".",
    ]  # fmt: skip
    for content in contents:
        (tmp_path / "a.p").write_bytes(content)
        with pytest.raises(UserError, match="not a plain NumPy array"):
            read_pickled_array(tmp_path / "a.p")


def test_bytes_that_were_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.p").write_bytes(pickle.dumps(Forged(np.dtype("f4"), Encoded()), protocol=2))
    with pytest.raises(UserError, match="not a plain NumPy array"):
        read_pickled_array(tmp_path / "a.p")
