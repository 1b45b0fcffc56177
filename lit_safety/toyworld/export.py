"""The trained parts as a folder that plain `diffusers.StableDiffusionPipeline.from_pretrained` loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from lit_safety.toyworld.folders import swap_in
from lit_safety.toyworld.unet import load_networks, new_scheduler


def assemble(work: Path) -> Any:
    """The StableDiffusionPipeline with the averaged weights of unet.pt, float32."""
    networks = load_networks(work)
    state = torch.load(work / "unet.pt", weights_only=True)
    with torch.no_grad():
        for parameter, average in zip(networks.parameters(), state["average"], strict=True):
            parameter.copy_(average)
    networks.requires_grad_(False).eval()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=networks.text,
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=networks.unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export_pipeline(work: Path, target: Path) -> None:
    """Writes the pipeline in float16 safetensors, in one swap."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    assemble(work).to(torch.float16).save_pretrained(part, safe_serialization=True)
    for config in part.glob("*/config.json"):
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # where a part was loaded from says nothing to its user
        if "dtype" in settings:
            # Transformers loads a model in its config's type, diffusers in float32: without this a plain
            # from_pretrained mixes the two and cannot draw.
            settings["dtype"] = "float32"
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for file in part.rglob("*.safetensors"):
        file.chmod(0o644)
    swap_in(part, target)
