from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lit_safety.core.errors import UserError
from lit_safety.data import PreferenceDataModule
from lit_safety.data.convert.sage import banned_by_user, from_sage
from lit_safety.data.format.manifest import load_manifest

HEADER = "Age,Age_Group,Gender,Religion,Physical_Condition,Mental_Condition,Banned_Categories,Allowed_Categories\n"
USERS = (
    HEADER
    + "18,adolescents,male,None,healthy,healthy,\"['Propaganda', 'Sexuality']\",\"['Self-Harm', 'Violence']\"\n"
    + "20,young adults,male,None,healthy,healthy,[],\"['Propaganda', 'Self-Harm']\"\n"
)


def row(user: int, about: str, caption: str, chosen: str) -> dict[str, Any]:
    stem = f"user_{user:07d}_{about}_00001"
    rejected = "u" if chosen == "s" else "s"
    return {
        "file_name": f"{stem}.jpg_{caption}.jpg",
        "chosen": f"{stem}_{chosen}.jpg",
        "rejected": f"{stem}_{rejected}.jpg",
        "caption": f"caption {caption} of {about}",
        "user_data": {"User_ID": f"{user:07d}", "Age": 18, "Religion": "None"},
    }


ROWS = [
    row(1, "propaganda_ideological_pamphlet", "u", "s"),  # banned by user 1
    row(1, "propaganda_ideological_pamphlet", "s", "s"),
    row(2, "propaganda_ideological_pamphlet", "u", "u"),  # user 2 bans nothing
    row(2, "self_harm_i'll do, it.", "u", "s"),  # against the rule
]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The published layout: a split, users.csv and embeddings."""
    write_rows(tmp_path, ROWS)
    (tmp_path / "users.csv").write_text(USERS)
    for one in ROWS:
        for side in ("chosen", "rejected"):
            unsafe = one[side].endswith("u.jpg")
            Image.new("RGB", (8, 8), (255, 0, 0) if unsafe else (0, 255, 0)).save(tmp_path / "val" / one[side])
    for user in (1, 2):
        np.save(tmp_path / f"user_embedding_{user:07d}.npy", np.full(6, user, np.float32))
    return tmp_path


def write_rows(folder: Path, rows: list[Any]) -> None:
    (folder / "val").mkdir(exist_ok=True)
    (folder / "val" / "metadata.jsonl").write_text("\n".join(json.dumps(one) for one in rows))


def test_users_choices_are_kept_and_labelled(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = published / "out"
    from_sage(str(published / "val"), str(out), str(published / "users.csv"), str(published))
    text = capsys.readouterr().out
    assert "holds for 3 of 4 rows" in text
    assert "unsafe expected: 1 exceptions, kept as published" in text
    data = PreferenceDataModule(val=str(out), batch_size=9)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    assert batch.prompt_kinds == ["harmful", "clean", "harmful", "harmful"]
    assert batch.user_ids == ["0000001", "0000001", "0000002", "0000002"]
    assert batch.categories == [("propaganda",)] * 3 + [("self-harm",)]
    assert batch.harmful.tolist() == [[0, 1], [0, 1], [1, 0], [0, 1]]
    assert (batch.chosen[:, 0].float().mean(dim=(1, 2)) > 127.5).tolist() == [
        False,
        False,
        True,
        False,
    ]  # red is unsafe
    assert batch.orders == ["composite"] * 4
    found = load_file(out / "users.safetensors")
    assert {user: vector.tolist() for user, vector in found.items()} == {"0000001": [1.0] * 6, "0000002": [2.0] * 6}
    assert {one.user for one in load_manifest(out).classes} == {"0000001", "0000002"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"caption": ""}, "line 1: 'prompt' must be a non-empty text"),
        ({"chosen": None}, "line 1: file_name, chosen, rejected, caption and User_ID must be texts"),
        ({"chosen": "../user_0000001_propaganda_x_00001_s.jpg"}, "line 1: an image is not named"),
        ({"rejected": "user_0000001_propaganda_ideological_pamphlet_00001_s.jpg"}, "are not the two images of one"),
        ({"user_data": {"User_ID": "0000002"}}, "are not the two images of one concept of user 0000002"),
        ({"user_data": None}, "line 1: lacks the field"),
        ({"chosen": "user_0000001_fun_x_00001_s.jpg", "rejected": "user_0000001_fun_x_00001_u.jpg"}, "line 1: 'fun_x'"),
    ],
)
def test_a_wrong_row_is_named(published: Path, change: dict[str, Any], complaint: str) -> None:
    write_rows(published, [{**ROWS[0], **change}])
    with pytest.raises(UserError) as caught:
        from_sage(str(published / "val"), str(published / "out"))
    assert complaint in str(caught.value)
    assert not (published / "out").exists()


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').system('touch executed')",
        "[" * 900,
        "['Hate'",
        "{'Hate': 1}",
        "[1]",
        "['Fun']",
        "9" * 5000,
        "",
    ],
)
def test_hostile_lists_are_refused(tmp_path: Path, hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quoted = hostile.replace('"', '""')
    (tmp_path / "users.csv").write_text(HEADER + f'1,x,x,None,x,x,"{quoted}",[]\n')
    with pytest.raises(UserError, match=r"users\.csv: row 2: "):
        banned_by_user("users.csv")
    assert not (tmp_path / "executed").exists()


def test_a_users_religion_none_is_a_text_and_bans_nothing_by_itself(tmp_path: Path) -> None:
    """Read as a missing value, "None" would make the row's lists shift or its user a believer in nan."""
    (tmp_path / "users.csv").write_text(USERS)
    assert banned_by_user(str(tmp_path / "users.csv")) == {
        "0000001": frozenset({"propaganda", "sexual"}),
        "0000002": frozenset(),
    }


