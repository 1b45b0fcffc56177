"""An attacked fit through the command line: ranks, micro-batches and a resumed run find and remember the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.losses import mean_losses
from tests.helpers.methods import exported, under, write_config
from tests.helpers.ranks import run
from tests.strategies.test_strategies import ACCUMULATED, ONE_PAIR, goes_on_from_the_middle, largest, start_of

#: In front of the encoder and remembered, on hidden states, and with noise on clean pairs.
ADVERSARIES = [
    {
        "class_path": "lit_safety.modules.TextAdversary",
        "init_args": {"tokens": 2, "share": 0.7, "start": 0.2, "replay": 6, "replay_share": 0.9, "grow": 2},
    },
    {"class_path": "lit_safety.modules.HiddenAdversary", "init_args": {"layers": ["attn2"], "share": 0.7}},
]


def attacked(folder: Path, pipeline: Path, shards: Path) -> Path:
    folder.mkdir(exist_ok=True)
    file = write_config(folder, "scdpo", pipeline, shards)
    config = yaml.safe_load(file.read_text())
    config["model"]["init_args"]["adversary"] = ADVERSARIES
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="module")
def alone(
    tiny_pipeline: Path, user_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of one process with all four pairs of a step at once."""
    folder = tmp_path_factory.mktemp("alone")
    command = ["fit", "--config", str(attacked(folder, tiny_pipeline, user_shards)), "--data.init_args.batch_size", "4"]
    run(command, folder / "logs", ranks=1)
    whole = (folder / "runs" / "fit" / "latest").resolve()
    found = mean_losses(folder / "losses"), exported(whole)
    goes_on_from_the_middle(command, whole, folder, ranks=1)
    return found


def test_two_ranks_that_accumulate_find_what_one_finds_and_go_on_exactly(
    alone: tuple[list[float], dict[str, torch.Tensor]], tiny_pipeline: Path, user_shards: Path, tmp_path: Path
):
    config = attacked(tmp_path, tiny_pipeline, user_shards)
    command = ["fit", "--config", str(config), *under("ddp"), "--trainer.devices", "2", *ONE_PAIR]
    run(command, tmp_path / "logs")
    losses, weights = alone
    assert mean_losses(tmp_path / "losses", ACCUMULATED) == pytest.approx(losses, rel=1e-3)
    latest = tmp_path / "runs" / "fit" / "latest"
    found, whole = exported(latest), latest.resolve()
    moved = largest({name: value - start_of("scdpo", name, value, tiny_pipeline) for name, value in weights.items()})
    assert moved > 1e-5
    assert largest({name: found[name] - value for name, value in weights.items()}) < 2e-2 * moved
    goes_on_from_the_middle(command, whole, tmp_path)
