"""A real worker process, and everything that can happen to it: every accepted request ends, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from loramux_adapters.errors import BaseModelError, EngineError, QueueFull
from loramux_server.config import read_config
from loramux_server.engine import restarts
from loramux_server.engine.client import WorkerClient
from loramux_server.engine.messages import AdapterRef, SamplingParams, StepOutput, TokenOutput
from loramux_server.engine.options import WorkerOptions
from loramux_server.engine.process import worker_environment
from loramux_server.engine.watch import Watch
from loramux_server.serve import worker_options

PROMPT = list(range(5, 25))
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=470, temperature=0.0, ignore_eos=True)

# One loop and one worker for the whole file: a worker takes seconds to import what it needs.
pytestmark = pytest.mark.asyncio(loop_scope="module")


def options(model: Path) -> WorkerOptions:
    return WorkerOptions(
        address="",
        parent_pid=0,
        model=str(model),
        name="tiny",
        device="cpu",
        dtype="float32",
        threads=1,
        kv_cache_bytes=16 * 2**20,
        max_num_seqs=4,
        max_loras=2,
        max_lora_rank=8,
        log_level="error",
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(tiny_model: Callable[[str], Path]) -> AsyncIterator[WorkerClient]:
    made = WorkerClient(options(tiny_model("llama")), max_queued=6)
    assert made.state == "starting"
    with pytest.raises(EngineError, match="still loading"):
        _ = made.ready
    with pytest.raises(EngineError, match="starting"):
        await anext(made.generate("early", PROMPT, GREEDY, None))
    await made.start()
    yield made
    await made.close()


async def collect(
    client: WorkerClient, name: str, params: SamplingParams = GREEDY, adapter: AdapterRef | None = None
) -> list[TokenOutput]:
    return [output async for output in client.generate(name, PROMPT, params, adapter)]


def tokens(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


async def test_a_worker_does_not_spin_for_long_unless_the_user_says_how_long(client: WorkerClient) -> None:
    assert client.worker_pid is not None
    given = Path(f"/proc/{client.worker_pid}/environ").read_bytes().split(b"\0")
    assert [entry for entry in given if entry.startswith((b"GOMP_SPINCOUNT=", b"OMP_WAIT_POLICY="))] == [
        b"GOMP_SPINCOUNT=10000"
    ]
    for own in ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active", "HOME": "/"}):
        assert worker_environment(own) == own


async def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_what_the_front_learns_of_the_base(client: WorkerClient) -> None:
    ready = client.ready
    assert client.state == "ready"
    assert (ready.base_name, ready.architecture, ready.quantization) == ("tiny", "LlamaForCausalLM", "nf4")
    assert (ready.device, ready.dtype, ready.max_model_len, ready.vocab_size) == ("cpu", "float32", 512, 320)
    assert ready.eos_token_ids == [2]
    assert ready.linear_shapes["model.layers.0.mlp.down_proj"] == (64, 128)
    assert len(ready.base_identity) == 64


async def test_requests_stream_token_by_token_and_side_by_side(client: WorkerClient) -> None:
    alone = await collect(client, "alone")
    assert [len(output.tokens) for output in alone] == [1] * 8
    assert [output.finish for output in alone] == [None] * 7 + ["length"]
    together = await asyncio.gather(*(collect(client, f"r{i}") for i in range(5)))
    assert all(tokens(outputs) == tokens(alone) for outputs in together)
    assert client.in_flight == 0


async def test_listeners_hear_every_step(client: WorkerClient) -> None:
    heard: list[StepOutput] = []
    client.add_listener(heard.append)
    answer = await collect(client, "heard")
    assert [o.tokens for step in heard for o in step.outputs if o.id == "heard"] == [o.tokens for o in answer]
    assert client.stats is not None
    assert client.stats.step == heard[-1].stats.step


async def test_a_refused_request_ends_with_its_reason(client: WorkerClient) -> None:
    (output,) = await collect(client, "long", SamplingParams(max_tokens=1000))
    assert (output.finish, output.error_code) == ("error", "context_length_exceeded")
    assert "maximum context length is 512 tokens" in str(output.error)
    missing = AdapterRef("0" * 64, "/no/such/adapter")
    (output,) = await collect(client, "adapter", GREEDY, missing)
    assert output.finish == "error"


async def test_no_more_than_max_queued(client: WorkerClient) -> None:
    streams = [client.generate(f"q{i}", PROMPT, ENDLESS, None) for i in range(6)]
    for stream in streams:
        await anext(stream) if stream in streams[:4] else None
    waiting = [asyncio.ensure_future(anext(stream)) for stream in streams[4:]]
    await until(lambda: client.in_flight == 6)
    with pytest.raises(QueueFull, match="6 requests"):
        await anext(client.generate("one too many", PROMPT, GREEDY, None))
    with pytest.raises(QueueFull, match="6 requests"):
        client.check_room()
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for stream in streams:
        await stream.aclose()
    assert client.in_flight == 0
    client.check_room()
    assert len(tokens(await collect(client, "after"))) == 8


async def test_closing_a_stream_aborts_the_request(client: WorkerClient) -> None:
    stream = client.generate("left", PROMPT, ENDLESS, None)
    for _ in range(3):
        await anext(stream)
    await stream.aclose()
    await collect(client, "next")
    assert client.stats is not None
    assert (client.stats.running, client.stats.waiting, client.stats.kv_blocks_used) == (0, 0, 0)


async def test_cancelling_the_task_aborts_the_request(client: WorkerClient) -> None:
    task = asyncio.create_task(collect(client, "cancelled", ENDLESS))
    await until(lambda: client.stats is not None and client.stats.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await collect(client, "next")
    assert client.stats is not None
    assert client.stats.kv_blocks_used == 0


async def test_a_killed_worker_ends_its_streams_and_is_replaced(
    client: WorkerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tokens(await collect(client, "before"))
    streams = [client.generate(f"k{i}", PROMPT, ENDLESS, None) for i in range(3)]
    for stream in streams:
        await anext(stream)
    pid = client.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for stream in streams:
        last = [output async for output in stream][-1]
        assert (last.finish, last.error_code) == ("error", "engine_unavailable")
        assert "restarting" in str(last.error)
    assert client.in_flight == 0
    with pytest.raises(EngineError, match="restarting"):
        await collect(client, "meanwhile")
    await until(lambda: client.state == "ready")
    assert client.restarts == 1
    assert client.worker_pid != pid
    assert tokens(await collect(client, "again")) == before


async def test_close_leaves_nothing(client: WorkerClient) -> None:
    process = client._process
    assert process is not None
    address = Path(client._options.address.removeprefix("ipc://"))
    assert address.exists()
    assert address.parent.stat().st_mode & 0o777 == 0o700
    stream = client.generate("in flight", PROMPT, ENDLESS, None)
    await anext(stream)
    await client.close()
    assert client.state == "dead"
    assert process.returncode == 0  # it was told, not killed
    assert not address.parent.exists()
    last = [output async for output in stream][-1]
    assert (last.finish, last.error) == ("error", "the server is shutting down")
    with pytest.raises(EngineError, match="dead"):
        await collect(client, "late")
    await client.close()  # again: nothing to do


# --- workers played by a few lines of Python ---------------------------------------------------------------------------

FAKE = """
    import sys, time, msgspec, zmq
    from pathlib import Path
    from loramux_server.engine.messages import COMMAND_DECODER, EVENT_ENCODER, Fatal, Ready
    from loramux_server.engine.options import WorkerOptions
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerOptions)
    log = Path(__file__).with_suffix(".log")
    life = len(log.read_text().split()) if log.exists() else 0  # how many lived before this one
    log.open("a").write("started\\n")
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(options.address)
    def say(event):
        socket.send(EVENT_ENCODER.encode(event))
    def ready():
        say(Ready("tiny", "0", "Fake", 512, 320, "cpu", "float32", "nf4", [2], {}, 0, 0, 16, 1, 1, 1))
    def hear():
        return COMMAND_DECODER.decode(socket.recv())
