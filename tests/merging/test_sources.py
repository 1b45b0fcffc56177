from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from lit_safety.core.errors import UserError
from lit_safety.merging.experts import base_model, read_experts, short_names
from lit_safety.merging.merge import base_of


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/violence/adapter"], ["adapter"]),
        (["runs/violence/adapter", "runs/hate/adapter"], ["violence", "hate"]),
        (["x/violence/latest/adapter", "y/hate/latest/adapter"], ["violence", "hate"]),
        (["a/violence", "b/violence", "b/hate"], ["a/violence", "b/violence", "b/hate"]),
        (["violence.safetensors", "x/hate.safetensors"], ["violence", "hate"]),
        (["runs/a", "runs/a/b"], ["a", "b"]),
    ],
)
def test_short_names(paths: list[str], names: list[str]):
    assert short_names([PurePosixPath(path) for path in paths]) == names
    assert short_names([PurePosixPath(path) for path in paths[::-1]]) == names[::-1]


def test_experts_are_read_with_their_names_and_where_they_come_from(tmp_path: Path, save_expert: Callable[..., Path]):
    one, two = save_expert(tmp_path / "hate" / "adapter", 0), save_expert(tmp_path / "violence" / "adapter", 1)
    found = read_experts([str(one), f"guns={two}"])
    assert [expert.name for expert in found] == ["adapter", "guns"]
    assert found[0].provenance["sha256"] != found[1].provenance["sha256"]
    assert found[0].provenance["base_model"] == base_model(one) != None  # noqa: E711
    assert base_model(tmp_path) is None
    assert [expert.name for expert in read_experts([str(one), str(two)])] == ["hate", "violence"]


def test_without_a_card_pefts_configuration_names_the_base(tmp_path: Path, save_expert: Callable[..., Path]):
    """And experts of different ones are refused by it."""
    folders = [save_expert(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    for folder, base in zip(folders, ("someone/one", "someone/other"), strict=True):
        (folder / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
    assert base_model(folders[0]) not in (None, "someone/one")  # the card goes first
    for folder in folders:
        (folder / "README.md").unlink()
    assert base_model(folders[0]) == "someone/one"
    with pytest.raises(UserError, match="a: someone/one; b: someone/other"):
        base_of(read_experts([str(folder) for folder in folders]))


def test_ambiguous_lists_are_refused(tmp_path: Path, save_expert: Callable[..., Path]):
    one, two = save_expert(tmp_path / "a", 0), save_expert(tmp_path / "b", 1)
    with pytest.raises(UserError, match="no experts"):
        read_experts([])
    with pytest.raises(UserError, match="given twice"):
        read_experts([str(one), str(one)])
    with pytest.raises(UserError, match="two experts are called x"):
        read_experts([f"x={one}", f"x={two}"])
    with pytest.raises(UserError, match="no adapter at"):
        read_experts([str(tmp_path / "none")])
