"""The README's commands, as they stand there, against a real server.

Only three things are replaced: the address, `MODEL` by the embedded model, and the folder of the virtual environment. The
blocks that start servers or set up the environment are read, not run: the fixture does what they say.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import loramux_adapters.demo
from loramux_server.config import read_config
from tests.e2e.conftest import Server

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
STARTS = [code for _, code in BLOCKS if " serve " in code]
RUN = [(kind, code) for kind, code in BLOCKS if " serve " not in code and not code.startswith("make ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader stands: an adapter in ./my-adapters/sql, and ./train.jsonl."""
    here = tmp_path_factory.mktemp("reader")
    shutil.copytree(Path(loramux_adapters.demo.__file__).parent / "pirate", here / "my-adapters" / "sql")
    said = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "How can I help?"})
    (here / "train.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    return here


@pytest.mark.parametrize(("kind", "code"), RUN, ids=[code.strip().splitlines()[0][:50] for _, code in RUN])
def test_a_block_of_the_readme_runs(kind: str, code: str, server: Server, folder: Path) -> None:
    code = code.replace("http://127.0.0.1:8000", server.url).replace("--model MODEL", "--model demo")
    code = code.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    code = re.sub(
        r"(loramux (?:ask|adapters|jobs) .*?)(\s+#.*)?$", rf"\1 --url {server.url}", code, flags=re.MULTILINE
    )
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=550,
        # the keys that the reader makes are not for the server of whoever runs the tests
        env={**os.environ, "OMP_NUM_THREADS": "2", "LORAMUX_DATA_DIR": str(folder / "data")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"error"' not in done.stdout
    assert done.stdout or "export" in code


def test_the_readme_starts_servers_with_flags_that_exist() -> None:
    lines = [line for code in STARTS for line in code.splitlines() if " serve " in line]
    assert lines
    for line in lines:
        arguments = line.partition("#")[0].split(" serve ", 1)[1].split()
        assert read_config(arguments).model == arguments[0]
