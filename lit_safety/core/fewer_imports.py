"""What torchmetrics, which Lightning imports, need not bring along where settings are only printed."""

from __future__ import annotations

#: Packages that torchmetrics imports where they are installed: for plots, and for metrics of texts and images.
EXTRAS = ("matplotlib", "transformers", "SciencePlots")


def leave_out_extras() -> None:
    """From now on torchmetrics and Lightning find these packages missing. For a process that computes no metric."""
    from lightning_utilities.core.imports import RequirementCache

    found = RequirementCache.__bool__

    def available(wanted: RequirementCache) -> bool:
        return not (wanted.requirement or "").lower().startswith(tuple(map(str.lower, EXTRAS))) and found(wanted)

    RequirementCache.__bool__ = available  # type: ignore[method-assign]
