from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.convert.convert import plain_key
from lit_safety.data.convert.folder import from_folder
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import PairMetadata, Sides, parse_metadata
from lit_safety.data.format.tar_index import OpenShard


def drawn(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A table and the images it names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(folder / f"{number}.png")
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "pairs.csv"


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"prompt {number}", "chosen": f"{number}.png", "rejected": f"{number + 1}.png", **more}


def stored(folder: Path) -> dict[str, PairMetadata]:
    found = {}
    for one in load_manifest(folder).shardlist:
        shard = OpenShard(str(folder / one.url))
        for number in range(one.nsamples):
            key, members = shard.read(number)
            found[key] = parse_metadata(members["json"], key)
        shard.close()
    return found


def test_a_table_becomes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {
        "key": "first one",
        "prompt_kind": "clean",
        "order": "quality",
        "categories": "Harrasment; violence",
        "chosen_harmful": "False",
        "rejected_harmful": "1",
        "chosen_cost": "-1",
        "rejected_cost": "2.5",
        "user_id": "7",
        "seed": "3",
    }
    table = drawn(tmp_path / "in", [row(0, **full), row(1, prompt='Bär, "x"\nzwei')])
    from_folder(str(table), str(tmp_path / "out"), prompt_kind="harmful")
    assert stored(tmp_path / "out") == {
        plain_key("first one"): PairMetadata(
            "prompt 0",
            "clean",
            "quality",
            ("harassment", "violence"),
            Sides(False, True),
            None,
            Sides(-1.0, 2.5),
            None,
            "7",
            None,
            3,
        ),
        "00000001": PairMetadata('Bär, "x"\nzwei', "harmful"),
    }
    assert "2 pairs in 1 shards" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        ([row(0)], {}, "row 2: lacks prompt_kind"),
        ([{"prompt": "x", "chosen": "0.png"}], {}, "has no column 'rejected'; its columns are chosen, prompt"),
        ([row(0, colour="red")], {}, "has an unknown column 'colour'"),
        ([row(0, chosen_harmful="maybe")], {"prompt_kind": "clean"}, "row 2: chosen_harmful is 'maybe'"),
        ([row(0, seed="x")], {"prompt_kind": "clean"}, "row 2: seed is 'x', not a whole number"),
        ([row(0), row(1, prompt="")], {"prompt_kind": "clean"}, "row 3: 'prompt' must be a non-empty text"),
        ([row(0, categories="fun")], {"prompt_kind": "clean"}, "row 2: 'categories' must hold categories"),
        ([row(0, chosen="../secret.png")], {"prompt_kind": "clean"}, "'../secret.png' is not a file within"),
        ([row(0, chosen="/etc/passwd")], {"prompt_kind": "clean"}, "'/etc/passwd' is not a file within"),
        ([row(0, chosen="a\0.png")], {"prompt_kind": "clean"}, "is not a file within"),
        ([], {}, "has no column 'prompt'"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named_and_nothing_is_written(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], complaint: str
) -> None:
    table = drawn(tmp_path / "in", rows)
    with pytest.raises(UserError) as caught:
        from_folder(str(table), str(tmp_path / "out"), **options)
    assert re.search(complaint, str(caught.value))
    assert not (tmp_path / "out").exists()


def test_images_may_be_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    table = drawn(tmp_path / "in", [row(0)])
    (tmp_path / "in" / "0.png").rename(tmp_path / "blob")
    (tmp_path / "in" / "0.png").symlink_to(tmp_path / "blob")
    from_folder(str(table), str(tmp_path / "out"), prompt_kind="clean")
    assert len(stored(tmp_path / "out")) == 1


def test_keys_become_plain_and_stay_apart() -> None:
    texts = ["a b", "a-b", "a_b", "a.b", "__a", "x" * 300, "x" * 299, "熊", "é"]
    keys = [plain_key(text) for text in texts]
    assert len(set(keys)) == len(texts)
    assert keys[1:3] == ["a-b", "a_b"]
    assert all(re.fullmatch(r"(?!__)[A-Za-z0-9_-]{1,200}", key) for key in keys)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(b"prompt,chosen,rejected\na,b\n", "row 2 does not have the header's 3 fields"),
     (b"prompt,chosen,rejected\na,b,c,d\n", "row 2 does not have the header's 3 fields"),
     (b"prompt,chosen,rejected\n\xff,b,c\n", "is not UTF-8"),
     (b'prompt,chosen,rejected\n"a,b,c\n', "is not a CSV file")],
)  # fmt: skip
def test_a_broken_table_is_one_line(tmp_path: Path, text: bytes, complaint: str) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(UserError, match=complaint):
        from_folder(str(tmp_path / "t.csv"), str(tmp_path / "out"))


def test_images_that_cannot_be_read_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = drawn(tmp_path, [row(0), row(1, chosen="none.png"), row(2, chosen="pairs.csv"), row(4)])
    from_folder(str(table), str(tmp_path / "out"), prompt_kind="clean")
    assert set(stored(tmp_path / "out")) == {"00000000", "00000003"}
    text = capsys.readouterr().out
    assert "left out 00000001" in text
    assert "left out: 1 without an image file" in text
    assert "left out: 1 with an image that cannot be read" in text


