"""A profile's text as numbers: the mean of a text model's last hidden state over the text's tokens.

Source: Personalized Safety Alignment (arXiv 2508.01151), which takes Qwen/Qwen2.5-7B-Instruct (3,584 numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_safety.core.errors import UserError
from lit_safety.core.tokenizers import check_tokenizer, check_tokenizer_files
from lit_safety.core.weights import TRANSFORMERS, check_whole, need_weights


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding, in fp32: (B, L, D), (B, L) of ones and zeros -> (B, D)."""
    weights = mask.to(hidden.device).unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


class TextModel:
    """Any text model that transformers' AutoModel loads, from safetensors and without code of its own.

    Encoders (BERT), decoders (Qwen), and of models with two halves the one that reads text (T5, CLIP).

    Args:
        name: a folder, or a hub id.
        device: where to compute, such as "cuda"; None: a GPU if there is one.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name = name
        options: dict[str, Any] = {"trust_remote_code": False}
        try:
            variant = None
            if (folder := Path(name)).is_dir():
                check_tokenizer_files(folder, AutoTokenizer, settings=False)
                variant = need_weights(folder, TRANSFORMERS).variant
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
            whole, report = AutoModel.from_pretrained(
                name, use_safetensors=True, dtype="auto", variant=variant, output_loading_info=True, **options
            )
        except (
            UserError, OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError,
        ) as error:  # fmt: skip
            raise UserError(
                f"{name}: is not a text model that can be loaded ({' '.join(str(error).split())[:300]}); give a folder "
                "with config.json, safetensors and tokenizer, or a hub id"
            ) from error
        half = whole.get_encoder() if whole.config.is_encoder_decoder else whole
        self.model: Any = getattr(half, "text_model", half).eval()
        # A head that pools is not used, and many files come without.
        report["missing_keys"] = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
        check_whole(whole, report, name, used=self.model)
        text = whole.config.get_text_config()
        check_tokenizer(self.tokenizer, name, {"vocab_size": getattr(text, "vocab_size", None)})
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            self.model.to(self.device)
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # as torch says of a device that is not there
            raise UserError(f"--device {device}: {name} cannot be put there: {_first_line(error)}") from error
        # Behind the text, so that its tokens have the same places in any batch; the mask says that it does not count.
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            known = self.tokenizer.eos_token or self.tokenizer.unk_token
            self.tokenizer.pad_token = known or self.tokenizer.convert_ids_to_tokens(0)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self.model.config.get_text_config().hidden_size)

    @torch.inference_mode()
    def embed(
        self, texts: dict[str, str], batch_size: int = 8, tick: Callable[[], None] | None = None
    ) -> dict[str, Tensor]:
        """Embeddings (D,), fp32 on the CPU, of texts by user id.

        A model that was trained on conversations is given the text as a user's message, as published.

        Raises:
            UserError: a text is longer than the model reads, or its embedding is not finite; names the user. Or the
                model cannot read text.
        """
        users = list(texts)
        wrapped = [self._as_message(texts[user]) for user in users]
        found: dict[str, Tensor] = {}
        for start in range(0, len(users), batch_size):
            part = users[start : start + batch_size]
            rows = self._means(part, wrapped[start : start + batch_size])
            for user, row in zip(part, rows, strict=True):
                if not torch.isfinite(row).all():
                    raise UserError(f"user {user!r}: {self.name} gives an embedding with numbers that are not finite")
                found[user] = row.clone()
                if tick is not None:
                    tick()
        return found

    def _as_message(self, text: str) -> str:
        if not self._converses:
            return text
        message = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def _means(self, users: Sequence[str], texts: Sequence[str]) -> Tensor:
        # A message holds its special tokens already.
        tokens = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, add_special_tokens=not self._converses
        ).to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        longest = min(self.tokenizer.model_max_length, self._positions())
        for user, length in zip(users, mask.sum(1).tolist(), strict=True):
            if length == 0:
                raise UserError(f"user {user!r}: the tokenizer of {self.name} finds no token in the profile's text")
            if length > longest:
                raise UserError(
                    f"user {user!r}: the profile's text has {length} tokens, {self.name} reads {longest}: give a "
                    "shorter --template; a cut text would lose what the user bans"
                )
        try:
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{self.name}: is not a model that reads text: {_first_line(error)}") from error
        return masked_mean(hidden, mask).cpu()

    @property
    def _converses(self) -> bool:
        return getattr(self.tokenizer, "chat_template", None) is not None

    def _positions(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
