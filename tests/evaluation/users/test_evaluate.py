"""`users evaluate` from end to end, on a pipeline and a user adapter of random weights."""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageStat

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm
from lit_safety.evaluation.users.evaluate import evaluate_users
from lit_safety.evaluation.users.vlm import UserVLM
from lit_safety.judges.judge import JudgeError, Verdict
from tests.helpers.user_adapters import save_random_adapter, save_users
from tests.helpers.user_profiles import profile
from tests.helpers.vlm_server import Server, says, serving

PEOPLE = [
    profile("a", ("violence",), "seen"),
    profile("b", ("shocking",), "seen"),
    profile("c", ("violence", "shocking"), "unseen"),
    profile("d", (), "unseen"),
    profile("e", ("violence",), "train"),
]


class ColourJudge:
    """Red is violence with a knife in it, green is shocking with a skull, blue shows cars and trees."""

    name = "colour"

    def __init__(self) -> None:
        labels = ["knife", "skull", "car", "tree", "violence", "shocking"]
        self.settings = {"name": self.name, "labels": labels, "threshold": 0.5}
        self.fails: Callable[[Image.Image], bool] = lambda _: False

    def judge(self, images: list[Image.Image]) -> list[Verdict | JudgeError]:
        return [JudgeError("odd") if self.fails(image) else self._one(image) for image in images]

    def _one(self, image: Image.Image) -> Verdict:
        red, green, blue = ImageStat.Stat(image).median
        present = {"knife", "violence"} if red > 128 else set()
        present |= {"skull", "shocking"} if green > 128 else set()
        present |= {"car", "tree"} if blue > 128 else set()
        return Verdict(bool(present & {"violence", "shocking"}), present=frozenset(present))


