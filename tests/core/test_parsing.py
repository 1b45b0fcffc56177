from pathlib import Path

import pytest
import yaml

from lit_safety.cli.commands import gather_list
from lit_safety.cli.trainer import run_trainer
from lit_safety.core.errors import UserError
from lit_safety.core.parsing import SingleLineErrorParser, shorten
from lit_safety.judges.load import load_judge

CONFIGS = Path(__file__).parents[2] / "configs"


def test_nested_reports_become_the_path_and_the_reason():
    """What jsonargparse 4.53 says of an unknown key two classes deep."""
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'Module'>, <class 'NoneType'>]
  Errors:
    - Parser key "objective":
        Does not validate against any of the Union subtypes
        Subtypes: [<class 'Objective'>, <class 'NoneType'>]
        Errors:
          - Option 'bta' is not accepted
          - Expected a <class 'NoneType'>
        Given value type: <class 'NestedArg'>
        Given value: NestedArg(key='bta', val='3')
    - Expected a <class 'NoneType'>
  Given value type: <class 'NestedArg'>"""
    assert shorten(message) == "`model.init_args.objective`: Option 'bta' is not accepted"


def test_a_class_whose_package_is_not_installed():
    """What jsonargparse 4.53 says of an optimizer, and of a module of one's own."""
    optimizer = (
        'Parser key "model":\n  Errors:\n    - Parser key "optimizer":\n        Type typing.Callable[[Iterable], '
        "Optimizer] expects a function or a callable class: No module named 'bitsandbytes'. Got value: "
        "Namespace(class_path='bitsandbytes.optim.AdamW8bit', init_args=Namespace(lr=0.0001))"
    )
    assert shorten(optimizer).startswith(
        "`model.init_args.optimizer`: bitsandbytes.optim.AdamW8bit is of the package bitsandbytes, which is not "
        "installed: `pip install bitsandbytes`"
    )
    own = "Parser key \"model\":\n  Problem with given class_path 'mine.Method': No module named 'mine'"
    assert "mine.py" in shorten(own)  # a name that the user made up is nothing to install
    assert "PYTHONPATH" in shorten(own)
    assert "pip install" not in shorten(own)
    # The package is there, and something that it needs is not.
    other = own.replace("named 'mine'", "named 'wanted'")
    assert shorten(other) == "`model`: Problem with given class_path 'mine.Method': No module named 'wanted'"


def test_our_own_messages_stay_as_they_are():
    text = "data/x does not exist; give a folder of shards"
    assert shorten(text) == text
    assert shorten("two\nlines   become one") == "two lines become one"


def test_leading_words_become_one_list():
    assert gather_list(["a", "b", "--out", "c"]) == ['["a", "b"]', "--out", "c"]
    assert gather_list(["--config", "x"]) == ["--config", "x"]
    assert gather_list(["[a]", "--x"]) == ["[a]", "--x"]


def test_a_null_of_a_config_names_its_key(tmp_path: Path) -> None:
    for name, given in (("prompt_dropout", "{prompt_dropout: null}"),
                        ("objective.init_args.beta", "{objective: {init_args: {beta: null}}}")):  # fmt: skip
        (tmp_path / "mine.yaml").write_text(f"model: {{init_args: {given}}}\n")
        with pytest.raises(UserError, match=name):
            run_trainer(["fit", "--config", "configs/scdpo.yaml", "--config", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("judge", "key"), [("nudenet", "threshold"), ("clip", "threshold"), ("vlm", "parallel"), ("vlm", "timeout")]
)
def test_a_null_in_a_judge_s_file_names_its_key(judge: str, key: str, tmp_path: Path) -> None:
    described = yaml.safe_load((CONFIGS / "judges" / f"{judge}.yaml").read_text())
    described["init_args"][key] = None
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(described))
    with pytest.raises(UserError, match=key) as error:
        load_judge(str(tmp_path / "judge.yaml"))
    assert "judge.yaml" in str(error.value)


class Picky:
    """Takes no odd number."""

    def __init__(self, number: int) -> None:
        if number % 2:
            raise UserError(f"number {number}: must be even")


def test_what_a_class_says_of_its_arguments_comes_out_where_none_is_allowed_too() -> None:
    parser = SingleLineErrorParser()
    parser.add_argument("--one", type=dict[str, Picky | None] | None)
    parsed = parser.parse_args(
        ["--one", '{"a": {"class_path": "' + f"{__name__}.Picky" + '", "init_args": {"number": 3}}}']
    )
    with pytest.raises(UserError, match="number 3: must be even"):
        parser.instantiate(parsed)
