from collections import Counter
from functools import partial
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from lit_safety.core.errors import UserError
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.source import Source
from lit_safety.merging.calibration import calibration_prompts, check_prompts, has_categories


def rows(*lines: str) -> str:
    return "\n".join(("prompt,category", *lines)) + "\n"


def test_categories_take_turns_and_clean_prompts_are_left_out(tmp_path: Path):
    many = (
        [f"gun {i},violence" for i in range(50)] + [f"slur {i},Hate" for i in range(3)] + ["a cat,", "gun 1,violence"]
    )
    file = tmp_path / "p.csv"
    file.write_text(rows(*many))
    chosen = calibration_prompts(str(file), 10)
    assert Counter(prompt.split()[0] for prompt in chosen) == {"gun": 7, "slur": 3}
    assert len(set(chosen)) == 10
    assert calibration_prompts(str(file), 4) == chosen[:4]
    file.write_text(rows(*reversed(many)))
    assert calibration_prompts(str(file), 10) == chosen
    assert len(calibration_prompts(str(file), 100, ["Violence"])) == 50


def test_a_file_without_categories_gives_every_prompt(tmp_path: Path):
    (tmp_path / "p.csv").write_text("prompt\na cat\na gun\n")
    assert sorted(calibration_prompts(str(tmp_path / "p.csv"), 5)) == ["a cat", "a gun"]
    assert not has_categories(str(tmp_path / "p.csv"))
    with pytest.raises(UserError, match=r"--calibration\.categories: .*p\.csv has no column `category`"):
        calibration_prompts(str(tmp_path / "p.csv"), 5, ["hate"])


def test_a_prompt_of_several_categories_counts_for_each_of_them(tmp_path: Path):
    both = "gun slur"
    (tmp_path / "p.csv").write_text(rows(f'{both},"Hate, violence"', "gun,violence"))
    metadata = {"prompt": both, "prompt_kind": "harmful", "categories": ["hate", "violence"], "order": "safety",
                "harmful": {"chosen": False, "rejected": True}}  # fmt: skip
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("0", metadata, Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8)))
    for source in (str(tmp_path / "p.csv"), str(tmp_path / "shards")):
        assert calibration_prompts(source, 5, ["hate"]) == [both]
        assert both in calibration_prompts(source, 5, ["violence"])
        found = calibration_prompts(source, 5)
        assert len(found) == len(set(found))


def test_shards_give_their_harmful_prompts(pair_shards: Path):
    assert calibration_prompts(str(pair_shards), 5) == ["a gun and a house"]


def test_bad_sources_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read"):
        calibration_prompts(str(tmp_path / "none.csv"), 5)
    (tmp_path / "p.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match="no column `prompt`"):
        calibration_prompts(str(tmp_path / "p.csv"), 5)
    (tmp_path / "p.csv").write_text(rows("a cat,"))
    for find in (partial(calibration_prompts, count=5), check_prompts):
        with pytest.raises(UserError, match="no harmful prompt"):
            find(str(tmp_path / "p.csv"))
    (tmp_path / "p.csv").write_text(rows("a gun,violence", "a cat,benign"))
    with pytest.raises(UserError, match=r"p\.csv, line 3: unknown category 'benign'"):
        calibration_prompts(str(tmp_path / "p.csv"), 5)


def test_a_check_of_shards_reads_their_manifest_only(pair_shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Source, "open_shard", lambda *_: pytest.fail("a shard was opened"))
    check_prompts(str(pair_shards), ["violence"])
    with pytest.raises(UserError, match="holds no harmful prompt of hate"):
        check_prompts(str(pair_shards), ["hate"])


def test_shards_elsewhere_are_fetched(pair_shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("LIT_SAFETY_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for file in pair_shards.iterdir():
        store.pipe(f"/calibration/{file.name}", file.read_bytes())
    check_prompts("memory://calibration")
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert calibration_prompts("memory://calibration", 5) == ["a gun and a house"]
    assert list((tmp_path / "cache").rglob("*.tar"))


def test_a_sample_that_cannot_be_read_gives_no_prompt(tmp_path: Path):
    """And is told: a fit with `on_bad_sample: skip` must not fail at its end because of it."""
    metadata = {"prompt": "a gun", "prompt_kind": "harmful", "categories": ["violence"], "order": "safety",
                "harmful": {"chosen": False, "rejected": True}}  # fmt: skip
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(2):
            writer.write(f"{number}", metadata | {"prompt": f"a gun {number}"}, Image.new("RGB", (8, 8)),
                         Image.new("RGB", (8, 8)))  # fmt: skip
    (shard,) = (tmp_path / "shards").glob("*.tar")
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b'"a gun 1"', b"'a gun 1'"))
    with pytest.warns(UserWarning, match="1 samples cannot be read"):
        assert calibration_prompts(str(tmp_path / "shards"), 5) == ["a gun 0"]
