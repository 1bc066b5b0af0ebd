"""The two formats of the log, for both processes."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from loramux_server.logs import LogFormat, adopt_libraries, set_up_logging
from loramux_server.observed import ObservedRequest, current_request, observing


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


def logged(log_format: LogFormat, level: str = "info") -> io.StringIO:
    sink = io.StringIO()
    set_up_logging(level, log_format, "worker", sink)
    return sink


def test_json_lines_are_one_object_each() -> None:
    sink = logged("json")
    log = logging.getLogger("loramux.test")
    log.info("two\nlines of %s", "ü", extra={"fields": {"seconds": 0.5}})
    log.debug("not at this level")
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in sink.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "process": "worker",
        "logger": "loramux.test",
        "message": "two\nlines of ü",
        "seconds": 0.5,
    }
    assert second["exception"].endswith("ValueError: wrong")


def test_the_level_is_what_was_asked_for() -> None:
    sink = logged("text", "error")
    logging.getLogger("loramux.test").warning("quiet")
    logging.getLogger("loramux.test").error("loud")
    assert [line.split(" ", 2)[2] for line in sink.getvalue().splitlines()] == ["ERROR loramux.test: loud"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_requests_id_is_in_its_lines_alone(log_format: LogFormat) -> None:
    sink = logged(log_format)
    log = logging.getLogger("loramux.test")
    with observing(ObservedRequest("req_7", "GET")):
        log.info("inside")
    log.info("outside")
    inside, outside = sink.getvalue().splitlines()
    assert "req_7" in inside
    assert "req_7" not in outside
    assert current_request() is None


def test_warnings_and_libraries_go_the_same_way() -> None:
    sink = logged("json")
    library = logging.getLogger("transformers")
    before, propagate = library.handlers[:], library.propagate
    try:
        library.addHandler(logging.StreamHandler(io.StringIO()))
        library.propagate = False
        adopt_libraries()
        library.error("of the library")
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("old", stacklevel=1)
    finally:
        library.handlers[:], library.propagate = before, propagate
    messages = [json.loads(line)["message"] for line in sink.getvalue().splitlines()]
    assert messages[0] == "of the library"
    assert "UserWarning: old" in messages[1]
