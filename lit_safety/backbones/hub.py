"""Files of a pipeline on the Hugging Face hub: only what is needed, in bounded time, with one clear line if it fails.

The hub's client has a time limit (HF_HUB_ETAG_TIMEOUT) and an offline mode (HF_HUB_OFFLINE); both work here too. But if
a firewall drops packets, the client tries six times, one minute each, for a file that was not fetched before. So we
first check once whether the hub answers. If it does not, the client uses only files from earlier runs.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the error of the underlying HTTP library for a broken connection
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from lit_safety.core.errors import UserError
from lit_safety.core.weights import DIFFUSERS, TRANSFORMERS, choose_weights

#: The hub's address (HF_ENDPOINT).
ENDPOINT = constants.ENDPOINT
#: Seconds to wait for a connection to one of the hub's addresses; it has several, which are tried in turn.
CONNECT = 5
#: The end of messages: advice that always works.
FOLDER = "or point at a local folder"


def hub_file(source: str, name: str, revision: str | None = None, key: str | None = None) -> Path:
    """One file of the hub model ``source``, fetched if it was not yet.

    Args:
        source: the hub id.
        name: the file's path in the repository.
        revision: a commit; None: the newest one.
        key: the option or YAML key of the model, for messages.

    Raises:
        UserError: the model is missing, gated or not reachable, has no such file, or the disk is full.
    """
    with _as_user_error(source, name, key):
        validate_repo_id(source)
        return Path(
            hf_hub_download(source, name, revision=revision, endpoint=ENDPOINT, local_files_only=not hub_answers())
        )


def hub_part(source: str, name: str, snapshot: Path) -> Path:
    """The folder of the component ``name`` with its files in it, weights as safetensors only.

    Args:
        source: the hub id.
        name: the component's folder in the repository.
        snapshot: folder of its `model_index.json`; the folder's name is the commit from which all files come.

    Raises:
        UserError: as `hub_file`.
    """
    if hub_answers():
        for file in _needed(_listing(source, snapshot.name), name):
            hub_file(source, file, snapshot.name)
    elif not (snapshot / name).is_dir():
        raise UserError(f"{source}: its {name} was not fetched yet, and the hub does not answer: go online, {FOLDER}")
    return snapshot / name


def hub_answers() -> bool:
    """Whether the hub can be used: not in offline mode, and not if it did not answer this process's first request."""
    return not constants.HF_HUB_OFFLINE and _answers(ENDPOINT)


@functools.cache
def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    limit = constants.HF_HUB_ETAG_TIMEOUT
    try:
        get_session().head(endpoint, timeout=(CONNECT, limit, limit, limit))
    except Exception:  # errors differ by HTTP library; also for a wrong HF_ENDPOINT
        return False
    return True


@functools.cache
def _listing(source: str, revision: str) -> tuple[str, ...]:
    with _as_user_error(source, "its list of files"):
        return tuple(HfApi(endpoint=ENDPOINT).list_repo_files(source, revision=revision))


def _needed(files: tuple[str, ...], name: str) -> list[str]:
    """The files of a component: all small files, and those safetensors that will be loaded."""
    own = [file.removeprefix(f"{name}/") for file in files if file.startswith(f"{name}/") and file.count("/") == 1]
    weights = []
    for stem in (DIFFUSERS, TRANSFORMERS):
        if (chosen := choose_weights(own, stem)) is not None:
            weights += [*chosen.names, *([chosen.index] if chosen.index else [])]
    small = [file for file in own if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
    return [f"{name}/{file}" for file in (*small, *weights)]


@contextmanager
def _as_user_error(source: str, what: str, key: str | None = None) -> Iterator[None]:
    """Turns all errors of the hub's client into one line that says what to do."""
    try:
        yield
    except HFValidationError as error:
        given = f"{key}: " if key else ""
        raise UserError(f"{given}no folder {source!r}, and it is not a hub id either: check the path") from error
    except GatedRepoError as error:
        raise UserError(
            f"{source} is gated: accept its licence at {ENDPOINT}/{source}, then `hf auth login` (or set "
            f"HF_TOKEN), {FOLDER}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no folder {source!r}, and the hub has no such model: check the name; if it is private, `hf auth login` "
            f"(or set HF_TOKEN), {FOLDER}"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise UserError(
            f"{source} has no {what} on the hub: is it a diffusers pipeline? Name another, {FOLDER}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"no folder {source!r}, and the hub does not answer or HF_HUB_OFFLINE is set; its {what} was not fetched "
            f"before: check the path, go online, {FOLDER}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{source}: the hub did not give {what}: {_first_line(error)}; try again, {FOLDER}") from error
    except (OSError, RuntimeError, HTTPError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise UserError(
                f"{source}: no space left for {what} in {constants.HF_HUB_CACHE}: make room, set HF_HOME to a folder "
                f"on a larger disk, {FOLDER}"
            ) from error
        raise UserError(f"{source}: {what} cannot be fetched: {_first_line(error)}; try again, {FOLDER}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
