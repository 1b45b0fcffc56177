import pytest
from jsonargparse import ArgumentParser

from lit_safety.errors import UserError
from lit_safety.evaluation.arms import Arm, collect_arms, gather_arms
from lit_safety.evaluation.evaluate import evaluate


def parse(*words: str) -> dict[str, Arm]:
    """The arms that the command line of `evaluate` says, as the parser makes them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(evaluate, as_positional=True)
    given = ["--pipeline=a", "--prompts=b", "--judge=c", "--out=d"]
    return parser.instantiate(parser.parse_args(gather_arms([*given, *words]))).arms


def test_arms_on_the_command_line() -> None:
    words = [
        "--arms.half.adapter",
        "x",
        "--steps",
        "5",
        "--arms.half.scale=-0.5",
        "--arms.neg.negative_prompt",
        "a gun",
    ]
    assert parse(*words) == {"half": Arm("x", -0.5), "neg": Arm(negative_prompt="a gun")}
    assert parse('--arms.whole={"adapter": "y"}') == {"whole": Arm("y")}
    assert parse() is None


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--arms.a.scal=1"], "no key `scal`; it has adapter, scale"), (["--arms.a.scale", "big"], "must be a number"),
     (["--arms.a.adapter"], "needs a value"), (["--arms.a.adapter="], "needs a value")],
)  # fmt: skip
def test_bad_arms_name_the_option(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        gather_arms(words)
    assert words[0].partition("=")[0] in str(error.value)


def test_base_comes_first_and_aligned_is_the_adapter(tmp_path) -> None:
    arms = collect_arms(str(tmp_path), {"b": Arm(), "a": Arm()})
    assert list(arms) == ["base", "aligned", "b", "a"]
    assert arms["base"] == Arm()
    assert arms["aligned"] == Arm(adapter=str(tmp_path))
