"""Proof at load: does this adapter do something, and does it do what PEFT does?

    report = verify_adapter(model, geometry, weights)
    report.verdict, report.reason     # "ok", "noop", "disagrees" or "not_finite", and one sentence
    report.require(allow_noop=False)  # raises InvalidAdapter unless it may be served

Reads top down: check -> (facts, served, reference, compare) -> twin; `report` is what comes out.
"""

from loramux_adapters.probe import Probe
from loramux_adapters.verify.check import Progress, verification_steps, verify_adapter
from loramux_adapters.verify_report import LogitShift, ModuleFacts, PeftAgreement, VerifyReport, WeightFacts

__all__ = [
    "LogitShift",
    "ModuleFacts",
    "PeftAgreement",
    "Probe",
    "Progress",
    "VerifyReport",
    "WeightFacts",
    "verification_steps",
    "verify_adapter",
]
