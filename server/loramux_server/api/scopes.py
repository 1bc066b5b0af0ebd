"""Which scopes open which route. The one table; a route that is not in it is an admin's alone.

Keys are the templates of routes; `METHOD template` comes before the template alone. Any one of the scopes is enough, and
`admin` always is. OPEN needs no key.
"""

from __future__ import annotations

from collections.abc import Mapping

from loramux_server.keys.principal import SCOPES, Scope

Scopes = tuple[Scope, ...]

OPEN: Scopes = ()
_ADMIN: Scopes = ("admin",)
_ANY: Scopes = SCOPES
_INFER: Scopes = ("infer",)
_ADAPTERS: Scopes = ("adapters",)
_TRAIN: Scopes = ("train",)
_OF_TENANTS: Scopes = ("infer", "adapters", "train")

_ADAPTER = "/v1/adapters/{name:path}"
_EXPORT = f"{_ADAPTER}/exports/{{export_id:export_id}}"
_JOB = "/v1/fine_tuning/jobs/{job_id}"

ROUTES: Mapping[str, Scopes] = {
    "/": OPEN,  # the page: files of the package, the same for everybody
    "/page/{name}": OPEN,
    "/health": OPEN,
    "/ready": OPEN,
    "/version": _ANY,
    "/openapi.json": _ANY,
    "/metrics": ("metrics",),
    "/v1/keys": _ADMIN,
    "/v1/keys/{key_id}": _ADMIN,
    # models
    "/v1/models": _OF_TENANTS,
    "/v1/models/{model:path}": _OF_TENANTS,
    "DELETE /v1/models/{model:path}": _ADAPTERS,
    # answers
    **dict.fromkeys(
        (
            *("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"),
            *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/input_items"),
        ),
        _INFER,
    ),
    # adapters and their exports
    **dict.fromkeys(
        (
            *("/v1/adapters", "/v1/adapters/plan", _ADAPTER, f"{_ADAPTER}/rollback", f"{_ADAPTER}/download"),
            *("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
            *(
                f"{_ADAPTER}/exports",
                _EXPORT,
                f"{_EXPORT}/events",
                f"{_EXPORT}/cancel",
                f"{_EXPORT}/download",
            ),
        ),
        _ADAPTERS,
    ),
    # training
    **dict.fromkeys(
        (
            *("/v1/files", "/v1/files/{file_id}", "/v1/files/{file_id}/content"),
            *(
                "/v1/fine_tuning/plan",
                "/v1/fine_tuning/jobs",
                _JOB,
                f"{_JOB}/cancel",
                f"{_JOB}/pause",
                f"{_JOB}/resume",
            ),
            *(f"{_JOB}/events", f"{_JOB}/checkpoints"),
        ),
        _TRAIN,
    ),
}

# Whoever may generate here waits in the queue of his key.
GENERATING = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})


def scopes_of(method: str, route: str | None) -> Scopes:
    """What opens a route; for a path that has none, any key does, and then learns that it is not there."""
    if route is None:
        return _ANY
    return ROUTES.get(f"{method} {route}", ROUTES.get(route, _ADMIN))
