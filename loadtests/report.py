"""From rounds to figures, ratios, goals; printed as a table and written as JSON.

A figure is the median of its rounds, with the lowest and highest beside it. A ratio is the ratio of two medians; its
spread is that of the round-by-round ratios, whose two sides ran right after each other. Machines are described by
processor and thread count, never by name. Asserts nothing.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests.parity import Parity
from loadtests.scenarios import Goal, Scenario

FORMAT = 1
RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("loramux", "torch", "transformers", "peft", "bitsandbytes")
# What is printed under the table of the first contestant: JSON name -> (label, factor, unit)
_DETAILS = {
    "ttft_p50_s": ("TTFT p50", 1e3, "ms"),
    "ttft_max_s": ("TTFT max", 1e3, "ms"),
    "gap_p50_s": ("between tokens p50", 1e3, "ms"),
    "gap_p99_s": ("p99", 1e3, "ms"),
    "decode_tok_s": ("decode only", 1, "tok/s"),
    "prefill_tok_s": ("prefill", 1, "tok/s"),
    "client_cpu": ("client used", 100, "% of a core"),
}


@dataclass(frozen=True)
class Spread:
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(min(values), median(values), max(values))


@dataclass(frozen=True)
class Figure:
    """One contestant: a value for each round."""

    name: str
    unit: str
    values: list[float]
    note: str = ""
    details: Mapping[str, float] = field(default_factory=dict)
    parity: Parity | None = None

    @property
    def spread(self) -> Spread:
        return Spread.of(self.values)


@dataclass(frozen=True)
class GoalResult:
    text: str
    value: float
    met: bool


@dataclass(frozen=True)
class Result:
    """A scenario that was run. `figures[0]` is ours; ratios are it over each other."""

    scenario: Scenario
    settings: Mapping[str, Any]
    figures: list[Figure]

    def figure(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)

    @property
    def ratios(self) -> dict[str, Spread]:
        """To each rate; not to one that was nothing in some round (a job that got no time, say)."""
        ours, *others = self.figures
        rates = [other for other in others if other.unit.endswith("/s") and all(other.values)]
        return {other.name: ratio(ours, other) for other in rates}

    @property
    def goals(self) -> list[GoalResult]:
        """Those whose contestants took part."""
        judged = (self._judge(goal) for goal in self.scenario.goals)
        return [result for result in judged if result is not None]

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "scenario": self.scenario.name,
            "summary": self.scenario.summary,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.system()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            "settings": dict(self.settings),
            "figures": [
                {
                    "name": figure.name,
                    "note": figure.note,
                    "unit": figure.unit,
                    "rounds": figure.values,
                    **asdict(figure.spread),
                    "details": dict(figure.details),
                    "parity": figure.parity.as_json() if figure.parity else None,
                }
                for figure in self.figures
            ],
            "ratios": {name: asdict(spread) for name, spread in self.ratios.items()},
            "goals": [asdict(goal) for goal in self.goals],
        }

    def _judge(self, goal: Goal) -> GoalResult | None:
        figure = self.figure(goal.of)
        over = self.figure(goal.over) if goal.over else None
        if figure is None or (goal.over and over is None):
            return None
        value = ratio(figure, over).median if over else figure.spread.median
        bound = f"{'<=' if goal.at_most else '>='} {goal.bound:g}"
        what = f"{goal.of} {bound}x {goal.over}" if over else f"{goal.of} {bound} {figure.unit}"
        return GoalResult(what, value, goal.met(value))


def ratio(one: Figure, other: Figure) -> Spread:
    """Of the medians, with the lowest and highest of the rounds' own ratios."""
    rounds = [a / b for a, b in zip(one.values, other.values, strict=True)]
    return Spread(min(rounds), one.spread.median / other.spread.median, max(rounds))


def print_result(result: Result, console: Console) -> None:
    table = Table(title=f"{result.scenario.name}: {result.scenario.summary}", title_justify="left")
    for heading in ("", "median", "min - max", "ours is", "tokens"):
        table.add_column(heading, justify="left" if heading in ("", "tokens") else "right", no_wrap=True)
    ratios = result.ratios
    for figure in result.figures:
        times = ""
        if spread := ratios.get(figure.name):
            times = f"{spread.median:.2f}x ({spread.low:.2f} - {spread.high:.2f})"
        table.add_row(
            figure.name,
            f"{number(figure.spread.median)} {figure.unit}",
            f"{number(figure.spread.low)} - {number(figure.spread.high)}",
            times,
            figure.parity.verdict if figure.parity else "",
        )
    console.print(table)
    for figure in result.figures:
        for line in _small_print(figure):
            console.print(f"  {figure.name}: {line}", highlight=False, markup=False)
    for goal in result.goals:
        console.print(
            f"  {'met    ' if goal.met else 'NOT MET'}  {goal.text}: {number(goal.value)}", highlight=False
        )


def _small_print(figure: Figure) -> list[str]:
    lines = [figure.note] if figure.note else []
    known = [
        f"{label} {number(figure.details[key] * factor)} {unit}"
        for key, (label, factor, unit) in _DETAILS.items()
        if key in figure.details
    ]
    if known:
        lines.append(", ".join(known))
    parity = figure.parity
    if parity is not None and parity.timed_differently:
        lines.append(f"{parity.timed_differently} of {parity.timed} timed streams were not the checked text")
    return lines


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write_json(results: Sequence[Result], path: Path) -> None:
    """One object for one scenario, else a list."""
    written = [result.as_json() for result in results]
    path.write_text(json.dumps(written[0] if len(written) == 1 else written, indent=2) + "\n")


def save(result: Result, directory: Path = RESULTS) -> Path:
    """`<date>-<scenario>.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{datetime.now(UTC):%Y-%m-%d}-{result.scenario.name}.json"
    write_json([result], path)
    return path


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor's model, as Linux says it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
