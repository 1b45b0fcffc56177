"""Settings of the datamodule that are wrong by themselves, said before anything is opened."""

from __future__ import annotations

from typing import Any

from lit_safety.errors import UserError

KEY = "data.init_args"


def check_settings(data: Any) -> None:
    """What can be said of a `PreferenceDataModule`'s settings by themselves.

    Raises:
        UserError: one is out of its range, or two do not go together; names the keys.
    """
    for name, least in (
        ("batch_size", 1),
        ("val_batch_size", 1),
        ("num_workers", 0),
        ("shuffle_window", 1),
        ("bad_sample_limit", 0),
    ):
        if getattr(data, name) < least:
            raise UserError(f"{KEY}.{name} must be at least {least}, not {getattr(data, name)}")
    if data.resolution is not None and data.resolution < 1:
        raise UserError(f"{KEY}.resolution must be at least 1 pixel, not {data.resolution}")
    if data.consecutive and not data.one_category:
        raise UserError(f"{KEY}.consecutive: true is about batches of one category: set {KEY}.one_category: true")
    if data.aspect_buckets:
        if data.resolution is None:
            raise UserError(
                f"{KEY}.aspect_buckets: true cuts pictures to about resolution^2 pixels: set {KEY}.resolution"
            )
        if data.one_category or data.weights is not None:
            other = "one_category" if data.one_category else "weights"
            raise UserError(f"{KEY}.aspect_buckets divides batches, {KEY}.{other} too: leave one of them out")
    if data.weights is not None:
        entries = len(data.train) if isinstance(data.train, list) else 0
        if len(data.weights) != entries or not all(0 < weight < float("inf") for weight in data.weights):
            raise UserError(
                f"{KEY}.weights must hold a number above 0 for each entry of the list {KEY}.train, which has "
                f"{entries or 'none: it is no list'}"
            )
        if data.one_category:
            raise UserError(f"{KEY}.weights mixes batches, {KEY}.one_category divides them: leave one of them out")
    if data.on_bad_sample not in ("error", "skip"):
        raise UserError(f"{KEY}.on_bad_sample must be error or skip, not {data.on_bad_sample!r}")
