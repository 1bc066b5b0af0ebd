"""vLLM's POST /v1/load_lora_adapter and /v1/unload_lora_adapter, for the tools that know only these.

Answers are vLLM's sentences as plain text; errors have the envelope of all routes. Unlike there, what is loaded outlives a
restart, and a path is read only inside the folders given with --adapter-dir.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from loramux_adapters.errors import Fault, InvalidAdapter
from loramux_adapters.sources import Staged, stage_directory
from loramux_server.api.adapter_wire import LoadLoraBody, UnloadLoraBody, parse
from loramux_server.api.body import read_object
from loramux_server.api.context import ApiContext
from loramux_server.catalog import AdapterCatalog
from loramux_server.keys.principal import current_access
from loramux_server.publishing import Options


def vllm_router(api: ApiContext, catalog: AdapterCatalog) -> APIRouter:
    router = APIRouter()
    roots = tuple(root.resolve() for root in api.settings.adapter_roots)

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_lora_adapter(request: Request) -> Response:
        """Add an adapter from one of the server's folders; with load_inplace it replaces one of that name."""
        body = parse(LoadLoraBody, await read_object(request, api.settings.max_body_bytes))

        def stage() -> Staged:
            return _stage_below(Path(body.lora_path), roots, catalog)

        options = Options(overwrite=body.load_inplace)
        await catalog.publish(body.lora_name, stage, options, current_access())
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_lora_adapter(request: Request) -> Response:
        """Forget an adapter; requests that run on it finish."""
        body = parse(UnloadLoraBody, await read_object(request, api.settings.max_body_bytes))
        await catalog.delete(body.lora_name, 0, current_access())
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _stage_below(path: Path, roots: tuple[Path, ...], catalog: AdapterCatalog) -> Staged:
    """A relative path is looked for below each root in turn."""
    if not roots:
        raise InvalidAdapter(
            [Fault("lora_path", "no folder may be loaded from: start the server with --adapter-dir")]
        )
    places = [path] if path.is_absolute() else [root / path for root in roots]
    place = next((place for place in places if place.is_dir()), places[0])
    return stage_directory(place, catalog.staging, roots=roots, limits=catalog.limits)
