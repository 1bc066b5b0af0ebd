"""The page's files as they are served, and that what is committed is what its sources make."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "server" / "page"
BUNDLE = ROOT / "server" / "loramux_server" / "page"
MAX_BYTES = 100_000  # of script and style, before compression


async def test_the_page_is_served_with_a_strict_policy(client: httpx.AsyncClient) -> None:
    for path, media_type in (
        ("/", "text/html; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/app.css", "text/css; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ):
        answer = await client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == media_type
        policy = dict(
            part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"


async def test_what_the_browser_has_is_not_sent_again(client: httpx.AsyncClient) -> None:
    first = await client.get("/page/app.js")
    again = await client.get("/page/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = await client.get("/page/app.js", headers={"if-none-match": '"else"'})
    assert other.status_code == 200
    assert (await client.head("/")).status_code == 200


@pytest.mark.parametrize("path", ["/page/", "/page/index.html", "/page/../app.py", "/page/sources.sha256"])
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    assert (await client.post("/")).status_code == 405


def test_the_bundle_is_small_and_needs_nobody_else() -> None:
    texts = {name: (BUNDLE / name).read_text() for name in ("app.js", "app.css", "index.html")}
    assert sum(len(texts[name].encode()) for name in ("app.js", "app.css")) < MAX_BYTES
    # Names of XML are no addresses; anything else would be asked of another host.
    assert set(re.findall(r"https?://[^\s\"'`)]+", "".join(texts.values()))) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1998/Math/MathML",
        "http://www.w3.org/1999/xhtml",
    }
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", texts["index.html"])
    packages = re.findall(r"^(\S+) [\d.]+ \((.+)\)$", (BUNDLE / "licenses.txt").read_text(), re.MULTILINE)
    assert dict(packages) == {
        "@preact/signals": "MIT",
        "@preact/signals-core": "MIT",
        "htm": "Apache-2.0",
        "preact": "MIT",
    }


def test_the_bundle_is_made_from_these_sources() -> None:
    named = dict(reversed(line.split("  ")) for line in (BUNDLE / "sources.sha256").read_text().splitlines())
    files = [SOURCES / "build.mjs", SOURCES / "package-lock.json", *(SOURCES / "src").rglob("*.*")]
    found = {
        path.relative_to(SOURCES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    assert found == named, "run `make page` and commit what it makes"


def test_lockfile_names_no_registry() -> None:
    lock = (SOURCES / "package-lock.json").read_text()
    assert '"resolved"' not in lock
    assert '"integrity"' in lock


@pytest.mark.skipif(
    shutil.which("node") is None or not (SOURCES / "node_modules").exists(),
    reason="needs Node.js and the page's packages: run `make page`",
)
def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run(["node", "build.mjs", str(tmp_path)], cwd=SOURCES, check=True, timeout=120)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (BUNDLE / path.name).read_bytes(), f"{path.name}: run `make page`"
