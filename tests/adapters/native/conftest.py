"""The kernels, compiled once for all tests of them."""

from __future__ import annotations

import shutil

import pytest

from loramux_adapters.native.library import Native, load_native


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    found = load_native(tmp_path_factory.mktemp("kernels"))
    assert found is not None
    return found
