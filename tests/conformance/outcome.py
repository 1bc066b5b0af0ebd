"""What a suite said, held against what we expect of it: a result that is written down with versions.

A failure is expected only if expected.json names its case (by a pattern), what it says (by a regular expression) and the
reason: a case that fails otherwise than it should is not expected. What is expected and did not happen is as wrong.
"""

from __future__ import annotations

import json
import platform
import re
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
RESULTS = HERE / "results"


@dataclass
class Outcome:
    """`failures` are the cases that failed with what they said; `figures` whatever else is worth knowing."""

    passed: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """A failure that is right, as expected.json has it."""

    case: str
    says: str
    because: str

    def covers(self, case: str, said: str) -> bool:
        return fnmatchcase(case, self.case) and re.search(self.says, said) is not None


@dataclass
class Judged:
    """An outcome beside what was expected of it."""

    suite: str
    outcome: Outcome
    versions: dict[str, str]
    seconds: float
    explained: dict[str, str]  # failed case -> why that is right
    unexplained: dict[str, str]  # failed case -> what it said
    unused: list[str]  # what was expected and did not happen

    @property
    def good(self) -> bool:
        return not self.unexplained and not self.unused and self.outcome.passed > 0

    def __str__(self) -> str:
        counts = (
            f"{self.outcome.passed} passed, {len(self.unexplained)} failed, {len(self.explained)} failed as expected, "
            f"{len(self.outcome.skipped)} skipped, {self.seconds:.0f} s"
        )
        lines = [f"{self.suite}: {counts}"]
        lines += [f"  FAILED {case}: {said}" for case, said in self.unexplained.items()]
        lines += [f"  expected to fail, but nothing like it did: {pattern}" for pattern in self.unused]
        return "\n".join(lines)

    def save(self, folder: Path = RESULTS) -> Path:
        path = folder / f"{self.suite}.json"
        content = {
            "suite": self.suite,
            "python": platform.python_version(),
            "versions": self.versions,
            "passed": self.outcome.passed,
            "failed": self.unexplained,
            "failed_as_expected": dict(Counter(self.explained.values())),  # reason -> cases
            "skipped": self.outcome.skipped,
            "figures": self.outcome.figures,
            "seconds": round(self.seconds, 1),
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return path


def judge(suite: str, outcome: Outcome, versions: dict[str, str], seconds: float) -> Judged:
    expected = [Expected(**one) for one in json.loads(EXPECTED.read_text()).get(suite, [])]
    explained, unexplained, used = {}, {}, set()
    for case, said in outcome.failures.items():
        if (right := next((one for one in expected if one.covers(case, said)), None)) is None:
            unexplained[case] = said
        else:
            explained[case] = right.because
            used.add(right)
    unused = [f"{one.case}: {one.says}" for one in expected if one not in used]
    return Judged(suite, outcome, versions, seconds, explained, unexplained, unused)


def read_junit(path: Path) -> Outcome:
    """pytest's report. A case is named like `package.module.Class::test[parameters]`."""
    outcome = Outcome()
    for case in ET.parse(path).iter("testcase"):
        # A bracket means something to the patterns of expected.json.
        name = f"{case.get('classname')}::{case.get('name')}".replace("[", "(").replace("]", ")")
        bad = [*case.iter("failure"), *case.iter("error")]
        if bad:
            outcome.failures[name] = _short(bad[0].get("message") or bad[0].text or "")
        elif (skipped := case.find("skipped")) is not None:
            outcome.skipped[name] = _short(skipped.get("message") or "")
        else:
            outcome.passed += 1
    return outcome


def read_checks(path: Path) -> Outcome:
    """What clients/checks.py wrote."""
    checks: dict[str, str | None] = json.loads(path.read_text())
    failures = {name: _short(said) for name, said in checks.items() if said is not None}
    return Outcome(passed=len(checks) - len(failures), failures=failures)


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
