"""`lit_safety shards from-sage`: Sage as its authors publish it: metadata.jsonl next to images, and a table of users.

Source: Personalized Safety Alignment (arXiv 2508.01151). Every concept has a safe and an unsafe image and a caption
for each; which image is chosen depends on what the user bans, so a chosen image may be the unsafe one.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lit_safety.core.errors import UserError
from lit_safety.core.files import write_atomic
from lit_safety.users.profiles import read_profiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lit_safety.data.convert.convert import FoundPair

IMAGE = re.compile(r"(?P<stem>user_(?P<user>\d{1,12})_(?P<about>[^/\\]+)_\d+)_(?P<side>[su])\.(jpg|jpeg|png|webp)")
# "user_..._00001.jpg_u.jpg": malformed as published, but its end says which image's caption the row has.
CAPTION_SIDE = re.compile(r".*_(?P<side>[su])\.(jpg|jpeg|png|webp)")


def from_sage(
    folder: str,
    out: str,
    users: str | None = None,
    embeddings: str | None = None,
    samples_per_shard: int = 256,
    overwrite: bool = False,
) -> None:
    """Write shards from one split of Sage.

    Chosen and rejected are kept as published, the labels say which image is unsafe, and the user's id is kept. With
    `users`, the published rule for the winner is checked on every row and the exceptions are counted. With
    `embeddings`, those of the split's users are written to `users.safetensors` next to the shards. A stopped run
    continues when it is started again.

    Args:
        folder: The split's folder: metadata.jsonl and the images.
        out: The folder to write the shards to.
        users: users.csv; the n-th row is user n.
        embeddings: The folder of the users' embeddings, NNNNNNN.npy or user_embedding_NNNNNNN.npy.
        samples_per_shard: How many pairs a shard holds.
        overwrite: Delete what an earlier run left in the folder.
    """
    from pathlib import Path

    from lit_safety.core.hashes import file_sha256
    from lit_safety.data.convert.convert import convert

    table = Path(folder) / "metadata.jsonl"
    pairs = list(_pairs(table))
    asked = {str(pair.metadata.user_id) for pair in pairs if not isinstance(pair.metadata, dict)}
    if users is not None:
        _check_winners(pairs, banned_by_user(users))
    provenance: dict[str, Any] = {
        "converter": "from-sage",
        "table_sha256": file_sha256(table),
        "embeddings": embeddings is not None,
        "samples_per_shard": samples_per_shard,
    }
    held = None if embeddings is None else read_embeddings(Path(embeddings), sorted(asked))
    convert(pairs, out, provenance, samples_per_shard, overwrite, len(pairs))
    if held is not None:  # only now, because `out` could hold another set
        save_embeddings(held, Path(out))


def _pairs(table: Path) -> Iterator[FoundPair]:
    from lit_safety.core.tables import image_path
    from lit_safety.data.convert.convert import FoundPair
    from lit_safety.data.convert.published import JsonLines

    for row in JsonLines(table, ("chosen", "rejected", "caption")).rows():
        try:
            texts = [row.values[name] for name in ("file_name", "chosen", "rejected", "caption")]
            user = row.values["user_data"]["User_ID"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{row.where}: lacks the field {error}") from error
        if not all(isinstance(text, str) for text in (*texts, user)):
            raise UserError(f"{row.where}: file_name, chosen, rejected, caption and User_ID must be texts")
        key, metadata = _parse(texts, user, row.where)
        yield FoundPair(key, metadata, *(image_path(table.parent, texts[n], row.where) for n in (1, 2)))


def _parse(texts: list[str], user: str, where: str) -> tuple[str, Any]:
    """Key and metadata of one row."""
    from lit_safety.data.convert.convert import plain_key
    from lit_safety.data.format.sample import parse_metadata

    named, chosen, rejected = CAPTION_SIDE.fullmatch(texts[0]), IMAGE.fullmatch(texts[1]), IMAGE.fullmatch(texts[2])
    if named is None or chosen is None or rejected is None:
        raise UserError(f"{where}: an image is not named user_ID_CATEGORY_CONCEPT_NUMBER_s.jpg (or _u.jpg)")
    if chosen["stem"] != rejected["stem"] or chosen["side"] == rejected["side"] or chosen["user"] != user:
        raise UserError(f"{where}: {texts[1]} and {texts[2]} are not the two images of one concept of user {user}")
    category, concept = category_and_concept(chosen["about"], where)
    metadata = parse_metadata(
        {
            "prompt": texts[3],
            "prompt_kind": "harmful" if named["side"] == "u" else "clean",
            "order": "composite",
            "categories": [category],
            "concept": concept,
            "harmful": {"chosen": chosen["side"] == "u", "rejected": rejected["side"] == "u"},
            "user_id": user,
            "source": f"Sage {chosen['stem']}",
        },
        where,
    )
    return plain_key(f"{chosen['stem']}_{named['side']}"), metadata


def category_and_concept(text: str, where: str) -> tuple[str, str | None]:
    """Category and concept from a text such as "self_harm_cutting" in the names of Sage's images.

    A category may have several words.

    Raises:
        UserError: it begins with no known category.
    """
    from lit_safety.core.categories import canonical_category

    words = text.split("_")
    for number in range(min(3, len(words)), 0, -1):
        try:
            return canonical_category("_".join(words[:number])), "_".join(words[number:]) or None
        except UserError:
            continue  # fewer words
    raise UserError(f"{where}: {text!r} does not begin with a known category")


def _check_winners(pairs: list[FoundPair], banned: dict[str, frozenset[str]]) -> None:
    """Published rule: the winner is the safe image for a safe caption, and for an unsafe one if the user bans it."""
    exceptions: Counter[str] = Counter()
    for pair in pairs:
        row: Any = pair.metadata
        if row.user_id not in banned:
            raise UserError(f"{row.source}: user {row.user_id} is not in the table of users")
        expected_safe = row.prompt_kind == "clean" or row.categories[0] in banned[row.user_id]
        if row.harmful.chosen == expected_safe:
            exceptions["safe expected" if expected_safe else "unsafe expected"] += 1
    print(f"the published rule for the winner holds for {len(pairs) - exceptions.total()} of {len(pairs)} rows")
    for what, times in sorted(exceptions.items()):
        print(f"  {what}: {times} exceptions, kept as published")


# Sage's users: what each one bans, and their embeddings.
#
# Both are other people's files: arrays are never unpickled.


USERS_FILE = "users.safetensors"
EMBEDDING_NAMES = ("{}.npy", "user_embedding_{}.npy")
"""The names of a user's file in the published code's folder and in the published archive."""
MAX_EMBEDDING_BYTES = 1 << 20


def banned_by_user(table: str) -> dict[str, frozenset[str]]:
    """User id (the row's number, seven digits) -> the categories that the user bans.

    Raises:
        UserError: the table cannot be read, or a list in it is not a list of categories.
    """
    return {user: frozenset(profile.banned) for user, profile in read_profiles(table).items()}


def read_embeddings(folder: Path, users: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """The users' embeddings, a float32 vector (D,) by user id; files hold (D,) or (1, D).

    Raises:
        UserError: an embedding is missing or exists twice, is not a finite vector, or has another length than the
            others.
    """
    if not folder.is_dir():
        raise UserError(f"--embeddings {folder}: is not a folder; give the one with 0000001.npy and so on")
    found: dict[str, NDArray[np.float32]] = {}
    for user in users:
        path = _embedding_file(folder, user)
        found[user] = _vector(path)
        if len(found[user]) != len(found[users[0]]):
            raise UserError(f"{path}: has {len(found[user])} numbers, the first user's {len(found[users[0]])}")
    return found


def save_embeddings(found: dict[str, NDArray[np.float32]], out: Path) -> Path:
    """Write them to `out/users.safetensors`."""
    from safetensors.numpy import save

    return write_atomic(out / USERS_FILE, save(found))


def _embedding_file(folder: Path, user: str) -> Path:
    paths = [folder / name.format(user) for name in EMBEDDING_NAMES]
    there = [path for path in paths if path.exists()]
    if not there:
        raise UserError(
            f"{paths[1]}: is missing, and so is {paths[0].name}; every user of the split needs an embedding"
        )
    if len(there) > 1:
        raise UserError(f"{paths[0]} and {paths[1].name} are both there for user {user}; keep one of the two")
    return there[0]


def _vector(path: Path) -> NDArray[np.float32]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_EMBEDDING_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_EMBEDDING_BYTES:
        raise UserError(f"{path}: is over the limit of {MAX_EMBEDDING_BYTES} bytes; no embedding is that large")
    try:
        array = _plain_array(data)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}: is not a plain array ({' '.join(str(error).split())})") from error
    found = f"{array.dtype} of shape {array.shape}"
    if array.ndim == 2 and len(array) == 1:  # a batch of one, as the published code stores some
        array = array[0]
    if array.ndim != 1 or not array.size or array.dtype.kind != "f":
        raise UserError(f"{path}: is not a vector of finite numbers, (D,) or (1, D), but {found}")
    with np.errstate(over="ignore"):  # numbers that are too large for float32 become infinite
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: is not a vector of finite numbers: it holds NaN or infinity")
    return array


def _plain_array(data: bytes) -> NDArray[Any]:
    """The array in the bytes of an `.npy` file. Its size is checked before memory is allocated.

    Raises:
        ValueError: it is not such a file, holds pickled objects, or its header states a wrong size.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file, max_header_size=10_000)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which this program never reads")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"its header states {shape} of {dtype}, but its contents differ")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)
