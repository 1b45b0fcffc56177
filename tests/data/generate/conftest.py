"""The helpers beside this file are plain modules; importlib mode leaves their folder out."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
