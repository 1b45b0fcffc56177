"""The few callbacks that earn their place."""

from lit_safety.callbacks.checkpoint import AtomicModelCheckpoint
from lit_safety.callbacks.drawings import DrawSamples, WriteDrawings
from lit_safety.callbacks.evaluate import EvaluateOnTest
from lit_safety.callbacks.export import ExportAdapter
from lit_safety.callbacks.export_cost_model import ExportCostModel
from lit_safety.callbacks.export_user_adapter import ExportUserAdapter
from lit_safety.callbacks.merge_experts import MergeExperts
from lit_safety.callbacks.probe_margin import ProbeMargin
from lit_safety.callbacks.stop_on_signal import StopOnSignal
from lit_safety.callbacks.summary import RunSummary
from lit_safety.callbacks.update_dual import UpdateDual
from lit_safety.callbacks.write_costs import WriteCosts

__all__ = [
    "AtomicModelCheckpoint",
    "DrawSamples",
    "EvaluateOnTest",
    "ExportAdapter",
    "ExportCostModel",
    "ExportUserAdapter",
    "MergeExperts",
    "ProbeMargin",
    "RunSummary",
    "StopOnSignal",
    "UpdateDual",
    "WriteCosts",
    "WriteDrawings",
]
