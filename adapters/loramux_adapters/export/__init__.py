"""Merge adapters into their base and write a checkpoint that is proven equal to what was served.

    options = ExportOptions(model=Path("base"), adapters=(WeightedAdapter(Path("a")),), out=Path("merged"))
    result = run_export(plan_export(options))
    result.proof.export.kl   # KL(export || served)

Planning reads headers and adapters only; running streams tensor by tensor into `<out>.partial/` and renames
at the end. Reads top down: options -> plan -> run -> (shards, merge, assets, verify, report).
"""

from loramux_adapters.export.agreement import Agreement
from loramux_adapters.export.options import (
    Device,
    ExportOptions,
    Format,
    Onto,
    Quantization,
    ServedDtype,
    VerifyOptions,
    WeightedAdapter,
)
from loramux_adapters.export.plan import ExportPlan, plan_export
from loramux_adapters.export.run import (
    CANCELLED,
    NOT_PROVEN,
    ExportProgress,
    ExportResult,
    run_export,
)
from loramux_adapters.export.verify import Proof

__all__ = [
    "CANCELLED",
    "NOT_PROVEN",
    "Agreement",
    "Device",
    "ExportOptions",
    "ExportPlan",
    "ExportProgress",
    "ExportResult",
    "Format",
    "Onto",
    "Proof",
    "Quantization",
    "ServedDtype",
    "VerifyOptions",
    "WeightedAdapter",
    "plan_export",
    "run_export",
]
