"""What a fit does besides its steps."""

from .checkpoint import AtomicModelCheckpoint as AtomicModelCheckpoint
from .checkpoint import StopOnSignal as StopOnSignal
from .drawings import DrawSamples as DrawSamples
from .drawings import WriteDrawings as WriteDrawings
from .evaluate import EvaluateOnTest as EvaluateOnTest
from .export import ExportAdapter as ExportAdapter
from .export import ExportCostModel as ExportCostModel
from .export import ExportUserAdapter as ExportUserAdapter
from .find_strength import FindStrength as FindStrength
from .merge_experts import MergeExperts as MergeExperts
from .probe_margin import ProbeMargin as ProbeMargin
from .resist_tampering import ResistTampering as ResistTampering
from .resist_tampering import Tampering as Tampering
from .stop_when_aligned import StopWhenAligned as StopWhenAligned
from .summary import RunSummary as RunSummary
from .update_dual import UpdateDual as UpdateDual
from .watch_chosen import WatchChosenError as WatchChosenError
from .write_costs import WriteCosts as WriteCosts

__all__ = [
    "AtomicModelCheckpoint",
    "DrawSamples",
    "EvaluateOnTest",
    "ExportAdapter",
    "ExportCostModel",
    "ExportUserAdapter",
    "FindStrength",
    "MergeExperts",
    "ProbeMargin",
    "ResistTampering",
    "RunSummary",
    "StopOnSignal",
    "StopWhenAligned",
    "Tampering",
    "UpdateDual",
    "WatchChosenError",
    "WriteCosts",
    "WriteDrawings",
]
