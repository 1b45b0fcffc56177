"""What a study file asks to be drawn beside its table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from lit_safety.errors import UserError


@dataclass(frozen=True)
class HeatMap:
    """A row's arms against the names of an `each:` column."""

    row: str
    """Whose arms."""
    figure: str
    """The column."""


@dataclass(frozen=True)
class Growth:
    """A column over a number that rows stand for, a line an arm."""

    figure: str
    """The column."""
    label: str
    """What that number is."""
    rows: dict[str, int]
    """Row -> its number."""
    common: dict[str, str] = field(default_factory=dict)
    """Row whose arms are no lines -> the column whose mean over its arms is where all lines stand there."""


def check_pictures(
    heatmaps: Mapping[str, HeatMap], growth: Growth | None, rows: Collection[str], columns: Collection[str]
) -> None:
    """Complain about what is not in the study.

    Raises:
        UserError: there is no such row or column.
    """
    for key, name, row in _spoken_of(heatmaps, growth):
        if name not in (rows if row else columns):
            known = f"row; rows are {', '.join(rows)}" if row else f"column; columns are {', '.join(columns)}"
            raise UserError(f"{key}: {name!r} is no {known}")


def _spoken_of(heatmaps: Mapping[str, HeatMap], growth: Growth | None) -> Iterator[tuple[str, str, bool]]:
    """Key of the study file, name, and whether it is to be a row."""
    for name, heatmap in heatmaps.items():
        yield f"heatmaps.{name}.row", heatmap.row, True
        yield f"heatmaps.{name}.figure", heatmap.figure, False
    if growth is not None:
        yield "growth.figure", growth.figure, False
        yield from (("growth.rows", row, True) for row in growth.rows)
        yield from (("growth.common", row, True) for row in growth.common)
        yield from (("growth.common", column, False) for column in growth.common.values())
