"""`metrics.csv` of a run that is resumed: Lightning's logger would delete the rows of before."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lit_safety.data.atomic import write_atomic


def keep_rows(logger: Any) -> None:
    """Let a `CSVLogger` go on in the file that is there; any other logger is left alone. For rank 0."""
    if isinstance(logger, CSVLogger) and logger._experiment is None and "://" not in str(logger.log_dir):
        logger._experiment = _Appending(log_dir=logger.log_dir)


class _Appending(ExperimentWriter):
    """Lightning's writer, which begins with the columns of the rows that are there."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        try:
            content = path.read_bytes().decode("utf-8")
            # A row that a kill cut short has no end, and its last number may lack digits.
            rows = list(csv.DictReader(io.StringIO(content[: content.rfind("\n") + 1])))
            columns = list(rows[0]) if rows else []
        except (UnicodeDecodeError, csv.Error):
            columns = []
        if not columns or any(name is None for name in columns):
            path.rename(_free(path))  # nobody's rows that could be gone on with, and not ours to delete
            return
        self.metrics_keys = sorted(columns)
        self._write_all(rows)

    def _check_log_dir_exists(self) -> None:
        """Lightning deletes here what is there."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.metrics_keys = fieldnames
        self._write_all(rows)

    def _write_all(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(Path(self.metrics_file_path), text.getvalue().encode())


def _free(path: Path) -> Path:
    return next(one for n in range(1, 1_000_000) if not (one := path.with_name(f"{path.stem}-{n}.csv")).exists())
