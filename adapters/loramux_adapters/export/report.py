"""What an export says about itself: merge_report.json for programs, README.md (a model card) for people.

Promises: equal exports give equal files, so neither holds a time or a path; every number in the card is in
the report.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loramux_adapters.export.agreement import Agreement
from loramux_adapters.export.checkpoint import write_json
from loramux_adapters.export.journal import FinishedShard
from loramux_adapters.export.merge import TensorOutcome
from loramux_adapters.export.options import Format, Onto, Quantization
from loramux_adapters.export.plan import ExportPlan
from loramux_adapters.export.verify import Proof
from loramux_adapters.files import replace_file

REPORT = "merge_report.json"
CARD = "README.md"
REPORT_VERSION = 1

_LIBRARIES = ("loramux", "torch", "transformers", "bitsandbytes", "safetensors")
_LICENSE = re.compile(r"^(license(?:_name|_link)?):[ \t]*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything the two files are written from. `proof` is None when verification was switched off."""

    plan: ExportPlan
    shards: tuple[FinishedShard, ...]
    identity: str | None
    proof: Proof | None

    @property
    def outcomes(self) -> Iterable[TensorOutcome]:
        return (outcome for shard in self.shards for outcome in shard.tensors)


def write_report(directory: Path, facts: Facts) -> dict[str, Any]:
    """Write both files; returns the report."""
    report = build_report(facts)
    replace_file(directory / REPORT, [write_json(report)])
    replace_file(directory / CARD, [_card(facts, report).encode()])
    return report


def build_report(facts: Facts) -> dict[str, Any]:
    """The report as a JSON object."""
    plan = facts.plan
    return {
        "report_version": REPORT_VERSION,
        "versions": {name: version(name) for name in _LIBRARIES},
        "base": {
            "name": plan.options.base_name,
            "revision": _revision(plan.checkpoint.directory),
            "quantization_identity": facts.identity,
            "content_sha256": _content_digest(facts.outcomes),
            "prequantized": plan.skeleton.prequantized,
        },
        "adapters": [
            {
                "name": adapter.name,
                "weight": adapter.weight,
                "generation": adapter.weights.generation,
                "trained_on": _public_name(adapter.weights.spec.base_model_name_or_path),
                "trained_on_identity": adapter.weights.spec.base_identity,
                "data_sha256": adapter.data,
                "rank": adapter.weights.rank,
                "modules": len(adapter.weights.tensors),
            }
            for adapter in plan.adapters
        ],
        "export": {
            "format": plan.options.format.value,
            "onto": plan.options.onto.value,
            "served_dtype": str(plan.served_dtype).removeprefix("torch."),
            "quantization": plan.options.quantization.value,
            "dtype": str(plan.output_dtype).removeprefix("torch."),
            "tensor_bytes": plan.total_bytes,
        },
        "delta": _delta_summary(facts.outcomes),
        "verification": _verification(facts.proof),
        "shards": {shard.name: {"bytes": shard.num_bytes, "sha256": shard.sha256} for shard in facts.shards},
        "tensors": [outcome.to_json() for outcome in facts.outcomes],
    }


def _public_name(base: str | None) -> str | None:
    """A hub id as it is; of a path only the last part, which is all a reader of the card can use."""
    return Path(base).name if base is not None and base.startswith(("/", "~", ".")) else base


def _revision(directory: Path) -> str | None:
    """The commit, when the base lies in the hub's cache (`.../snapshots/<commit>`)."""
    path = directory.resolve()
    return path.name if path.parent.name == "snapshots" else None


def _content_digest(outcomes: Iterable[TensorOutcome]) -> str:
    digest = hashlib.sha256()
    for outcome in sorted(outcomes, key=lambda outcome: outcome.name):
        digest.update(f"{outcome.name} {outcome.source_sha256}\n".encode())
    return digest.hexdigest()


def _delta_summary(outcomes: Iterable[TensorOutcome]) -> dict[str, Any]:
    outcomes = list(outcomes)
    survivals = [outcome.survival for outcome in outcomes if outcome.survival is not None]
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    actions = [outcome.action for outcome in outcomes]
    return {
        "tensors": {action: actions.count(action) for action in sorted(set(actions))},
        "all_finite": all(outcome.finite for outcome in outcomes),
        "survival_min": min(survivals, default=None),
        "survival_mean": sum(survivals) / len(survivals) if survivals else None,
        "error_mean": sum(errors) / len(errors) if errors else None,
        "error_max": max(errors, default=None),
    }


