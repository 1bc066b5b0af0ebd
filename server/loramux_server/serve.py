"""`loramux serve`: from a configuration to a running server, and down again without losing a request.

Order at start: take the port, fetch the demo model if asked for, listen (503 until ready), start the worker and read the
tokenizer beside it, open the adapter registry, then answer. At SIGTERM or Ctrl-C: refuse new requests with 503, let running
ones finish within the grace period, stop the worker. A second signal stops at once (`front_door.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from loramux_adapters import __version__
from loramux_adapters.errors import BaseModelError, ConfigError
from loramux_adapters.probe import Probe
from loramux_adapters.training.tensorboard import check_tensorboard
from loramux_server.api.app import ApiSettings, create_app
from loramux_server.banner import banner, exposure
from loramux_server.base.demo import default_cache_dir, ensure_demo_model
from loramux_server.base.location import check_location
from loramux_server.catalog import AdapterCatalog
from loramux_server.config import ServeConfig
from loramux_server.engine.client import WorkerClient
from loramux_server.engine.options import WorkerOptions
from loramux_server.exports.base import served_base
from loramux_server.exports.manager import ExportManager
from loramux_server.folders import AdapterFolders
from loramux_server.front_door import FrontDoor, drain
from loramux_server.keys.guard import Guard, open_guard
from loramux_server.keys.limits import Limits
from loramux_server.logs import adopt_libraries, set_up_logging
from loramux_server.metrics import Metrics
from loramux_server.quotas import Quota
from loramux_server.tracing import Tracing
from loramux_server.training.manager import JobManager

logger = logging.getLogger("loramux")

# Of each text that uploads are verified on. Decoding waits for one text's forward pass: half of what `verify` reads.
_PROBE_TOKENS = 32


def run(config: ServeConfig) -> None:
    """Serve until stopped. Raises LoramuxError if it cannot start."""
    set_up_logging(config.log_level, config.log_format, "front")
    if config.tensorboard is not None:
        check_tensorboard()
    listener = _take_port(config.host, config.port)
    with contextlib.closing(listener), _traced(config) as tracing:
        if config.is_demo:
            model = str(ensure_demo_model())
        else:
            model = config.model
            check_location(model)
        uvicorn_loop = uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()
        with _guarded(config) as guard, asyncio.Runner(loop_factory=uvicorn_loop) as runner:
            runner.run(_serve(config, model, listener, guard, tracing))


async def _serve(
    config: ServeConfig, model: str, listener: socket.socket, guard: Guard, tracing: Tracing | None
) -> None:
    client = WorkerClient(
        worker_options(config, model),
        max_queued=config.max_queued,
        request_timeout=config.request_timeout,
        hang_timeout=config.hang_timeout,
    )
    metrics = Metrics(max_loras=config.max_loras)
    door = FrontDoor(listener, metrics, tracing)
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    door.start()
    started = asyncio.create_task(client.start())
    stopped = asyncio.create_task(stop.wait())
    with contextlib.ExitStack() as opened:  # is closed when the worker and the door are
        try:
            tokenizer, template = await asyncio.to_thread(_read_tokenizer, config, model)
            await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                return
            ready = started.result()
            metrics.describe(
                version=__version__, base=ready.base_name, quantization=ready.quantization, dtype=ready.dtype
            )
            services = await _open_services(config, model, client, metrics, tokenizer, opened)
            app = create_app(
                engine=client, adapters=services.catalog.registry, tokenizer=tokenizer, settings=_api_settings(config),
                metrics=metrics, chat_template=template, catalog=services.catalog, exports=services.exports,
                jobs=services.jobs, guard=guard, tracing=tracing,
            )  # fmt: skip
            async with services.running():
                door.open(app)
                names = [record.name for record in services.catalog.registry.list()]
                exposed = listener.getsockname()[0] if guard.keys.is_open else None
                _say_ready(config, door.url, names, exposed=exposed)
                await stop.wait()
                stop.clear()
                await drain(door, client, services.exports, services.jobs, grace=config.grace, again=stop)
        finally:
            for task in (started, stopped):
                task.cancel()
            await asyncio.gather(started, stopped, return_exceptions=True)
            await client.close()
            await door.close()


@dataclass(frozen=True)
class _Services:
    """What the routes work with beside the engine."""

    catalog: AdapterCatalog
    folders: AdapterFolders
    exports: ExportManager
    jobs: JobManager

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        keeping = [asyncio.create_task(self.catalog.maintain()), asyncio.create_task(self.folders.watch())]
        self.exports.start()
        self.jobs.start()
        try:
            yield
        finally:
            for keeper in keeping:
                keeper.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)


async def _open_services(
    config: ServeConfig, model: str, client: WorkerClient, metrics: Metrics, tokenizer: Any, opened: contextlib.ExitStack
) -> _Services:  # fmt: skip
    catalog = _open_catalog(config, client, metrics, tokenizer)
    opened.callback(catalog.close)
    folders = AdapterFolders(catalog, config.adapter_dir)
    await asyncio.to_thread(_import_adapters, folders, config)
    await catalog.keep_pinned()
    base = await asyncio.to_thread(served_base, model, config.revision, client.ready, is_demo=config.is_demo)
    folder = catalog.staging.with_name("exports")
    exports = await asyncio.to_thread(ExportManager, folder, catalog.registry, base)
    jobs = await asyncio.to_thread(JobManager, catalog.staging.parent, catalog, config.tensorboard)
    opened.callback(jobs.close)
    metrics.service.watch(client, config.data_dir, exports.counts)
    return _Services(catalog, folders, exports, jobs)


def _open_catalog(
    config: ServeConfig, client: WorkerClient, metrics: Metrics, tokenizer: Any
) -> AdapterCatalog:
    return AdapterCatalog(
        config.data_dir,
        client,
        metrics,
        reserved=config.names,
        max_lora_rank=config.max_lora_rank,
        max_file_bytes=config.max_adapter_size,
        probe=Probe.of_texts(tokenizer, length=min(_PROBE_TOKENS, client.ready.max_model_len)),
        quota=Quota(adapters=config.max_adapters_per_tenant, num_bytes=config.max_adapter_bytes_per_tenant),
    )


def _api_settings(config: ServeConfig) -> ApiSettings:
    return ApiSettings(
        served_model_names=tuple(config.names),
        version=__version__,
        max_body_bytes=config.max_body_size,
        adapter_roots=tuple(config.adapter_dir),
    )


def _say_ready(config: ServeConfig, url: str, adapters: list[str], *, exposed: str | None) -> None:
    """`exposed` is the address that everybody may use, as there are no keys."""
    logger.info("ready on %s", url)
    if config.log_format == "text":
        banner(url, config.names[0], adapters, needs_key=exposed is None)
    if exposed is not None and (warning := exposure(exposed)):
        logger.warning(warning)


def _guarded(config: ServeConfig) -> contextlib.AbstractContextManager[Guard]:
    limits = Limits(
        requests_per_minute=config.rate_limit_requests,
        tokens_per_minute=config.rate_limit_tokens,
        queued=config.max_queued_per_key,
    )
    return open_guard(config.data_dir, [key.get_secret_value() for key in config.api_key], limits)


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


def worker_options(config: ServeConfig, model: str) -> WorkerOptions:
    return WorkerOptions(
        address="",
        parent_pid=0,
        model=model,
        name=config.names[0],
        revision=config.revision,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        nf4_cache=str(default_cache_dir().absolute() / "nf4") if config.nf4_cache else None,
        cpu_kernels=None if config.enforce_eager else str(default_cache_dir().absolute() / "kernels"),
        seed=config.seed,
        threads=config.threads,
        max_model_len=config.max_model_len,
        kv_cache_bytes=config.kv_cache_memory,
        gpu_memory_utilization=config.gpu_memory_utilization,
        block_size=config.block_size,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        speculative_config=config.speculative_config,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        scheduling_policy=config.scheduling_policy,
        max_loras=config.max_loras,
        max_lora_rank=config.max_lora_rank,
        max_cpu_loras=config.max_cpu_loras,
        chat_template=None if config.chat_template is None else str(config.chat_template.absolute()),
        training_latency_budget=config.training_latency_budget / 1000,
        log_level=config.log_level,
        log_format=config.log_format,
    )
