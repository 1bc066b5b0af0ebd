"""What needs nothing installed: broken bytes against the front, and that a run would notice what it looks for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conformance import api_fuzz, outcome, schemas
from tests.conformance.fake_application import fake_application
from tests.conformance.outcome import EXPECTED, Outcome, judge, read_junit
from tests.conformance.suites import SUITES

REPORT = """<testsuites><testsuite>
<testcase classname="a.B" name="good"/>
<testcase classname="a.B" name="bad[x]"><failure message="it  is&#10;wrong">long</failure></testcase>
<testcase classname="a.B" name="left"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture(scope="module")
def fake() -> Iterator[str]:
    with fake_application() as url:
        yield url


def test_broken_bytes_are_never_our_fault(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_fuzz, "RAW_CASES", 300)
    found = Outcome()
    api_fuzz.send_raw(fake, found)
    assert found.failures == {}
    assert found.passed > 400
    statuses = found.figures["raw_statuses"]
    assert {"200", "400", "404", "415", "431"} <= statuses.keys()
    assert statuses["closed"] < 25, "most are answered"


def test_reports_are_read(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    path.write_text(REPORT)
    read = read_junit(path)
    assert read == Outcome(1, {"a.B::left": "no"}, {"a.B::bad(x)": "it is wrong"})


def test_only_named_failures_are_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "expected.json"
    right = {"case": "a::bad*", "says": "code: 40[04]", "because": "of that"}
    gone = {"case": "a::gone", "says": ".", "because": "it was wrong"}
    path.write_text(json.dumps({"s": [right, gone]}))
    monkeypatch.setattr(outcome, "EXPECTED", path)
    said = {"a::bad(1)": "Error code: 404", "a::bad(2)": "Error code: 500", "a::worse": "code: 404"}
    judged = judge("s", Outcome(3, failures=said), {}, 1.0)
    assert judged.explained == {"a::bad(1)": "of that"}
    assert judged.unexplained == {"a::bad(2)": "Error code: 500", "a::worse": "code: 404"}
    assert judged.unused == ["a::gone: ."]
    assert not judged.good
    assert judge("other", Outcome(1), {}, 1.0).good
    assert not judge("other", Outcome(), {}, 1.0).good, "a run without tests is no success"
    assert json.loads(judged.save(tmp_path).read_text())["failed"] == judged.unexplained


def test_expectations_belong_to_suites() -> None:
    assert json.loads(EXPECTED.read_text()).keys() <= SUITES.keys()


def test_an_interrupted_run_of_schemas_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    async def ask(_: object, number: int, schema: dict[str, Any]) -> tuple[str, bool]:
        asked.append(number)
        return "no JSON", number == 5

    monkeypatch.setattr(schemas, "_ask", ask)
    journal = tmp_path / "answered.jsonl"
    schemas.answers_to_schemas("http://unused", 4, journal=journal)
    assert sorted(asked) == [0, 1, 2, 3]
    found = schemas.answers_to_schemas("http://unused", 6, journal=journal)
    assert sorted(asked) == [0, 1, 2, 3, 4, 5]
    assert found.figures == {"schemas": 6, "seed": 0, "finished": 1, "cut_off": 5}
    assert found.failures.keys() == {"schema 5", "finished"}, "too few came to an end, and that one is wrong"
    assert schemas.answers_to_schemas("http://unused", 1, seed=1, journal=journal).figures["schemas"] == 1
