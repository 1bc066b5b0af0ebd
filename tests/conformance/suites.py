"""The suites other people wrote, and how each is pointed at our server.

A suite is a function from a server's address and its own environment to an Outcome. What it may fail at is in
expected.json; nothing is left out here that could fail.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.api_fuzz import run_schemathesis
from tests.conformance.environment import ConformanceError, Environment, call
from tests.conformance.lm_eval import run_lm_eval
from tests.conformance.outcome import Outcome, read_checks, read_junit
from tests.conformance.schemas import run_schemas

CLIENTS = Path(__file__).parent / "clients"
OPENAI = "3.54.0"
# Of openai-python's own tests: what speaks to routes that we have.
_OPENAI_TESTS = ("test_completions.py", "test_models.py", "chat/test_completions.py", "test_responses.py",
                 "responses/test_input_items.py", "test_files.py", "fine_tuning/test_jobs.py",
                 "fine_tuning/jobs/test_checkpoints.py")  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """`requirements` are installed in an environment of its own; without any it runs in ours."""

    name: str
    summary: str
    run: Callable[[str, Environment], Outcome]
    requirements: tuple[str, ...] = ()
    needs_server: bool = True
    context: int = 2048  # of the server; the suite that sets no limits gets short answers by a short one


def _openai_python(url: str, environment: Environment) -> Outcome:
    """The tests are in the source package only."""
    source = environment.folder / f"openai-{OPENAI}"
    if not source.is_dir():
        download = ("-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "openai")
        environment.run("python", *download, "--dest", str(environment.folder), f"openai=={OPENAI}")
        with tarfile.open(environment.folder / f"openai-{OPENAI}.tar.gz") as archive:
            archive.extractall(environment.folder, filter="data")
    # Its pytest options start as many processes as there are cores.
    options = ("-o", "addopts=", "-p", "no:cacheprovider", "--tb=line", "-q", "--timeout=120")
    return _pytest(
        environment,
        *options,
        *(f"tests/api_resources/{name}" for name in _OPENAI_TESTS),
        cwd=source,
        TEST_API_BASE_URL=f"{url}/v1",
    )


def _langchain(url: str, environment: Environment) -> Outcome:
    """In a folder of its own, where pytest finds none of our configuration."""
    (environment.folder / "test_chat.py").write_text((CLIENTS / "langchain_chat.py").read_text())
    # One event loop for all tests, or its client's connections belong to loops that are closed.
    loops = ("asyncio_default_test_loop_scope", "asyncio_default_fixture_loop_scope")
    settings = ["asyncio_mode = auto", *(f"{loop} = session" for loop in loops)]
    (environment.folder / "pytest.ini").write_text("\n".join(["[pytest]", *settings, ""]))
    return _pytest(
        environment,
        *("-p", "no:cacheprovider", "-q", "test_chat.py"),
        cwd=environment.folder,
        CONFORMANCE_URL=f"{url}/v1",
    )


def _pytest(environment: Environment, *arguments: str, cwd: Path, **variables: str) -> Outcome:
    report = environment.folder / "report.xml"
    report.unlink(missing_ok=True)
    done = environment.run(
        "python", "-m", "pytest", f"--junitxml={report}", *arguments, cwd=cwd, check=False, **variables
    )
    if not report.is_file():
        raise ConformanceError(f"pytest wrote no report: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return read_junit(report)


def _client(script: str, **variables: str) -> Callable[[str, Environment], Outcome]:
    def run(url: str, environment: Environment) -> Outcome:
        result = environment.folder / "checks.json"
        result.unlink(missing_ok=True)
        environment.run("python", CLIENTS / script, f"{url}/v1", str(result), **variables)
        return read_checks(result)

    return run


def _node(url: str, environment: Environment) -> Outcome:
    """Node's packages lie beside the script that imports them, so the script is copied to them."""
    folder = environment.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "openai").is_dir():
        call(
            ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder), "openai"],
            folder,
        )
    script = folder / "node_client.mjs"
    script.write_text((CLIENTS / "node_client.mjs").read_text())
    result = folder / "checks.json"
    result.unlink(missing_ok=True)
    call(["node", str(script), f"{url}/v1", str(result)], folder)
    package = json.loads((folder / "node_modules" / "openai" / "package.json").read_text())
    outcome = read_checks(result)
    outcome.figures["openai (npm)"] = package["version"]
    outcome.figures["node"] = call(["node", "--version"], folder).stdout.strip()
    return outcome


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "openai-python",
            "the official client's own tests of completions, chat, responses, models, files and fine-tuning",
            _openai_python,
            (
                f"openai[aiohttp]=={OPENAI}",
                "pytest",
                "pytest-asyncio",
                "pytest-timeout",
                "inline-snapshot",
                "rich",
            ),
            context=128,
        ),
        Suite(
            "langchain",
            "LangChain's standard integration tests of a chat model",
            _langchain,
            ("langchain-openai", "langchain-tests"),
        ),
        Suite(
            "lm-eval",
            "lm-eval local-completions; log-likelihoods equal to transformers' on the same model",
            run_lm_eval,
            ("lm-eval[api]", "transformers"),
        ),
        Suite(
            "schemathesis",
            "generated requests, valid and invalid, against the application with an engine that does not compute",
            run_schemathesis,
            ("schemathesis",),
            needs_server=False,
        ),
        Suite(
            "schemas",
            "answers that follow random JSON schemas; every finished one must validate",
            run_schemas,
        ),
        Suite(
            "instructor",
            "instructor: tools, json_schema, partial objects",
            _client("instructor_client.py"),
            ("instructor",),
        ),
        Suite(
            "pydantic-ai",
            "pydantic-ai: text, structured output, streams, over chat and responses",
            _client("pydantic_ai_client.py"),
            ("pydantic-ai-slim[openai]",),
        ),
        Suite(
            "litellm",
            "litellm: chat, streams, text, responses, the exceptions it makes",
            _client("litellm_client.py", LITELLM_LOCAL_MODEL_COST_MAP="True"),
            ("litellm", "mcp"),  # its responses import the latter
        ),
        Suite("llm", "the llm command line: chat, schema, completion", _client("llm_client.py"), ("llm",)),
        Suite("node", "the official client for Node", _node),
    )
}
