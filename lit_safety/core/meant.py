"""What somebody probably meant who wrote a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

#: Packages that a YAML may well name and that need not be there -> what installs them.
INSTALLED_BY = {
    "bitsandbytes": "bitsandbytes",
    "comet_ml": "comet-ml",
    "deepspeed": "deepspeed",
    "lion_pytorch": "lion-pytorch",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "nudenet": "nudenet",
    "prodigyopt": "prodigyopt",
    "torch_fidelity": "torch-fidelity",
    "torch_optimizer": "torch-optimizer",
    "torchao": "torchao",
    "transformer_engine": "transformer-engine",
    "wandb": "wandb",
}


def did_you_mean(word: str, names: Iterable[str], listed: bool = True) -> str:
    """`; did you mean ...?`, or what there is, or nothing, to be put behind a complaint.

    Args:
        word: what was written.
        names: what could have been.
        listed: tell the names where none is close.
    """
    names = list(dict.fromkeys(names))
    close = difflib.get_close_matches(word, names, 2, 0.7 if len(word) > 4 else 0.6)
    if not close:  # `LR` for `lr`
        close = [name for name in names if name.casefold() == word.casefold()]
    if close:
        return f"; did you mean {' or '.join(repr(one) for one in close)}?"
    return f"; there are {', '.join(names)}" if listed and 0 < len(names) <= 60 else ""


def no_package(path: str) -> str:
    """What to do about a class whose package is nowhere: a package that is known is to be installed, any other name is
    taken for the user's own file.

    Args:
        path: the class, with its package.
    """
    package = path.partition(".")[0]
    if package in INSTALLED_BY:
        return f"{path} is of the package {package}, which is not installed: `pip install {INSTALLED_BY[package]}`"
    like = did_you_mean(package, _modules_here(), listed=False)
    return (
        f"{path}: there is no {package}.py and no folder {package} in the working folder {Path.cwd()}, and no "
        f"installed package of that name{like or '; run where your file is, or name its folder in PYTHONPATH'}"
    )


def _modules_here() -> list[str]:
    try:
        here = list(Path.cwd().iterdir())
    except OSError:
        return []
    return ["lit_safety", "torch", "lightning", *(one.stem for one in here if one.suffix == ".py" or one.is_dir())]
