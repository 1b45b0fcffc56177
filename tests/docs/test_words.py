"""How documents are written: one word for one thing, and numbers with their zero."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.documents import FENCE, ROOT, documents


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_numbers_have_their_zero_and_images_their_name(page: Path) -> None:
    text = re.sub(r"^    .*$|`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    assert re.findall(r"(?<=[\s|(\[,;])-?\.\d\S*", text) == []
    assert re.findall(r"\w*picture\w*", re.sub(r"a picture of a \w+", "", text), re.IGNORECASE) == []
