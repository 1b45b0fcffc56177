"""Hashes of what decides the content of a cache, computed from a pipeline's files without loading its networks.

A cache of latents and text is only right for the encoders that made it, a reference cache also only for the denoiser
and the noise schedule. For a network, all of every tensor counts (`lit_safety.hashes`), and the settings in its
config.json that change its numbers, with its class's defaults filled in. It does not matter how the tensors are split
into files, and settings for other purposes do not count, so a copy that was saved again keeps its caches. A tokenizer
is loaded, and what it does counts, independent of its files.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from lit_safety.backbones.pipeline_index import LIBRARIES, pipeline_index
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import tensor_hashes
from lit_safety.core.text import load_json
from lit_safety.core.weights import is_hidden, weight_files

#: Settings of transformers' networks that have no effect on encoding: who saved the file and how, what only training
#: and text generation need, and the class name, which the pipeline's index gives.
IDLE_TEXT = {
    *("_name_or_path", "name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"),
    *("_commit_hash", "_attn_implementation_autoset", "tokenizer_class", "vocab_size", "model_type"),
    *("attention_dropout", "dropout", "dropout_rate", "classifier_dropout", "hidden_dropout", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "gradient_checkpointing", "initializer_range", "initializer_factor"),
    *("logit_scale_init_value", "task_specific_params", "problem_type", "id2label", "label2id", "n_positions"),
    *("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "num_decoder_layers", "is_decoder"),
    *("is_encoder_decoder", "add_cross_attention", "use_cache", "scale_decoder_outputs", "tie_word_embeddings"),
    *("tie_encoder_decoder", "output_past", "output_attentions", "output_hidden_states", "return_dict"),
    *("use_return_dict", "chunk_size_feed_forward", "projection_dim"),
}
#: The same of a network of diffusers: sizes that a pipeline draws at when none is given, and precautions for half
#: precision.
IDLE_NETWORKS = {
    "AutoencoderKL": {"sample_size", "force_upcast", "up_block_types"},
    "UNet2DConditionModel": {"sample_size", "dropout"},
}
#: What of a scheduler's configuration decides noise, timesteps and target in training. The rest is about drawing.
PROCESS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "shift",
    "use_dynamic_shifting",
)
#: The same of a process of flow matching, where its shift stands besides `shift`.
FLOW_PROCESS = ("flow_shift", "use_flow_sigmas")
DYNAMIC_PROCESS = (
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type", "shift_terminal"),
)
#: The settings of the image encoder that scale its output for the denoiser.
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
#: Files that hold a tokenizer's words.
WORDS = ("vocab.json", "tokenizer.json")
#: The value for a component that the pipeline's index says it does not contain.
ABSENT = "absent"


def part_hashes(source: str, parts: Sequence[str]) -> dict[str, str]:
    """Hashes of the ``parts`` of a pipeline by name, 16 hexadecimal digits each; parts without files are left out, and
    those that the pipeline does not contain are `absent`.

    Raises:
        UserError: there is no pipeline at ``source``, or a file of it is damaged.
    """
    index = pipeline_index(source)
    hashes = {
        part: _part_hash(index.folder / part, index.components[part]) if part in index.components else ABSENT
        for part in parts
    }
    return {part: found for part, found in hashes.items() if found is not None}


def reference_hashes(source: str, denoiser: str) -> dict[str, str]:
    """What decides the reference's errors in addition to latents and text.

    These are hashes of the ``denoiser``, of the noise schedule (`scheduler`) and of how latents are scaled (`latent
    scaling`).

    Raises:
        UserError: as `part_hashes`.
    """
    index = pipeline_index(source)
    found = part_hashes(source, [denoiser, "scheduler"])
    if "vae" in index.components:
        settings = _network_settings(index.folder / "vae", index.components["vae"])
        scaling = {name: settings[name] for name in SCALING if name in settings}
        found["latent scaling"] = _hash([json.dumps(scaling, sort_keys=True)])
    return found


def _part_hash(folder: Path, kind: tuple[str, str]) -> str | None:
    if folder.name == "scheduler":
        stated = _process(folder, kind)
        return _hash([json.dumps(stated, sort_keys=True)]) if stated else None
    if folder.name.startswith("tokenizer"):
        words = any(
            file.suffix in (".txt", ".model") or file.name in WORDS for file in folder.glob("*") if not is_hidden(file)
        )
        return _hash([json.dumps(_tokenizer(folder, kind), sort_keys=True)]) if words else None
    if not (weights := weight_files(folder)):
        return None
    lines = sorted(line for file in weights for line in tensor_hashes(file))
    return _hash([*lines, json.dumps(_network_settings(folder, kind), sort_keys=True, default=str)])


def _hash(lines: Sequence[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for line in lines:
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _class(kind: tuple[str, str]) -> Any:
    """The class of a component; None: the library has no such class."""
    return getattr(import_module(kind[0]), kind[1], None) if kind[0] in LIBRARIES else None


def _stated(file: Path, read: Callable[[str], Any] = load_json) -> dict[str, Any]:
    """A file's JSON object; empty if the file does not exist."""
    try:
        stated = read(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(stated, dict):
        raise UserError(f"{file} is not a readable configuration: it holds no JSON object")
    return stated


def _network_settings(folder: Path, kind: tuple[str, str]) -> dict[str, Any]:
    """The settings in a network's config.json that change its numbers and differ from its class's defaults."""
    file, found = folder / "config.json", _class(kind)
    stated = _stated(file)
    if not stated or found is None:
        return {}
    if (config_class := getattr(found, "config_class", None)) is not None:
        try:
            config = config_class.from_pretrained(folder, local_files_only=True).to_dict()
            default = config_class().to_dict()
        except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
            told = " ".join(str(error).split())
            raise UserError(f"{file} is not a readable configuration: {told}") from error
        idle = IDLE_TEXT
    else:
        parameters = inspect.signature(found.__init__).parameters.items()
        default = {name: one.default for name, one in parameters if one.default is not one.empty}
        config = {name: stated[name] for name, _ in parameters if name in stated}
        idle = IDLE_NETWORKS.get(kind[1], set())
    # A tuple as default becomes a list in the file.
    default = _without(json.loads(json.dumps(default, default=str)), idle)
    config = _without(json.loads(json.dumps(config, default=str)), idle)
    return {name: value for name, value in config.items() if value != default.get(name)}


def _without(value: Any, idle: set[str]) -> Any:
    """Settings without those that have no effect, also in parts of a network (`text_config`)."""
    if not isinstance(value, dict):
        return value
    return {name: _without(one, idle) for name, one in value.items() if name not in idle}


def _process(folder: Path, kind: tuple[str, str]) -> dict[str, Any]:
    """The settings of a scheduler that decide training, with its class's defaults filled in.

    Settings that are off are left out, so that schedulers of the same process are equal.
    """
    found = _class(kind)
    # Infinite limits of samplers, as diffusers writes them, have no effect here.
    stated = _stated(folder / "scheduler_config.json", json.loads)
    if stated and found is not None:
        parameters = inspect.signature(found.__init__).parameters.items()
        default = {name: one.default for name, one in parameters if one.default is not one.empty}
        stated = {**default, **stated}
    counted = [*PROCESS, *(FLOW_PROCESS if stated.get("use_flow_sigmas") else ())]
    counted += DYNAMIC_PROCESS if stated.get("use_dynamic_shifting") else ()
    return {name: stated[name] for name in counted if stated.get(name) not in (None, False)}


def _tokenizer(folder: Path, kind: tuple[str, str]) -> dict[str, Any]:
    """Everything that decides a tokenizer's result: words and rules, special tokens, length and sides."""
    found = _class(kind)
    try:
        tokenizer = found.from_pretrained(folder, local_files_only=True)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = {} if backend is None else json.loads(backend.to_str())
    except Exception as error:  # transformers and tokenizers raise many kinds of errors for wrong files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: its tokenizer does not load: {reason}") from error
    for name in ("version", "padding", "truncation"):  # what a call sets again
        words.pop(name, None)
    if not words:  # a tokenizer written in Python: its files decide what it does
        files = [file for file in sorted(folder.iterdir()) if file.suffix in (".txt", ".model") or file.name in WORDS]
        words = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        words["settings"] = _stated(folder / "tokenizer_config.json")
    template = getattr(tokenizer, "chat_template", None)
    return {
        **({} if template is None else {"template": template}),
        "words": words,
        "special": special,
        "pad": tokenizer.pad_token_id,
        "length": tokenizer.model_max_length,
        "sides": [tokenizer.padding_side, tokenizer.truncation_side],
        "split": bool(getattr(tokenizer, "split_special_tokens", False)),
    }