@pytest.fixture(scope="session")
def user_adapter(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(pipeline, tmp_path_factory.mktemp("user-adapter") / "adapter")


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return save_users(tmp_path / "people", PEOPLE)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> ColourJudge:
    judge = ColourJudge()
    monkeypatch.setattr("lit_safety.judges.load.load_judge", lambda _: judge)
    return judge


@pytest.fixture(scope="session")
def shared_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What several tests draw alike is drawn once."""
    return tmp_path_factory.mktemp("images")


@pytest.fixture
def run(
    pipeline: Path,
    user_adapter: Path,
    people: Path,
    prompts_csv: Path,
    tmp_path: Path,
    judge: ColourJudge,
    shared_images: Path,
):
    """`users evaluate` with the judge that needs no weights; returns the report's folder."""

    def run(**changes) -> Path:
        given = {"pipeline": str(pipeline), "adapter": str(user_adapter), "users": str(people), "judge": "x"}
        given |= {"prompts": str(prompts_csv), "out": str(tmp_path / "report"), "steps": 2, "batch_size": 4}
        given |= {"device": "cpu", "explicit": 1, "implicit": 1, "clean": 1, "lookalike": 1}
        given |= {"images": str(shared_images)}
        evaluate_users(**(given | changes))
        return Path((given | changes)["out"])

    return run


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_the_report_holds_what_it_promises(run, adapter: Path, capsys) -> None:
    out = run(arms={"uniform": Arm(adapter=str(adapter))})
    found = metrics(out)
    assert list(found["arms"]) == ["base", "psa", "null", "uniform"]
    assert found["differences"].keys() == {"psa", "null", "uniform"}
    assert found["wins"].keys() == {"base", "null", "uniform"}
    assert found["settings"]["tested"] == {"seen": 2, "unseen": 2}
    # violence has an explicit and an implicit prompt, shocking an explicit one; d bans nothing, so allows all
    counts = {split: found["arms"]["psa"][split] for split in ("seen", "unseen", "all")}
    assert [counts[split]["pass_banned"]["n"] for split in counts] == [2 + 1, 3, 6]
    assert [counts[split]["allowed_recall"]["n"] for split in counts] == [1 + 2, 3, 6]
    assert [counts[split]["clean_recall"]["n"] for split in counts] == [2, 2, 4]
    assert counts["seen"]["by_category"]["violence"]["ip_banned"]["n"] == 2
    for arm in found["arms"].values():
        for share in arm["all"].values():
            if share.get("value") is not None:
                low, high = share["interval"]
                assert low <= share["value"] <= high
        assert arm["settings"]["steps"] == 2
        unnamed = arm["all"]["unnamed_recall"]  # no prompt of the small set asks for an unnamed thing
        assert (unnamed["value"], unnamed["n"], unnamed["errors"]) == (None, 0, 0)
    assert "not measured" in (out / "table.md").read_text()
    for against in found["wins"].values():
        for kind in ("preservation", "suppression"):
            one = against["all"][kind]
            assert one["wins"] + one["ties"] + one["losses"] + one["errors"] == one["n"] + one["errors"] == 6
            assert one["value"] == one["wins"] / 6
    assert found["arms"]["psa"]["settings"]["adapter_sha256"]
    assert {p.name for p in out.iterdir()} == {"metrics.json", "table.md", "verdicts.csv", "index.html"}
    page = (out / "index.html").read_text()
    assert "User c</b> (unseen), bans violence, shocking. Banned:" in page
    assert "Win Rate, preservation" in capsys.readouterr().out


def test_a_judge_of_categories_compares_what_it_can_see(run, judge: ColourJudge, tmp_path: Path) -> None:
    """Prompts that name a concept are left out of the preservation, which would be a tie in every row otherwise."""
    judge.settings["labels"] = ["violence", "shocking"]
    found = metrics(run(out=str(tmp_path / "categories")))
    assert "allowed_recall" not in found["arms"]["psa"]["all"]
    for against in found["wins"].values():
        assert set(against["all"]) == {"suppression"}
        assert against["all"]["suppression"]["n"] == 6


def test_images_are_drawn_for_their_users_and_shared_where_nobody_matters(run) -> None:
    """Ours: each row its own image. Base and null user: as many as there are prompts."""
    out = run(images=None)
    found = metrics(out)
    rows, prompts = sum(found["settings"]["rows"].values()), found["settings"]["different_prompts"]
    drawn = {folder.name.split("-")[0]: list(folder.glob("*.png")) for folder in (out / "images").iterdir()}
    assert {name: len(files) for name, files in drawn.items()} == {"base": prompts, "null": prompts, "psa": rows}
    users = set()
    for file in drawn["psa"]:
        with Image.open(file) as image:
            users.add(json.loads(image.text["row"])["user"])
    assert users == {"a", "b", "c", "d"}
    lines = (out / "verdicts.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * rows


def test_figures_can_be_counted_again_from_the_verdicts(run) -> None:
    import csv

    out = run()
    found = metrics(out)
    with (out / "verdicts.csv").open() as file:
        lines = list(csv.DictReader(file))
    for arm in ("base", "psa", "null"):
        own = [line for line in lines if line["arm"] == arm and line["part"] in ("banned", "allowed")]
        passed = [line["within_bounds"] == "1" for line in own if line["split"] == "unseen"]
        share = found["arms"][arm]["unseen"]["pass_rate"]
        assert (share["hits"], share["n"]) == (sum(passed), len(passed))
        for line in own:
            banned = set(line["banned"].split(";")) & set(line["present"].split(";"))
            assert (line["within_bounds"] == "0") == bool(banned)


def test_twice_the_same_to_the_byte_and_resumed_too(run) -> None:
    """In the same folder, after losing an image of each arm; then in a fresh one."""
    files = ("metrics.json", "table.md", "verdicts.csv", "index.html")
    out = run(images=None)
    first = {name: (out / name).read_bytes() for name in files}
    for folder in (out / "images").iterdir():
        sorted(folder.glob("*.png"))[2].unlink()
    run(images=None)
    assert {name: (out / name).read_bytes() for name in files} == first
    shutil.rmtree(out)
    run(images=None)
    assert {name: (out / name).read_bytes() for name in files} == first


def test_another_embedding_is_another_image(run, people: Path, shared_images: Path) -> None:
    run()
    before = {folder.name for folder in shared_images.iterdir()}
    save_users(people, [profile("z", (), "val"), *PEOPLE])  # everybody's random embedding moves on
    run()
    after = {folder.name for folder in shared_images.iterdir()} - before
    assert [name.split("-")[0] for name in after] == ["psa"]


def test_an_arm_may_draw_for_one_user_only(run, user_adapter: Path) -> None:
    """Scale 0 is the base; a fixed user is drawn once a prompt."""
    arms = {"off": Arm(adapter=str(user_adapter), scale=0.0), "anna": Arm(adapter=str(user_adapter), user="a")}
    out = run(arms=arms)
    found = metrics(out)
    base, off, anna = (found["arms"][name] for name in ("base", "off", "anna"))
    assert {k: v for k, v in off["all"].items() if k != "settings"} == base["all"]
    assert off["settings"]["pictures"] == sum(found["settings"]["rows"].values())
    assert anna["settings"]["pictures"] == found["settings"]["different_prompts"]
    assert found["wins"]["off"]["all"]["preservation"] == found["wins"]["base"]["all"]["preservation"]


def test_a_judge_that_fails_on_a_image_makes_it_an_error(run, judge: ColourJudge, capsys) -> None:
    seen: list[bytes] = []

    def fails(image: Image.Image) -> bool:
        seen.append(image.tobytes())
        return image.tobytes() == seen[0]  # the first image of the base, wherever it is shown

    judge.fails = fails
    found = metrics(run())
    base = found["arms"]["base"]
    assert base["errors"] == len(base["error_list"]) > 0
    assert base["error_list"][0]["reason"] == "odd"
    assert (
        base["all"]["pass_rate"]["errors"]
        == found["wins"]["base"]["all"]["preservation"]["errors"]
        + (found["wins"]["base"]["all"]["suppression"]["errors"])
    )
    assert "WITHOUT A VERDICT" in capsys.readouterr().out


def test_a_judge_that_fails_on_all_writes_no_report(run, judge: ColourJudge, tmp_path: Path) -> None:
    judge.fails = lambda _: True
    with pytest.raises(UserError, match="base"):
        run()
    assert not (tmp_path / "report" / "metrics.json").exists()


# ---- by a vision-language model


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def test_a_model_says_pass_and_win_too(run, server: Server, tmp_path: Path) -> None:
    """It passes everything and always prefers the first image; asked once, whatever is run again."""

    def reply(number: int) -> tuple[int, bytes]:
        images = sum(p["type"] == "image_url" for p in server.asked[number][1]["messages"][0]["content"])
        return says('{"within_bounds": true}' if images == 1 else '{"better": "A"}')

    server.reply = reply
    out = run(user_judge=UserVLM(server.url, "m", retries=0, parallel=1))
    found = metrics(out)["user_judge"]
    assert found["settings"]["name"] == "VLM m"
    for arm in found["arms"].values():
        assert arm["all"]["pass_rate"]["value"] == arm["all"]["pass_harmless"]["value"] == 1.0
        assert arm["errors"] == 0
    one = found["wins"]["base"]["all"]["suppression"]
    assert one["ties"] == one["errors"] == 0
    assert one["wins"] + one["losses"] == one["n"] == 6
    assert "By VLM m" in (out / "index.html").read_text()
    asked, before = len(server.asked), (out / "metrics.json").read_bytes()
    run(user_judge=UserVLM(server.url, "m", retries=0, parallel=1))
    assert len(server.asked) == asked
    assert (out / "metrics.json").read_bytes() == before


def test_a_model_that_never_answers_writes_no_report(run, server: Server, tmp_path: Path) -> None:
    server.reply = lambda _: (500, b"")
    with pytest.raises(UserError, match=r"VLM m .*base: .*status 500"):
        run(user_judge=UserVLM(server.url, "m", retries=0, parallel=1, give_up_after=2))
    assert len(server.asked) == 2
    assert not (tmp_path / "report" / "metrics.json").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "says_"),
    [
        ({"adapter": "{tmp}/absent"}, "--adapter .*absent: does not exist"),
        ({"adapter": "{lora}"}, "is not a user adapter; a LoRA is a further arm"),
        ({"users": "{tmp}/absent"}, "no users at"),
        ({"ids": ["zoe"]}, "user 'zoe' is not in"),
        ({"splits": ["val"]}, "--splits: .*'val'.* seen, unseen, train"),
        ({"arms": {"psa": Arm()}}, "--arms.psa: "),
        ({"steps": 0}, "--steps 0"),
        ({"prompts": "{tmp}/absent.csv"}, "absent.csv"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    run, tmp_path: Path, adapter: Path, changes: dict, says_: str
) -> None:
    names = {"tmp": tmp_path, "lora": adapter}
    changes = {key: value.format(**names) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(UserError, match=says_) as error:
        run(**changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


def test_users_without_embeddings_or_of_another_length_are_named(run, people: Path, tmp_path: Path) -> None:
    save_users(people, PEOPLE, without=("c",))
    with pytest.raises(UserError, match=r"user 'c' is not in .*users\.safetensors"):
        run()
    import torch

    from lit_safety.users.table import write_users

    write_users(people, {one.user_id: torch.randn(5) for one in PEOPLE})
    with pytest.raises(UserError, match=r"5 numbers.* 6"):
        run()
    assert not (tmp_path / "report").exists()


def test_a_judge_that_knows_no_categories_is_refused(run, judge: ColourJudge) -> None:
    judge.settings["labels"] = ["knife", "skull", "car", "tree"]
    with pytest.raises(UserError, match="the judge colour cannot recognise"):
        run()


def test_every_argument_is_documented() -> None:
    documented = inspect.getdoc(evaluate_users) or ""
    for name in inspect.signature(evaluate_users).parameters:
        assert f"\n    {name}: " in documented or f"\n    **{name}: " in documented


PROTOCOL = """
title: a test
command: users evaluate
source: [this test]
prompts: {columns: [prompt], rows: 6, kinds: [explicit, clean]}
drawing: {steps: 2, guidance: 3.0, resolution: not stated, seeds: [7]}
judge: {class_path: lit_safety.evaluation.UserVLM, init_args: {model: gpt}}
counted: [pass_rate, win_rate]
"""


def test_a_protocol_is_named_and_says_seeds_and_who_is_asked(run, tmp_path: Path, capsys) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(PROTOCOL)
    with pytest.raises(UserError, match="--user_judge"):
        run(protocol=str(file))
    with pytest.raises(UserError, match="evaluate"):
        run(protocol="safetydpo-i2p")
    out = run(protocol=str(file), deviate=True, steps=1)
    settings = metrics(out)["settings"]
    assert settings["steps"] == 1
    assert settings["named_protocol"]["name"] == "own"
    assert set(settings["named_protocol"]["deviations"]) == {"steps", "user_judge"}
    rows = (out / "verdicts.csv").read_text().splitlines()
    place = rows[0].split(",").index("seed")
    assert {row.split(",")[place] for row in rows[1:]} == {"7"}
    assert "protocol own" in capsys.readouterr().out
