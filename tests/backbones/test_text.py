"""Prompts that are too long, and rows that are the same in every batch."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lit_safety.backbones import load_backbone
from lit_safety.backbones.backbone import encode_alike
from lit_safety.modules.monitoring import TruncatedPrompts


def test_too_long_is_more_tokens_than_the_encoder_has_places(tiny_pipeline: Path):
    """16 places less start and end: 14 words of one token each fit, 15 do not; bytes alone do not decide."""
    backbone = load_backbone(str(tiny_pipeline), denoiser=False)
    assert backbone.too_long(["a " * 14, "a " * 15, "", "with house"]) == [False, True, False, False]


def test_the_end_token_is_kept(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline), denoiser=False)
    tokenizer = backbone.part("tokenizer")
    ids = tokenizer("a " * 40, padding="max_length", max_length=16, truncation=True)["input_ids"]
    assert len(ids) == 16
    assert ids[-1] == tokenizer.eos_token_id


def test_different_prompts_are_counted_once_and_the_first_is_named(
    tiny_pipeline: Path, caplog: pytest.LogCaptureFixture
):
    backbone = load_backbone(str(tiny_pipeline), denoiser=False)
    counted = TruncatedPrompts()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            counted.look(backbone, ["a cat", "cat " * 20, "a " * 20])
    assert len(counted) == 2
    assert list(counted.prompts.values()) == ["cat " * 20, ""]
    assert len(caplog.records) == 1


def test_a_row_does_not_depend_on_its_batch(tiny_pipeline: Path):
    backbone = load_backbone(str(tiny_pipeline), denoiser=False)
    prompts = ["a red cat", "a gun", "", "blue house", "a"]
    with torch.no_grad():
        together = encode_alike(backbone, prompts)["encoder_hidden_states"]
        for row, prompt in enumerate(prompts):
            alone = encode_alike(backbone, [prompt])["encoder_hidden_states"]
            assert alone.shape == (1, 16, 32)
            assert torch.equal(alone[0], together[row])