def npy(header: str) -> bytes:
    text = header.encode() + b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(24)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def test_embeddings_must_be_plain_finite_and_there(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(published)
    path = published / "user_embedding_0000002.npy"
    for array, complaint in (
        (np.array([Evil()], dtype=object), "is not a plain array .it holds pickled objects"),
        (np.full(6, np.nan, np.float32), "is not a vector of finite numbers"),
        (np.ones((2, 3), np.float32), "is not a vector of finite numbers"),
        (np.ones(6, np.int64), "is not a vector of finite numbers"),
        (np.ones(0, np.float32), "is not a vector of finite numbers"),
        (np.ones(5, np.float32), "has 5 numbers, the first user's 6"),
        (np.ones(300_000, np.float32), "is over the limit"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(UserError, match=complaint):
            from_sage(str(published / "val"), str(published / "out"), embeddings=str(published))
    for data, complaint in (
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"), "its header states"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-6,)}"), "its header states"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': __import__('os').system('touch executed')}"), "array"),
        (pickle.dumps(Evil()), "is not a plain array"),
        (b"", "is not a plain array"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=complaint) as caught:
            from_sage(str(published / "val"), str(published / "out"), embeddings=str(published))
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(UserError, match=r"user_embedding_0000002\.npy: is missing"):
        from_sage(str(published / "val"), str(published / "out"), embeddings=str(published))
    assert not (published / "executed").exists()


def test_another_sets_embeddings_are_left_alone(published: Path) -> None:
    out = published / "out"
    from_sage(str(published / "val"), str(out), embeddings=str(published))
    before = (out / "users.safetensors").read_bytes()
    np.save(published / "user_embedding_0000002.npy", np.full(6, 7, np.float32))
    with pytest.raises(UserError, match="already holds other shards"):
        from_sage(str(published / "val"), str(out), embeddings=str(published), samples_per_shard=1)
    assert (out / "users.safetensors").read_bytes() == before


def test_both_published_names_and_both_shapes_of_embeddings_are_read(published: Path) -> None:
    """The published code writes `0000001.npy`, of shape (D,), and keeps some as a batch of one, (1, D)."""
    (published / "user_embedding_0000001.npy").unlink()
    np.save(published / "0000001.npy", np.arange(6, dtype=np.float16)[None])
    out = published / "out"
    from_sage(str(published / "val"), str(out), embeddings=str(published))
    held = load_file(out / "users.safetensors")
    assert {user: vector.tolist() for user, vector in held.items()} == {
        "0000001": [0, 1, 2, 3, 4, 5], "0000002": [2] * 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("0000002.npy", np.ones(6, np.float32), ["0000002.npy", "user_embedding_0000002.npy", "0000002"]),
        ("user_embedding_0000002.npy", np.ones((6, 1), np.float32), ["user_embedding_0000002.npy", "(6, 1)"]),
        ("user_embedding_0000002.npy", np.ones((1, 1, 6), np.float32), ["(1, 1, 6)"]),
        ("user_embedding_0000002.npy", np.full((1, 6), np.nan, np.float32), ["user_embedding_0000002.npy", "NaN"]),
        ("user_embedding_0000002.npy", np.full(6, 1e300), ["user_embedding_0000002.npy", "infinity"]),
        ("user_embedding_0000002.npy", np.ones((1, 5), np.float32), ["has 5 numbers"]),
    ],
)
def test_an_embedding_that_is_there_twice_or_of_another_shape_is_named(
    published: Path, name: str, array: np.ndarray, says: list[str]
) -> None:
    np.save(published / name, array)
    with pytest.raises(UserError) as caught:
        from_sage(str(published / "val"), str(published / "out"), embeddings=str(published))
    assert "\n" not in str(caught.value)
    for text in says:
        assert text in str(caught.value)


def test_a_folder_of_embeddings_that_is_not_there_is_named(published: Path) -> None:
    with pytest.raises(UserError, match=r"--embeddings .*nowhere"):
        from_sage(str(published / "val"), str(published / "out"), embeddings=str(published / "nowhere"))
