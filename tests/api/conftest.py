"""Test doubles for the HTTP side: an engine that says what it is told, adapters without files, a tokenizer.

FakeEngine keeps the contract of EngineClient (closing a generator early is an abort) and records what it was
asked. Nothing here generates text with a model.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loramux_adapters.access import Access
from loramux_adapters.errors import LoramuxError, UnknownAdapter
from loramux_adapters.probe import Probe
from loramux_adapters.verify_report import VerifyReport
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.engine.interface import EngineState
from loramux_server.engine.messages import (
    AdapterRef,
    EngineStats,
    Ready,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
    TokenOutput,
)
from loramux_server.metrics import Metrics

MAX_MODEL_LEN = 256
EOS = "<|im_end|>"
CORPUS = [
    "Hello world, this is a small test of many words.",
    "user assistant system content",
    "Grüße, 日本語 and 😀 emoji",
]
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' and not m.tool_call_id %}"
    "{{ raise_exception('a tool message needs tool_call_id') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + (prefix or '') }}{% endif %}"
)


def byte_level_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", EOS],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, **options)


@dataclass
class Call:
    """One generate() as the engine saw it."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    adapter: AdapterRef | None
    closed_early: bool = False
    outputs: int = 0


# What the engine does for a call: give an output, raise an exception, or be silent for some seconds.
Script = Callable[[Call], Iterable[TokenOutput | Exception | float]]


@dataclass
class FakeEngine:
    """Answers every request with `script(call)`, `delay` seconds between outputs."""

    tokenizer: PreTrainedTokenizerFast
    script: Script | None = None
    delay: float = 0.0
    max_model_len: int = MAX_MODEL_LEN
    state: EngineState = "ready"
    stall: str | None = None
    stats: EngineStats | None = None
    not_ready: LoramuxError | None = None
    full: LoramuxError | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    calls: list[Call] = field(default_factory=list)
    pins: list[AdapterRef] = field(default_factory=list)
    listeners: list[Callable[[StepOutput], None]] = field(default_factory=list)

    @property
    def ready(self) -> Ready:
        if self.not_ready:
            raise self.not_ready
        return Ready(
            base_name="org/tiny",
            base_identity="0123456789abcdef",
            architecture="LlamaForCausalLM",
            max_model_len=self.max_model_len,
            vocab_size=len(self.tokenizer),
            device="cpu",
            dtype="float32",
            quantization="nf4",
            eos_token_ids=[self.tokenizer.eos_token_id],
            linear_shapes={},
            weight_bytes=1,
            kv_blocks_total=8,
            kv_block_size=16,
            max_loras=4,
            max_cpu_loras=8,
            lora_rows=64,
            scheduling_policy=self.scheduling_policy,
        )

    def check_room(self) -> None:
        if self.full is not None:
            raise self.full

    async def pin(self, adapters: Sequence[AdapterRef]) -> None:
        self.pins = list(adapters)

    def add_listener(self, listener: Callable[[StepOutput], None]) -> None:
        self.listeners.append(listener)

    async def verify(self, adapter: AdapterRef, probe: Probe) -> VerifyReport:
        raise AssertionError("the adapters of this stand have no files")

    async def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams, adapter: AdapterRef | None
    ) -> AsyncGenerator[TokenOutput, None]:
        call = Call(request_id, prompt, params, adapter)
        self.calls.append(call)
        script = self.script or self.saying("Hello world")
        try:
            for output in script(call):
                await asyncio.sleep(output if isinstance(output, float) else self.delay)
                if isinstance(output, Exception):
                    raise output
                if isinstance(output, float):
                    continue
                call.outputs += 1
                yield output
        except (GeneratorExit, asyncio.CancelledError):
            call.closed_early = True
            raise

    def saying(self, text: str, *, finish: str = "stop") -> Script:
        """A script: `text`, a token per output, then the end token (or, for 'length', nothing more)."""

        def script(call: Call) -> list[TokenOutput]:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            if finish == "stop":
                tokens = [*tokens, self.tokenizer.eos_token_id]
            outputs = [TokenOutput(call.request_id, [token], cached_tokens=2) for token in tokens]
            outputs[-1].finish = finish  # type: ignore[assignment]
            if call.params.logprobs is not None:
                for place, output in enumerate(outputs):
                    top = [(tokens[place], -0.5), (5, float("-inf")), (6, -3.0)][: call.params.logprobs]
                    output.logprobs = [TokenLogprobs(-0.5, top)]
            if (top := call.params.prompt_logprobs) is not None:
                outputs[0].prompt_logprobs = [
                    TokenLogprobs(-float(place), [(5, -0.25), (6, -3.0)][:top], rank=place)
                    for place in range(1, len(call.prompt))
                ]
            return outputs

        return script


@dataclass(frozen=True)
class FakeRecord:
    name: str
    generation: str
    created: float = 1_700_000_000.5
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] = field(default_factory=dict)
    owner: str = ""


class FakeLease:
    def __init__(self, directory: FakeAdapters, record: FakeRecord) -> None:
        self.record = record
        self._directory = directory
        directory.leased.append(record.generation)

    def release(self) -> None:
        self._directory.leased.remove(self.record.generation)


class FakePaths:
    def path(self, generation: str) -> Path:
        return Path("/store") / generation


class FakeAdapters:
    """An AdapterDirectory; `leased` holds the generations in use."""

    def __init__(self, *records: FakeRecord) -> None:
        self.records = {record.name: record for record in records}
        self.store = FakePaths()
        self.leased: list[str] = []

    def list(self, after: str | None, limit: int, access: Access) -> Sequence[FakeRecord]:
        seen = [record for _, record in sorted(self.records.items()) if access.sees(record.owner)]
        return [record for record in seen if after is None or record.name > after][:limit]

    def resolve(self, model: str, access: Access) -> FakeRecord:
        name, _, pin = model.partition("@")
        record = self.records.get(name)
        if record is None or not access.sees(record.owner) or not record.generation.startswith(pin):
            raise UnknownAdapter(f"no {model}")
        return record

    def lease(self, model: str, access: Access) -> FakeLease:
        return FakeLease(self, self.resolve(model, access))


@dataclass
class Stand:
    """The application and everything behind it."""

    app: FastAPI
    engine: FakeEngine
    adapters: FakeAdapters
    metrics: Metrics
    tokenizer: PreTrainedTokenizerFast


def build(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Stand:
    engine = FakeEngine(tokenizer)
    adapters = FakeAdapters(FakeRecord("pirate", "a1b2c3d4e5f60718"), FakeRecord("team/x:v2", "ffee" * 4))
    metrics = Metrics(max_loras=4)
    names = settings.pop("served_model_names", ("tiny", "gpt-4"))
    app = create_app(
        engine=engine,
        adapters=adapters,
        tokenizer=tokenizer,
        settings=ApiSettings(served_model_names=names, version="9.9", **settings),
        metrics=metrics,
    )
    return Stand(app, engine, adapters, metrics, tokenizer)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application on a real loopback port, in a thread with its own event loop."""
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    )
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(chat_template=CHATML)


@pytest.fixture
def stand(tokenizer: PreTrainedTokenizerFast) -> Stand:
    return build(tokenizer)


@pytest.fixture
async def client(stand: Stand) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(stand.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def server_url(stand: Stand) -> Iterator[str]:
    with listening(stand.app) as url:
        yield url
