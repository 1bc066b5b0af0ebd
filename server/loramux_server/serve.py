"""`loramux serve`: from a configuration to a running server, and down again without losing a request.

Order at start: take the port, fetch the demo model if asked for, start the worker and read the tokenizer beside it, open
the adapter registry, then listen. At SIGTERM or Ctrl-C: refuse new requests with 503, let running ones finish within the
grace period, stop the worker. A second signal stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import uvicorn

from loramux_adapters import __version__
from loramux_adapters.errors import BaseModelError, ConfigError
from loramux_adapters.probe import Probe
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.banner import banner
from loramux_server.base.demo import ensure_demo_model
from loramux_server.base.location import check_location
from loramux_server.catalog import AdapterCatalog
from loramux_server.config import ServeConfig
from loramux_server.engine.client import WorkerClient
from loramux_server.engine.options import WorkerOptions
from loramux_server.exports.base import served_base
from loramux_server.exports.manager import ExportManager
from loramux_server.folders import AdapterFolders
from loramux_server.logs import adopt_libraries, set_up_logging
from loramux_server.metrics import Metrics
from loramux_server.tracing import Tracing
from loramux_server.training.manager import JobManager

logger = logging.getLogger("loramux")

# Of each text that uploads are verified on. Decoding waits for one text's forward pass: half of what `verify` reads.
_PROBE_TOKENS = 32


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: draining is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def run(config: ServeConfig) -> None:
    """Serve until stopped. Raises LoramuxError if it cannot start."""
    set_up_logging(config.log_level, config.log_format, "front")
    listener = _take_port(config.host, config.port)
    with contextlib.closing(listener), _traced(config) as tracing:
        if config.is_demo:
            model = str(ensure_demo_model())
        else:
            model = config.model
            check_location(model)
        uvicorn_loop = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
        with asyncio.Runner(loop_factory=uvicorn_loop) as runner:
            runner.run(_serve(config, model, listener, tracing))


async def _serve(config: ServeConfig, model: str, listener: socket.socket, tracing: Tracing | None) -> None:
    client = WorkerClient(_worker_options(config, model), max_queued=config.max_queued)
    metrics = Metrics(max_loras=config.max_loras)
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    catalog: AdapterCatalog | None = None
    jobs: JobManager | None = None
    started = asyncio.create_task(client.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        tokenizer, template = await asyncio.to_thread(_read_tokenizer, config, model)
        await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return
        ready = started.result()
        catalog = AdapterCatalog(
            config.data_dir,
            client,
            metrics,
            reserved=config.names,
            max_lora_rank=config.max_lora_rank,
            max_file_bytes=config.max_adapter_size,
            probe=Probe.of_texts(tokenizer, length=min(_PROBE_TOKENS, ready.max_model_len)),
        )
        folders = AdapterFolders(catalog, config.adapter_dir)
        await asyncio.to_thread(_import_adapters, folders, config)
        await catalog.keep_pinned()
        exports = await asyncio.to_thread(_open_exports, config, model, catalog)
        jobs = await asyncio.to_thread(JobManager, catalog.staging.parent, catalog)
        metrics.describe(
            version=__version__, base=ready.base_name, quantization=ready.quantization, dtype=ready.dtype
        )
        settings = ApiSettings(
            served_model_names=tuple(config.names),
            version=__version__,
            max_body_bytes=config.max_body_size,
            adapter_roots=tuple(config.adapter_dir),
        )
        app = create_app(
            engine=client, adapters=catalog.registry, tokenizer=tokenizer, settings=settings, metrics=metrics,
            chat_template=template, catalog=catalog, exports=exports, jobs=jobs, tracing=tracing,
        )  # fmt: skip
        metrics.service.watch(client, config.data_dir, exports.counts)
        keeping = [asyncio.create_task(catalog.maintain())]
        if config.adapter_dir:
            keeping.append(asyncio.create_task(folders.watch()))
        names = [record.name for record in catalog.registry.list()]
        await _listen(app, config, client, exports, jobs, listener, stop, names)
        for keeper in keeping:
            keeper.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
    finally:
        for task in (started, stopped):
            task.cancel()
        await asyncio.gather(started, stopped, return_exceptions=True)
        await client.close()
        if jobs is not None:
            jobs.close()
        if catalog is not None:
            catalog.close()


async def _listen(
    app: Any,
    config: ServeConfig,
    client: WorkerClient,
    exports: ExportManager,
    jobs: JobManager,
    listener: socket.socket,
    stop: asyncio.Event,
    adapters: list[str],
) -> None:
    exports.start()
    jobs.start()
    settings = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75, server_header=False
    )
    server = _Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    host, port = listener.getsockname()[:2]
    logger.info("ready on http://%s:%d", host, port)
    if config.log_format == "text":
        banner(f"http://{host}:{port}", config.names[0], adapters)
    await stop.wait()
    logger.info("draining: %d requests in flight, at most %g s", client.in_flight, config.grace)
    client.drain()
    await exports.close()
    stop.clear()
    saved = asyncio.create_task(jobs.stop(config.grace))
    idle = asyncio.create_task(client.wait_idle(config.grace))
    again = asyncio.create_task(stop.wait())
    for task in (saved, idle):
        await asyncio.wait({task, again}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    if not client.in_flight:  # an upload that is coming in gets the same time
        await asyncio.wait({serving, again}, timeout=config.grace, return_when=asyncio.FIRST_COMPLETED)
    for task in (saved, idle, again):
        task.cancel()
    server.force_exit = True
    await serving


@contextlib.contextmanager
def _traced(config: ServeConfig) -> Iterator[Tracing | None]:
    if config.otlp_traces_endpoint is None:
        yield None
        return
    endpoint = config.otlp_traces_endpoint
    with contextlib.closing(
        Tracing.to_collector(endpoint, base=config.names[0], version=__version__)
    ) as tracing:
        yield tracing


def _take_port(host: str, port: int) -> socket.socket:
    """Bind now, so that a taken port is said before a model is loaded; listening starts when the server is ready."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        with contextlib.ExitStack() as unless_bound:
            unless_bound.callback(listener.close)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            unless_bound.pop_all()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use; choose another with --port", param="port"
            ) from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}", param="host") from error
    listener.setblocking(False)
    return listener


