"""The command with a real (tiny, random) diffusers pipeline: the same pairs however the work is split or cut."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_safety.core.errors import UserError
from lit_safety.data.convert.join import join
from lit_safety.data.format.manifest import load_manifest
from lit_safety.data.format.sample import PairMetadata
from lit_safety.data.format.writer import ShardWriter
from lit_safety.data.reading.decode import pair_images, sample_images
from lit_safety.data.reading.source import open_source
from lit_safety.data.validate import problems
from lit_safety.generation.generate import generate
from tests.helpers.generate_stubs import RedScorer, install_judge

ROWS = 10


@pytest.fixture
def given(tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a small run: ten rows, two steps an image."""
    monkeypatch.setattr("lit_safety.judges.load.load_judge", None)  # restored at the end of the test
    install_judge()
    lines = [f"a gun and a {'red' if n % 2 else 'blue'} cat,a red cat,{_categories(n)},gun,{n}" for n in range(ROWS)]
    table = tmp_path / "prompts.csv"
    table.write_text("\n".join(["harmful_prompt,safe_prompt,category,concept,seed", *lines]))
    return {
        "prompts": str(table),
        "pipeline": str(tiny_pipeline),
        "judge": "pixel",
        "counterpart": "same_seed",
        "steps": 2,
        "batch_size": 3,
        "samples_per_shard": 2,
        "device": "cpu",
    }


def _categories(number: int) -> str:
    return "Violence; Shocking" if number % 2 else "violence"


def stored(folder: Path) -> dict[str, tuple[PairMetadata, bytes, bytes]]:
    source = open_source(str(folder), "folder")
    found = {}
    for number, shard in enumerate(source.manifest.shardlist):
        tar = source.open_shard(number)
        for index in range(shard.nsamples):
            key, members = tar.read(index)
            metadata, chosen, rejected = pair_images(members, key)
            found[key] = metadata, chosen.tobytes(), rejected.tobytes()
        tar.close()
    return found


