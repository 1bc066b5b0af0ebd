"""Do other programs see the same model? Exports an adapter, reads the result with each of them, compares greedy tokens.

    python -m loadtests.export_readers [--model demo] [--adapter DIR] [--python /other/bin/python ...] [--reader vllm]

Readers are transformers here, in every environment named with --python, and what `make peers` has installed: vLLM on a
CPU, and llama.cpp by way of its own converter. Each continues the same prompts greedily; its tokens are held against
the served model, NF4 base with the adapter beside it: against what our engine answers, and against PEFT's logits as in
every benchmark. Its tokenizer has to give the same ids; transformers, the same loss on 1,000 tokens and the same chat
prompt as here. Exits with 1 if a reader sees another model or cannot read it. Asserts nothing about time.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from loadtests import BenchError
from loadtests.adapters import model_directory
from loadtests.client import Request, body_of
from loadtests.contestants import check_answers
from loadtests.parity import TOLERANCES, Parity
from loadtests.peers import REFERENCE_MODULE, PeerProcess
from loadtests.peers.install import LLAMA_TREE, VLLM_PYTHON
from loadtests.peers.servers import BASE, LLAMA_CPP, PeerServer, Room
from loramux_adapters.export import ExportOptions, VerifyOptions, WeightedAdapter, plan_export, run_export
from loramux_adapters.prompts import PROMPTS

DEMO_ADAPTER = Path(__file__).parents[1] / "adapters" / "loramux_adapters" / "demo" / "pirate"
PROMPT_TOKENS = 96
LOSS_TOKENS = 1000
LOSS_TOLERANCE = 1e-4
_HERE = Path(__file__).parent / "peers"
_NAME = "exported"  # the adapter's, in the reference


@dataclass(frozen=True)
class Task:
    """What every reader is asked."""

    directory: Path
    prompts: list[list[int]]
    new_tokens: int
    threads: int

    def as_json(self, answer: Path) -> str:
        """`answer` is where the reading goes: standard output is full of what libraries say."""
        fields = {"directory": str(self.directory), "texts": PROMPTS, "prompts": self.prompts}
        sizes = {"new_tokens": self.new_tokens, "loss_tokens": LOSS_TOKENS}
        return json.dumps({**fields, **sizes, "answer": str(answer)})


# `version`, `ids` of the texts, `tokens` of the answers; transformers also `loss` and `chat`
Reading = dict[str, Any]
Reader = Callable[[Task], Reading]


def read_with_python(python: str | Path, script: str, task: Task) -> Reading:
    """Raises BenchError with the reader's last words."""
    environment = {
        **os.environ,
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(task.threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    answer = task.directory.parent / "reading.json"
    answer.unlink(missing_ok=True)
    # As text, and elsewhere: the folder of a script is searched first for whatever the environment's own packages import.
    done = subprocess.run(
        [str(python), "-c", (_HERE / script).read_text()],
        input=task.as_json(answer),
        capture_output=True,
        text=True,
        env=environment,
        cwd=task.directory,
    )
    if done.returncode != 0 or not answer.is_file():
        raise BenchError(f"{python}: {done.stderr.strip()[-1500:]}")
    reading: Reading = json.loads(answer.read_text())
    return reading


def read_with_llama_cpp(task: Task) -> Reading:
    """Converts the export, and asks llama.cpp's server one prompt after the other."""
    room = Room(1, PROMPT_TOKENS + task.new_tokens)
    with tempfile.TemporaryDirectory(prefix="loramux-gguf-") as name:
        folder = Path(name)
        launch = LLAMA_CPP.launch(task.directory, folder, (), room, task.threads)
        with PeerServer(launch, folder / "server.log") as server:
            url = server.wait_ready()
            tokens = [
                LLAMA_CPP.ask(
                    url, body_of(BASE, Request(prompt, None, task.new_tokens), {"cache_prompt": False})
                )[0]
                for prompt in task.prompts
            ]
            asked = [{"content": text, "add_special": False} for text in PROMPTS]
            ids = [httpx.post(f"{url}/tokenize", json=one, trust_env=False).json()["tokens"] for one in asked]
            version = httpx.get(f"{url}/props", trust_env=False).json()["build_info"]
    return {"version": version, "ids": ids, "tokens": tokens}


def readers(pythons: Sequence[str]) -> dict[str, Reader]:
    """By name. Whatever is not installed is not among them."""
    found: dict[str, Reader] = {
        f"transformers ({python})": partial(read_with_python, python, "read_transformers.py")
        for python in (sys.executable, *pythons)
    }
    if VLLM_PYTHON.is_file():
        found["vllm"] = partial(read_with_python, VLLM_PYTHON, "read_vllm.py")
    if LLAMA_CPP.program.is_file() and LLAMA_TREE.is_dir():
        found[LLAMA_CPP.name] = read_with_llama_cpp
    return found


def served_tokens(model: Path, adapter: Path, task: Task, log: Path) -> list[list[int]]:
    """Greedy answers of our engine, with the adapter beside the NF4 base."""
    with PeerProcess(
        "loadtests.peers.loader", {"kind": "loramux", "model": str(model)}, log, threads=task.threads
    ) as ours:
        ours.ready()
        return [
            ours.call("answer", path=str(adapter), prompt=prompt, count=task.new_tokens)["tokens"]
            for prompt in task.prompts
        ]


def check(
    model: Path, adapter: Path, task: Task, tokens: dict[str, list[list[int]]], special: list[int], log: Path
) -> dict[str, Parity]:
    """Each reader's tokens against PEFT's logits on the same NF4 values."""
    setup = {"model": str(model), "adapters": {_NAME: str(adapter)}}
    requests = [Request(prompt, _NAME, task.new_tokens) for prompt in task.prompts]
    with PeerProcess(REFERENCE_MODULE, setup, log, threads=task.threads) as reference:
        tolerance = TOLERANCES[reference.ready()["dtype"]]
        return {
            name: check_answers(
                reference,
                list(zip(requests, answers, strict=True)),
                tolerance,
                without=special if name == LLAMA_CPP.name else (),
            )
            for name, answers in tokens.items()
        }


def faults(reading: Reading, here: Reading, parity: Parity) -> list[str]:
    """What is not as it is here; `here` is this environment's reading."""
    found = [] if parity.right else [parity.verdict]
    if reading["ids"] != here["ids"]:
        found.append("its tokenizer gives other ids")
    if abs(reading.get("loss", here["loss"]) - here["loss"]) > LOSS_TOLERANCE:
        found.append(f"its loss is {reading['loss']:.6f}, here {here['loss']:.6f}")
    if reading.get("chat", here["chat"]) != here["chat"]:
        found.append("its chat template writes another prompt")
    return found


def run(options: argparse.Namespace, directory: Path) -> bool:
    """Whether every reader sees the served model."""
    model = model_directory(options.model)
    merged = directory / "merged"
    adapters = (WeightedAdapter(options.adapter),)
    unproven = VerifyOptions(prompts=0)  # what reads it below is the proof
    run_export(plan_export(ExportOptions(model, adapters, merged, verify=unproven)))
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    prompts = [tokenizer.encode(text, add_special_tokens=False)[:PROMPT_TOKENS] for text in PROMPTS]
    task = Task(merged, prompts, options.new_tokens, options.threads)
    served = served_tokens(model, options.adapter, task, directory / "served.log")
    readings: dict[str, Reading] = {}
    failed: dict[str, list[str]] = {}
    for name, read in readers(options.python).items():
        if readings and options.reader and name not in options.reader:
            continue
        print(f"reading with {name}", file=sys.stderr)
        try:
            readings[name] = read(task)
        except BenchError as error:
            if not readings:  # this environment is what the others are compared with
                raise
            failed[name] = [str(error)]
    tokens = {name: reading["tokens"] for name, reading in readings.items()}
    answers = {"served": served, **tokens}
    special = list(tokenizer.all_special_ids)
    parities = check(model, options.adapter, task, answers, special, directory / "reference.log")
    print(f"served by loramux: {parities['served'].verdict}")
    [here, *_] = readings.values()
    for name, reading in readings.items():
        failed[name] = faults(reading, here, parities[name])
        same = sum(a == b for a, b in zip(reading["tokens"], served, strict=True))
        loss = f", loss {reading['loss']:.6f}" if "loss" in reading else ""
        print(f"{name} {reading['version']}: {parities[name].verdict}; {same}/{len(served)} as served{loss}")
    for name, said in failed.items():
        for one in said:
            print(f"FAILED {name}: {one}")
    return not any(failed.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="'demo' or a model directory")
    parser.add_argument("--adapter", type=Path, default=DEMO_ADAPTER, help="default: the shipped 'pirate'")
    parser.add_argument("--python", action="append", default=[], help="interpreter of another environment")
    parser.add_argument(
        "--reader",
        action="append",
        choices=("vllm", LLAMA_CPP.name),
        help="only these, beside transformers here",
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="length of the answers that are compared")
    parser.add_argument("--threads", type=int, default=2)
    with tempfile.TemporaryDirectory(prefix="loramux-readers-") as name:
        try:
            return 0 if run(parser.parse_args(), Path(name)) else 1
        except BenchError as error:
            print(f"export_readers: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    # As an exception, so that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
