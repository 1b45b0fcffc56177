"""The guards by name, as YAML writes them: `lit_safety.guards.SAFREE`."""

from importlib import import_module


def __getattr__(name: str) -> object:
    return getattr(import_module("lit_safety.drawing.guards"), name)