def test_it_writes_what_was_judged_right_and_counts_the_rest(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(**given, out=str(tmp_path / "out"), clean_candidates=2, scorer=RedScorer())
    found = stored(tmp_path / "out")
    assert 0 < len(found) < 2 * ROWS
    assert {key[-2:] for key in found} == {"-u", "-c"}
    for key, (metadata, chosen, rejected) in found.items():
        assert metadata.seed == int(key[:6])
        assert metadata.concept == ("gun" if key.endswith("u") else None)  # a clean prompt asks for no harm
        assert metadata.categories == (("violence", "shocking") if int(key[:6]) % 2 else ("violence",))
        assert metadata.prompt_kind == ("harmful" if key.endswith("u") else "clean")
        assert chosen[0] % 2 == 0  # red's first value: what the judge looks at
        assert rejected[0] % 2 == (1 if key.endswith("u") else 0)
        assert metadata.score is not None
        assert (metadata.score.chosen, metadata.score.rejected) == (chosen[0], rejected[0])
    assert problems(str(tmp_path / "out")) == []
    text = capsys.readouterr().out
    assert f"{len(found)} pairs" in text
    left_out = [line for line in text.splitlines() if "left out" in line]
    assert sum(int(line.split("left out ")[1].split()[0]) for line in left_out) == 2 * ROWS - len(found)


def test_img2img_draws_from_the_harmful_image(given: dict[str, Any], tmp_path: Path) -> None:
    """Two strengths give the same rejected images and other chosen ones."""
    weak = {**given, "counterpart": "img2img", "steps": 4, "both_prompts": True}
    generate(**weak, out=str(tmp_path / "weak"), strength=0.3)
    generate(**weak, out=str(tmp_path / "strong"), strength=1.0)
    one, two = stored(tmp_path / "weak"), stored(tmp_path / "strong")
    assert set(one) & set(two)
    for key in set(one) & set(two):
        assert one[key][2] == two[key][2]
        assert one[key][1] != two[key][1]
    assert all(one[f"{key[:6]}-s"][1:] == one[key][1:] for key in one)


def test_several_ranks_draw_what_one_draws(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(**given, out=str(tmp_path / "one"))
    out = tmp_path / "three"
    generate(**given, out=str(out), rank=0, world=3)
    assert "2 of 3 processes have not finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="rank 1 of 3"):
        join(str(out))
    for rank in (1, 2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        generate(**given, out=str(out))
    assert "pairs in" in capsys.readouterr().out
    assert stored(out) == stored(tmp_path / "one")
    assert load_manifest(out).provenance == load_manifest(tmp_path / "one").provenance
    assert problems(str(out)) == []


def test_a_rank_without_a_pair_does_not_stop_the_others(given: dict[str, Any], tmp_path: Path) -> None:
    table = Path(given["prompts"])
    generate(**given, out=str(tmp_path / "all"))
    good = {int(key[:6]) for key in stored(tmp_path / "all")}
    lines = table.read_text().splitlines()
    kept = [lines[1 + number] for number in sorted(good)[:1]] + [lines[1 + n] for n in range(ROWS) if n not in good]
    table.write_text("\n".join([lines[0], *kept]))
    for rank in range(2):
        generate(**{**given, "batch_size": len(kept) - 1}, out=str(tmp_path / "out"), rank=rank, world=2)
    parts = [load_manifest(tmp_path / "out" / f"rank-00{rank}-of-002").nsamples for rank in range(2)]
    assert parts[1] == 0
    assert load_manifest(tmp_path / "out").nsamples == parts[0] >= 1


KILLED = """
import json, os, signal, sys
from tests.helpers.generate_stubs import install_judge
install_judge()
from lit_safety.drawing import pipelines
from lit_safety.generation.generate import generate
calls, draw = [0], pipelines.Painter.from_text
def counted(self, prompts, seeds):
    calls[0] += 1
    if calls[0] > 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, prompts, seeds)
pipelines.Painter.from_text = counted
generate(**json.loads(sys.argv[1]))
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_files(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from lit_safety.drawing.pipelines import Painter

    generate(**given, out=str(tmp_path / "whole"))
    out = tmp_path / "out"
    arguments = json.dumps({**given, "out": str(out)})
    done = subprocess.run([sys.executable, "-c", KILLED, arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (out / "manifest.json").exists()
    with open(out / "generated.jsonl", "a") as file:
        file.write('{"batch": 2, "sam')  # the kill came while a line was written
    drawn = []
    draw = Painter.from_text
    monkeypatch.setattr(
        Painter, "from_text", lambda self, prompts, seeds: drawn.append(seeds) or draw(self, prompts, seeds)
    )
    capsys.readouterr()
    generate(**given, out=str(out))
    assert len(drawn) < 2 * 4  # four batches, two drawings each: not all of them again
    assert load_manifest(out) == load_manifest(tmp_path / "whole")
    names = sorted(name for name in os.listdir(out))
    assert names == sorted(os.listdir(tmp_path / "whole"))
    assert (out / "generated.jsonl").read_text() == (tmp_path / "whole" / "generated.jsonl").read_text()
    generate(**given, out=str(out))
    assert "is already complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="already holds other shards"):
        generate(**{**given, "steps": 3}, out=str(out))


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("harmful_prompt,safe_prompt\na,b\n", "has no column 'category'"),
        ("harmful_prompt,safe_prompt,category\n", "0 rows"),
        ("harmful_prompt,safe_prompt,category,colour\na,b,hate,x\n", "has an unknown column 'colour'"),
        ("harmful_prompt,safe_prompt,category\n ,b,hate\n", "row 2: has an empty harmful_prompt"),
        ("harmful_prompt,safe_prompt,category\na,,hate\n", "row 2: has an empty safe_prompt"),
        ("harmful_prompt,safe_prompt,category\na,a,hate\n", "row 2: the harmful and the safe prompt are the same"),
        ("harmful_prompt,safe_prompt,category\na,b,fun\n", "row 2: unknown category 'fun'"),
        ("harmful_prompt,safe_prompt,category\na,b,;\n", "row 2: lacks a category"),
        ("harmful_prompt,safe_prompt,category,seed\na,b,hate,-1\n", "row 2: seed is '-1', not a whole number"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_named_before_anything_is_drawn(
    given: dict[str, Any], tmp_path: Path, table: str, complaint: str
) -> None:
    Path(given["prompts"]).write_text(table)
    with pytest.raises(UserError) as caught:
        generate(**given, out=str(tmp_path / "out"))
    assert complaint in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_ranks_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_safety.data.convert.join import this_rank

    assert this_rank(2, 4) == (2, 4)
    for rank, world in ((4, 4), (-1, 2), (0, 0)):
        with pytest.raises(UserError, match="--rank and --world"):
            this_rank(rank, world)
    with pytest.raises(UserError, match="--rank and --world"):
        this_rank(1, None)
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="RANK and WORLD_SIZE are 'x'"):
        this_rank(None, None)


def test_a_seed_depends_on_the_prompts_not_on_the_row(tmp_path: Path) -> None:
    from lit_safety.generation.pairs import read_prompt_pairs

    table = tmp_path / "t.csv"
    table.write_text("harmful_prompt,safe_prompt,category\na,b,hate\nc,d,hate\nc,d,hate\n")
    rows, repeated = read_prompt_pairs(str(table), 0)
    assert (len(rows), repeated) == (2, 1)
    table.write_text("harmful_prompt,safe_prompt,category\nc,d,hate\na,b,hate\n")
    swapped, _ = read_prompt_pairs(str(table), 0)
    assert [row.seed for row in swapped] == [row.seed for row in reversed(rows)]
    others, _ = read_prompt_pairs(str(table), 1)
    assert not {row.seed for row in others} & {row.seed for row in rows}


def test_what_an_earlier_run_left_is_not_joined(given: dict[str, Any], tmp_path: Path, capsys) -> None:
    """Rank 1's shards are of another seed: rank 0 alone is done."""
    generate(**{**given, "seed": 5}, out=str(tmp_path), rank=1, world=2)
    generate(**{**given, "seed": 6}, out=str(tmp_path), rank=0, world=2)
    assert "1 of 2 processes have not finished" in capsys.readouterr().out
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(UserError, match="rank-001-of-002: already holds other shards"):
        generate(**{**given, "seed": 6}, out=str(tmp_path), rank=1, world=2)


def test_groups_are_drawn_judged_and_resumed_to_the_same_bytes(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**given, "per_prompt": 4, "clean_candidates": 3, "scorer": RedScorer()}
    generate(**asked, out=str(tmp_path / "whole"))
    assert problems(str(tmp_path / "whole")) == []
    manifest = load_manifest(tmp_path / "whole")
    assert manifest.version == 2
    source = open_source(str(tmp_path / "whole"), "folder")
    tar = source.open_shard(0)
    for number in range(len(tar.index.samples)):
        key, members = tar.read(number)
        about, images = sample_images(members, key)
        assert [one.harmful for one in about.images] == [image.getpixel((0, 0))[0] % 2 == 1 for image in images]
        assert len({one.seed for one in about.images}) >= len(images) - 1
        assert about.order == ("safety" if key.endswith("u") else "quality")
    tar.close()
    writing = ShardWriter.write_group

    def killed(self: ShardWriter, *arguments: Any, **named: Any) -> None:
        if len(self) == 3:
            raise KeyboardInterrupt
        writing(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write_group", killed)
        with pytest.raises(KeyboardInterrupt):
            generate(**asked, out=str(tmp_path / "cut"))
    generate(**asked, out=str(tmp_path / "cut"))
    for path in (tmp_path / "whole").glob("*.tar"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert load_manifest(tmp_path / "cut") == manifest
