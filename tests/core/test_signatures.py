"""What classes take, read from source: the same names as the classes themselves have, and nothing claimed in doubt."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from lit_safety.core.signatures import Absent, nested, signature_of, values_of


def test_the_names_are_those_that_the_classes_have() -> None:
    from lightning.pytorch import Trainer
    from torch.optim import AdamW

    from lit_safety.modules import SCDPO, PreferenceModule

    for path, real in (("lightning.pytorch.Trainer", [Trainer]), ("torch.optim.AdamW", [AdamW]),
                       ("lit_safety.modules.SCDPO", [SCDPO, PreferenceModule])):  # fmt: skip
        found = signature_of(path)
        assert found is not None
        names = {name for one in real for name in inspect.signature(one).parameters}
        assert set(found.parameters) == names - {"settings"}
        assert not found.open


def test_nothing_is_imported() -> None:
    code = (
        "import sys; from lit_safety.core.signatures import signature_of as s; "
        "s('lit_safety.modules.SCDPO'); s('lightning.pytorch.Trainer'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_types_defaults_and_words_are_those_of_the_source() -> None:
    found = signature_of("lit_safety.objectives.SafetyConstrainedDPO")
    assert found is not None
    beta = found.parameters["beta"]
    assert (beta.type, beta.default) == ("float", "5000.0")
    assert "strength" in beta.doc
    module = signature_of("lit_safety.modules.SCDPO")
    assert module is not None
    assert module.parameters["pretrained"].default is None
    drawing = nested(module.parameters["drawing"])
    assert drawing is not None
    assert set(drawing.parameters) == {"steps", "guidance", "resolution"}
    evaluate = signature_of("lit_safety.evaluation.evaluate")
    assert evaluate is not None
    assert {"prompts", "steps", "workers"} <= set(evaluate.parameters)  # of its own, and of what `**drawing` becomes
    arm = values_of(evaluate.parameters["arms"])
    assert arm is not None
    assert (one := nested(arm)) is not None
    assert "adapter" in one.parameters


def test_a_name_that_is_nowhere_is_absent_and_one_in_doubt_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plain_names.py").write_text("class Mine:\n    def __init__(self, a, b=1): ...\n")
    (tmp_path / "made_names.py").write_text("from os import *\nclass Mine: ...\n")
    (tmp_path / "open_names.py").write_text(
        "import os\nclass A(os.Unknown):\n    def __init__(self, a, **more): super().__init__(**more)\n"
    )
    found = signature_of("plain_names.Mine")
    assert found is not None
    assert list(found.parameters) == ["a", "b"]
    with pytest.raises(Absent) as absent:
        signature_of("plain_names.Mien")
    assert absent.value.names == ["Mine"]
    with pytest.raises(Absent):
        signature_of("no_such_module_at_all.Mine")
    assert signature_of("made_names.Other") is None
    unsure = signature_of("open_names.A")
    assert unsure is not None
    assert unsure.open
    (tmp_path / "plain_names.py").write_text("class Mien:\n    def __init__(self, c): ...\n\n")
    assert signature_of("plain_names.Mien") is not None  # a file that was changed is read again
