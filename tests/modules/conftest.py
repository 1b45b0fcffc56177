"""The helper beside this file (`batches.py`) is a plain module; importlib mode leaves its folder out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
