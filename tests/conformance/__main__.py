"""`python -m tests.conformance [NAME ...]`: run other people's suites against loramux. `make conformance` runs all.

A real server with the embedded model in float32, unquantized, so that its log-probabilities can be compared, serves the
suites that ask for answers. Each suite has its own virtual environment below build/conformance/; installing needs the
package index, the run itself no network. Results go to tests/conformance/results/.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path

from tests.conformance.environment import ConformanceError, Environment
from tests.conformance.outcome import judge
from tests.conformance.suites import SUITES, Suite
from tests.e2e.conftest import start_server

# The second and third are what openai-python's tests ask for.
NAMES = ("demo", "gpt-6-astra", "gpt-3.5-turbo-instruct")
ARGUMENTS = [
    *("demo", "--dtype", "float32", "--quantization", "none"),
    *(word for name in NAMES for word in ("--served-model-name", name)),
]


@contextmanager
def serving(context: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="loramux-conformance-") as name:
        server = start_server(Path(name), [*ARGUMENTS, "--max-model-len", str(context)])
        try:
            yield server.url
        finally:
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="NAME", help="default: all; see --list")
    parser.add_argument("--list", action="store_true", help="say what the suites are")
    parser.add_argument("--url", help="a running server; default: start what the suites need")
    parser.add_argument(
        "--resume", action="store_true", help="go on with an interrupted run (schemas); the others start anew"
    )
    parser.add_argument("--no-save", action="store_true", help="do not write results")
    options = parser.parse_args()
    if options.list:
        for suite in SUITES.values():
            print(f"{suite.name:16}{suite.summary}")
        return 0
    if unknown := [name for name in options.suites if name not in SUITES]:
        parser.error(f"{unknown[0]} is no suite; choose from {', '.join(SUITES)}")
    good = True
    chosen = [SUITES[name] for name in options.suites or SUITES]
    # Those that share a server one after the other.
    for context, suites in groupby(sorted(chosen, key=_server), key=_server):
        with serving(context) if context and not options.url else nullcontext(options.url or "") as url:
            for suite in suites:
                good = _run(suite, url, options) and good
    return 0 if good else 1


def _server(suite: Suite) -> int:
    """The context of the server that it needs, 0 for none."""
    return suite.context if suite.needs_server else 0


def _run(suite: Suite, url: str, options: argparse.Namespace) -> bool:
    """Whether it went as expected."""
    environment = Environment(suite.name, suite.requirements, resume=options.resume)
    try:
        environment.ensure()
        started = time.monotonic()
        outcome = suite.run(url, environment)
        versions = environment.versions()
    except ConformanceError as error:
        print(f"{suite.name}: could not be run: {error}", flush=True)
        return False
    judged = judge(suite.name, outcome, versions, time.monotonic() - started)
    print(judged, flush=True)
    if not options.no_save:
        judged.save()
    return judged.good


if __name__ == "__main__":
    # As an exception, so that the server is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
