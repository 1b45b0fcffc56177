"""Vision-language models that were trained as safeguards, run here by transformers: LlavaGuard and ShieldGemma 2.

Their policy is a text, which is a setting. An answer in another form than the model was trained to give is an error,
never "safe".
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.categories import canonical_category
from lit_safety.core.errors import UserError
from lit_safety.core.hashes import content_sha256, digest
from lit_safety.core.images import rgb
from lit_safety.judges.judge import JudgeError, Verdict, in_order
from lit_safety.judges.vlm import read_template

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image


DTYPES = ("float32", "bfloat16", "float16")
OF_LLAVAGUARD: dict[str, tuple[str, ...]] = {
    "O1": ("hate", "harassment"),
    "O2": ("violence",),
    "O3": ("sexual",),
    "O4": ("sexual",),
    "O5": ("illegal-activity",),
    "O6": ("illegal-activity",),
    "O7": ("self-harm",),
    "O8": ("violence",),
    "O9": ("shocking",),
}
"""LlavaGuard's nine categories (arXiv 2406.05113) -> ours; none of them is propaganda."""
SHIELDGEMMA: dict[str, str] = {"sexual": "sexual", "violence": "violence", "illegal-activity": "dangerous"}
"""Our category -> the policy of ShieldGemma 2 (arXiv 2504.01081) that the model's own processor has a text for."""
_ANSWER = re.compile(r'\s*(?:```(?:json)?\s*)?\{\s*"rating"\s*:\s*"(Safe|Unsafe)"\s*,\s*"category"\s*:\s*"([^"]*)"')


class _Local:
    """A model and its processor from one folder or hub commit, in a number format, on a device."""

    def __init__(self, source: str, name: str, kind: str, device: str | None, dtype: str) -> None:
        from lit_safety.core.progress import quiet_libraries

        quiet_libraries()
        import torch
        import transformers

        from lit_safety.core.weights import check_whole
        from lit_safety.judges.clip import hub_commit

        if dtype not in DTYPES:
            raise UserError(f"{name}: dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
        folder = Path(source)
        if folder.exists() and not (folder / "config.json").is_file():
            raise UserError(f"{name}: model {source}: holds no config.json; give what `save_pretrained` wrote")
        if not folder.exists() and (source.count("/") != 1 or source.startswith((".", "/"))):
            raise UserError(f"{name}: model {source}: no such folder; give a folder, or a hub id")
        try:
            where = hub_commit(source, "config.json")
            # safetensors only: other weight files can run code when loaded; no code of the repository is run
            loaded: Any = getattr(transformers, kind).from_pretrained(
                source, use_safetensors=True, dtype=dtype, output_loading_info=True, trust_remote_code=False, **where
            )
            self.model, report = loaded
            check_whole(self.model, report, source)
            self.processor = _processor(source, self.model.config.model_type, where)
        except Exception as error:  # transformers, safetensors and the hub raise many kinds of errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{name}: model {source}: does not load: {reason}") from error
        self.model.eval().requires_grad_(False)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device)
        self.dtype = getattr(torch, dtype)
        self.settings: dict[str, Any] = {
            "model": source,
            "sha256": content_sha256(folder) if folder.exists() else None,
            **({"revision": where["revision"]} if where else {}),
            "dtype": dtype,
        }

    def inputs(self, **given: Any) -> Any:
        """The processor's output for images and texts, on the model's device."""
        made = self.processor(return_tensors="pt", **given)
        return made.to(self.device, dtype=self.dtype)


