"""Hashes of files and folders, and the cache folder for what can be made or fetched again, such as these hashes."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_safety.core.errors import UserError

VARIABLE = "LIT_SAFETY_CACHE"


def user_cache() -> Path:
    """`$LIT_SAFETY_CACHE`, else `~/.cache/lit_safety`. A user without a home folder gets a folder among the temporary
    files. It may not exist yet.

    Raises:
        UserError: there is no home folder, and the folder among the temporary files belongs to another user.
    """
    if given := os.environ.get(VARIABLE):
        return Path(given)
    try:
        return Path.home() / ".cache" / "lit_safety"
    except RuntimeError:  # no HOME, and the user is not in the list of users, as in many containers
        return _temporary()


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"lit_safety-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); set {VARIABLE} to a folder") from error
    # Anybody may make folders there: another user's folder is not trusted.
    if folder.is_symlink() or (hasattr(os, "getuid") and found.st_uid != user):
        raise UserError(f"{folder}: belongs to another user, and HOME is not set; set {VARIABLE} to a folder")
    return folder


# Hashes of files: by these all commands see whether weights or data are the same. Whole files, links followed.
#
# A file of 10 GB must not be read at every start. So its hash is remembered in the user's cache folder, with the
# file's size, inode and times in nanoseconds; a file that was changed in any way is read again. A file that changed
# less than two seconds ago is not remembered: a second change could leave the same times. If the folder cannot be
# written to, files are read every time.


#: Smaller files are read faster than they are looked up.
SMALL = 1 << 20
#: Seconds that a file must have been left alone to be remembered.
SETTLED = 2.0
CHUNK = 8 << 20
#: safetensors' own limit of a header.
MAX_HEADER = 100 << 20


def check_regular(path: str | os.PathLike[str]) -> os.stat_result:
    """The state of a plain file. Reading a pipe or a device might never end.

    Raises:
        OSError: it cannot be looked at.
        UserError: it is a pipe, a device or a socket.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path}: is not a file but a pipe, a device or a socket; give a file")
    return found


def files_below(top: Path) -> Iterator[Path]:
    """The files in a folder and its sub-folders, also those behind links, without hidden ones.

    Hidden are files of version control, of the hub's client and of macOS (`._name`). A link back to a folder that is
    being read is not followed.

    Raises:
        OSError: a folder cannot be read.
    """

    def enter(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        found = folder.stat()
        here = (found.st_dev, found.st_ino)
        if here in above:
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from enter(folder / entry.name, above | {here})
            elif entry.is_file():
                yield folder / entry.name

    yield from enter(top, frozenset())


def file_sha256(path: str | os.PathLike[str], remember: bool = False) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Args:
        path: the file; links are followed.
        remember: take what an earlier call found, if the file has not changed since.

    Raises:
        OSError: it cannot be read.
        UserError: it is a pipe or a device.
    """

    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    check_regular(path)
    if not remember:
        return read()
    return str(_remembered(path, "sha256", read, lambda found: isinstance(found, str)))


def tensor_hashes(path: Path) -> list[str]:
    """One line a tensor of a safetensors file: its name, type, shape and the hash of all its bytes; remembered.

    Raises:
        UserError: it is not a readable safetensors file.
    """

    def good(found: Any) -> bool:
        return isinstance(found, list) and all(isinstance(line, str) for line in found)

    try:
        check_regular(path)
        return list(_remembered(path, "tensors", lambda: list(_tensors(path)), good))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error


def _tensors(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError("its header is too long")
        header: dict[str, Any] = json.loads(file.read(size))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        entries.sort(key=lambda entry: tuple(entry[1]["data_offsets"]))
        offset, end = 0, os.fstat(file.fileno()).st_size - 8 - size
        for name, entry in entries:
            start, stop = entry["data_offsets"]
            # With tensors that overlap, a small file could take hours.
            if not offset <= start <= stop <= end:
                raise ValueError(f"its tensor {name!r} does not lie within it")
            file.seek(8 + size + start)
            digest, left = hashlib.blake2b(digest_size=16), stop - start
            while left:
                part = file.read(min(CHUNK, left))
                if not part:
                    raise ValueError("it is cut short")
                digest.update(part)
                left -= len(part)
            offset = stop
            yield json.dumps([name, entry["dtype"], entry["shape"], digest.hexdigest()])


def _remembered(path: str | os.PathLike[str], kind: str, read: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
    """What `read` finds in a file, or found there when it was in the same state."""
    before = os.stat(path)
    if before.st_size < SMALL:
        return read()
    note = _note(path, kind)
    state = [before.st_size, before.st_ino, before.st_mtime_ns, before.st_ctime_ns]
    if note is not None:
        with suppress(OSError, ValueError, RecursionError):  # no note was written, or it is damaged: read the file
            stated = json.loads(note.read_text(encoding="utf-8"))
            if isinstance(stated, dict) and stated.get("state") == state and good(stated.get("found")):
                return stated["found"]
    settled = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED
    found = read()
    after = os.stat(path)
    same = state == [after.st_size, after.st_ino, after.st_mtime_ns, after.st_ctime_ns]
    if note is not None and settled and same:
        _write(note, json.dumps({"file": os.path.realpath(path), "state": state, "found": found}))
    return found


def _note(path: str | os.PathLike[str], kind: str) -> Path | None:
    """The path of what is remembered of a file; None: there is no folder for it."""
    name = hashlib.blake2b(f"{kind}\0{os.path.realpath(path)}".encode("utf-8", "surrogateescape"), digest_size=16)
    try:
        return user_cache() / "hashes" / f"{name.hexdigest()}.json"
    except UserError:
        return None


def _write(note: Path, text: str) -> None:
    """Written whole or not at all, under a name that no other process uses. If the disk is full, only time is lost."""
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".{note.name}.{uuid.uuid4().hex}.partial")
        try:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
            os.replace(temporary, note)
        finally:
            temporary.unlink(missing_ok=True)


# Everything that an image depends on, as a hash: images of other weights or settings are never mistaken for these.


_COUNTS = {
    *(".safetensors", ".json", ".bin", ".txt", ".model", ".pt", ".pth", ".ckpt", ".npy"),
    *(".onnx", ".npz", ".gguf", ".spm", ".p"),
}
"""Suffixes of files that change what a model does. Model cards, licences and images next to them do not."""


def content_sha256(path: str | Path) -> str:
    """sha256 over the names and contents of a model's weight and config files; of a single file, its content.

    Links to files and to folders are followed. In a pipeline's folder, weights that are not loaded (half precision
    next to full precision) do not count.

    Raises:
        UserError: there is nothing at `path`, or a file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        try:
            files = sorted(_files(path))
        except OSError as error:
            raise UserError(f"{error.filename or path}: cannot be read ({error.strerror})") from error
    elif path.exists():
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder")
    total = hashlib.sha256()
    for file in files:
        name = file.name if file == path else file.relative_to(path).as_posix()
        try:
            content = file_sha256(file, remember=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        total.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _files(top: Path) -> Iterator[Path]:
    """The files below a folder that count."""
    from lit_safety.core.weights import weight_files

    pipeline = (top / "model_index.json").is_file()
    loaded: dict[Path, set[Path]] = {}
    for file in files_below(top):
        if file.suffix not in _COUNTS:
            continue
        if pipeline and file.suffix == ".safetensors":
            if file.parent not in loaded:
                loaded[file.parent] = set(weight_files(file.parent))
            if file not in loaded[file.parent]:
                continue
        yield file


def digest(value: Any) -> str:
    """sha256 of anything that JSON can hold, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
