"""From a study to command lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lit_safety.core.errors import UserError
from lit_safety.study.plan import Study, jobs_of, load_study

FIGURES = {"ip": "aligned.ip"}


def study(**changes: object) -> Study:
    given: dict[str, object] = {"out": "runs/s", "rows": {"one": {"fit": {}}}, "figures": FIGURES}
    return Study(**{**given, **changes})  # type: ignore[arg-type]


def test_options_become_words_and_places_are_filled_in():
    plan = study(
        defaults={"fit": {"config": ["a.yaml", "b.yaml"], "seed_everything": "{seed}", "trainer.max_steps": 5}},
        rows={"one": {"fit": {"trainer.max_steps": 7, "run.root": "{folder}", "model.x": {"class_path": "y"}}}},
        seeds=[3],
    )
    (job,) = jobs_of(plan)
    assert job.commands == (
        (
            "fit",
            "--config=a.yaml",
            "--config=b.yaml",
            "--seed_everything=3",
            "--trainer.max_steps=7",
            "--run.root=runs/s/one/seed3",
            '--model.x={"class_path": "y"}',
        ),
    )
    assert job.metrics == Path("runs/s/one/seed3/report/metrics.json")


def test_a_row_that_names_anothers_folder_comes_after_it_at_every_seed():
    plan = study(
        rows={
            "merged": {"merge": {"words": ["{folder:left}", "{folder:right}"]}},
            "left": {"fit": {}},
            "right": {"fit": {}},
        },
        seeds=[0, 1],
    )
    jobs = jobs_of(plan)
    assert [job.name for job in jobs] == [f"{row}/seed{s}" for s in (0, 1) for row in ("left", "right", "merged")]
    assert jobs[5].needs == ("left", "right")
    assert jobs[5].commands == (("merge", "runs/s/left/seed1", "runs/s/right/seed1"),)


def test_what_the_defaults_need_is_needed_too():
    plan = study(
        rows={"one": {"fit": {}}, "cache": {"precompute": {}}}, defaults={"fit": {"train": "{folder:cache}/shards"}}
    )
    assert [(job.name, job.needs) for job in jobs_of(plan)] == [("cache/seed0", ()), ("one/seed0", ("cache",))]


def test_one_command_may_be_called_twice_under_two_names():
    plan = study(
        defaults={"evaluate": {"steps": 12}, "evaluate@curve": {"steps": 4}},
        rows={"one": {"evaluate": {}, "evaluate@curve": {"out": "x"}}},
    )
    assert jobs_of(plan)[0].commands == (("evaluate", "--steps=12"), ("evaluate", "--steps=4", "--out=x"))


def test_rows_may_have_seeds_of_their_own():
    plan = study(rows={"one": {"fit": {}}, "two": {"fit": {}}}, seeds=[0], row_seeds={"two": [0, 1, 2]})
    assert [job.name for job in jobs_of(plan)] == ["one/seed0", "two/seed0", "two/seed1", "two/seed2"]


def test_texts_differ_from_seed_to_seed():
    plan = study(
        rows={"one": {"merge": {"words": ["x/{first}", "y/{second}"], "out": "{folder}/{first}"}}},
        texts={"first": ["hate", "sexual"], "second": ["sexual", "hate"]},
        seeds=[0, 5],
    )
    assert [job.commands[0] for job in jobs_of(plan)] == [
        ("merge", "x/hate", "y/sexual", "--out=runs/s/one/seed0/hate"),
        ("merge", "x/sexual", "y/hate", "--out=runs/s/one/seed5/sexual"),
    ]
    with pytest.raises(UserError, match=r"\{first\} at seed 3"):
        jobs_of(study(rows=plan.rows, texts=plan.texts, seeds=[0, 5], row_seeds={"one": [3]}))


def test_a_row_is_another_job_when_one_that_it_needs_changed():
    def digests(x: int) -> dict[str, str]:
        rows = {"low": {"fit": {"x": x}}, "high": {"merge": {"words": ["{folder:low}"]}}, "other": {"fit": {"x": 0}}}
        return {job.row: job.digest for job in jobs_of(study(rows=rows))}

    assert {row for row, digest in digests(1).items() if digest != digests(2)[row]} == {"low", "high"}


def test_a_row_that_prepares_has_no_metrics():
    plan = study(rows={"one": {"fit": {}}, "two": {"fit": {}}}, prepare=["one"])
    assert [job.metrics for job in jobs_of(plan)] == [None, Path("runs/s/two/seed0/report/metrics.json")]


def test_a_changed_row_is_another_job():
    first, second = (jobs_of(study(rows={"one": {"fit": {"x": x}}}))[0] for x in (1, 2))
    assert first.digest != second.digest
    assert first.digest == jobs_of(study(rows={"one": {"fit": {"x": 1}}}))[0].digest


def test_a_row_is_another_job_when_its_config_file_changed(tmp_path: Path):
    config = tmp_path / "fit.yaml"
    config.write_text("a: 1")
    (job,) = jobs_of(study(defaults={"fit": {"config": str(config)}}))
    before = job.digest
    config.write_text("a: 2")
    assert job.digest != before


def test_comments_and_the_order_of_keys_in_a_config_file_do_not_matter(tmp_path: Path):
    config = tmp_path / "fit.yaml"
    config.write_text("a: 1\nb: {c: 2, d: [3, 4]}\n")
    (job,) = jobs_of(study(defaults={"fit": {"config": str(config)}}))
    before = job.digest
    config.write_text("# Why.\nb:\n  d: [3, 4]\n  c: 2\na: 1\n")
    assert job.digest == before
    config.write_text("a: 1\nb: {c: 2, d: [4, 3]}\n")
    assert job.digest != before
    config.write_text("a: [1")
    with pytest.raises(UserError, match=r"fit\.yaml cannot be read as YAML"):
        job.digest  # noqa: B018


def test_a_row_that_is_needed_at_a_seed_that_it_lacks_is_refused():
    rows = {"prep": {"fit": {}}, "one": {"merge": {"words": ["{folder:prep}"]}}}
    plan = study(rows=rows, seeds=[0, 1], row_seeds={"prep": [0]})
    with pytest.raises(UserError, match=r"one needs .*prep at seed 1"):
        jobs_of(plan)


def test_rows_that_need_each_other_are_refused():
    plan = study(rows={"a": {"merge": {"words": ["{folder:b}"]}}, "b": {"merge": {"words": ["{folder:a}"]}}})
    with pytest.raises(UserError, match="a -> b -> a"):
        jobs_of(plan)


def test_classes_in_options_reach_the_command_as_they_stand(tmp_path: Path):
    objective = {"class_path": "lit_safety.objectives.DiffusionDPO", "init_args": {"beta": 100.0}}
    callbacks = [{"class_path": "lit_safety.callbacks.ExportAdapter"}]
    rows = {"one": {"fit": {"model.init_args.objective": objective, "trainer.callbacks": callbacks}}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"out": "x", "rows": rows, "figures": FIGURES}))
    (job,) = jobs_of(load_study(str(file)))
    given = [json.loads(word.partition("=")[2]) for word in job.commands[0][1:]]
    assert given[0]["class_path"] == objective["class_path"]
    assert given[0]["init_args"]["beta"] == 100.0
    assert [one["class_path"] for one in given[1]] == ["lit_safety.callbacks.ExportAdapter"]
