"""The untrained networks of the art world's pipeline: autoencoder, tokenizer, text encoder, UNet, noise schedule."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lit_safety.core.errors import UserError
from lit_safety.worlds.artworld.scene import SIDE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

LATENT_CHANNELS = 8
LENGTH = 32
"""Tokens of a prompt, start and end included."""
WIDTH = 128
"""Width of the text encoder's hidden states."""
_MERGES = 49_152 - 256 - 2
"""How many lines of CLIP's merge file its vocabulary uses."""
START, END = "<|startoftext|>", "<|endoftext|>"


def new_vae(toy: Path) -> Any:
    """The toy world's AutoencoderKL, for further training on art: (B, 3, 48, 48) images to (B, 8, 12, 12) latents.

    Edges and flat colours are the same in both worlds: 8 minutes from this start give a better result than 40 minutes
    from a random start.
    """
    vae = AutoencoderKL.from_pretrained(toy)
    vae.register_to_config(sample_size=SIDE)
    return vae


def new_unet() -> Any:
    """An untrained UNet2DConditionModel of 8.9 M parameters: convolutions at 12x12, attention at 6x6."""
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        norm_num_groups=16,
    )


def new_text_encoder(tokens: int) -> CLIPTextModel:
    """An untrained text tower over this many tokens: 2 layers, 4 heads."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=tokens, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, projection_dim=WIDTH, attention_dropout=0.0,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def known_tokens(tokenizer: CLIPTokenizer, texts: Iterable[str]) -> NDArray[np.int64]:
    """The token ids of these texts: start, end, then the others in ascending order. Only these are trained and
    stored."""
    found = {token for text in texts for token in tokenizer(text).input_ids}
    first = [int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)]
    return np.array([*first, *sorted(found - set(first))], np.int64)


def whole_text_encoder(trained: Any, known: NDArray[np.int64], tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The trained tower with the whole vocabulary: the rows of tokens that it never saw are zeros."""
    config = copy.deepcopy(trained.config)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    whole = CLIPTextModel(config)
    weights = dict(trained.state_dict())
    (name,) = [key for key in weights if key.endswith("token_embedding.weight")]
    rows = torch.zeros(len(tokenizer), WIDTH)
    rows[torch.from_numpy(known)] = weights[name].float()
    whole.load_state_dict({**weights, name: rows})
    return whole.eval()


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes CLIP's own vocabulary into the folder and loads it as a CLIPTokenizer.

    The merges are those of Radford et al. (2021), as contained in the package open_clip_torch (MIT).

    Raises:
        UserError: open_clip_torch is not installed.
    """
    from importlib.metadata import PackageNotFoundError, files

    from lit_safety.core.files import atomic_folder

    try:
        found = [file for file in files("open_clip_torch") or [] if file.name == "bpe_simple_vocab_16e6.txt.gz"]
    except PackageNotFoundError as error:
        raise UserError(
            "CLIP's vocabulary comes from a package: pip install --no-deps open_clip_torch==3.3.0"
        ) from error
    if not found:
        raise UserError("open_clip_torch holds no bpe_simple_vocab_16e6.txt.gz; install version 3.3.0")
    lines = gzip.decompress(Path(str(found[0].locate())).read_bytes()).decode().split("\n")[1 : 1 + _MERGES]
    pairs = [tuple(line.split()) for line in lines]
    letters = list(_byte_letters())
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in pairs), START, END]
    with atomic_folder(folder) as unfinished:
        vocab = {symbol: i for i, symbol in enumerate(symbols)}
        (unfinished / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in pairs)]) + "\n"
        (unfinished / "merges.txt").write_text(text, encoding="utf-8")
        tokenizer = CLIPTokenizer(
            vocab=str(unfinished / "vocab.json"), merges=str(unfinished / "merges.txt"),
            unk_token=END, bos_token=START, eos_token=END, pad_token=END, model_max_length=LENGTH,
        )  # fmt: skip
        tokenizer.save_pretrained(unfinished)
    return tokenizer


def _byte_letters() -> list[str]:
    """The letter for each byte in byte-level BPE (Radford et al., 2019), in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
