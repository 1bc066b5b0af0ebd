"""The worker process: one thread owns the device and steps the engine; one message per step goes to the front.

Started by `client.py` as `python -m loramux_server.engine`, with a `WorkerOptions` as JSON on standard input. Ends
when told to, when its parent is gone, or, with a `Fatal` message first, when the device cannot go on. Signals of the
terminal are the front's business: it drains before it stops the worker.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import msgspec
import torch
import zmq

from loramux_adapters.errors import LoramuxError, RequestError
from loramux_adapters.training.context import context_length
from loramux_adapters.training.memory import DecoderShape
from loramux_server.base.loading import LoadOptions, ResidentBase, load_base
from loramux_server.engine.budget import LatencyBudget
from loramux_server.engine.constraints import Grammars, read_tokenizer
from loramux_server.engine.device_memory import DeviceMemory
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.messages import (
    COMMAND_DECODER,
    EVENT_ENCODER,
    AbortRequest,
    AddRequest,
    Beat,
    Event,
    Fatal,
    PinAdapters,
    Ready,
    Shutdown,
    StartTraining,
    StepOutput,
    StopTraining,
    TokenOutput,
    VerifyAdapter,
)
from loramux_server.engine.options import WorkerOptions
from loramux_server.engine.reading import TokenizerSource
from loramux_server.engine.runner import kv_bytes_per_token
from loramux_server.engine.scheduler import SchedulerLimits
from loramux_server.engine.sizing import plan_sizes
from loramux_server.engine.training import Training
from loramux_server.engine.verification import Verifications
from loramux_server.logs import adopt_libraries, set_up_logging

logger = logging.getLogger("loramux.worker")

_IDLE_POLL_MS = 1000
_LOADING_POLL_MS = 2  # everything runnable waits for files that are being read
_BEAT_S = 1.0


class Worker:
    """The loop between the socket and the engine: receive -> step -> send -> slices of what runs beside."""

    def __init__(self, engine: Engine, training: Training, socket: zmq.Socket[bytes]) -> None:
        self.engine = engine
        self.training = training
        self.socket = socket
        self.verifications = Verifications(engine.base)
        self.memory = DeviceMemory(engine.base.device)
        self._refused: list[TokenOutput] = []
        self._told = 0.0  # when something was last said

    def run(self) -> None:
        """Until Shutdown."""
        timeout = 0
        with closing(self.verifications), closing(self.training):
            while self._receive(timeout):
                decoding = self._step()
                self._slice(decoding)
                self._beat()
                timeout = self._patience_ms(decoding)

    def _step(self) -> bool:
        """One step of the engine, if it has work; whether anything ran in it."""
        if not self.engine.has_work:
            self._send_refused()
            return False
        began = time.perf_counter()
        output = self.engine.step()
        output.stats.step_seconds = time.perf_counter() - began
        output.stats.device_memory_held, output.stats.device_memory_free = self.memory.read()
        output.outputs[:0] = self._refused
        self._refused = []
        self._send(output)
        return output.stats.batch_tokens > 0

    def _slice(self, decoding: bool) -> None:
        """A verification goes first: somebody waits for it, and it is short."""
        verified = self.verifications.advance(decoding=decoding)
        if verified is not None:
            self._send(verified)
        if not self.verifications.has_work or self.verifications.is_waiting:
            for event in self.training.advance(decoding=decoding):
                self._send(event)

    def _beat(self) -> None:
        """Slices of training say nothing for long: without this the front would take them for a hang (`watch.py`)."""
        has_work = self.engine.has_work or self.verifications.has_work or self.training.has_work
        if has_work and time.monotonic() - self._told >= _BEAT_S:
            self._send(Beat())

    def _patience_ms(self, decoding: bool) -> int:
        """How long the loop may wait for a command before it goes on by itself."""
        beside = (self.verifications, self.training)
        if decoding or any(one.has_work and not one.is_waiting for one in beside):
            return 0
        waiting = self.engine.has_work or any(one.has_work for one in beside)
        return _LOADING_POLL_MS if waiting else _IDLE_POLL_MS

    def _receive(self, timeout_ms: int) -> bool:
        """Apply every command that has come; wait up to `timeout_ms` for the first. False on Shutdown."""
        while self.socket.poll(timeout_ms):
            command = COMMAND_DECODER.decode(self.socket.recv())
            match command:
                case AddRequest():
                    try:
                        self.engine.add(command)
                    except RequestError as error:
                        refusal = TokenOutput(
                            command.id, [], finish="error", error=error.message, error_code=error.code
                        )
                        self._refused.append(refusal)
                case AbortRequest():
                    self.engine.abort(command.id)
                    self.verifications.abort(command.id)
                case PinAdapters():
                    self.engine.bank.pin({one.generation: one.path for one in command.adapters})
                case VerifyAdapter():
                    self.verifications.add(command)
                case StartTraining():
                    self.training.start(command)
                case StopTraining():
                    self.training.stop(command)
                case Shutdown():
                    return False
            timeout_ms = 0
        return True

    def _send_refused(self) -> None:
        if self._refused:
            self._send(StepOutput(outputs=self._refused, stats=self.engine.stats()))
            self._refused = []

    def _send(self, event: Event) -> None:
        self._told = time.monotonic()
        self.socket.send(EVENT_ENCODER.encode(event))


def describe(base: ResidentBase, options: EngineOptions) -> Ready:
    text_config = base.model.config.get_text_config()
    return Ready(
        base_name=base.geometry.name,
        base_identity=base.geometry.identity,
        architecture=type(base.model).__name__,
        max_model_len=options.max_model_len,
        vocab_size=base.config.vocab_size,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        quantization=base.quantization,
        eos_token_ids=list(base.eos_token_ids),
        linear_shapes=dict(base.geometry.linear_shapes),
        weight_bytes=base.weight_bytes,
        kv_blocks_total=options.num_blocks,
        kv_cache_bytes=options.num_blocks * options.block_size * kv_bytes_per_token(base),
        kv_block_size=options.block_size,
        max_loras=options.max_loras,
        max_cpu_loras=options.max_cpu_loras,
        lora_rows=options.lora_rows,
        decoder=DecoderShape.of(text_config),
        context_length=context_length(text_config),
        scheduling_policy=options.scheduling_policy,
    )


def build_engine(options: WorkerOptions) -> tuple[Engine, Ready]:
    """Load the base and size the engine. Raises BaseModelError or ConfigError."""
    if options.seed is not None:
        random.seed(options.seed)
        torch.manual_seed(options.seed)
    base = load_base(
        LoadOptions(
            model=options.model,
            name=options.name,
            revision=options.revision,
            device=options.device,
            dtype=options.dtype,
            quantization=options.quantization,
            nf4_cache=None if options.nf4_cache is None else Path(options.nf4_cache),
            cpu_kernels=None if options.cpu_kernels is None else Path(options.cpu_kernels),
        )
    )
    sizes = plan_sizes(options, base, kv_bytes_per_token(base))
    engine_options = EngineOptions(
        num_blocks=sizes.num_blocks,
        block_size=options.block_size,
        limits=SchedulerLimits(
            options.max_num_seqs,
            options.max_num_batched_tokens,
            long_prompt_tokens=options.max_num_batched_tokens // 2,
        ),
        max_model_len=sizes.max_model_len,
        scheduling_policy=options.scheduling_policy,
        max_loras=options.max_loras,
        max_cpu_loras=options.max_cpu_loras,
        lora_rows=sizes.lora_rows,
        enforce_eager=options.enforce_eager,
        enable_prefix_caching=options.enable_prefix_caching,
        speculative_config=options.speculative_config,
    )
    vocab_size, end_tokens = base.config.vocab_size, base.eos_token_ids
    grammars = Grammars(lambda: read_tokenizer(options.model, options.revision, vocab_size, end_tokens))
    return Engine(base, engine_options, grammars), describe(base, engine_options)


def build_training(options: WorkerOptions, engine: Engine) -> Training:
    tokenizer = TokenizerSource(options.model, options.revision, options.chat_template)
    return Training(engine.base, tokenizer, LatencyBudget(options.training_latency_budget))


def _exit_with_parent(parent: int) -> None:
    """A worker whose front was killed must not keep the device."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> int:
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerOptions)
    _exit_with_parent(options.parent_pid)
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # sent to the whole group; the front drains first, then says Shutdown
        signal.signal(name, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)  # where every thread is, to the log; also while none of them moves
    set_up_logging(options.log_level, options.log_format, "worker")
    adopt_libraries()
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(options.address)
    engine: Engine | None = None
    try:
        engine, ready = build_engine(options)
        socket.send(EVENT_ENCODER.encode(ready))
        Worker(engine, build_training(options, engine), socket).run()
    except LoramuxError as error:
        socket.send(EVENT_ENCODER.encode(Fatal(error.message)))
        return 1
    except (RuntimeError, MemoryError) as error:
        # Of a CUDA error nothing on this device can be trusted any more: say so and let the front start another worker.
        logger.exception("the worker cannot go on")
        reason = str(error).partition("\n")[0][:300]
        socket.send(EVENT_ENCODER.encode(Fatal(f"{type(error).__name__}: {reason}")))
        return 1
    finally:
        if engine is not None:
            engine.close()
        socket.close(linger=2000)
    return 0
