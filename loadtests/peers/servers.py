"""Servers that a user would start instead, as processes: llama.cpp's and vLLM's, on the weights that loramux serves.

Promises: both read a 16-bit checkpoint of the very values that the NF4 base is worth, and adapters made from the same
files by their own tools, so that their answers can be held against the same reference; the same number of threads; no prompt
is answered from a cache, unless a request has a salt. Options are each server's own defaults where these promises leave a
choice.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from loadtests import BenchError
from loadtests.adapters import RANK, BenchAdapter
from loadtests.client import Request
from loadtests.peers.install import (
    CONVERTER_LIBRARIES,
    LLAMA_PACKAGE,
    LLAMA_SERVER,
    LLAMA_TREE,
    VLLM_PACKAGE,
    VLLM_PYTHON,
)

BASE = "base"  # what the servers call the model without an adapter
_START_TIMEOUT_S = 900  # vLLM compiles its kernels first
_STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class Room:
    """What a server has to be able to hold at once."""

    streams: int
    tokens: int  # of the longest prompt with its answer


@dataclass(frozen=True)
class Launch:
    """How a server is started. `{port}` stands for the port in the command."""

    command: Sequence[str | Path]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class ServerKind:
    """`launch` makes what the server needs in the folder it is given. `fields` are its own of a request's body."""

    name: str
    note: str
    program: Path  # is there once it is installed
    launch: Callable[[Path, Path, Sequence[BenchAdapter], Room, int], Launch]
    fields: Callable[[Request, Sequence[str]], dict[str, Any]]
    ask: Callable[[str, dict[str, Any]], tuple[list[int], str]]  # ids and text of an answer, not streamed
    # With `ignore_eos` it never takes a token that ends an answer, where others take it and go on.
    never_ends: bool = False


class PeerServer:
    """A server's process: started at once; `wait_ready` gives its address."""

    def __init__(self, launch: Launch, log: Path) -> None:
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [str(word).replace("{port}", str(port)) for word in launch.command]
        with log.open("w") as sink:
            self._process = subprocess.Popen(
                command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **launch.environment}
            )

    def __enter__(self) -> PeerServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_ready(self) -> str:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self._url}/health", timeout=5, trust_env=False).status_code == 200:
                    return self._url
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise BenchError(f"a peer did not start:\n{self._log.read_text(errors='replace')[-2000:]}")


def convert_model(checkpoint: Path, file: Path) -> None:
    """llama.cpp's own converter, in bf16."""
    _convert("convert_hf_to_gguf.py", checkpoint, "--outtype", "bf16", "--outfile", file)


def convert_adapter(checkpoint: Path, adapter: Path, file: Path) -> None:
    _convert("convert_lora_to_gguf.py", "--base", checkpoint, "--outtype", "bf16", "--outfile", file, adapter)


def _convert(script: str, *arguments: str | Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(CONVERTER_LIBRARIES), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(LLAMA_TREE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        raise BenchError(f"{script} failed: {done.stderr.strip()[-1000:]}")


def _llama_cpp(
    checkpoint: Path, folder: Path, adapters: Sequence[BenchAdapter], room: Room, threads: int
) -> Launch:
    model = folder / "model.gguf"
    convert_model(checkpoint, model)
    loras: list[str] = []
    for adapter in adapters:
        file = folder / f"{adapter.name}.gguf"
        convert_adapter(checkpoint, adapter.path, file)
        loras.append(str(file))
    command: list[str | Path] = [LLAMA_SERVER, "-m", model, "--host", "127.0.0.1", "--port", "{port}"]
    command += ["--threads", str(threads), "--parallel", str(room.streams)]
    command += ["--ctx-size", str(room.streams * (room.tokens + 32)), "--no-cache-prompt", "--cache-ram", "0"]
    if loras:
        command += ["--lora", ",".join(loras), "--lora-init-without-apply"]
    return Launch(command, {})


def _llama_cpp_fields(request: Request, adapters: Sequence[str]) -> dict[str, Any]:
    """Adapters have the numbers of their order. What is not named is not applied, but if none is named, all are."""
    number, scale = (0, 0.0) if request.adapter is None else (adapters.index(request.adapter), 1.0)
    return {
        "cache_prompt": request.salt is not None,
        "lora": [{"id": number, "scale": scale}] if adapters else [],
    }


def _ask_llama_cpp(url: str, body: dict[str, Any]) -> tuple[list[int], str]:
    """Its own route, which gives the ids."""
    own = {"n_predict": body["max_tokens"], "return_tokens": True, "stream": False}
    answer = _post(f"{url}/completion", {**body, **own})
    return answer["tokens"], answer["content"]


def _vllm(checkpoint: Path, _: Path, adapters: Sequence[BenchAdapter], room: Room, threads: int) -> Launch:
    # Not `vllm serve`, which looks for a distribution called vllm; the wheel for CPUs has another name.
    command: list[str | Path] = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", "{port}", "--dtype", "bfloat16"]
    command += ["--model", checkpoint, "--served-model-name", BASE]
    command += ["--max-model-len", str(room.tokens + 32), "--max-num-seqs", str(room.streams)]
    if adapters:
        modules = [f"{adapter.name}={adapter.path}" for adapter in adapters]
        command += ["--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", str(len(adapters))]
        command += ["--lora-modules", *modules]
    # It takes a core per thread, and leaves one out unless it is told which.
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Launch(command, environment)


def _ask_vllm(url: str, body: dict[str, Any]) -> tuple[list[int], str]:
    [choice] = _post(f"{url}/v1/completions", {**body, "return_token_ids": True})["choices"]
    return choice["token_ids"], choice["text"]


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(url, json=body, timeout=1800, trust_env=False)
    if response.status_code != 200:
        raise BenchError(f"{url}: HTTP {response.status_code}: {response.text[:300]}")
    answer: dict[str, Any] = response.json()
    return answer


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


LLAMA_CPP = ServerKind(
    "llama.cpp",
    f"llama-server of {LLAMA_PACKAGE}, bf16 GGUF",
    LLAMA_SERVER,
    _llama_cpp,
    _llama_cpp_fields,
    _ask_llama_cpp,
    never_ends=True,
)
VLLM = ServerKind(
    "vllm",
    f"{VLLM_PACKAGE}, OpenAI server, bf16",
    VLLM_PYTHON,
    _vllm,
    lambda request, adapters: {},
    _ask_vllm,
)
KINDS = (LLAMA_CPP, VLLM)
