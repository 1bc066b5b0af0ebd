"""The `llm` command line: chat, streams, a schema, a completion model. Runs the program of its environment."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import checks

LLM = Path(sys.executable).with_name("llm")
HOME = Path(tempfile.mkdtemp(prefix="llm-"))
(HOME / "extra-openai-models.yaml").write_text(
    f"""
- {{model_id: ours, model_name: demo, api_base: "{checks.URL}", supports_schema: true}}
- {{model_id: ours-adapter, model_name: {checks.ADAPTER}, api_base: "{checks.URL}"}}
- {{model_id: ours-completion, model_name: demo, api_base: "{checks.URL}", completion: true}}
"""
)


def llm(*arguments: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": str(HOME), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [LLM, *arguments],
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.strip()


def stream() -> None:
    assert llm("-m", "ours", "-o", "max_tokens", "20", "Say hello.")


def whole() -> None:
    assert llm("-m", "ours-adapter", "--no-stream", "-o", "max_tokens", "20", "-s", "Be brief.", "Say hello.")


def schema() -> None:
    """llm's short notation leaves further properties free, which a small model goes on with until it is cut off."""
    properties = {"happy": {"type": "boolean"}, "age": {"type": "integer", "minimum": 0, "maximum": 120}}
    wanted = {
        "type": "object",
        "properties": properties,
        "required": ["happy", "age"],
        "additionalProperties": False,
    }
    answer = json.loads(
        llm("-m", "ours", "-o", "max_tokens", "200", "--schema", json.dumps(wanted), "Ann is 3.")
    )
    assert isinstance(answer["happy"], bool)


def completion() -> None:
    assert llm("-m", "ours-completion", "-o", "max_tokens", "8", "Roses are")


def goes_on() -> None:
    assert llm("-m", "ours", "-c", "-o", "max_tokens", "10", "And again.")


checks.run(stream, whole, schema, completion, goes_on)
