"""`lit_safety shards from-sage`: Sage as its authors publish it, a metadata.jsonl beside images, and who the users are.

Source: Personalized Safety Alignment (arXiv 2508.01151). Every concept has a safe and an unsafe image and a caption for
each; which image is chosen depends on what the user bans, so a chosen image may be the unsafe one.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from lit_safety.errors import UserError

if TYPE_CHECKING:  # the command line asks for this module's signature and must not wait for torch
    from collections.abc import Iterator
    from pathlib import Path

    from lit_safety.data.converters.run import FoundPair

IMAGE = re.compile(r"(?P<stem>user_(?P<user>\d{1,12})_(?P<about>[^/\\]+)_\d+)_(?P<side>[su])\.(jpg|jpeg|png|webp)")
# "user_..._00001.jpg_u.jpg": malformed as published, but its end says whose caption the row carries.
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

    Chosen and rejected are kept as published, the labels say which image is unsafe, and the user's id goes along. With
    `users`, the published rule for the winner is checked on every row and the exceptions are counted. With
    `embeddings`, those of the split's users are written to `users.safetensors` beside the shards. A run that was
    stopped goes on when it is started again.

    Args:
        folder: The split's folder: metadata.jsonl and the images.
        out: The folder to write the shards to.
        users: users.csv; the n-th row is user n.
        embeddings: The folder of user_embedding_NNNNNNN.npy.
        samples_per_shard: How many pairs a shard holds.
        overwrite: Throw away what an earlier run left in the folder.
    """
    from pathlib import Path

    from lit_safety.data.converters.run import convert
    from lit_safety.data.converters.sage_users import banned_by_user, read_embeddings, save_embeddings
    from lit_safety.data.manifest import file_sha256

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
    if held is not None:  # not before: `out` may turn out to hold another set
        save_embeddings(held, Path(out))


def _pairs(table: Path) -> Iterator[FoundPair]:
    from lit_safety.data.converters.published import JsonLines
    from lit_safety.data.converters.run import FoundPair
    from lit_safety.data.converters.table import image_path

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
    from lit_safety.data.converters.run import plain_key
    from lit_safety.data.sample import parse_metadata

    named, chosen, rejected = CAPTION_SIDE.fullmatch(texts[0]), IMAGE.fullmatch(texts[1]), IMAGE.fullmatch(texts[2])
    if named is None or chosen is None or rejected is None:
        raise UserError(f"{where}: an image is not named user_ID_CATEGORY_CONCEPT_NUMBER_s.jpg (or _u.jpg)")
    if chosen["stem"] != rejected["stem"] or chosen["side"] == rejected["side"] or chosen["user"] != user:
        raise UserError(f"{where}: {texts[1]} and {texts[2]} are not the two images of one concept of user {user}")
    category, concept = _about(chosen["about"], where)
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


def _about(text: str, where: str) -> tuple[str, str | None]:
    """Category and concept from "self_harm_cutting": the category may be of several words."""
    from lit_safety.data.categories import canonical_category

    words = text.split("_")
    for number in range(min(3, len(words)), 0, -1):
        try:
            return canonical_category("_".join(words[:number])), "_".join(words[number:]) or None
        except UserError:
            continue  # fewer words
    raise UserError(f"{where}: no category is known by which {text!r} begins")


def _check_winners(pairs: list[FoundPair], banned: dict[str, frozenset[str]]) -> None:
    """Published rule: a safe caption's winner is the safe image; an unsafe one's too if the user bans the category."""
    exceptions: Counter[str] = Counter()
    for pair in pairs:
        row: Any = pair.metadata
        if row.user_id not in banned:
            raise UserError(f"{row.source}: user {row.user_id} does not stand in the table of users")
        expected_safe = row.prompt_kind == "clean" or row.categories[0] in banned[row.user_id]
        if row.harmful.chosen == expected_safe:
            exceptions["safe expected" if expected_safe else "unsafe expected"] += 1
    print(f"the published rule for the winner holds for {len(pairs) - exceptions.total()} of {len(pairs)} rows")
    for what, times in sorted(exceptions.items()):
        print(f"  {what}: {times} exceptions, kept as published")
