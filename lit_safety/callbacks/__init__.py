"""The few callbacks that earn their place."""

from lit_safety.callbacks.drawings import DrawSamples, WriteDrawings
from lit_safety.callbacks.evaluate import EvaluateOnTest
from lit_safety.callbacks.export import ExportAdapter
from lit_safety.callbacks.summary import RunSummary

__all__ = ["DrawSamples", "EvaluateOnTest", "ExportAdapter", "RunSummary", "WriteDrawings"]
