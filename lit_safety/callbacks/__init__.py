"""The few callbacks that earn their place."""

from lit_safety.callbacks.export import ExportAdapter
from lit_safety.callbacks.summary import RunSummary

__all__ = ["ExportAdapter", "RunSummary"]
