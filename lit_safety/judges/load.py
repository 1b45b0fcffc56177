"""A judge, or a scorer, described by a folder or by a small YAML or JSON file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_safety.core.errors import UserError
from lit_safety.core.own_classes import attributes_lacking
from lit_safety.core.shipped import shipped
from lit_safety.core.text import load_json, load_yaml, read_text
from lit_safety.judges.judge import Judge
from lit_safety.judges.toy.judge import ToyJudge, ToyWorldJudge

if TYPE_CHECKING:
    pass


def object_from_file(file: Path, protocol: Any, option: str, examples: str) -> Any:
    """The object that `file` describes by `class_path` and `init_args`.

    Args:
        file: YAML or JSON.
        protocol: the protocol of its class.
        option: the option it was given by, for messages.
        examples: example files, for messages.

    Raises:
        UserError: the file is unreadable or does not describe such an object, or making it failed.
    """
    import yaml

    from lit_safety.core.parsing import SingleLineErrorParser, shorten

    try:
        keys: Any = load_yaml(read_text(file), str(file))
    except UserError as error:
        raise UserError(f"{option} {error}" if str(file) in str(error) else f"{option} {file}: {error}") from error
    except OSError as error:
        raise UserError(f"{option} {file}: cannot be read ({error.strerror})") from error
    except (RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{option} {file}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(keys, dict) or "class_path" not in keys or keys.keys() - {"class_path", "init_args"}:
        raise UserError(f"{option} {file}: must hold only `class_path` and `init_args`, as {examples}")
    parser = SingleLineErrorParser(exit_on_error=False)
    parser.add_argument(option, type=protocol)
    name = option.removeprefix("--")
    try:
        parsed = parser.parse_object({name: keys})
    except UserError as error:
        raise UserError(f"{option} {file}: {shorten(str(error))}") from error
    try:
        made = parser.instantiate(parsed)[name]
    except UserError as error:
        raise UserError(f"{option} {file}: {error}") from error
    if (lack := attributes_lacking(made, protocol)) is not None:
        raise UserError(f"{option} {file}: {keys['class_path']} {lack}")
    return made


def judge_from_file(file: Path) -> Judge:
    """The judge that `file` describes, such as configs/judges/q16.yaml. Paths in it are relative to the working folder.

    Raises:
        UserError: the file is unreadable, does not describe a judge, or the judge's weights are missing.
    """
    return object_from_file(file, Judge, "--judge", "configs/judges/*")


# The judge that a folder or a file describes.


def load_judge(spec: str) -> Judge:
    """The judge that `spec` names: a folder (toy-world judge, cost model, CLIP), or a file as in configs/judges.

    Raises:
        UserError: there is no such folder or file, or it is not a judge.
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
        raise UserError(f"--judge {spec}: the folder lacks config.json, so it is not a judge")
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
        raise UserError(f"--judge {config}: lacks the keys `labels` and `harm`, so it does not describe a judge")
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
