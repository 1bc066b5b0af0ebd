"""Figures of one geometry on one device: printed, and written in the form of the other scenarios' results."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from loadtests.gpu.parity import Checked
from loadtests.report import FORMAT, RESULTS, GoalResult, Spread, cpu_model, number, usable_cores

_LIBRARIES = ("loramux", "torch", "transformers", "bitsandbytes", "accelerate")
FAST_MEMORY = (
    1.2e12  # bytes a second of a copy: above are cards with stacked memory, for which the lower shares hold
)
# By streams: the share of the memory roof that decoding on the base should reach.
_SHARES = {True: {1: 0.50, 8: 0.35, 32: 0.35}, False: {1: 0.70, 8: 0.55, 32: 0.50}}
_MIXED, _MANY, _COLD_MS = 0.85, 0.65, 60.0


@dataclass(frozen=True)
class Figure:
    """`values` by round. `details` say what it is a share of."""

    name: str
    unit: str
    values: Sequence[float]
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        return Spread.of(self.values)


@dataclass
class Report:
    scenario: str
    device: torch.device
    settings: Mapping[str, Any]
    parity: Checked
    roofs: Mapping[str, float]
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def value(self, name: str) -> float | None:
        return next((one.spread.median for one in self.figures if one.name == name), None)

    @property
    def goals(self) -> list[GoalResult]:
        """Of a real geometry on CUDA; figures that are missing are not judged."""
        if self.device.type != "cuda" or self.settings["tiny"]:
            return []
        judged = [
            self._ratio("decode 32, 8 adapters", "decode 32, base", _MIXED),
            self._ratio("decode 32, 32 adapters", "decode 32, 1 adapter", _MANY),
        ]
        for streams, share in _SHARES[self.roofs["copy_bytes_per_second"] >= FAST_MEMORY].items():
            name = f"decode {streams}, base"
            found = next((one for one in self.figures if one.name == name), None)
            if found is not None:
                reached = found.details["share_of_memory_roof"]
                judged.append(
                    GoalResult(f"{name}: share of the memory roof >= {share}", reached, reached >= share)
                )
        cold = self.value("cold adapter adds")
        if cold is not None:
            judged.append(GoalResult(f"cold adapter adds <= {_COLD_MS:g} ms", cold, cold <= _COLD_MS))
        return [one for one in judged if one is not None]

    def _ratio(self, one: str, other: str, bound: float) -> GoalResult | None:
        above, below = self.value(one), self.value(other)
        if above is None or below is None:
            return None
        return GoalResult(f"{one} >= {bound:g}x {other}", above / below, above / below >= bound)

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "scenario": self.scenario,
            "summary": "random weights of this geometry; the engine without a server",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(self.device),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            "settings": dict(self.settings),
            "parity": self.parity.as_json(),
            "roofs": dict(self.roofs),
            "figures": [
                {
                    **{"name": one.name, "unit": one.unit, "rounds": list(one.values)},
                    **asdict(one.spread),
                    "details": dict(one.details),
                }
                for one in self.figures
            ],
            "left_out": self.left_out,
            "goals": [asdict(goal) for goal in self.goals],
        }

    def show(self, console: Console) -> None:
        table = Table(title=f"{self.scenario}; tokens: {self.parity.verdict}", title_justify="left")
        for heading in ("", "median", "min - max", "of the roof"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for one in self.figures:
            share = next((v for k, v in one.details.items() if k.startswith("share_of")), None)
            table.add_row(
                one.name,
                f"{number(one.spread.median)} {one.unit}",
                f"{number(one.spread.low)} - {number(one.spread.high)}",
                "" if share is None else f"{share:.2f}",
            )
        console.print(table)
        for line in self.left_out:
            console.print(f"  left out: {line}", highlight=False, markup=False)
        for goal in self.goals:
            said = "met    " if goal.met else "NOT MET"
            console.print(f"  {said}  {goal.text}: {number(goal.value)}", highlight=False)

    def save(self, directory: Path = RESULTS) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{datetime.now(UTC):%Y-%m-%d}-{self.scenario}.json"
        path.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        return path


def machine(device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.system()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return about
