"""Everything strangers send, to a real server that talks to eight others meanwhile: no token changes, nothing stays.

The gate's corpus, archives and broken forms, each with the sentence its sender gets. The server has a working folder and one
for temporary files of its own, so that a file it would leave anywhere can be seen.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch
import zstandard
from safetensors.torch import save

from loadtests.adapters import model_directory, read_geometry
from loramux_adapters.adapter_files import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from loramux_adapters.demo import demo_adapters
from loramux_adapters.spec import BaseGeometry
from tests.adapters.conftest import AdapterFiles
from tests.adapters.test_archives import LINKS, special, tar, zipped
from tests.adapters.test_gate import CASES
from tests.api.test_uploads import BODIES, FORM
from tests.e2e.conftest import Server, start_server

pytestmark = pytest.mark.e2e

MODELS = (*sorted(demo_adapters())[:3], "demo") * 2
TOKENS = 24
RSS_BYTES = 128 * 1024**2  # that front and worker may each grow by, under two hundred attacks
MODULES = tuple(f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(2) for kind in "qv")
# The gate's corpus is written for a smaller base and smaller limits; these cases mean something else here.
OTHER_LIMITS = {"huge config", "header length lies", "header bomb", "file bomb", "many tensors"}
OTHER_SHAPES = {
    "offset far outside",
    "offsets swapped",
    "extra tensor 'el.layers.0.self_attn.q_proj.lora_A.default.weight'",
}
HERE = {
    "to 512": "to 64",
    "16384": "1048576",
    "[4, 16]": "[4, 576]",
    "[16, 4]": "[576, 4]",
    "[8, 16]": "[8, 576]",
    "[2, 16]": "[2, 576]",
    "[8, 4]": "[192, 4]",
    "[64]": "[2304]",
    'this one is "nf4:1234"': 'this one is "',
}
OTHER_FORMS = {"base name", "config too large", "weights too large"}


@dataclass(frozen=True)
class Attack:
    """One request and what must come back."""

    name: str
    body: bytes
    headers: Mapping[str, str]
    status: int
    sentence: str


def form(files: Mapping[str, bytes]) -> tuple[bytes, dict[str, str]]:
    parts = [(name, (name, data)) for name, data in files.items()]
    request = httpx.Request("POST", "http://server/", data={"name": "evil"}, files=parts)
    return request.read(), {"content-type": request.headers["content-type"]}


@cache
def geometry() -> BaseGeometry:
    return read_geometry(model_directory("demo"))


def small_adapter() -> AdapterFiles:
    """A valid adapter for the embedded model: four linears of rank 4."""
    config: dict[str, object] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": list(MODULES),
        "use_rslora": False, "bias": "none",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in MODULES:
        out_features, in_features = geometry().linear_shapes[module]
        for kind, shape in (("lora_A", (4, in_features)), ("lora_B", (out_features, 4))):
            tensors[f"base_model.model.{module}.{kind}.weight"] = torch.randn(shape, generator=generator)
    return AdapterFiles(config, tensors)


def gate_attacks(directory: Path) -> Iterator[Attack]:
    for number, case in enumerate(CASES):
        if case.name in OTHER_LIMITS | OTHER_SHAPES:
            continue
        files = small_adapter()
        case.alter(files)
        folder = files.write(directory / str(number))
        sentence = case.sentence
        for there, here in HERE.items():
            sentence = sentence.replace(there, here)
        sent = {name: (folder / name).read_bytes() for name in ADAPTER_FILES if (folder / name).exists()}
        yield Attack(case.name, *form(sent), 400, sentence)


def archive_attacks(outside: Path) -> Iterator[Attack]:
    files = small_adapter()
    good = {CONFIG_FILE: json.dumps(files.config).encode(), WEIGHTS_FILE: save(files.tensors)}
    packs: dict[str, Callable[[dict[str, bytes]], bytes]] = {
        "tar": tar,
        "tar.gz": lambda members: gzip.compress(tar(members)),
        "tar.zst": lambda members: zstandard.compress(tar(members)),
        "zip": zipped,
    }
    for kind, pack in packs.items():
        for name, sentence in (
            ("../evil", "is not a path inside the archive"),
            (f"{outside}/evil", "is not a path inside the archive"),
            ("a/../../evil", "is not a path inside the archive"),
            ("adapter_model.bin", "it is a pickle, which can run code and is never read"),
            ("chat_template.jinja", "does not belong in an adapter archive"),
            (f"deep/er/{CONFIG_FILE}", "does not lie beside the other files"),
        ):
            yield Attack(f"{kind} with {name}", *form({"archive": pack(good | {name: b"x"})}), 400, sentence)
        yield Attack(f"half a {kind}", *form({"archive": pack(good)[:900]}), 400, "archive: ")
        bomb = pack({"README.md": bytes(8_000_000), **good})
        if kind != "zip":  # which can pass over it unread
            yield Attack(f"{kind} bomb", *form({"archive": bomb}), 400, "8000000 bytes are more than allowed")
    for name, (member, sentence) in LINKS.items():
        yield Attack(name, *form({"archive": tar([member], tarfile.GNU_FORMAT)}), 400, sentence)
    linked = [
        special(WEIGHTS_FILE, tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.TarInfo(CONFIG_FILE), good[CONFIG_FILE]),
    ]
    yield Attack("link to a secret", *form({"archive": tar(linked)}), 400, f'"{WEIGHTS_FILE}": is a link')
    yield Attack("link in a zip", *form({"archive": zip_link()}), 400, "is a link")


def zip_link() -> bytes:
    link = zipfile.ZipInfo(WEIGHTS_FILE)
    link.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    return buffer.getvalue()


def form_attacks() -> Iterator[Attack]:
    for name, (body, status, sentence) in BODIES.items():
        if name not in OTHER_FORMS:
            yield Attack(f"form: {name}", body, FORM, status, sentence)


@pytest.fixture
def fenced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose every folder is below `tmp_path`."""
    for folder in ("home", "temporary", "server"):
        (tmp_path / folder).mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "home")
        patch.setenv("TMPDIR", str(tmp_path / "temporary"))
        patch.setenv("PYTHONPATH", "")
        running = start_server(tmp_path / "server", ["demo", "--dtype", "float32"])
    yield running
    assert running.stop() == 0


