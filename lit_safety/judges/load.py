"""A judge described by a small YAML or JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lit_safety.core.classes import object_from_file
from lit_safety.core.errors import UserError
from lit_safety.core.shipped import shipped
from lit_safety.core.text import load_json, read_text
from lit_safety.judges.judge import Judge
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge

if TYPE_CHECKING:
    pass


def judge_from_file(file: Path) -> Judge:
    """The judge that `file` describes, such as configs/judges/q16.yaml. Paths in it are relative to where you are.

    Raises:
        UserError: the file is unreadable, describes no judge, or the judge's weights are missing.
    """
    return object_from_file(file, Judge, "--judge", "configs/judges/*")


# The judge that a folder or a file describes.


def load_judge(spec: str) -> Judge:
    """The judge that `spec` names: a folder (toy-world judge, cost model, CLIP), or a file as in configs/judges.

    Raises:
        UserError: no such folder or file, or one that holds no judge.
    """
    folder = Path(shipped(spec))
    config = folder / "config.json"
    if folder.is_file() and folder.suffix in (".yaml", ".yml", ".json"):
        return judge_from_file(folder)
    if not folder.is_dir():
        raise UserError(
            f"--judge {spec}: no such folder; give the folder of a judge, such as data/toyworld/judge, or a file such "
            "as configs/judges/q16.yaml"
        )
    if not config.is_file():
        raise UserError(f"--judge {spec}: the folder holds no config.json, so it is not a judge")
    try:
        keys = load_json(read_text(config))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--judge {config}: cannot be read as JSON ({error})") from error
    from lit_safety.cost_model.files import is_cost_model

    if is_cost_model(keys):
        from lit_safety.judges.cost import CostJudge

        return CostJudge(folder)
    if isinstance(keys, dict) and keys.get("model_type") == "clip":
        from lit_safety.judges.clip import ZeroShotClip

        return ZeroShotClip(spec)
    if not isinstance(keys, dict) or not {"labels", "harm"} <= keys.keys():
        raise UserError(f"--judge {config}: has no keys `labels` and `harm`, so it describes no judge")
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"--judge {spec}: the weights model.safetensors are missing; copy the whole folder")
    from safetensors import SafetensorError

    try:
        return _of_world(str(keys.get("world", ToyJudge.world)), spec)(folder)
    except SafetensorError as error:
        raise UserError(f"--judge {spec}: model.safetensors is damaged ({error}); copy the folder again") from error


def _of_world(world: str, spec: str) -> type[ToyWorldJudge]:
    if world == ToyJudge.world:
        return ToyWorldJudge
    from lit_safety.judges.art.judge import ArtJudge, ArtWorldJudge

    if world == ArtJudge.world:
        return ArtWorldJudge
    known = f"{ToyJudge.world} and {ArtJudge.world}"
    raise UserError(f"--judge {spec}: config.json says world {world!r}; known are {known}")
