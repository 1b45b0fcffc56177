"""A profile as numbers, by a text model or without any model.

A text model reads the profile's text: the embedding is the mean of its last hidden state over the text's tokens.
Personalized Safety Alignment (arXiv 2508.01151) takes Qwen/Qwen2.5-7B-Instruct (3,584 numbers). Fields of the text are
named and filled as in its published template, which fits too: its adapters expect a user's lists to be written as a
Python list of Sage's names, `['Sexuality', 'Violence']`.

The default, where no text model is at hand, is the profile's multi-hot through one fixed random projection. As in a
text model's embedding, the directions of traits and bans mean nothing by themselves: an adapter must learn them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_safety.core.categories import CATEGORIES
from lit_safety.core.errors import UserError
from lit_safety.core.text import decode_text
from lit_safety.core.tokenizers import check_tokenizer, check_tokenizer_files
from lit_safety.core.weights import TRANSFORMERS, check_whole, need_weights
from lit_safety.users.profiles import VALUES, Profile, check_traits

_FIELD = re.compile(r"<<([A-Z_]+)>>")
_MAX_BYTES = 1 << 16
#: Fields of a template. The last two are ours: the lists in plain words.
FIELDS = (
    "AGE", "AGE_GROUP", "GENDER", "RELIGION", "PHYSICAL", "MENTAL", "BANNED", "ALLOWED", "BANNED_WORDS",
    "ALLOWED_WORDS",
)  # fmt: skip


def read_template(path: str | Path | None = None) -> str:
    """A template's text; None: the one of this package.

    Raises:
        UserError: it cannot be read, names an unknown field, or does not name any field.
    """
    if path is None:
        return (resources.files("lit_safety.users") / "templates" / "profile.txt").read_text("utf-8")
    try:
        with open(path, "rb") as file:
            text = decode_text(file.read(_MAX_BYTES + 1), str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    named = _FIELD.findall(text)
    known = ", ".join(f"<<{name}>>" for name in FIELDS)
    if unknown := [name for name in named if name not in FIELDS]:
        raise UserError(f"{path}: unknown field <<{unknown[0]}>>; known are {known}")
    if not named or len(text) > _MAX_BYTES:
        raise UserError(f"{path}: is not a template of a profile: it must name one of {known}, and have at most 64 KiB")
    return text


def fill(template: str, profile: Profile, none_as_nan: bool = False) -> str:
    """The template's text with this profile's values.

    Args:
        template: as `read_template` gives it.
        profile: the profile.
        none_as_nan: write `nan` for a trait that is "None", as in the published texts: they were filled from a table
            that pandas had read, which treats "None" as a missing value.
    """

    def trait(text: str) -> str:
        return "nan" if none_as_nan and text == "None" else text

    values = {
        "AGE": str(profile.age),
        "AGE_GROUP": trait(profile.age_group),
        "GENDER": trait(profile.gender),
        "RELIGION": trait(profile.religion),
        "PHYSICAL": trait(profile.physical_condition),
        "MENTAL": trait(profile.mental_condition),
        "BANNED": _as_published(profile.banned),
        "ALLOWED": _as_published(profile.allowed),
        # An empty list is written as a word, because an empty line would not be clear.
        "BANNED_WORDS": ", ".join(profile.banned) or "nothing",
        "ALLOWED_WORDS": ", ".join(profile.allowed) or "nothing",
    }
    # In one pass: a value that looks like a field is not filled in again.
    return _FIELD.sub(lambda match: values[match[1]], template)


def _as_published(categories: Sequence[str]) -> str:
    """The list as in Sage's users.csv: names with capitals, in alphabetical order."""
    return str(sorted("Sexuality" if name == "sexual" else name.title() for name in categories))


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are not padding, in fp32: (B, L, D), (B, L) of ones and zeros -> (B, D)."""
    weights = mask.to(hidden.device).unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


class TextModel:
    """Any text model that transformers' AutoModel loads from safetensors, without custom code.

    Encoders (BERT), decoders (Qwen), and the text half of models with two halves (T5, CLIP).

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
        # A pooling head is not used, and many files lack it.
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
        ) as error:  # torch's errors about a device that does not exist
            raise UserError(f"--device {device}: {name} cannot be put there: {_first_line(error)}") from error
        # Padding comes after the text, so that its tokens have the same positions in any batch; the mask excludes it.
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

        A model that was trained on conversations gets the text as a user's message, as published.

        Raises:
            UserError: a text is too long for the model, or its embedding is not finite; names the user. Or the model
                cannot read text.
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
        # A message already holds its special tokens.
        tokens = self.tokenizer(
            list(texts), return_tensors="pt", padding=True, add_special_tokens=not self._converses
        ).to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        longest = min(self.tokenizer.model_max_length, self._positions())
        for user, length in zip(users, mask.sum(1).tolist(), strict=True):
            if length == 0:
                raise UserError(f"user {user!r}: the tokenizer of {self.name} makes 0 tokens from the profile's text")
            if length > longest:
                raise UserError(
                    f"user {user!r}: the profile's text has {length} tokens, but {self.name} reads {longest}: give a "
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


SEED = 20250801
#: The adapter must respect bans, but they are only eight of 33 numbers. So they get a larger weight than traits.
BAN_WEIGHT = 3.0
#: One number for each value of each trait and for each category that is banned.
SIZE = sum(len(values) for values in VALUES.values()) + len(CATEGORIES)


def multi_hot(profile: Profile) -> Tensor:
    """1 for each of the profile's traits, `BAN_WEIGHT` for each of its banned categories, else 0: (SIZE,), float32.

    Raises:
        UserError: a trait is not one of the known values; names the user.
    """
    traits = {field: getattr(profile, field) for field in VALUES}
    try:
        check_traits(traits)
    except UserError as error:
        raise UserError(f"user {profile.user_id!r}: {error}; a text model (--model) reads any profile") from error
    hot = [float(traits[field] == value) for field, values in VALUES.items() for value in values]
    return torch.tensor(hot + [BAN_WEIGHT * (name in profile.banned) for name in CATEGORIES])


def project(profiles: Iterable[Profile], dimension: int = 64, seed: int = SEED) -> dict[str, Tensor]:
    """Embeddings (dimension,) by user id: the multi-hot times a fixed Gaussian matrix, the same in every release."""
    if dimension < 1:
        raise UserError(f"dimension must be at least 1, not {dimension}")
    # numpy's compatibility policy fixes the streams of RandomState, but not those of Generator; torch's may change too.
    matrix = np.random.RandomState(seed).standard_normal((SIZE, dimension)) / np.sqrt(SIZE)
    projection = torch.from_numpy(matrix).float()
    return {profile.user_id: multi_hot(profile) @ projection for profile in profiles}
