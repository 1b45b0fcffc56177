"""Evaluation: draw the same prompts and seeds with every arm, let judges look, count, and show."""

from .audit import judge_audit as judge_audit
from .command import evaluate as evaluate
from .users.vlm import UserVLM as UserVLM

__all__ = ["UserVLM", "evaluate", "judge_audit"]
