"""The front process holds names and files of adapters without paying for torch: these modules never import it."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = ["adapter_files", "archives", "files", "names", "registry", "scanner", "sources", "spec", "store"]


@pytest.mark.parametrize(
    "heavy", ["torch", "transformers", "huggingface_hub", "fastapi", "zmq", "loramux_server"]
)
def test_importing_them_loads_none_of(heavy: str) -> None:
    imports = "; ".join(f"import loramux_adapters.{module}" for module in MODULES)
    check = f"import sys; {imports}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
