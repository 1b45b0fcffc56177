"""What may decide what is learned: nothing that a report measures with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_safety.core.errors import UserError


def refuse_rewards(rewards: Mapping[str, str], reports: Sequence[str]) -> None:
    """Refuse to optimise what a report measures with: its figures would then say nothing.

    Args:
        rewards: folder or hub id of what gives a reward -> the YAML key that names it.
        reports: judges and CLIPs that reports score with.

    Raises:
        UserError: names both.
    """
    from lit_safety.core.hashes import content_sha256
    from lit_safety.drawing.worlds import refuse_reports_own, world_of

    def known(path: str) -> str:
        return content_sha256(path) if Path(path).exists() else path

    measured = {known(one): one for one in reports}
    for path, key in rewards.items():
        refuse_reports_own(path, f"`{key}`")
        if (found := measured.get(known(path))) is not None:
            raise UserError(f"`{key}` {path}: is {found}, with which the reports of this model measure: give another")
        if key.endswith("scorer") and Path(path).exists() and (world := world_of(path)) is not None:
            raise UserError(
                f"`{key}` {path}: belongs to the embedded world {world.name}, whose reports score with it: give another"
            )
