"""The result of one look: what was found, whether it is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from loramux_adapters.errors import LoramuxError

State = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """`note` is worth knowing and no fault. A fault always has advice."""

    check: str
    state: State
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def ok(check: str, detail: str) -> Finding:
    return Finding(check, "ok", detail)


def note(check: str, detail: str, advice: str = "") -> Finding:
    return Finding(check, "note", detail, advice)


def fault(check: str, detail: str, advice: str) -> Finding:
    return Finding(check, "fault", detail, advice)


def look(check: str, advice: str, looks: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """What `looks` finds; an error of ours becomes a fault with `advice`."""
    try:
        return looks()
    except LoramuxError as error:
        return [fault(check, error.message, advice)]