def _verification(proof: Proof | None) -> dict[str, Any] | None:
    if proof is None:
        return None
    return {
        "tokens": proof.tokens_from,
        "tokens_sha256": proof.tokens_sha256,
        "compute_dtype": "float32",
        "required": proof.required,
        "passed": not proof.failures,
        "failures": list(proof.failures),
        "export": proof.export.to_json(),
        "other_base": proof.other.to_json() if proof.other else None,
        "serving_noise": proof.noise.to_json() if proof.noise else None,
    }


def _card(facts: Facts, report: dict[str, Any]) -> str:
    plan = facts.plan
    names = ", ".join(
        f"`{a.name}`" + (f" × {a.weight:g}" if a.weight != 1 or len(plan.adapters) > 1 else "")
        for a in plan.adapters
    )
    front = ["---", f"base_model: {plan.options.base_name}", "library_name: transformers"]
    front += [f"{key}: {value}" for key, value in _license(plan.checkpoint.directory)]
    front += ["pipeline_tag: text-generation", "tags:", "- loramux", "- merge", "---"]
    body = [
        "",
        f"# {plan.options.base_name} with {', '.join(a.name for a in plan.adapters)} merged",
        "",
        f"Made by loramux {report['versions']['loramux']}: {names} merged into `{plan.options.base_name}`, "
        f"{_described(plan)}.",
        "",
        "| | |",
        "|---|---|",
        f"| base content (sha256) | `{report['base']['content_sha256']}` |",
        *([f"| quantization identity of the base | `{facts.identity}` |"] if facts.identity else []),
        *[f"| adapter generation | `{a.weights.generation}` ({a.name}) |" for a in plan.adapters],
        *[
            f"| {role} data (sha256) | `{digest}` ({a.name}) |"
            for a in plan.adapters
            for role, digest in (a.data or {}).items()
        ],
        *_delta_rows(report["delta"]),
        "",
        *_proof_lines(facts.proof),
        "",
        f"All figures, tensor by tensor, and the checksums of the weight files are in `{REPORT}`.",
        "",
    ]
    return "\n".join(front + body)


def _described(plan: ExportPlan) -> str:
    stored = "as bitsandbytes NF4" if plan.options.format is Format.NF4 else f"in {plan.options.format.value}"
    if plan.options.quantization is Quantization.NONE:
        return f"onto the unquantized weights it was served with, stored {stored}"
    if plan.options.onto is Onto.ORIGINAL:
        return f"onto the checkpoint's own 16-bit weights, stored {stored}"
    return f"onto the NF4 weights it was served with, stored {stored}"


def _delta_rows(delta: dict[str, Any]) -> list[str]:
    rows = [f"| tensors {action} | {count} |" for action, count in delta["tensors"].items()]
    if delta["survival_mean"] is not None:
        rows.append(
            f"| survival of the adapter's change | {delta['survival_mean']:.4f} on average, "
            f"{delta['survival_min']:.4f} at "
            "worst |"
        )
        rows.append(
            f"| rounding error / change | {delta['error_mean']:.3g} on average, {delta['error_max']:.3g} at "
            "worst |"
        )
    return rows


def _proof_lines(proof: Proof | None) -> list[str]:
    if proof is None:
        return ["This export was not compared with the served model."]
    lines = [
        f"Compared with the served model (the resident base and the adapter) on {proof.export.positions} positions of "
        f"{proof.tokens_from}:",
        "",
        "| | KL (nats) | top-1 agreement | max. logit difference | loss | served loss |",
        "|---|---|---|---|---|---|",
        _row("this export", proof.export),
    ]
    if proof.other is not None:
        lines.append(_row("merged onto the other base", proof.other))
    if proof.noise is not None:
        lines.append(_row("the server's own arithmetic", proof.noise))
    if not proof.required:
        lines += [
            "",
            "Equality with the served model is not to be expected of this format and base; these are its "
            "costs.",
        ]
    if proof.failures:
        lines += ["", f"**NOT PROVEN: {'; '.join(proof.failures)}.**"]
    return lines


def _row(name: str, agreement: Agreement) -> str:
    return (
        f"| {name} | {agreement.kl:.2e} | {agreement.top1:.2%} | {agreement.max_logit_difference:.2e} | "
        f"{agreement.loss:.4f} | {agreement.served_loss:.4f} |"
    )


def _license(base: Path) -> list[tuple[str, str]]:
    """The licence fields of the base's own model card, which still apply."""
    card = base / CARD
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return []
    return _LICENSE.findall(text.split("\n---", 1)[0])