@contextmanager
def talking(client: httpx.Client, expected: Mapping[str, str]) -> Iterator[list[bool]]:
    """A greedy stream after the other on each model; whether each said what it should."""
    stop = threading.Event()
    right: list[bool] = []

    def talk(model: str) -> None:
        while not stop.is_set():
            right.append(stream(client, model) == expected[model])

    with ThreadPoolExecutor(len(MODELS)) as pool:
        tasks = [pool.submit(talk, model) for model in MODELS]
        try:
            yield right
        finally:
            stop.set()
        for task in tasks:
            task.result()


def stream(client: httpx.Client, model: str) -> str:
    body = {
        "model": model,
        "prompt": "Once upon a time",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }
    pieces = []
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["text"])
    return "".join(pieces)


def resident(server: Server) -> dict[str, int]:
    """Bytes of the front and of its processes."""
    front = str(server.process.pid)
    children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
    return {pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in (front, *children)}


def outside(tmp_path: Path) -> set[str]:
    """Every file below the test's folder that is not in the data directory or sent by us."""
    ours = (tmp_path / "server" / "data", tmp_path / "sent")
    return {
        str(path) for path in tmp_path.rglob("*") if not any(path.is_relative_to(folder) for folder in ours)
    }


def test_hostile_uploads_harm_nobody(fenced: Server, tmp_path: Path) -> None:
    attacks = [*gate_attacks(tmp_path / "sent"), *archive_attacks(tmp_path / "home"), *form_attacks()]
    assert len(attacks) > 200
    names = {card.id for card in fenced.openai.models.list()}
    with httpx.Client(base_url=fenced.url, timeout=300) as client:
        expected = {model: stream(client, model) for model in set(MODELS)}
        assert len(set(expected.values())) == len(expected)
        with talking(client, expected) as right:
            for attack in attacks[::10]:  # what the first of each kind costs is not a leak
                client.post("/v1/adapters", content=attack.body, headers=dict(attack.headers))
            files, memory = outside(tmp_path), resident(fenced)
            for attack in attacks:
                response = client.post("/v1/adapters", content=attack.body, headers=dict(attack.headers))
                error = response.json()["error"]
                assert response.status_code == attack.status, (attack.name, error)
                assert attack.sentence in error["message"], attack.name
                if str(tmp_path) not in attack.name:  # else it is the attacker's own word, given back to him
                    assert str(tmp_path) not in error["message"], attack.name
            after = resident(fenced)
    assert len(right) >= len(MODELS)
    assert all(right), f"{right.count(False)} of {len(right)} streams had other tokens"
    assert after.keys() == memory.keys(), "a process came or went"
    assert {pid: after[pid] - memory[pid] for pid in memory if after[pid] - memory[pid] > RSS_BYTES} == {}
    assert outside(tmp_path) == files
    assert {card.id for card in fenced.openai.models.list()} == names
    assert list((tmp_path / "server" / "data").glob("bases/*/staging/*")) == []
    assert len(list((tmp_path / "server" / "data").glob("bases/*/generations/??/*"))) == len(demo_adapters())
    assert "Traceback" not in fenced.log.read_text()
