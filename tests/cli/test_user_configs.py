"""The YAMLs of `users evaluate`: they parse, and the study calls what there is."""

from __future__ import annotations

import pytest
import yaml

from lit_safety.__main__ import main
from lit_safety.study.plan import jobs_of, load_study
from tests.helpers.documents import CONFIGS


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """What a command's parser makes of its options."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_evaluation_and_its_model_parse(capsys: pytest.CaptureFixture[str]):
    config, judge = CONFIGS / "evaluate_users.yaml", CONFIGS / "judges" / "user_vlm.yaml"
    words = ["users", "evaluate", "--config", str(config), "--adapter", "a", "--out", "x"]
    found = printed([*words, "--user_judge", str(judge), "--arms.uniform.adapter", "y"], capsys)
    given = yaml.safe_load(config.read_text())
    assert {key: found[key] for key in given if key != "user_judge"} == {
        key: value for key, value in given.items() if key != "user_judge"
    }
    assert found["user_judge"] == yaml.safe_load(judge.read_text())
    assert found["arms"]["uniform"]["adapter"] == "y"


def test_the_study_calls_what_there_is(capsys: pytest.CaptureFixture[str]):
    """Three seeds of an alignment that knows no users, then of one that does; the first is an arm of the second."""
    jobs = jobs_of(load_study(str(CONFIGS / "studies" / "psa.yaml")))
    assert [job.name for job in jobs if job.seed == 2] == ["cache/seed2", "uniform/seed2", "users/seed2"]
    cache, uniform, users = jobs[:3]
    assert uniform.metrics is None
    (fit, evaluate) = users.commands
    assert fit[0] == "fit"
    assert f"--data.init_args.train={cache.folder}/shards" in fit
    found = printed(list(evaluate), capsys)
    assert found["prompts"].endswith("test.csv")
    assert found["each"] * len(found["splits"]) >= 100
    assert found["adapter"] == f"{users.folder}/fit/latest/adapter"
    assert found["arms"]["uniform"]["adapter"] == f"{uniform.folder}/fit/latest/adapter"
    assert len({job.digest for job in jobs}) == len(jobs)
