"""Where the networks of judges and scorers compute, and in which number format."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_safety.core.errors import UserError
from lit_safety.core.hardware import check_precision

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

JudgePrecision = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Place:
    """A device, and a number format. Below float32 networks run under autocast, and their weights stay in float32."""

    device: str = "cpu"
    precision: JudgePrecision = "float32"

    @classmethod
    def of(cls, device: str | None, precision: JudgePrecision | None = None) -> Place:
        """The place for what is to be measured next to the drawing.

        Args:
            device: the drawing's; None: a GPU if there is one.
            precision: None: float16 on a GPU, whose rounding is finer than bfloat16's, and float32 elsewhere.

        Raises:
            UserError: the device does not compute in this precision.
        """
        import torch

        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = precision or ("float16" if where.startswith("cuda") else "float32")
        check_precision(chosen, where, "--judge_precision")
        return cls(where, chosen)

    def move(self, network: Any) -> None:
        """Move a network, or anything with its method `to`, to the device.

        Raises:
            UserError: there is no such device, or it is too small.
        """
        try:
            network.to(self.device)
        except (RuntimeError, AssertionError) as error:  # torch's errors for a device that is missing or too small
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--device {self.device}: a {type(network).__name__}, which measures, cannot be moved there: {reason}"
            ) from error

    def computing(self) -> AbstractContextManager[Any]:
        """A context in which networks compute in this format."""
        import torch

        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.precision))


def place(one: Any, where: Place) -> None:
    """Move the networks of a judge or a scorer, and note the number format in its settings.

    It has to have a method `place(where)`, which returns the format in which it then computes, or None if its settings
    say that already. Without the method it stays as it is: it runs on the CPU, as the ONNX judges, or on a device of
    its own.
    """
    move = getattr(one, "place", None)
    if callable(move) and (computed := move(where)) is not None:
        one.settings["precision"] = computed
