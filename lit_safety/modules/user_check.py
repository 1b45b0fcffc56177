"""What PSA looks at before it trains: are the users' pairs there, and is every user's embedding?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_safety.data import PreferenceDataModule
from lit_safety.data.users import UserTable
from lit_safety.errors import UserError


def check_folders(data: Any) -> None:
    """Refuse folders of pairs that are not there, and say how they are made.

    Raises:
        UserError: names key, folder and command.
    """
    for name in ("train", "val", "test"):
        given = getattr(data, name, None)
        for folder in [given] if isinstance(given, str) else given or []:
            plain = not any(sign in folder for sign in "{*?[:")
            if plain and not Path(folder).exists():
                raise UserError(
                    f"data.init_args.{name}: {folder} does not exist. PSA trains on the pairs of users: make the toy "
                    "world's with `python -m lit_safety toyworld users`, or convert yours, as `shards from-sage` does"
                )


def check_users(data: Any, stage: str | None, table: UserTable) -> None:
    """Refuse pairs of users who have no embedding, before the first step and not in the middle of a run.

    Raises:
        UserError: names the first such user.
    """
    if not isinstance(data, PreferenceDataModule):
        return
    for key, users in data.users(stage).items():
        if missing := sorted(users - set(table.ids)):
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(
                f"{key}: holds pairs of user {missing[0]!r}{others}, who is not in {' or '.join(table.files)}: embed "
                "all users (`python -m lit_safety users embed`)"
            )
