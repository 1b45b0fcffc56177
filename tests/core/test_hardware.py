"""Precision that the hardware has not, and memory that is used up: one line each."""

from __future__ import annotations

import pytest
import torch

from lit_safety.core.errors import UserError
from lit_safety.core.hardware import check_precision, device_of_rank, out_of_memory, products, weights_of

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.69 GiB of which 1.2 GiB is free."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)


def test_bfloat16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = "cuda:0"
    with pytest.raises(UserError, match=r"`trainer.precision: bf16-mixed`: Tesla T4 .*set it to 16-mixed or 32-true"):
        check_precision("bf16-mixed", gpu, "trainer.precision")
    with pytest.raises(UserError, match=r"`--precision: bfloat16`.*float16 or float32"):
        check_precision("bfloat16", gpu, "--precision")
    for fine in ("16-mixed", "32-true", "float16"):
        check_precision(fine, gpu, "trainer.precision")


def test_float16_on_a_cpu():
    for wrong in ("16-mixed", "16", "float16"):
        with pytest.raises(UserError, match="float16"):
            check_precision(wrong, "cpu", "trainer.precision")
    for fine in ("bf16-mixed", "32-true", "bfloat16"):
        check_precision(fine, "cpu", "trainer.precision")


def test_tf32_is_for_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"`--precision: tf32`: only GPUs have TF32.*cpu; set it to float32"):
        check_precision("tf32", "cpu", "--precision")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UserError, match="Tesla T4 has no TF32"):
        check_precision("tf32", "cuda:0", "--precision")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_precision("tf32", "cuda:0", "--precision")


def test_tf32_is_on_inside_only():
    assert weights_of("tf32") is weights_of("float32") is torch.float32
    assert weights_of("bfloat16") is torch.bfloat16
    before = torch.backends.cuda.matmul.allow_tf32
    with products("float32"):
        assert torch.backends.cuda.matmul.allow_tf32 is before
    with products("tf32"):
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_processes_take_gpus_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of_rank("cuda", rank, 3) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert device_of_rank("cuda", 1, 1) == "cuda"
    assert device_of_rank("cuda:1", 0, 3) == "cuda:1"
    assert device_of_rank("cpu", 2, 3) == "cpu"


def test_out_of_memory_names_the_settings():
    told = out_of_memory(torch.OutOfMemoryError(CUDA), "fit")
    assert told is not None
    assert told.startswith("out of memory: the GPU is used up (it asked for 2.50 GiB)")
    for key in ("data.init_args.batch_size", "accumulate_grad_batches", "bf16-mixed", "gradient_checkpointing"):
        assert key in told
    told = out_of_memory(RuntimeError(CPU), "evaluate")
    assert told is not None
    assert "4398046511104 bytes" in told
    assert "--batch_size" in told
    assert "memory of this machine" in str(out_of_memory(MemoryError(), "shards"))
    # What a library says that finds no room for its workspace.
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert str(out_of_memory(cublas, "fit")).startswith("out of memory: the GPU is used up;")


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("memory")])
def test_other_errors_are_let_through(error: Exception):
    assert out_of_memory(error, "fit") is None
