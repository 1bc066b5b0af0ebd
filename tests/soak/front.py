"""The server's front in a process of its own, without a model: HTTP, staging, gate, registry and store are the real ones.

Imported once by multiprocessing's fork server, so that a start after a kill takes a moment and not the time torch needs.
"""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import uvicorn

from loramux_adapters.spec import BaseGeometry
from tests.api.catalog_support import make_stand
from tests.api.conftest import byte_level_tokenizer

GEOMETRY = BaseGeometry(
    name="org/tiny",
    identity="nf4:1234",
    linear_shapes={f"model.layers.{number}.self_attn.q_proj": (256, 256) for number in range(12)},
)
_TOKENIZER = byte_level_tokenizer()


def serve(root: Path, ready: Connection) -> None:
    """Listen on a free port, say which, and serve until killed."""
    torch.set_num_threads(1)
    stand = make_stand(root, GEOMETRY, _TOKENIZER)
    listener = socket.create_server(("127.0.0.1", 0))
    ready.send(f"http://127.0.0.1:{listener.getsockname()[1]}")
    uvicorn.Server(uvicorn.Config(stand.app, log_level="warning", lifespan="off")).run(sockets=[listener])