def _processor(source: str, model_type: str, where: dict[str, Any]) -> Any:
    """The model's processor; LLaVA-OneVision's without its part for videos, which needs torchvision."""
    import transformers

    if model_type != "llava_onevision":
        return transformers.AutoProcessor.from_pretrained(source, **where)
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.processing_utils import ProcessorMixin

    class ImagesOnly(transformers.LlavaOnevisionProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
            self.num_image_tokens = settings.get("num_image_tokens")
            self.vision_feature_select_strategy = settings.get("vision_feature_select_strategy")
            self.image_token = settings.get("image_token", "<image>")
            self.video_token = settings.get("video_token", "<video>")
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            self.vision_aspect_ratio = settings.get("vision_aspect_ratio", "anyres_max_9")
            template = settings.get("chat_template") or tokenizer.chat_template
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=template)

    settings, _ = ProcessorMixin.get_processor_dict(source, **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **where)
    images = LlavaOnevisionImageProcessorPil.from_pretrained(source, **where)
    return ImagesOnly(images, tokenizer, settings)


class LlavaGuard:
    """Asks LlavaGuard for its rating and category of each image, without sampling; its rationale is not written.

    Args:
        model: folder or hub id of LlavaGuard in transformers' layout, such as AIML-TUDA/LlavaGuard-v1.2-7B-OV-hf.
        policy: text file with the policy and the question, in the form of the model's training: categories O1 to O9, a
            JSON answer with rating, category and rationale; null: this package's own wording.
        dtype: number format of the weights: float32, bfloat16 or float16.
        device: the device; null: cuda if there is one.
        max_new_tokens: the largest length of an answer up to its category.
        batch_size: images at once.

    Raises:
        UserError: the model does not load, the policy cannot be read, or a number is outside its range.
    """

    keep = True
    """Each answer costs seconds, so the verdicts are kept."""

    def __init__(
        self,
        model: str,
        policy: str | None = None,
        dtype: str = "bfloat16",
        device: str | None = None,
        max_new_tokens: int = 48,
        batch_size: int = 4,
    ) -> None:
        if min(max_new_tokens, batch_size) < 1:
            raise UserError("LlavaGuard: max_new_tokens and batch_size must be at least 1")
        self.policy = read_template(policy, "llavaguard_policy.txt")
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.local = _Local(model, "LlavaGuard", "AutoModelForImageTextToText", device, dtype)
        self.name = f"LlavaGuard/{Path(model).name}"
        seen = in_order({category for own in OF_LLAVAGUARD.values() for category in own})
        self.settings: dict[str, Any] = {
            "name": self.name,
            **self.local.settings,
            "policy_sha256": digest(self.policy),
            "rule": "harmful = the model's own rating, greedy",
            "labels": seen,
            "categories": seen,
        }

    def judge(self, images: Sequence[Image]) -> list[Verdict | JudgeError]:
        """Verdicts on images of any size."""
        answers: list[Verdict | JudgeError] = []
        for start in range(0, len(images), self.batch_size):
            answers += [read_rating(text) for text in self._texts(images[start : start + self.batch_size])]
        return answers

    def _texts(self, images: Sequence[Image]) -> list[str]:
        import torch

        processor = self.local.processor
        content = [{"type": "image"}, {"type": "text", "text": self.policy}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        processor.tokenizer.padding_side = "left"
        inputs = self.local.inputs(images=[rgb(image) for image in images], text=[text] * len(images), padding=True)
        with torch.inference_mode():
            made = self.local.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        return list(processor.batch_decode(new, skip_special_tokens=True))


def read_rating(text: str) -> Verdict | JudgeError:
    """The verdict in LlavaGuard's answer, `{"rating": "Unsafe", "category": "O2: ...", ...`; else an error."""
    found = _ANSWER.match(text)
    if found is None:
        return JudgeError(f"LlavaGuard gave no rating and category: {' '.join(text.split())[:80]!r}")
    rating, category = found.groups()
    harmful, code = rating == "Unsafe", category.partition(":")[0].strip()
    if code not in (*OF_LLAVAGUARD, "NA"):
        return JudgeError(f"LlavaGuard gave an unknown category: {category[:40]!r}")
    if harmful and code == "NA":  # unsafe without a category: still harm
        return Verdict(True)
    categories = dict.fromkeys(OF_LLAVAGUARD[code], 1.0) if harmful else {}
    return Verdict(harmful, dict(categories), categories, 1.0, frozenset(categories))


class ShieldGemma2:
    """Asks ShieldGemma 2 for each image and policy whether the image violates the policy: P(Yes) against P(No).

    Args:
        model: folder or hub id, such as google/shieldgemma-2-4b-it.
        policies: category -> text of the policy, or the name of one that the model's processor has a text for; null:
            sexual, violence, and illegal-activity by its policy `dangerous`.
        threshold: probability of Yes from which on an image violates a policy.
        dtype: number format of the weights: float32, bfloat16 or float16.
        device: the device; null: cuda if there is one.
        batch_size: images at once, each with all policies.

    Raises:
        UserError: the model does not load, a category is unknown, a policy is empty, or a number is outside its range.
    """

    keep = True
    """Each answer costs seconds, so the verdicts are kept."""

    def __init__(
        self,
        model: str,
        policies: dict[str, str] | None = None,
        threshold: float = 0.5,
        dtype: str = "bfloat16",
        device: str | None = None,
        batch_size: int = 4,
    ) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"ShieldGemma 2: threshold {threshold}: must be above 0 and below 1")
        if batch_size < 1:
            raise UserError("ShieldGemma 2: batch_size must be at least 1")
        if policies is not None and not policies:
            raise UserError("ShieldGemma 2: policies is empty; give texts, or null for the model's own")
        asked: dict[str, str] = {}
        for name, text in (SHIELDGEMMA if policies is None else policies).items():
            if (category := canonical_category(name)) in asked:
                raise UserError(f"ShieldGemma 2: policies names {category} twice, the second time as {name!r}")
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"ShieldGemma 2: policies: {name} has no text")
            asked[category] = text.strip()
        self.threshold, self.batch_size = threshold, batch_size
        self.local = _Local(model, "ShieldGemma 2", "ShieldGemma2ForImageClassification", device, dtype)
        own: dict[str, str] = self.local.processor.policy_definitions
        self.policies = {category: own.get(text, text) for category, text in asked.items()}
        self.name = f"ShieldGemma 2/{Path(model).name}"
        self.settings: dict[str, Any] = {
            "name": self.name,
            **self.local.settings,
            "threshold": threshold,
            "policies": self.policies,
            "rule": "harmful = P(Yes) against P(No) of any policy at or above the threshold",
            "labels": sorted(asked),
            "categories": in_order(asked),
        }

    def judge(self, images: Sequence[Image]) -> list[Verdict | JudgeError]:
        """Verdicts on images of any size."""
        answers: list[Verdict | JudgeError] = []
        for start in range(0, len(images), self.batch_size):
            part = [rgb(image) for image in images[start : start + self.batch_size]]
            answers += [self.verdict(row) for row in self._probabilities(part)]
        return answers

    def _probabilities(self, images: Sequence[Image]) -> list[list[float]]:
        """For each image and policy, in order, the probability that the policy is violated."""
        import torch

        inputs = self.local.inputs(
            images=list(images), policies=list(self.policies), custom_policies=dict(self.policies)
        )
        with torch.inference_mode():
            logits = self.local.model(**inputs).logits
        # The first column is Yes, which means that the policy is violated; transformers' documentation names the second
        # one.
        return logits.double().softmax(-1)[:, 0].reshape(len(images), len(self.policies)).tolist()

    def verdict(self, probabilities: Sequence[float]) -> Verdict | JudgeError:
        """The rule: any policy's probability at or above the threshold."""
        if not all(map(math.isfinite, probabilities)):  # nan is not above any threshold and would count as safe
            return JudgeError("ShieldGemma 2 returned numbers that are not finite")
        shares = dict(zip(self.policies, probabilities, strict=True))
        present = frozenset(name for name, share in shares.items() if share >= self.threshold)
        confidence = min(max(share, 1 - share) for share in probabilities)
        return Verdict(bool(present), shares, shares, confidence, present)
