"""The shipped configuration of PSA, on users made of a few of the toy world's own pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from lit_safety.__main__ import main
from lit_safety.adapters import load_psa
from lit_safety.users.profiles import read_profiles
from lit_safety.worlds.toyworld.users import draw_users, write_splits
from tests.helpers.documents import TOYWORLD
from tests.helpers.small_fits import small_fit


@pytest.fixture(scope="module")
def toy_users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users in training, 5 of them tested, 5 for validation, 5 unseen, on the validation pairs."""
    folder = tmp_path_factory.mktemp("toy-users")
    (folder / "shards").mkdir()
    for part in ("train", "val", "test"):
        (folder / "shards" / part).symlink_to(TOYWORLD / "shards" / "val")
    write_splits(folder / "users", folder / "shards", draw_users(40, 5, 5, 5))
    return folder / "users"


def fit(users: Path, runs: Path, *more: str) -> int:
    """One step of the shipped configuration; data of `users`."""
    settings = {
        "model.init_args.pretrained": TOYWORLD / "pipeline",
        "model.init_args.drawing.steps": 1,
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.limit_val_batches": 1,
    }
    tested = f"[{users / 'test_seen'}, {users / 'test_unseen'}]"
    shards = {"train": users / "train", "val": users / "val", "test": tested}
    return main(small_fit("fit", ["psa.yaml"], runs, shards, settings, more))


def test_the_shipped_configuration_trains_an_adapter_that_draws_for_unseen_users(
    toy_users: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(toy_users, tmp_path / "runs") == 0
    run = next((tmp_path / "runs" / "psa").glob("2*"))
    card = (run / "adapter" / "README.md").read_text()
    assert "| user_tokens | 8 |" in card
    assert "val/rewards/margins" in card
    (sheet,) = (run / "samples").glob("*.png")
    # Two prompts in columns; in rows the null user and three users: 4 x 128 pixels and 3 x 4 between them.
    with Image.open(sheet) as opened:
        assert opened.size == (2 * 128 + 4, 4 * 128 + 3 * 4)
    pipe: Any = StableDiffusionPipeline.from_pretrained(TOYWORLD / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    load_psa(pipe, run / "adapter", users=toy_users)
    unseen = next(one.user_id for one in read_profiles(toy_users).values() if one.split == "unseen")
    (image,) = pipe(["a red house"], user=unseen, num_inference_steps=1).images
    assert np.asarray(image).shape == (32, 32, 3)
    assert str(run / "adapter") in capsys.readouterr().out


def test_users_that_were_not_made_and_embeddings_of_another_length_are_named(
    toy_users: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(tmp_path / "users", tmp_path / "runs") == 2
    message = capsys.readouterr().err
    assert "train does not exist" in message
    assert "python -m lit_safety toyworld users" in message
    assert main(["users", "embed", str(toy_users), "--out", str(tmp_path), "--dimension", "5"]) == 0
    short = f"[{toy_users / 'train'}, {tmp_path}]"
    assert fit(toy_users, tmp_path / "runs", "--model.init_args.users", short) == 2
    assert "embeddings of 5 numbers" in capsys.readouterr().err
