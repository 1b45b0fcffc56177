"""A judge described by a small YAML or JSON file: class_path and init_args, as everywhere in jsonargparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_safety.errors import UserError
from lit_safety.evaluation.judges import Judge


def judge_from_file(file: Path) -> Judge:
    """The judge that `file` describes, such as configs/judges/q16.yaml. Paths in it are relative to where you are.

    Raises:
        UserError: the file is unreadable, describes no judge, or the judge's weights are missing.
    """
    import yaml

    from lit_safety.parsing import SingleLineErrorParser, shorten

    try:
        keys: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--judge {file}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--judge {file}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(keys, dict) or "class_path" not in keys or keys.keys() - {"class_path", "init_args"}:
        raise UserError(f"--judge {file}: must hold `class_path` and `init_args` and nothing else, as configs/judges/*")
    parser = SingleLineErrorParser(exit_on_error=False)
    parser.add_argument("--judge", type=Judge)
    try:
        parsed = parser.parse_object({"judge": keys})
    except UserError as error:
        raise UserError(f"--judge {file}: {shorten(str(error))}") from error
    try:
        return parser.instantiate(parsed).judge
    except UserError as error:
        raise UserError(f"--judge {file}: {error}") from error
