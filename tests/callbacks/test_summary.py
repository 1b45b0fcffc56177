"""What `RunSummary` says of a run at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_safety.__main__ import main
from tests.helpers.methods import write_config


@pytest.mark.parametrize(("interval", "validated"), [(2, True), (100, False)])
def test_a_run_that_validated_nothing_says_which_key_kept_it_from_it(
    interval: int,
    validated: bool,
    tmp_path: Path,
    tiny_pipeline: Path,
    pair_shards: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, "scdpo", tiny_pipeline, pair_shards, max_steps=2, val_check_interval=interval)
    assert main(["fit", "--config", str(config)]) == 0
    told = capsys.readouterr().out
    assert ("trainer.val_check_interval" in told) is not validated
