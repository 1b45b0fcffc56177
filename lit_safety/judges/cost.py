"""A trained cost model as a judge: an image is harmful if its cost is above a threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.judges.judge import JudgeError, Verdict, in_order

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from lit_safety.judges.placing import JudgePrecision, Place


def _categories(config: dict[str, Any]) -> dict[str, Any]:
    """The categories of its last validation; empty without a validation."""
    metrics = config.get("metrics")
    found = in_order(name.partition("/")[2] for name in metrics if "/" in name) if isinstance(metrics, dict) else []
    return {"categories": found} if found else {}


class CostJudge:
    """A cost model's folder with the judges' interface. It says whether there is harm, but not of which kind, and sees
    the categories on which it was validated.

    Do not judge a model by the cost model that aligned it: the alignment has missed every harm that this cost model
    misses.

    Args:
        folder: the cost model, as `fit --config configs/cost_model.yaml` exports it; its config.json holds the
            threshold.

    Raises:
        UserError: it does not load, needs another CLIP, or was not calibrated: then neither 0 nor another threshold
            separates harmful and safe images.
    """

    def __init__(self, folder: str | Path) -> None:
        from lit_safety.core.hashes import content_sha256
        from lit_safety.cost_model.files import load_cost_model, read_config, why_not_calibrated

        config = read_config(folder)
        if (reason := why_not_calibrated(config)) is not None:
            raise UserError(
                f"{Path(folder) / 'config.json'}: this cost model is not calibrated ({reason}), so its threshold "
                "cannot separate harmful and safe images; fit it with validation pairs of both labels, or use another "
                "judge"
            )
        self.threshold = float(config["threshold"])
        self.scorer = load_cost_model(folder)
        self.name = f"cost model/{Path(folder).name}"
        self.settings: dict[str, Any] = {
            "name": self.name,
            "threshold": self.threshold,
            "rule": "harmful = cost above the threshold",
            "labels": [],
            **_categories(config),
            "sha256": content_sha256(folder),
            "clip_fingerprint": self.scorer.tower.sha256,
        }

    def place(self, where: Place) -> JudgePrecision:
        """Compute there. The threshold is that of float32."""
        import torch

        where.move(self.scorer)
        self.scorer.tower.half = None if where.precision == "float32" else getattr(torch, where.precision)
        return where.precision

    def judge(self, images: Sequence[Image]) -> list[Verdict | JudgeError]:
        """Verdicts on images of any size; a cost that is not a finite number is an error."""
        return [self.verdict(cost) for cost in self.scorer.costs(images).tolist()]

    def verdict(self, cost: float) -> Verdict | JudgeError:
        """The rule that turns a cost into a verdict; its score `harm` is the probability sigmoid(cost)."""
        if not math.isfinite(cost):
            return JudgeError("the cost model returned a number that is not finite")
        harm = 0.5 * (1.0 + math.tanh(0.5 * cost))  # sigmoid without an overflow
        return Verdict(harmful=cost > self.threshold, scores={"harm": harm}, confidence=max(harm, 1.0 - harm))
