"""The application with everything it has (adapters, files, jobs, exports, keys) and an engine that does not compute.

For thousands of requests with the key in `AUTHORIZATION`. Jobs and exports are queued and never carried out.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loramux_adapters.spec import BaseGeometry
from tests.adapters.conftest import LINEARS
from tests.api.conftest import CHATML, byte_level_tokenizer, listening
from tests.api.tenants_support import ADMIN, TenantStand

AUTHORIZATION = f"Bearer {ADMIN}"


@contextmanager
def fake_application() -> Iterator[str]:
    """Its address. Every answer is "Hello world"."""
    shapes = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LINEARS.items()}
    geometry = BaseGeometry(name="org/tiny", identity="nf4:1234", linear_shapes=shapes)
    with tempfile.TemporaryDirectory(prefix="loramux-fake-") as name:
        stand = TenantStand.open(Path(name), geometry, byte_level_tokenizer(chat_template=CHATML))
        stand.engine.max_model_len = 65536  # generated requests would seldom fit into a small one
        with listening(stand.app) as url:
            yield url
        asyncio.run(stand.close())
