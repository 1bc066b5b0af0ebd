"""What a verification found, as plain data: kept beside the adapter, shown by the API, printed by the command line.

Every number in a report is finite, so that it is JSON everywhere. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from loramux_adapters.adapter_files import WEIGHTS_FILE
from loramux_adapters.errors import Fault, InvalidAdapter

Verdict = Literal["ok", "noop", "disagrees", "not_finite"]


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One targeted linear: `relative` is ||scaling * B @ A|| / ||W||, Frobenius norms, W as resident."""

    name: str
    rank: int
    scaling: float
    delta_norm: float
    weight_norm: float
    relative: float


@dataclass(frozen=True, slots=True)
class WeightFacts:
    """What the files say before any model runs. Shares are between 0 and 1.

    `zero_modules` have a lora_B of zeros only; `nonfinite_modules` hold inf or nan and are not in `modules`.
    """

    modules: tuple[ModuleFacts, ...]
    nonzero_tensors: float
    nonzero_elements: float
    zero_modules: tuple[str, ...]
    nonfinite_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LogitShift:
    """How far the adapter moves the base's logits, over `positions` positions.

    `relative` is ||adapted - base|| / ||base||, `kl` the mean of KL(adapted || base) in nats, `top1_changed` the share of
    positions whose most likely next token is another one.
    """

    positions: int
    max_logit: float
    relative: float
    kl: float
    kl_max: float
    top1_changed: float


@dataclass(frozen=True, slots=True)
class PeftAgreement:
    """What is served against PEFT on the same NF4 values.

    `relative_error` is ||served - PEFT|| / ||PEFT|| of the logits; `update_error` the same of one module's low-rank update
    alone, on fixed inputs, in the module where it is largest: it sees a wrong scaling of however small an adapter. Each
    has the bound that rounding in the compute dtype stays below. Top-1 agreement has none: near ties flip by rounding.
    """

    relative_error: float
    relative_bound: float
    update_error: float
    update_bound: float
    worst_module: str
    max_logit: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`shift` and `peft` are None where the verdict is clear without them. `tokens_from` says what was read."""

    verdict: Verdict
    reason: str
    generation: str
    base: str
    base_identity: str
    dtype: str
    device: str
    tokens_from: str
    weights: WeightFacts
    shift: LogitShift | None
    peft: PeftAgreement | None
    warnings: tuple[str, ...]
    seconds: float

    def passes(self, *, allow_noop: bool = False) -> bool:
        return self.verdict == "ok" or (allow_noop and self.verdict == "noop")

    def require(self, *, allow_noop: bool = False, name: str | None = None) -> None:
        """Raises InvalidAdapter with the reason unless the adapter may be served."""
        if self.passes(allow_noop=allow_noop):
            return
        advice = "; allow_noop accepts it as it is" if self.verdict == "noop" else ""
        raise InvalidAdapter([Fault(WEIGHTS_FILE, self.reason + advice)], name=name)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, tuples, strings and finite numbers."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> VerifyReport:
        """The inverse of `to_json`. Raises msgspec.ValidationError for anything else."""
        return msgspec.convert(dict(fields), type=cls)
