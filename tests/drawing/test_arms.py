import pytest
from jsonargparse import ArgumentParser

from lit_safety.core.errors import UserError
from lit_safety.drawing.arms import Arm, adapter_sha256, collect_arms, gather_arms
from lit_safety.evaluation.command import evaluate


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
    composed = parse("--arms.both.adapters", '{"a": 0.5, "b": -1}')["both"]
    assert composed.loras() == {"a": 0.5, "b": -1.0}
    assert parse('--arms.whole={"adapter": "y"}') == {"whole": Arm("y")}
    assert parse() is None


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--arms.a.scal=1"], "`scal`.* adapter, scale"), (["--arms.a.scale", "big"], "must be a number"),
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


def test_a_guard_on_the_command_line() -> None:
    where = "lit_safety.guards"
    sld = f'{{"class_path": "{where}.SafeLatentDiffusion", "init_args": {{"strength": "max"}}}}'
    arms = parse("--arms.one.adapter=x", "--arms.one.guard", sld, f"--arms.two.guard={where}.SAFREE")
    assert arms["one"].loras() == {"x": 1.0}
    assert arms["one"].guard.settings["strength"] == "max"
    assert arms["two"].guard.settings["guard"] == "SAFREE"


def test_an_arm_says_what_it_is_made_of(tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.safetensors").write_text(name)
    arm = Arm(adapters={str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 1.0})
    said = arm.describe()["adapters"]
    assert [one["weight"] for one in said.values()] == [0.5, 1.0]
    assert len({one["sha256"] for one in said.values()}) == 2
    assert "guard" not in Arm().describe()
    with pytest.raises(UserError, match="is both"):
        Arm(adapter=str(tmp_path / "a"), adapters={str(tmp_path / "a"): 1.0}).check("x")
    with pytest.raises(UserError, match="absent does not exist"):
        Arm(adapters={str(tmp_path / "absent"): 1.0}).check("x")


def test_pefts_weights_named_alone_count_with_their_configuration(tmp_path) -> None:
    """Which says their alpha: images of one are not those of the other."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    found = set()
    for alpha in (4, 8):
        (tmp_path / "adapter_config.json").write_text(f'{{"lora_alpha": {alpha}}}')
        found.add(adapter_sha256(tmp_path / "adapter_model.safetensors"))
    assert len(found) == 2
