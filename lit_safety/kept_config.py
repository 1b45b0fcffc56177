"""A run's `config.yaml`: written when the run is accepted, the earlier ones kept, and what differs printed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from lit_safety.data.atomic import write_atomic

#: Keys that say where a run goes on or writes, not what it computes.
_PLACES = ("ckpt_path", "run.")
_SHOWN = 30


class KeepConfig(SaveConfigCallback):
    """Writes the config once nothing can refuse the run any more; a resumed run's earlier one becomes `config-1.yaml`.

    A `fit` writes before its first step, when checkpoint and data are read; the other commands at their start.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self.already_saved:
            return
        folder = Path(str(trainer.log_dir))  # asked on every rank: rank 0's is sent to all
        self.already_saved = True
        if not trainer.is_global_zero:
            return
        path = folder / self.config_filename
        text = self.parser.dump(self.config, skip_none=False)
        new = yaml.safe_load(text)
        resumed = Path(str(trainer.ckpt_path)).parent.parent / path.name if trainer.ckpt_path is not None else path
        if (old := _read(resumed)) is not None:
            _tell(old, new, resumed)
        if path.is_file() and _read(path) != new:
            number = next(n for n in range(1, 1_000_000) if not path.with_name(f"{path.stem}-{n}.yaml").exists())
            write_atomic(path.with_name(f"{path.stem}-{number}.yaml"), path.read_bytes())
        write_atomic(path, text.encode())


def _read(path: Path) -> Any | None:
    """What a config says; None: it is not there, or somebody has made it unreadable."""
    try:
        return yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _tell(old: Any, new: Any, path: Path) -> None:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [key for key in {**before, **after} if before.get(key, _GONE) != after.get(key, _GONE)]
    changed = [key for key in changed if not key.startswith(_PLACES)]
    if changed:
        print(f"config  differs from {path} in")
    for key in changed[:_SHOWN]:
        print(f"        {key}: {_shown(before.get(key, _GONE))} -> {_shown(after.get(key, _GONE))}")
    if len(changed) > _SHOWN:
        print(f"        and {len(changed) - _SHOWN} more")


_GONE = object()


def _shown(value: Any) -> str:
    if value is _GONE:
        return "(not there)"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value by its dotted key."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    else:
        yield key, value