KILLED_AFTER_5 = """
import os, signal, sys
from lit_safety.data.convert import convert, folder
reads, read = [0], convert._read
def counted(path):
    reads[0] += 1
    if reads[0] > 10:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(path)
convert._read = counted
folder.from_folder(sys.argv[1], sys.argv[2], prompt_kind="clean", samples_per_shard=2)
"""


def test_a_killed_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = drawn(tmp_path / "in", [row(number) for number in range(7)])
    from_folder(str(table), str(tmp_path / "whole"), prompt_kind="clean", samples_per_shard=2)
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED_AFTER_5, str(table), str(out)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (out / "manifest.json").exists()
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(UserError, match="other settings"):
        from_folder(str(table), str(out), prompt_kind="harmful", samples_per_shard=2)
    capsys.readouterr()
    from_folder(str(table), str(out), prompt_kind="clean", samples_per_shard=2)
    assert "continuing after 4 pairs" in capsys.readouterr().out
    assert load_manifest(out) == load_manifest(tmp_path / "whole")
    assert sorted(os.listdir(out)) == sorted(os.listdir(tmp_path / "whole"))
    from_folder(str(table), str(out), prompt_kind="clean", samples_per_shard=2)
    assert "is already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds other shards"):
        from_folder(str(table), str(out), prompt_kind="harmful", samples_per_shard=2)


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = drawn(tmp_path / "in", [row(0), row(3)])
    (tmp_path / "in" / "1.png").unlink()
    os.mkfifo(tmp_path / "in" / "1.png")
    from_folder(str(table), str(tmp_path / "out"), prompt_kind="clean")
    assert "1.png: is not a file" in (said := capsys.readouterr().out)
    assert "left out: 1 with an image that cannot be read" in said


@pytest.mark.parametrize("name", ["chosen_cost", "rejected_cost", "chosen_score", "rejected_score"])
@pytest.mark.parametrize("other", ["absent", "empty"])
def test_half_a_cost_or_a_score_is_named(tmp_path: Path, name: str, other: str) -> None:
    side, value = name.split("_")
    missing = f"{'rejected' if side == 'chosen' else 'chosen'}_{value}"
    table = drawn(tmp_path / "in", [row(0), row(1, **{name: "1.5"}, **({missing: " "} if other == "empty" else {}))])
    with pytest.raises(UserError, match=f"row 3: .*{name}.*{missing}"):
        from_folder(str(table), str(tmp_path / "out"), prompt_kind="clean")


def test_half_a_label_is_kept_for_each_side_has_its_own(tmp_path: Path) -> None:
    table = drawn(tmp_path / "in", [row(0, chosen_harmful="0"), row(1, rejected_harmful="TRUE")])
    from_folder(str(table), str(tmp_path / "out"), prompt_kind="harmful")
    assert [one.harmful for one in stored(tmp_path / "out").values()] == [Sides(False, None), Sides(None, True)]


@pytest.mark.parametrize(
    ("column", "text"),
    [
        *(("seed", text) for text in ("41.5", "4.1E+10", "1_000", "nan", "forty")),
        *(("chosen_cost", text) for text in ("nan", "inf", "1,5", "1_0", "high")),
        *(("rejected_harmful", text) for text in ("maybe", "2", "-1", "safe")),
    ],
)
def test_a_cell_that_says_nothing_is_named_by_its_row(tmp_path: Path, column: str, text: str) -> None:
    cells = {"chosen_cost": "1", "rejected_cost": "2"} | {column: text}
    table = drawn(tmp_path / "in", [row(0, **cells)])
    with pytest.raises(UserError, match="row 2: .*" + column.rpartition("_")[2]):
        from_folder(str(table), str(tmp_path / "out"), prompt_kind="clean")


def test_cells_as_spreadsheets_and_pandas_write_them(tmp_path: Path) -> None:
    """A column of whole numbers or labels of which one is missing becomes one of floats."""
    cells = {
        "seed": "41.0",
        "chosen_harmful": "0.0",
        "rejected_harmful": "1.0",
        "chosen_cost": "-1",
        "rejected_cost": "2",
    }
    spelt = {"chosen_harmful": "No", "rejected_harmful": "YES", "seed": " 7 "}
    unknown = {"chosen_harmful": "NaN", "rejected_harmful": "None", "seed": ""}
    table = drawn(tmp_path / "in", [row(0, **cells), row(1, **spelt), row(2, **unknown)])
    from_folder(str(table), str(tmp_path / "out"), prompt_kind="harmful")
    first, second, third = stored(tmp_path / "out").values()
    assert (first.seed, first.harmful, first.cost) == (41, Sides(False, True), Sides(-1.0, 2.0))
    assert (second.seed, second.harmful, second.cost) == (7, Sides(False, True), None)
    assert (third.seed, third.harmful) == (None, Sides(None, None))


