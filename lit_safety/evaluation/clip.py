"""Any CLIP of transformers as two functions: pictures and texts to unit vectors of one space."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.errors import UserError
from lit_safety.tokenizers import check_tokenizer, check_tokenizer_files
from lit_safety.weights import TRANSFORMERS, check_whole, need_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor


def _commit(source: str, file: str) -> dict[str, Any]:
    """Where all files of a hub model are taken from: one commit, which a report can name; nothing for a folder."""
    if Path(source).exists():
        return {}
    from lit_safety.backbones.hub import hub_answers, hub_file

    return {"revision": hub_file(source, file).parent.name, "local_files_only": not hub_answers()}


class Clip:
    """A frozen CLIP, in fp32 on the CPU unless moved.

    Args:
        source: folder in the layout of `CLIPModel.save_pretrained` with its tokenizer and preprocessor, or a hub id.
        key: the option it was given by, for messages.
        device: where it runs.
        processor: folder or hub id of the tokenizer and preprocessor; None: those beside the weights.

    Raises:
        UserError: nothing is there, or it does not load as a CLIP.
    """

    def __init__(self, source: str, key: str, device: str | None = None, processor: str | None = None) -> None:
        from lit_safety.evaluation.fingerprint import fingerprint
        from lit_safety.evaluation.pipelines import quiet_libraries

        quiet_libraries()
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        folder = Path(source)
        if folder.exists() and not (folder / "config.json").is_file():
            raise UserError(
                f"{key} {source}: holds no config.json, so it is no CLIP; give what `save_pretrained` wrote"
            )
        if not folder.exists() and (source.count("/") != 1 or source.startswith((".", "/"))):
            raise UserError(f"{key} {source}: no such folder; give the folder of a transformers CLIP, or its hub id")
        try:
            # safetensors only: other weight files can run code when loaded
            where = _commit(source, "config.json")
            variant = need_weights(folder, TRANSFORMERS).variant if folder.exists() else None
            loaded: Any = CLIPModel.from_pretrained(
                source, use_safetensors=True, dtype="float32", variant=variant, output_loading_info=True, **where
            )
            model, report = loaded
            check_whole(model, report, source)
            self.model: Any = model.eval()
            beside = where if processor is None else _commit(processor, "preprocessor_config.json")
            words = Path(processor or source)
            if words.exists():
                check_tokenizer_files(words, AutoTokenizer, settings=False)  # lengths are the model's
            self.tokenizer: Any = AutoTokenizer.from_pretrained(processor or source, **beside)
            self.tokenizer.model_max_length = model.config.text_config.max_position_embeddings
            check_tokenizer(self.tokenizer, words, model.config.to_dict())
            self.preprocess: Any = CLIPImageProcessorPil.from_pretrained(processor or source, **beside)
        except Exception as error:  # transformers, safetensors and the hub raise all kinds for a folder that is no CLIP
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{key} {source}: does not load as a CLIP: {reason}") from error
        self.model.requires_grad_(False)
        if device is not None:
            self.model.to(device)
        self.length: int = self.model.config.text_config.max_position_embeddings
        self.settings: dict[str, Any] = {
            "clip": source,
            "sha256": fingerprint(folder) if folder.exists() else None,
            **({"revision": where["revision"]} if where else {}),
            "dimension": self.model.config.projection_dim,
            "text_length": self.length,
        }

    def images(self, images: Sequence[Image]) -> Tensor:
        """Unit vectors (B, d), float32 on the CPU, of RGB pictures."""
        pixels = self.preprocess([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        return self._unit(self.model.get_image_features, pixel_values=pixels)

    def texts(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Unit vectors (B, d), float32 on the CPU. A text beyond the encoder's length loses its tail, not the end.

        CLIP reads a text at the end token: without it the vector would be that of whatever word stands there.
        """
        import torch

        rows = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            tokens = self.tokenizer(part, padding=True, truncation=True, max_length=self.length, return_tensors="pt")
            wanted = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            rows.append(self._unit(self.model.get_text_features, **wanted))
        return torch.cat(rows)

    def _unit(self, features: Any, **inputs: Tensor) -> Tensor:
        import torch

        with torch.inference_mode():
            found = features(**{name: tensor.to(self.model.device) for name, tensor in inputs.items()})
        vectors = getattr(found, "pooler_output", found)
        return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()
