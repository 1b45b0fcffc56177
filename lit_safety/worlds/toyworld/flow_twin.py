"""The toy world's flow twin: a rectified-flow transformer on the same scenes, in the layout of Stable Diffusion 3.

Autoencoder, tokenizer and text encoder are the toy pipeline's; only the transformer is trained, on the same scenes and
captions. SD3's pipeline reads two CLIP towers, and from each the output of the layer before the last. So the first
tower is the toy's text encoder with one more layer that changes nothing: then all of its real layers are used. The
second tower is the toy's text encoder as it is, of which only the first layer is used. There is no T5.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lit_safety.core.errors import UserError
from lit_safety.core.processes import check_count


def build_flow_twin(
    out: Path = Path("data/flowtwin"),
    work: Path = Path("runs/flowtwin"),
    toy: Path = Path("data/toyworld/pipeline"),
    minutes: float = 15.0,
    scenes: int = 60_000,
    batch_size: int = 64,
    processes: int = 1,
) -> None:
    """Build the toy world's flow twin: a rectified-flow transformer with the toy pipeline's other parts.

    A killed build continues where it stopped, and existing outputs are not made again. Outputs are never half-written.

    Args:
        out: folder for `pipeline/` and `world.json`.
        work: folder for scenes, latents and the state of the training; the scenes are those of a toy world's build.
        toy: the toy world's pipeline; its autoencoder, tokenizer and text encoder are used.
        minutes: wall time of the transformer's training.
        scenes: number of training scenes.
        batch_size: images in a step of each process.
        processes: how many processes draw scenes and train.
    """
    check_count(processes, "--processes")
    if scenes < 1000:
        raise UserError(f"scenes is {scenes}; it must be at least 1000")
    for name in ("vae", "text_encoder", "tokenizer"):
        if not (toy / name).is_dir():
            raise UserError(f"--toy {toy}: there is no {name}/; name the toy world's pipeline")
    target = out / "pipeline"
    if target.exists():
        print(f"{target} is there", flush=True)
        return
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    _prepare(work, toy, scenes, processes)

    from lit_safety.drawing.worlds import write_marker
    from lit_safety.worlds.denoiser import train_networks
    from lit_safety.worlds.toyworld.transformer import load_networks, write_pipeline

    train_networks(work, load_networks, "transformer", minutes, batch_size, lr=1.5e-3, world=processes)
    write_pipeline(work, target)
    write_marker(out, "toyworld", target)
    print(f"{target} is made", flush=True)


def _prepare(work: Path, toy: Path, scenes: int, processes: int) -> None:
    """The toy's parts, scenes, latents and token ids in the work folder."""
    import numpy as np
    from transformers import CLIPTokenizer

    from lit_safety.worlds.autoencoder import encode_all
    from lit_safety.worlds.denoiser import write_ids
    from lit_safety.worlds.toyworld.text import tokenize
    from lit_safety.worlds.toyworld.unet import make_scenes

    for name in ("vae", "text_encoder", "tokenizer"):
        if not (work / name).exists():
            shutil.copytree(toy / name, work / f"{name}.part", dirs_exist_ok=True)
            (work / f"{name}.part").rename(work / name)
    if not (work / "scenes.npz").exists():
        print("drawing scenes", flush=True)
        make_scenes(work, scenes, processes)
    if not (work / "latents.npy").exists():
        print("encoding them", flush=True)
        encode_all(work, np.load(work / "scenes.npz")["pictures"])
    if not (work / "ids.npy").exists():
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        captions = np.load(work / "scenes.npz")["captions"]
        ids = tokenize(tokenizer, captions.reshape(-1).tolist()).view(*captions.shape, -1)
        write_ids(work, ids, tokenize(tokenizer, [""])[0])