def test_one_image_twice_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file, and the same pixels in another file."""
    table = drawn(tmp_path / "in", [row(0), row(1, rejected="1.png"), row(2, rejected="copy.webp")])
    Image.open(tmp_path / "in" / "2.png").save(tmp_path / "in" / "copy.webp", lossless=True)
    from_folder(str(table), str(tmp_path / "out"), prompt_kind="clean")
    assert set(stored(tmp_path / "out")) == {"00000000"}
    said = capsys.readouterr().out
    assert "left out: 2 whose images are the same" in said
    assert "left out 00000001" in said
    assert "left out 00000002" in said


def test_a_table_in_another_encoding_is_named(tmp_path: Path) -> None:
    table = drawn(tmp_path / "in", [row(0, prompt="Bär")])
    text = table.read_text(encoding="utf-8")
    from_folder(str(table), str(tmp_path / "plain"), prompt_kind="clean")
    table.write_bytes(text.encode("utf-8-sig"))
    from_folder(str(table), str(tmp_path / "marked"), prompt_kind="clean")
    assert stored(tmp_path / "marked") == stored(tmp_path / "plain")
    for encoding in ("utf-16", "utf-16-le", "cp1252"):
        table.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match=r"pairs\.csv: .*iconv"):
            from_folder(str(table), str(tmp_path / "out"), prompt_kind="clean")


def prompts_in(folder: Path) -> set[str]:
    return {one.prompt for one in stored(folder).values()}


def many(count: int) -> list[dict[str, Any]]:
    """Prompts that stand in two pairs each, once in other letters, of which a third is clean."""
    rows = [row(n % 7, prompt=f"Prompt {n // 2}" if n % 2 else f"prompt  {n // 2} ") for n in range(2 * count)]
    return [one | {"prompt_kind": "clean" if (n // 2) % 3 == 0 else "harmful"} for n, one in enumerate(rows)]


def test_val_share_holds_out_prompts_and_none_stands_on_both_sides(tmp_path: Path) -> None:
    rows = many(30)
    table = drawn(tmp_path / "in", rows)
    from_folder(str(table), str(tmp_path / "out"), val_share=0.2)
    sides = [
        {" ".join(text.casefold().split()) for text in prompts_in(tmp_path / "out" / name)} for name in ("train", "val")
    ]
    assert len(sides[0] | sides[1]) == 30
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2 + 4  # of 10 clean and 20 harmful ones
    kinds = {one.prompt_kind for one in stored(tmp_path / "out" / "val").values()}
    assert kinds == {"clean", "harmful"}
    # the same prompts in any order of rows, and beside prompts that are new
    again = drawn(tmp_path / "again", rows[::-1])
    from_folder(str(again), str(tmp_path / "other"), val_share=0.2)
    assert prompts_in(tmp_path / "other" / "val") == prompts_in(tmp_path / "out" / "val")
    before = (tmp_path / "out" / "val" / "manifest.json").read_bytes()
    from_folder(str(table), str(tmp_path / "out"), val_share=0.2)
    assert (tmp_path / "out" / "val" / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="already holds other shards"):
        from_folder(str(table), str(tmp_path / "out"), val_share=0.3)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_both_sides_of_a_small_table_hold_a_prompt(tmp_path: Path, share: float) -> None:
    table = drawn(tmp_path / "in", [row(n, prompt_kind="clean") for n in range(3)])
    from_folder(str(table), str(tmp_path / "out"), val_share=share)
    assert len(prompts_in(tmp_path / "out" / "train")) == (2 if share < 0.5 else 1)
    assert len(prompts_in(tmp_path / "out" / "val")) == (1 if share < 0.5 else 2)


@pytest.mark.parametrize(
    ("rows", "share", "says"),
    [
        (many(3), 0.0, "--val_share 0.0"), (many(3), 1.0, "--val_share 1.0"), (many(3), -0.5, "--val_share -0.5"),
        (many(3), float("nan"), "--val_share nan"), (many(1), 0.5, "one prompt"),
    ],
)  # fmt: skip
def test_a_share_that_cannot_be_is_named(tmp_path: Path, rows: list[dict[str, Any]], share: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        from_folder(str(drawn(tmp_path / "in", rows)), str(tmp_path / "out"), val_share=share)
    assert not (tmp_path / "out").exists()


def test_val_share_does_not_write_into_a_folder_of_shards(tmp_path: Path) -> None:
    table = drawn(tmp_path / "in", many(3))
    from_folder(str(table), str(tmp_path / "out"))
    with pytest.raises(UserError, match="already holds shards"):
        from_folder(str(table), str(tmp_path / "out"), val_share=0.5)


def test_all_complaints_about_a_table_are_said_at_once(tmp_path: Path) -> None:
    rows = [row(0, seed="x"), row(1), row(2, categories="fun"), row(3, chosen_harmful="maybe")]
    with pytest.raises(UserError) as error:
        from_folder(str(drawn(tmp_path / "in", rows)), str(tmp_path / "out"), prompt_kind="clean")
    for part in ("3 errors", "row 2: seed", "row 4", "row 5: chosen_harmful"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