def _read_tokenizer(config: ServeConfig, model: str) -> tuple[Any, str | None]:
    from transformers import AutoTokenizer

    adopt_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(
            f"cannot read the tokenizer of '{config.model}': {reason}", param="model"
        ) from error
    if config.chat_template is None:
        return tokenizer, None
    try:
        return tokenizer, config.chat_template.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template {config.chat_template}: {error}", param="chat_template"
        ) from error


def _import_adapters(folders: AdapterFolders, config: ServeConfig) -> None:
    import torch

    # The gate reads adapters in this process: now, so that the first upload does not stop the event loop for an import,
    # and on one thread, because the cores are the worker's.
    torch.set_num_threads(1)
    modules = {name: Path(path) for name, _, path in (entry.partition("=") for entry in config.lora_modules)}
    if config.demo_adapters if config.demo_adapters is not None else config.is_demo:
        from loramux_adapters.demo import demo_adapters

        folders.add_examples({name: path for name, path in demo_adapters().items() if name not in modules})
    folders.add_modules(modules)
    if config.adapter_dir:
        folders.scan()


def _open_exports(config: ServeConfig, model: str, catalog: AdapterCatalog) -> ExportManager:
    base = served_base(model, config.revision, catalog.engine.ready, is_demo=config.is_demo)
    return ExportManager(catalog.staging.with_name("exports"), catalog.registry, base)


def _worker_options(config: ServeConfig, model: str) -> WorkerOptions:
    return WorkerOptions(
        address="",
        parent_pid=0,
        model=model,
        name=config.names[0],
        revision=config.revision,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        seed=config.seed,
        threads=config.threads,
        max_model_len=config.max_model_len,
        kv_cache_bytes=config.kv_cache_memory,
        gpu_memory_utilization=config.gpu_memory_utilization,
        block_size=config.block_size,
        enable_prefix_caching=config.enable_prefix_caching,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        max_cpu_loras=config.max_cpu_loras,
        chat_template=None if config.chat_template is None else str(config.chat_template.absolute()),
        training_latency_budget=config.training_latency_budget / 1000,
        log_level=config.log_level,
        log_format=config.log_format,
    )
