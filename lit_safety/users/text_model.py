"""A profile's text as numbers: the mean of a text model's last hidden state over the text's tokens.

Source: Personalized Safety Alignment (arXiv 2508.01151), which takes Qwen/Qwen2.5-7B-Instruct (3,584 numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_safety.errors import UserError


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are no padding, in fp32: (B, L, D), (B, L) of ones and zeros -> (B, D)."""
    weights = mask.to(hidden.device).unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


class TextModel:
    """Any text model that transformers' AutoModel loads, from safetensors and without code of its own.

    Args:
        name: a folder, or a hub id.
        device: where to compute, such as "cuda"; None: a GPU if there is one.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        options: dict[str, Any] = {"trust_remote_code": False}
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
            self.model: Any = AutoModel.from_pretrained(name, use_safetensors=True, dtype="auto", **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(
                f"{name}: is no text model that can be loaded ({' '.join(str(error).split())[:300]}); give a folder "
                "with config.json, safetensors and tokenizer, or a hub id"
            ) from error
        self.model = self.model.to(self.device).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

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
            UserError: a text is longer than the model reads, or its embedding is not finite; names the user.
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
        if getattr(self.tokenizer, "chat_template", None) is None:
            return text
        message = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def _means(self, users: Sequence[str], texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(texts), return_tensors="pt", padding=True).to(self.device)
        lengths = tokens["attention_mask"].sum(1).tolist()
        longest = min(self.tokenizer.model_max_length, self._positions())
        for user, length in zip(users, lengths, strict=True):
            if length > longest:
                raise UserError(
                    f"user {user!r}: the profile's text has {length} tokens, {self.name} reads {longest}: give a "
                    "shorter --template; a cut text would lose what the user bans"
                )
        return masked_mean(self.model(**tokens).last_hidden_state, tokens["attention_mask"]).cpu()

    def _positions(self) -> int:
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30))
