"""Where things are kept on this machine that can be made or fetched again: shards from elsewhere, hashes of files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lit_safety.errors import UserError

VARIABLE = "LIT_SAFETY_CACHE"


def user_cache() -> Path:
    """`$LIT_SAFETY_CACHE`, else `~/.cache/lit_safety`; for a user without a home folder one of their own among the
    temporary files. It need not exist yet.

    Raises:
        UserError: there is no home folder, and the folder among the temporary files is somebody else's.
    """
    if given := os.environ.get(VARIABLE):
        return Path(given)
    try:
        return Path.home() / ".cache" / "lit_safety"
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in many containers
        return _temporary()


def _temporary() -> Path:
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"lit_safety-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); set {VARIABLE} to a folder") from error
    # Anybody may make folders there: what lies in another user's is not believed.
    if folder.is_symlink() or (hasattr(os, "getuid") and found.st_uid != user):
        raise UserError(f"{folder}: belongs to another user, and HOME is not set; set {VARIABLE} to a folder")
    return folder