"""

FakeWorker = Callable[..., WorkerClient]


@pytest_asyncio.fixture(loop_scope="module")
async def fake_worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[FakeWorker]:
    """A client whose worker runs the given lines; it is restarted without delay."""
    monkeypatch.setattr(restarts, "DELAYS_S", (0.0,) * 4)
    made: list[WorkerClient] = []

    def make(lines: str, **timeouts: float) -> WorkerClient:
        script = tmp_path / "worker.py"
        script.write_text(textwrap.dedent(FAKE) + textwrap.dedent(lines))
        real = asyncio.create_subprocess_exec
        monkeypatch.setattr(
            asyncio,
            "create_subprocess_exec",
            lambda executable, *_, **pipes: real(executable, str(script), **pipes),
        )
        made.append(WorkerClient(options(tmp_path), **timeouts))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for client in made:
        await client.close()


async def test_why_the_base_did_not_load_is_told(fake_worker: FakeWorker) -> None:
    """The worker says why and ends at once: its last words count, however its end is noticed."""
    client = fake_worker("say(Fatal('the checkpoint is damaged'))\nsocket.close(linger=2000)\nsys.exit(1)")
    with pytest.raises(BaseModelError, match="the checkpoint is damaged"):
        await client.start()


async def test_a_worker_that_dies_silently_while_loading(fake_worker: FakeWorker) -> None:
    client = fake_worker("sys.exit(7)")
    with pytest.raises(BaseModelError, match="ended while loading, with exit code 7"):
        await client.start()


@pytest.mark.parametrize("connected", [True, False])
async def test_closing_while_it_loads_does_not_wait(
    fake_worker: FakeWorker, connected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux_server.engine.process._STOP_WAIT_S", 600.0)
    client = fake_worker(("" if connected else "socket.close()\n") + "time.sleep(600)")
    starting = asyncio.create_task(client.start())
    await until(lambda: client.worker_pid is not None)
    pid = client.worker_pid
    assert pid is not None
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    begun = time.monotonic()
    await client.close()
    assert time.monotonic() - begun < 60
    assert not is_alive(pid)


async def test_a_request_sent_to_a_worker_that_just_died_is_not_sent_to_the_next(
    fake_worker: FakeWorker,
) -> None:
    client = fake_worker("""
        ready()
        while True:
            command = hear()
            if life > 0:
                say(Fatal(f"heard {type(command).__name__} {command.id}"))
    """)
    await client.start()
    pid = client.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it lives, but takes nothing from the socket
    first = asyncio.ensure_future(collect(client, "frozen"))
    await until(lambda: client.in_flight == 1)
    os.kill(pid, signal.SIGKILL)
    assert [output.finish for output in await first] == ["error"]
    await until(lambda: client.state == "ready")
    await asyncio.sleep(0.2)
    assert client._failure == ""


async def test_without_a_worker_at_the_other_end_nothing_waits(fake_worker: FakeWorker) -> None:
    """Its end is not noticed yet: the request must not wait for the next worker, nor be computed there for nobody."""
    client = fake_worker("ready()\nhear()\nsocket.close()\ntime.sleep(60)")
    await client.start()
    lost = asyncio.ensure_future(collect(client, "taken"))

    async def refused() -> bool:
        try:
            await asyncio.wait_for(collect(client, "refused"), 0.05)
        except EngineError as error:
            return "restarting" in str(error)
        except TimeoutError:
            pass
        return False

    deadline = time.monotonic() + 60
    while not await refused():
        assert time.monotonic() < deadline
    assert client.state == "ready"
    await client.pin([AdapterRef("0", "/a")])
    lost.cancel()
    await asyncio.gather(lost, return_exceptions=True)


async def test_a_failing_device_is_named_in_every_stream(fake_worker: FakeWorker) -> None:
    client = fake_worker("ready()\nhear()\nsay(Fatal('CUDA error'))\nsocket.close(linger=2000)\nsys.exit(1)")
    await client.start()
    (output,) = await collect(client, "unlucky")
    assert output.error == "the engine failed (CUDA error) and is restarting"
    await until(lambda: client.state == "ready")
    assert client.restarts == 1


async def test_a_worker_that_does_not_come_back_at_first_is_tried_again(fake_worker: FakeWorker) -> None:
    client = fake_worker("""
        if life in (1, 2):
            say(Fatal("out of memory"))
            socket.close(linger=2000)
            sys.exit(1)
        ready()
        hear()
        sys.exit(1)
    """)
    await client.start()
    (output,) = await collect(client, "unlucky")
    assert output.finish == "error"
    await until(lambda: client.state == "ready")
    assert client.restarts == 3


async def test_a_worker_that_hangs_is_ended_and_replaced(fake_worker: FakeWorker, tmp_path: Path) -> None:
    client = fake_worker(
        """
        import faulthandler, signal
        faulthandler.register(signal.SIGUSR1, Path(__file__).with_suffix(".stacks").open("a"))
        ready()
        hear()
        if life == 0:
            time.sleep(600)
        """,
        hang_timeout=0.4,
    )
    await client.start()
    await asyncio.sleep(1)
    assert (client.restarts, client.stall) == (0, None), "nobody waits for an idle worker"
    unlucky = asyncio.ensure_future(collect(client, "unlucky"))
    await until(lambda: client.stall is not None)
    assert "the worker has not moved for 0." in str(client.stall)
    (output,) = await unlucky
    assert (output.finish, output.error_code) == ("error", "engine_unavailable")
    assert "the worker has not moved for" in str(output.error)
    await until(lambda: client.state == "ready")
    assert (client.restarts, client.stall) == (1, None)
    assert "worker.py" in (tmp_path / "worker.stacks").read_text(), "its stacks were not asked for"


async def test_a_worker_that_beats_is_left_alone(fake_worker: FakeWorker) -> None:
    """A long slice of training, or a prompt that is computed in many steps: no tokens, but signs of life."""
    client = fake_worker(
        """
        from loramux_server.engine.messages import Beat
        ready()
        hear()
        for _ in range(20 if life == 0 else 0):
            time.sleep(0.1)
            say(Beat())
        say(Fatal(f"ended by itself in life {life}"))
        socket.close(linger=2000)
        """,
        hang_timeout=0.8,
    )
    await client.start()
    (output,) = await collect(client, "patient")
    assert "ended by itself in life 0" in str(output.error)


async def test_an_answer_that_nobody_reads_is_not_the_workers_fault(fake_worker: FakeWorker) -> None:
    """A slow client holds its stream open long after the worker has said all there is."""
    client = fake_worker(
        """
        from loramux_server.engine.messages import StepOutput, TokenOutput
        from loramux_server.engine.stats import EngineStats
        ready()
        command = hear()
        stats = EngineStats(1, 0, 0, 0, 8, 1, 1, 0, [], [])
        say(StepOutput([TokenOutput(command.id, [5]), TokenOutput(command.id, [6], "stop")], stats))
        hear()
        """,
        hang_timeout=0.4,
    )
    await client.start()
    stream = client.generate("slow reader", PROMPT, GREEDY, None)
    assert (await anext(stream)).tokens == [5]
    await asyncio.sleep(1)
    assert (client.restarts, client.stall, client.in_flight) == (0, None, 1)
    assert [output.finish async for output in stream] == ["stop"]


async def test_a_front_that_was_stopped_itself_blames_nobody() -> None:
    watch = Watch(2.0)

    async def end(reason: str) -> None:
        raise AssertionError(reason)

    running = asyncio.create_task(watch.run(lambda: 1, end))
    await asyncio.sleep(0)
    time.sleep(1.3)  # the whole process, event loop included
    await asyncio.sleep(0.05)
    assert watch.stall is None
    running.cancel()
    for _ in range(5):
        watch.look(True)
    assert watch.stall is not None
    watch.heard()
    watch.look(True)
    assert watch.stall is None


async def test_an_answer_that_takes_too_long_is_ended_and_the_worker_told(
    fake_worker: FakeWorker, tmp_path: Path
) -> None:
    client = fake_worker(
        """
        ready()
        hear()
        command = hear()
        Path(__file__).with_suffix(".heard").write_text(f"{type(command).__name__} {command.id}")
        hear()
        """,
        request_timeout=0.2,
    )
    await client.start()
    (output,) = await collect(client, "slow")
    assert (output.finish, output.error_code) == ("error", "request_timeout")
    assert "--request-timeout" in str(output.error)
    assert client.in_flight == 0
    heard = tmp_path / "worker.heard"
    await until(lambda: heard.exists() and heard.read_text() == "AbortRequest slow")


async def test_draining_outlives_a_restart(fake_worker: FakeWorker) -> None:
    client = fake_worker("ready()\nhear()\ntime.sleep(0.3)\nsys.exit(1)")
    await client.start()
    unlucky = asyncio.ensure_future(collect(client, "unlucky"))
    await until(lambda: client.in_flight == 1)
    client.drain()
    assert [output.finish for output in await unlucky if output.finish] == ["error"]
    await until(lambda: client.restarts == 1 and client.state == "draining")
    assert await client.wait_idle(1)
    with pytest.raises(EngineError, match="draining"):
        await collect(client, "late")


async def test_what_is_pinned_is_told_to_the_next_worker_too(fake_worker: FakeWorker) -> None:
    client = fake_worker("""
        ready()
        heard = hear()
        say(Fatal(f"heard {type(heard).__name__} {[one.generation for one in heard.adapters]}"))
        socket.close(linger=2000)
        sys.exit(1) if life == 0 else time.sleep(60)
    """)
    await client.start()
    await client.pin([AdapterRef("abc", "/a")])
    await until(lambda: client.restarts == 1 and client._failure == "heard PinAdapters ['abc']")


async def test_a_worker_ends_with_its_parent(tiny_model: Callable[[str], Path]) -> None:
    """The front is killed, so that it cannot say goodbye; the worker must not keep the device."""
    settings = msgspec.json.encode(options(tiny_model("llama")))
    front = f"""
        import asyncio, msgspec
        from loramux_server.engine.client import WorkerClient
        from loramux_server.engine.options import WorkerOptions
        async def main():
            client = WorkerClient(msgspec.json.decode({settings!r}, type=WorkerOptions))
            starting = asyncio.create_task(client.start())
            while client.worker_pid is None:
                await asyncio.sleep(0.01)
            print(client.worker_pid, flush=True)
            await starting
            print("ready", flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(front)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        pid = int(lines.readline())
        assert lines.readline() == "ready\n"
        assert is_alive(pid)
        process.kill()
        process.wait()
        try:
            await until(lambda: not is_alive(pid), 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def test_what_the_engine_is_told_of_its_options(tiny_model: Callable[[str], Path]) -> None:
    from loramux_server.engine.worker import build_engine

    told = msgspec.structs.replace(
        options(tiny_model("llama")),
        enable_prefix_caching=False,
        enforce_eager=True,
        scheduling_policy="priority",
        max_num_batched_tokens=64,
    )
    engine, ready = build_engine(told)
    engine.close()
    assert not engine.blocks.prefix_caching
    assert engine.options.enforce_eager
    assert engine.options.limits.long_prompt_tokens == 32
    assert (ready.max_loras, ready.kv_block_size) == (told.max_loras, told.block_size)
    assert ready.scheduling_policy == "priority"


async def test_the_worker_is_told_what_the_configuration_says() -> None:
    """Every setting that both have under one name, at another value than its default."""
    flags = {
        "--enforce-eager": (),
        "--no-enable-prefix-caching": (),
        "--scheduling-policy": ("priority",),
        "--max-num-seqs": ("7",),
        "--max-num-batched-tokens": ("77",),
        "--max-loras": ("3",),
        "--max-lora-rank": ("9",),
        "--max-cpu-loras": ("5",),
        "--block-size": ("32",),
        "--gpu-memory-utilization": ("0.5",),
        "--seed": ("4",),
        "--threads": ("1",),
        "--max-model-len": ("99",),
        "--quantization": ("none",),
        "--dtype": ("float32",),
        "--device": ("cpu",),
        "--revision": ("r",),
        "--log-level": ("debug",),
        "--log-format": ("json",),
    }
    config = read_config(["m", *itertools.chain(*((flag, *values) for flag, values in flags.items()))])
    told, usual = worker_options(config, "m"), worker_options(read_config(["m"]), "m")
    for flag in flags:
        name = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
        assert getattr(told, name) == getattr(config, name) != getattr(usual, name), flag


async def test_restarts_are_counted_for_ever_and_held_against_a_worker_for_a_while() -> None:
    now = 0.0
    counted = restarts.Restarts(lambda: now)
    delays = []
    for _ in range(5):
        delays.append(counted.delay())
        counted.count()
    assert delays == [0.0, 1.0, 5.0, 15.0, 15.0]
    now = restarts.RECENT_S - 1
    assert counted.delay() == 15.0
    counted.count()
    now += 2
    assert counted.delay() == 1.0
    now += restarts.RECENT_S
    assert (counted.delay(), counted.total) == (0.0, 6)
