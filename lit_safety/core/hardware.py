"""One-line errors of the hardware: it does not compute in this precision, or its memory is full."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lit_safety.core.errors import UserError

#: How the messages of torch's allocators begin.
_TOO_MUCH = re.compile(r"[Tt]ried to allocate (?:about )?([\d.]+ ?(?:[KMGT]i?B|bytes?)?)")
_EXHAUSTED = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


def check_precision(precision: str, device: str, key: str) -> None:
    """Refuse a precision that ``device`` does not compute in.

    Args:
        precision: Lightning's or torch's word, such as bf16-mixed, 16-mixed, float16 or 32-true.
        device: where the network is to compute, such as cpu or cuda:0. Whether it exists is checked elsewhere.
        key: the setting, for the message.

    Raises:
        UserError: names the device and what it can do.
    """
    import torch

    if "bf16" in precision or "bfloat16" in precision:
        gpu = device.startswith("cuda") and torch.cuda.is_available()
        if gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"`{key}: {precision}`: {torch.cuda.get_device_name(device)} does not compute in bfloat16; set it to "
                f"{'16-mixed or 32-true' if 'mixed' in precision or 'true' in precision else 'float16 or float32'}"
            )
    elif precision == "tf32":
        if not device.startswith("cuda"):
            raise UserError(f"`{key}: tf32`: only GPUs have TF32, and this run is on {device}; set it to float32")
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(f"`{key}: tf32`: {torch.cuda.get_device_name(device)} has no TF32; set it to float32")
    elif "16" in precision and device == "cpu":
        raise UserError(
            f"`{key}: {precision}`: float16 needs a GPU, and this run is on the CPU; set it to "
            f"{'32-true or bf16-mixed' if 'mixed' in precision or 'true' in precision else 'float32'}"
        )


def weights_of(precision: str) -> Any:
    """torch's type of the weights of a network that computes in `precision`: float32, float16, bfloat16 or tf32."""
    import torch

    return torch.float32 if precision == "tf32" else getattr(torch, precision)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Inside, if the precision is tf32, a GPU multiplies float32 matrices in TF32: 8 bits of exponent, 10 of mantissa.

    Convolutions do so anyway, by torch's default.
    """
    if precision != "tf32":
        yield
        return
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def device_of_rank(device: str, rank: int, processes: int) -> str:
    """The device of one of several processes: on `cuda`, process i takes GPU i, round robin."""
    if device != "cuda" or processes < 2:
        return device
    import torch

    return f"cuda:{rank % max(1, torch.cuda.device_count())}"


def check_trainer(trainer: Any) -> None:
    """`check_precision` for the trainer's settings, before anything is loaded.

    Args:
        trainer: with `precision` and `accelerator`, as the YAML states them.

    Raises:
        UserError: as `check_precision`.
    """
    import torch

    gpu = trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    known = (
        gpu or trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not torch.backends.mps.is_available())
    )
    if known and trainer.precision is not None:
        check_precision(str(trainer.precision), "cuda" if gpu else "cpu", "trainer.precision")


def out_of_memory(error: BaseException, command: str) -> str | None:
    """One line for an allocator's error that names the settings to change; None: it is another error.

    Args:
        error: what was raised.
        command: the command that ran, such as fit.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError | RuntimeError) or (
        not isinstance(error, MemoryError) and not any(words in text for words in _EXHAUSTED)
    ):
        return None
    asked = _TOO_MUCH.search(text)
    where = "GPU" if "CUDA" in text or "GPU" in text or "HIP" in text else "memory of this machine"
    wanted = f" (it asked for {asked.group(1)})" if asked else ""
    if command in ("fit", "validate", "test", "predict"):
        cure = (
            "halve `data.init_args.batch_size` and double `trainer.accumulate_grad_batches`, which trains on the same "
            "batches; then, in this order: `trainer.precision: bf16-mixed`, cached latents and text (`shards "
            "precompute`), `model.init_args.speed.gradient_checkpointing: true`, a lower "
            "`data.init_args.resolution` or `model.init_args.lora.init_args.rank`, and "
            "`data.init_args.val_batch_size: 1` if it was while validating"
        )
    else:
        cure = "lower --batch_size, then --resolution, or use --precision float16 on a GPU, if the command has them"
    return f"out of memory: the {where} is used up{wanted}; {cure}"
