"""A world's prompts and judges are refused for another pipeline, whatever path they are given under."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_safety.__main__ import main
from lit_safety.core.errors import UserError
from lit_safety.drawing.prompts import read_prompts
from lit_safety.drawing.worlds import check_world, embeddings, of_a_world, vocabularies, world_of, write_marker
from lit_safety.evaluation.command import evaluate
from tests.helpers.documents import CONFIGS, TOYWORLD

TEST, JUDGE = TOYWORLD / "prompts" / "test.csv", TOYWORLD / "judge"


def refused(pipeline: Path, **files: str | Path) -> bool:
    prompts = read_prompts(files["prompts"]) if "prompts" in files else []
    try:
        check_world(pipeline, files, allowed=False, prompts=prompts)
    except UserError as error:
        return "toyworld" in str(error) and "--other_world" in str(error)
    return False


def test_the_world_s_own_pipeline_takes_its_files(tmp_path: Path) -> None:
    assert not refused(TOYWORLD / "pipeline", prompts=TEST, judge=JUDGE)
    copy = tmp_path / "mine"
    shutil.copytree(TOYWORLD / "pipeline" / "tokenizer", copy / "tokenizer")
    assert not refused(copy, prompts=TEST, judge=JUDGE), "a merged or further trained copy has other weights"


def test_another_pipeline_does_not(pipeline: Path, tmp_path: Path, prompts_csv: Path) -> None:
    assert refused(pipeline, prompts=TEST)
    assert refused(pipeline, prompts=prompts_csv, judge=JUDGE)
    assert refused(pipeline, judge=TOYWORLD / "clip")
    assert not refused(pipeline, prompts=prompts_csv, judge=prompts_csv.parent)
    check_world(pipeline, {"prompts": TEST}, allowed=True)


def test_a_link_a_copy_and_a_part_are_the_world_s_too(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(TEST)
    (tmp_path / "part.csv").write_text("".join(TEST.read_text().splitlines(keepends=True)[:20]))
    shutil.copytree(JUDGE, tmp_path / "my-judge")
    (tmp_path / "judge.yaml").write_text(
        f"class_path: lit_safety.judges.ToyWorldJudge\ninit_args: {{folder: {JUDGE}}}\n"
    )
    assert refused(pipeline, prompts=tmp_path / "link.csv")
    assert refused(pipeline, prompts=tmp_path / "part.csv")
    assert refused(pipeline, judge=tmp_path / "my-judge")
    assert refused(pipeline, judge=tmp_path / "judge.yaml")


def test_a_world_that_was_built_again_is_known_by_its_marker(pipeline: Path, tmp_path: Path, prompts_csv: Path) -> None:
    world = tmp_path / "world"
    (world / "prompts").mkdir(parents=True)
    shutil.copy(prompts_csv, world / "prompts" / "test.csv")
    write_marker(world, "another", pipeline)
    found = world_of(world / "prompts" / "test.csv")
    assert found is not None
    assert found.name == "another"
    check_world(pipeline, {"--prompts": world / "prompts" / "test.csv"}, allowed=False)
    with pytest.raises(UserError, match="another"):
        check_world(TOYWORLD / "pipeline", {"--prompts": world / "prompts" / "test.csv"}, allowed=False)


def test_a_vocabulary_is_the_same_in_either_file(tmp_path: Path) -> None:
    words = json.loads((TOYWORLD / "pipeline" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    assert vocabularies(tmp_path) == vocabularies(TOYWORLD / "pipeline")
    assert of_a_world(tmp_path)
    assert not of_a_world(tmp_path / "tokenizer")


def test_a_world_s_pipeline_without_its_vocabulary_gets_the_file(tmp_path: Path) -> None:
    """Without words it cannot be known for the world's own: what is missing is what there is to say."""
    shutil.copytree(TOYWORLD / "pipeline", tmp_path / "mine")
    for file in (tmp_path / "mine" / "tokenizer").glob("*"):
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        check_world(tmp_path / "mine", {"--judge": JUDGE}, allowed=False)


def test_evaluate_refuses_before_it_draws(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="toyworld"):
        evaluate(pipeline=str(pipeline), prompts=str(TEST), judge=str(JUDGE), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_attack_refuses_too(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "attack.yaml")
    words = ["--config", config, "--pipeline", str(pipeline), "--out", str(tmp_path / "out"), "--arms", "{}"]
    assert main(["attack", *words]) == 2
    assert "toyworld" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_drawings_of_a_run_are_blurred_unless_the_world_is_harmless(pipeline: Path) -> None:
    from lit_safety.callbacks import DrawSamples

    assert DrawSamples(["a cat"])._blurs(str(pipeline))
    assert not DrawSamples(["a cat"])._blurs(str(TOYWORLD / "pipeline"))
    assert not DrawSamples(["a cat"], blur=False)._blurs(str(pipeline))


def test_generate_and_merge_refuse_them_for_another_model(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("harmful_prompt,safe_prompt,category\na gun,a house,violence\n")
    made = ["shards", "generate", str(rows), str(pipeline), str(tmp_path / "out"), "--judge", str(JUDGE)]
    assert main(made) == 2
    assert "--other_world" in (said := capsys.readouterr().err)
    assert str(JUDGE) in said
    for name in ("a", "b"):
        layer = "unet.mid_block.attentions.0.proj_in"
        factors = {f"{layer}.lora_A.weight": torch.ones(2, 32, 1, 1), f"{layer}.lora_B.weight": torch.ones(32, 2, 1, 1)}
        (tmp_path / name).mkdir()
        save_file(factors, tmp_path / name / "pytorch_lora_weights.safetensors")
    merged = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--pipeline", str(pipeline), "--method", "comerge"]
    assert main([*merged, "--out", str(tmp_path / "merged"), "--calibration.prompts", str(TEST)]) == 2
    assert "--calibration.other_world" in capsys.readouterr().err


def embedded(folder: Path, table: torch.Tensor) -> Path:
    """A pipeline whose text encoder has this table of token embeddings."""
    shutil.copytree(TOYWORLD / "pipeline" / "tokenizer", folder / "tokenizer")
    (folder / "text_encoder").mkdir(parents=True)
    save_file({"text_model.embeddings.token_embedding.weight": table}, folder / "text_encoder" / "model.safetensors")
    return folder


def test_a_world_that_speaks_real_words_is_known_by_its_text_encoder(tmp_path: Path) -> None:
    """Stored in another type it is the same world's; another table, and a real model's width, are not."""
    table = torch.randn(40, 8).half()
    own = embedded(tmp_path / "world" / "pipeline", table)
    write_marker(tmp_path / "world", "artworld", own, own_words=False)
    prompts = tmp_path / "world" / "test.csv"
    prompts.write_text("prompt\na bomb\n")
    check_world(own, {"--prompts": prompts}, False)
    check_world(embedded(tmp_path / "copy", table.float()), {"--prompts": prompts}, False)
    for name, other in (("else", table + 1), ("wide", torch.zeros(40, 768))):
        with pytest.raises(UserError, match="artworld"):
            check_world(embedded(tmp_path / name, other), {"--prompts": prompts}, False)
    assert embeddings(tmp_path / "wide") == set()
