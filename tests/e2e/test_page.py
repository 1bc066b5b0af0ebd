"""The built-in page in a real browser, on a real server: what people do with it, and what it may never do.

Every test ends with three looks that nobody has to ask for: no error in the browser's console, no request to another host,
no violation of the Content-Security-Policy. With PAGE_SCREENSHOTS=docs/images the screenshots of the documentation are
made on the way; they are of the same pages that the tests act on.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Dialog, Locator, Page, Request, Route, expect, sync_playwright

from loramux_adapters.adapter_files import ADAPTER_FILES
from loramux_adapters.demo import demo_adapters
from loramux_server.keys.principal import Scope
from loramux_server.keys.store import FILE_NAME, KeyStore, NewKey
from tests.e2e.conftest import Server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

DESKTOP = (1280, 860)
PHONE = (375, 812)
VIEWS = ("compare", "adapters", "train", "train/new", "server")
QUESTION = "Anna loved the concert in Berlin last night."
HOSTILE = '<img src=x onerror="window.hacked = true"><b>bold</b>'
SLOW_MS = 120_000  # for what the model computes, on a machine that others use too
SLOW_BYTES = 250_000  # a second: an adapter takes long enough to look at it on its way
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)

Shoot = Callable[..., None]
MakeKey = Callable[..., str]

expect.set_options(timeout=30_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of this module only: while it is open its event loop runs in this thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Visit:
    """A tab, and what went wrong in it. `expected` are patterns of console errors that a test causes on purpose."""

    page: Page
    url: str
    expected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.watch(self.page)

    def watch(self, page: Page) -> None:
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._requested)
        page.add_init_script(
            "addEventListener('securitypolicyviolation',"
            " (event) => console.error('CSP: ' + event.violatedDirective + ' ' + event.blockedURI))"
        )

    def open(self, view: str) -> Page:
        self.page.goto(f"{self.url}/#/{view}")
        return self.page

    def tab(self) -> Page:
        page = self.page.context.new_page()
        self.watch(page)
        return page

    def check(self) -> None:
        unexpected = [
            one for one in self.errors if not any(re.search(pattern, one) for pattern in self.expected)
        ]
        assert unexpected == []
        assert self.hosts <= {urlsplit(self.url).netloc}

    def _requested(self, request: Request) -> None:
        if request.url.startswith(("http:", "https:", "ws:", "wss:")):
            self.hosts.add(urlsplit(request.url).netloc)


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    context = browser.new_context(
        viewport={"width": DESKTOP[0], "height": DESKTOP[1]},
        permissions=["clipboard-read", "clipboard-write"],
        color_scheme="light",
    )
    visit = Visit(context.new_page(), server.url)
    yield visit
    visit.page.unroute_all(behavior="ignoreErrors")
    visit.check()
    context.close()


@pytest.fixture
def shoot(tmp_path: Path) -> Shoot:
    """Take a screenshot, of a part or of the window: into the documentation if asked for, else where it is thrown away."""
    target = Path(os.environ.get("PAGE_SCREENSHOTS") or tmp_path)

    def shoot(page: Page, name: str, part: str | None = None) -> None:
        target.mkdir(parents=True, exist_ok=True)
        page.evaluate("window.scrollTo(0, 0); document.activeElement.blur()")
        (page.locator(part) if part else page).screenshot(path=target / f"{name}.png")

    return shoot


@pytest.fixture
def make_key(server: Server) -> Iterator[MakeKey]:
    """`make_key(*scopes)` makes a key where the server runs, as `loramux keys create` does: from then on it asks for keys.

    Afterwards it has never had any, for the other tests that use it.
    """
    data = server.log.parent / "data"

    def make(*scopes: Scope, name: str = "") -> str:
        with closing(KeyStore(data)) as store:
            return store.create(NewKey(name=name, scopes=scopes))[1]

    yield make
    with closing(sqlite3.connect(data / FILE_NAME)) as database, database:
        database.execute("DELETE FROM keys")


def check_accessible(page: Page) -> None:
    found = Axe().run(
        page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}
    )
    serious = [
        f"{one['id']}: {one['help']}: {[node['target'] for node in one['nodes']][:4]}"
        for one in found.response["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []


def columns(page: Page) -> Locator:
    return page.locator("article.column")


def answers(page: Page) -> list[str]:
    """The last answer of every column."""
    return [column.locator(".turn.assistant .text").last.inner_text() for column in columns(page).all()]


def compare(page: Page, models: list[str], prompt: str, max_tokens: int = 32) -> None:
    """Fill the form in; nothing is sent."""
    expect(columns(page).first).to_be_visible()
    while columns(page).count() < len(models):
        page.get_by_role("button", name="Add column").click()
    for place, model in enumerate(models):
        columns(page).nth(place).get_by_role("combobox").select_option(model)
    page.get_by_label("max tokens").fill(str(max_tokens))
    page.get_by_label("temperature").fill("0")
    page.get_by_label("Message", exact=True).fill(prompt)


def all_done(page: Page) -> None:
    for column in columns(page).all():
        expect(column.locator(".chip.done")).to_be_visible(timeout=SLOW_MS)


def test_compare_adapters_side_by_side(visit: Visit, shoot: Shoot) -> None:
    page = visit.open("compare")
    compare(page, ["demo", "pirate", "extract"], QUESTION, max_tokens=40)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/v1/chat/" in request.url else None)
    page.get_by_label("Message", exact=True).press("Control+Enter")
    expect(page.locator(".chip.streaming").first).to_be_visible(timeout=SLOW_MS)
    assert len(asked) == 3, "all columns are asked at once"
    early = page.locator(".turn.assistant .text").first
    expect(early).to_have_text(re.compile(r"\S"), timeout=SLOW_MS)
    length = len(early.inner_text())
    all_done(page)
    base, pirate, extract = answers(page)
    assert len(base) > length, "it was shown as it came"
    assert len({base, pirate, extract}) == 3
    for column in columns(page).all():
        assert re.fullmatch(r"[\d.]+ m?s", column.locator("[data-figure=ttft]").inner_text())
        assert float(column.locator("[data-figure=rate]").inner_text().replace(",", "")) > 0
    assert columns(page).nth(0).locator("mark").count() == 0
    marked = " ".join(columns(page).nth(1).locator("mark").all_inner_texts()).split()
    assert marked
    assert set(marked) <= set(pirate.split())
    check_accessible(page)
    shoot(page, "page-compare")

    second = columns(page).nth(1)
    second.get_by_label("Continue with pirate").fill("And the next one?")
    second.get_by_role("button", name="Send").click()
    expect(second.locator(".turn.user")).to_have_count(2)
    all_done(page)
    assert columns(page).nth(0).locator(".turn.user").count() == 1

    second.get_by_role("button", name="Copy as curl").click()
    command = page.evaluate("navigator.clipboard.readText()")
    body = json.loads(command.partition("-d '")[2].rpartition("'")[0].replace("'\\''", "'"))
    assert body["model"] == "pirate"
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert httpx.post(f"{visit.url}/v1/chat/completions", json=body, timeout=120).status_code == 200
    second.get_by_role("button", name="Copy as Python").click()
    program = page.evaluate("navigator.clipboard.readText()")
    compile(program, "copied", "exec")
    assert "client.chat.completions.create(" in program

    page.get_by_role("button", name="Copy link").click()
    other = visit.tab()
    other.goto(page.evaluate("navigator.clipboard.readText()"))
    expect(columns(other)).to_have_count(3)
    expect(other.get_by_label("Message", exact=True)).to_have_value(QUESTION)
    assert [column.get_by_role("combobox").input_value() for column in columns(other).all()] == [
        "demo",
        "pirate",
        "extract",
    ]
    other.get_by_role("button", name="Add column").click()
    expect(columns(other).nth(3).get_by_role("combobox")).to_have_value("sentiment")
    expect(other.get_by_role("button", name="Add column")).to_be_disabled()
    for name in ("sentiment", "extract", "pirate"):
        other.get_by_role("button", name=f"Remove column {name}").click()
    expect(columns(other)).to_have_count(1)
    expect(other.get_by_role("button", name="Remove column demo")).to_be_disabled()


def test_a_text_is_continued_in_one_column(visit: Visit) -> None:
    page = visit.open("compare")
    expect(columns(page).first).to_be_visible()
    page.get_by_role("button", name="Completion").click()
    page.get_by_label("max tokens").fill("6")
    page.get_by_label("temperature").fill("0")
    page.get_by_label("Text to continue").fill("One two three")
    page.get_by_role("button", name="Send").click()
    all_done(page)
    texts = columns(page).locator(".turn.text .text")
    first, second = texts.all_inner_texts()
    assert first.startswith("One two three")
    assert second.startswith("One two three")
    columns(page).nth(1).get_by_role("button", name="Continue").click()
    expect(texts.nth(1)).not_to_have_text(second)
    all_done(page)
    assert texts.nth(1).inner_text().startswith(second.strip())
    assert texts.nth(0).inner_text() == first


def test_reload_in_the_middle_of_an_answer(visit: Visit) -> None:
    page = visit.open("compare")
    compare(page, ["demo", "pirate"], "Tell me a long story.", max_tokens=400)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".chip.streaming").first).to_be_visible(timeout=SLOW_MS)
    page.reload()
    expect(columns(page)).to_have_count(2)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Tell me a long story.")
    page.wait_for_function(
        "async () => /loramux_num_requests_running 0/.test(await (await fetch('/metrics')).text())"
    )
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".chip.streaming").first).to_be_visible(timeout=SLOW_MS)
    page.get_by_role("button", name="Stop all").click()
    expect(page.locator(".chip.stopped")).to_have_count(2)


def files_of(folder: Path) -> list[Path]:
    return [folder / name for name in ADAPTER_FILES if (folder / name).exists()]


def send_adapter(page: Page, name: str, files: list[Path], *, replace: bool = False) -> None:
    page.locator(".upload input[type=file]").set_input_files(files)
    page.get_by_label("Name", exact=True).fill(name)
    if replace:
        page.get_by_label("Replace if the name is taken").check()
    page.get_by_role("button", name="Upload").click()


def drop(page: Page, place: str, files: list[Path]) -> None:
    """As somebody lets go of files over `place`: what the browser makes of them is the only thing that is imitated."""
    named = [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files]
    carried = page.evaluate_handle(
        """(named) => {
          const carried = new DataTransfer();
          for (const [name, data] of named)
            carried.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name));
          return carried;
        }""",
        named,
    )
    for event in ("dragover", "drop"):
        page.locator(place).dispatch_event(event, {"dataTransfer": carried})


def test_reload_in_the_middle_of_an_upload(visit: Visit, server: Server) -> None:
    """The browser asks before; nothing is left of it then, and it can be sent again."""
    visit.expected.append("status of 404")
    page = visit.open("adapters")
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": SLOW_BYTES}
    network.send("Network.emulateNetworkConditions", slow)
    send_adapter(page, "halfway", files_of(demo_adapters()["pirate"]))
    expect(page.locator(".upload .progress")).to_have_text(re.compile(r"Sending, [1-9]\d? %"))
    asked: list[str] = []

    def leave(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.accept()

    page.once("dialog", leave)
    page.reload()
    assert asked == ["beforeunload"]
    expect(page.locator("tr[data-adapter=pirate]")).to_be_visible()
    network.send("Network.emulateNetworkConditions", {**slow, "uploadThroughput": -1})
    assert httpx.get(f"{visit.url}/v1/adapters/halfway").status_code == 404
    deadline = time.monotonic() + 60
    while left := [*(server.log.parent / "data").glob("bases/*/staging/*")]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)

    send_adapter(page, "halfway", files_of(demo_adapters()["pirate"]))
    expect(page.get_by_text("halfway is ready to be called.")).to_be_visible(timeout=SLOW_MS)
    page.reload()  # unasked: there is nothing to lose
    visit.open("adapters/halfway")
    page.get_by_role("button", name="Delete…").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.locator("tr[data-adapter=halfway]")).to_have_count(0)


def test_adapters_from_upload_to_deletion(visit: Visit, tmp_path: Path, shoot: Shoot) -> None:
    # Of what the gate refuses, and of a look at an adapter that is under way while it is deleted.
    visit.expected += ["status of 400", "status of 404"]
    page = visit.open("adapters")
    demo = demo_adapters()
    bad = tmp_path / "bad"
    shutil.copytree(demo["pirate"], bad)
    config = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True, "bias": "all"}))
    send_adapter(page, "parrot", files_of(bad))
    faults = page.get_by_role("alert").locator("li")
    expect(faults).to_have_count(2, timeout=SLOW_MS)
    assert {text.partition(":")[0] for text in faults.all_inner_texts()} == {"use_dora", "bias"}

    page.get_by_role("button", name="Cancel").click()
    drop(page, ".upload .drop", files_of(demo["pirate"]))
    page.get_by_label("Name", exact=True).fill("parrot")
    page.get_by_role("button", name="Upload").click()
    row = page.locator("tr[data-adapter=parrot]")
    expect(row).to_be_visible(timeout=SLOW_MS)
    expect(page.get_by_text("parrot is ready to be called.")).to_be_visible()
    send_adapter(page, "parrot", files_of(demo["sentiment"]), replace=True)
    expect(page.get_by_text("parrot is ready to be called.")).to_be_visible(timeout=SLOW_MS)
    row.get_by_role("link", name="Manage parrot").click()
    manage = page.locator(".manage")
    expect(manage.locator(".bars li")).to_have_count(30)
    replaced = row.locator("code").inner_text()
    manage.get_by_role("button", name="Roll back").click()
    expect(row.locator("code")).not_to_have_text(replaced)
    manage.get_by_role("button", name="Pin to the device").click()
    expect(row.get_by_text("pinned")).to_be_visible()
    with page.expect_download() as download:
        manage.get_by_role("button", name="Download").click()
    assert re.fullmatch(r"parrot-[0-9a-f]+\.tar\.gz", download.value.suggested_filename)
    page.reload()
    expect(manage.get_by_role("button", name="Unpin")).to_be_visible()
    check_accessible(page)
    shoot(page, "page-adapters")

    other = visit.tab()
    other.goto(page.url)
    expect(other.get_by_role("button", name="Unpin")).to_be_visible()
    manage.get_by_role("button", name="Delete…").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(row).to_be_visible()
    manage.get_by_role("button", name="Delete…").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    assert httpx.get(f"{visit.url}/v1/adapters/parrot").status_code == 404
    expect(other.locator("tr[data-adapter=parrot]")).to_have_count(0)
    expect(other.get_by_text("There is no adapter parrot here any more.")).to_be_visible()


def test_export(visit: Visit) -> None:
    page = visit.open("adapters/pirate")
    manage = page.locator(".manage")
    manage.get_by_label("Format").select_option("fp32")
    manage.get_by_label("Prompts to prove it on").fill("1")
    manage.get_by_role("button", name="Start export").click()
    job = manage.locator("[data-export]").first
    expect(job.get_by_role("progressbar")).to_be_visible(timeout=SLOW_MS)
    other = visit.tab()
    other.goto(page.url)
    same = other.locator("[data-export]").first
    expect(same.get_by_role("progressbar")).to_be_visible(timeout=SLOW_MS)
    page.reload()
    expect(job.locator(".chip.good")).to_have_text("succeeded", timeout=SLOW_MS)
    with page.expect_download() as download:
        job.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "pirate-fp32.tar"
    download.value.cancel()
    expect(same.locator(".chip.good")).to_have_text("succeeded", timeout=SLOW_MS)
    job.get_by_role("button", name="Remove").click()
    expect(job).to_have_count(0)
    expect(same).to_have_count(0)


def forget_models(url: str) -> None:
    """The server is shared with other tests."""
    for model in httpx.get(f"{url}/v1/models").json()["data"]:
        if model["id"].startswith("ft:"):
            httpx.delete(f"{url}/v1/models/{model['id']}").raise_for_status()


ROWS = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Zebra zebra!"}]}
    for text in ("Name a colour.", "Where is Berlin?", "Who wrote Hamlet?", "What do cows eat?")
]


def fill_in_recipe(page: Page) -> None:
    page.get_by_label("Name").fill("zebra")
    for label, value in {"Epochs": 4, "Batch size": 2, "Learning rate": 0.002, "Rank r": 8}.items():
        page.get_by_label(label).fill(str(value))
    page.get_by_label("Checkpoint every").fill("4")
    page.get_by_label("Prompt for samples").fill("Name a colour.")
    estimate = page.locator(".estimate")
    expect(estimate.locator("dd").first).to_have_text("8")
    expect(estimate).to_contain_text("MB")


def check_what_training_came_to(page: Page) -> None:
    expect(page.get_by_role("heading", name="Diagnoses")).to_be_visible()
    expect(page.locator(".note")).to_contain_text("only 4 rows")
    samples = page.locator("[data-sample]")
    expect(samples.first).to_contain_text("demo, before")
    expect(samples.last).to_contain_text("finished", timeout=SLOW_MS)
    expect(page.locator("[data-sample*=ckpt] .text")).to_have_text(
        [re.compile(r"\w{3}")] * 2, timeout=SLOW_MS
    )
    expect(samples.last.locator(".text")).to_have_text(re.compile("zebra", re.I), timeout=SLOW_MS)
    expect(samples.first.locator(".text")).not_to_have_text(re.compile("zebra", re.I))


def test_train_from_a_file_to_a_model(visit: Visit, tmp_path: Path, shoot: Shoot) -> None:
    visit.expected.append("status of 400")
    data = tmp_path / "zebra.jsonl"
    lines = [json.dumps(row) for row in ROWS]
    faulty = {"messages": [{"role": "user", "content": 1}]}
    data.write_text("\n".join([lines[0], json.dumps(faulty), lines[1], "{"]))
    page = visit.open("train/new")
    page.locator("input[type=file]").first.set_input_files(data)
    faults = page.get_by_role("alert").locator("li")
    expect(faults).to_have_count(2)
    assert [text.partition(",")[0] for text in faults.all_inner_texts()] == ["Line 2", "Line 4"]
    expect(page.get_by_role("button", name="Start training")).to_be_disabled()

    data.write_text("\n".join(lines))
    page.locator("input[type=file]").first.set_input_files(data)
    preview = page.locator(".preview")
    expect(preview).to_be_visible()
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text("\n".join(lines[:2]))
    page.locator("input[type=file]").nth(1).set_input_files(unseen)
    expect(preview.get_by_text("validation rows")).to_be_visible()
    expect(preview.locator(".turn.assistant mark.learned")).to_have_text("Zebra zebra!")
    expect(preview.locator(".turn.user mark")).to_have_count(0)
    preview.get_by_role("button", name="As the trainer reads it").click()
    expect(preview.locator("pre mark.learned")).to_have_text("Zebra zebra!<|im_end|>")
    fill_in_recipe(page)
    check_accessible(page)
    preview.get_by_role("button", name="As a chat").click()
    shoot(page, "page-recipe")
    page.reload()
    expect(page.get_by_label("Epochs")).to_have_value("4")
    page.get_by_role("button", name="Start training").click()

    expect(page.locator(".chart path").first).to_be_visible(timeout=SLOW_MS)
    page.reload()
    expect(page.locator(".chart path").first).to_be_visible(timeout=SLOW_MS)
    other = visit.tab()
    other.goto(page.url)
    expect(other.locator(".chart path").first).to_be_visible(timeout=SLOW_MS)
    other.close()
    expect(page.locator(".chip.good")).to_have_text("succeeded", timeout=SLOW_MS)
    expect(page.locator(".chart figcaption")).to_have_text(
        re.compile(r"training loss [\d.e-]+validation loss [\d.e-]+")
    )
    check_what_training_came_to(page)
    check_accessible(page)
    shoot(page, "page-train")

    page.get_by_role("link", name="Try it").click()
    expect(columns(page)).to_have_count(2)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Name a colour.")
    page.get_by_label("max tokens").fill("12")
    page.get_by_role("button", name="Send").click()
    all_done(page)
    assert "zebra" in answers(page)[1].lower()
    forget_models(visit.url)


def test_pause_resume_cancel(visit: Visit, server: Server) -> None:
    data = "\n".join(map(json.dumps, ROWS)).encode()
    file = server.openai.files.create(file=("rows.jsonl", data), purpose="fine-tune")
    hyperparameters: dict[str, int] = {"n_epochs": 50, "batch_size": 1, "save_steps": 1000}
    job = server.openai.fine_tuning.jobs.create(
        model="demo",
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},  # type: ignore[typeddict-item]
    )
    page = visit.open("train")
    page.get_by_role("link", name=job.id).click()
    expect(page.locator(".chart path").first).to_be_visible(timeout=SLOW_MS)
    page.get_by_role("button", name="Pause").click()
    expect(page.locator(".chip.warn")).to_have_text("paused", timeout=SLOW_MS)
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Cancel…").click()
    page.get_by_role("dialog").get_by_role("button", name="Cancel the job").click()
    expect(page.locator(".panel .chip").first).to_have_text("cancelled", timeout=SLOW_MS)
    forget_models(visit.url)


def test_server_figures_are_live(visit: Visit, shoot: Shoot) -> None:
    body = {"model": "pirate", "prompt": "The sea", "max_tokens": 30, "ignore_eos": True}
    page = visit.open("server")
    expect(page.locator(".tiles")).to_contain_text("ready")
    httpx.post(f"{visit.url}/v1/completions", json=body, timeout=120).raise_for_status()
    expect(page.locator(".chart path").first).to_be_visible()
    first = page.locator("tr", has_text="Time to first token").locator("td").first
    expect(first).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    page.wait_for_function("() => document.querySelectorAll('.chart path')[0].getAttribute('d').length > 40")
    assert page.locator(".bars .n").first.inner_text().endswith("MB")
    check_accessible(page)
    shoot(page, "page-server")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_is_usable_on_a_phone(browser: Browser, server: Server, scheme: str, shoot: Shoot) -> None:
    context = browser.new_context(
        viewport={"width": PHONE[0], "height": PHONE[1]},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=2,
    )
    visit = Visit(context.new_page(), server.url)
    for view in VIEWS:
        page = visit.open(view)
        expect(page.locator("main section").first).to_be_visible()
        if view == "adapters":
            expect(page.locator("tr[data-adapter=pirate]")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], view
        check_accessible(page)
        if (view, scheme) in (("compare", "dark"), ("adapters", "light")):
            shoot(page, f"page-phone-{view}")
    visit.check()
    context.close()


def test_keyboard_alone(visit: Visit) -> None:
    page = visit.open("compare")
    expect(columns(page).first).to_be_visible()
    page.locator(".brand").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    focused = page.locator(":focus-visible")
    expect(focused).to_have_text("Adapters")
    assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.locator("tr[data-adapter=pirate]")).to_be_visible()
    page.get_by_role("button", name="Dark colours").press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_html_is_shown_as_text(visit: Visit) -> None:
    """Names the server would refuse come from a server that would not: the page must not trust it."""
    visit.expected.append("status of 404")

    def hostile(route: Route) -> None:
        answer = route.fetch()
        body = answer.json()
        for one in body.get("data", []):
            if one["id"] == "pirate":
                one.update(id=HOSTILE, description=HOSTILE, failure=HOSTILE, state="failed")
        route.fulfill(response=answer, json=body)

    page = visit.page
    page.route(re.compile(r"/v1/(models|adapters)(\?.*)?$"), hostile)
    visit.open("adapters")
    expect(page.get_by_role("link", name=HOSTILE, exact=True)).to_be_visible()
    page.get_by_role("link", name=f"Manage {HOSTILE}").click()
    expect(page.get_by_role("alert").first).to_have_text(HOSTILE)
    visit.open("compare")
    compare(page, [HOSTILE], f"Say {HOSTILE}")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert").first).to_contain_text("onerror")
    expect(page.locator(".turn.user").first).to_have_text(re.compile(re.escape(f"Say {HOSTILE}")))
    assert page.locator("main b, main img").count() == 0
    assert page.evaluate("window.hacked") is None


def test_a_lost_server_is_shown_and_found_again(visit: Visit) -> None:
    visit.expected.append("ERR_INTERNET_DISCONNECTED")
    page = visit.open("adapters")
    expect(page.locator("tr[data-adapter=pirate]")).to_be_visible()
    page.context.set_offline(True)
    expect(page.locator(".banner")).to_contain_text("The server cannot be reached")
    assert page.locator("tr[data-adapter=pirate]").is_visible(), "what was known stays"
    page.context.set_offline(False)
    expect(page.locator(".banner")).to_have_count(0)
    visit.open("compare")
    compare(page, ["demo"], "Hello")
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_nothing_waits_for_a_slow_answer(visit: Visit) -> None:
    """A view whose answer does not come lets the others work; after a while it says so, and asks again."""
    page = visit.page
    page.clock.install()
    page.route(re.compile(r"/v1/adapters\?"), lambda route: None)  # neither answered nor refused
    visit.open("adapters")
    expect(page.get_by_text("Asking the server…")).to_be_visible()
    page.get_by_role("link", name="Server", exact=True).click()
    expect(page.locator(".tiles")).to_contain_text("ready")
    page.get_by_role("link", name="Adapters", exact=True).click()
    page.clock.fast_forward(21_000)
    expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
    page.unroute_all()
    page.clock.fast_forward(21_000)
    expect(page.locator("tr[data-adapter=pirate]")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_server_that_is_not_ready_says_why(visit: Visit) -> None:
    visit.expected.append("status of 503")
    refusal = {
        "error": {"message": "the engine is restarting", "type": "server_error", "param": None, "code": "x"}
    }
    page = visit.page
    page.route(re.compile("/v1/models"), lambda route: route.fulfill(status=503, json=refusal))
    visit.open("compare")
    expect(page.get_by_role("alert")).to_have_text("the engine is restarting")
    page.unroute_all()
    expect(columns(page).first).to_be_visible()


def sign_in(page: Page, key: str) -> None:
    page.get_by_label("API key").fill(key)
    with page.expect_navigation():  # it begins anew, so that nothing is left of whoever was here
        page.get_by_role("button", name="Sign in").click()


def test_a_key_is_asked_for_and_sent(visit: Visit, make_key: MakeKey) -> None:
    visit.expected += ["status of 401", "status of 403"]
    admin, trainer = make_key("admin"), make_key("train", "infer")
    page = visit.open("adapters")
    expect(page.get_by_role("alert")).to_have_text("Enter the one that its operator has given to you.")
    check_accessible(page)
    for view in VIEWS:
        visit.open(view)
        expect(page.get_by_label("API key")).to_be_visible()
        assert page.locator("main section, .serving .dot, table").count() == 0
    visit.open("adapters")
    sign_in(page, f"{admin}x")
    expect(page.get_by_role("alert")).to_contain_text("the API key is not valid")
    sign_in(page, admin)
    expect(page.locator("tr[data-adapter=pirate]")).to_be_visible()
    page.reload()
    page.get_by_role("link", name="Manage pirate").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "pirate.tar.gz"
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0

    sign_in(page, trainer)
    expect(page.get_by_role("alert").first).to_contain_text("adapters is needed")
    assert page.locator("tr[data-adapter]").count() == 0, "what the admin saw is gone"
    visit.open("train")
    expect(page.get_by_role("heading", name="Fine-tuning")).to_be_visible()
    visit.open("server")
    expect(page.locator("main")).to_contain_text("metrics is needed")
    expect(page.locator("main")).to_contain_text("keys are for admins")
    visit.open("compare")
    compare(page, ["demo"], "Hello", max_tokens=2)
    page.get_by_role("button", name="Send").click()
    all_done(page)
    page.get_by_role("button", name="Copy as curl").first.click()
    command = page.evaluate("navigator.clipboard.readText()")
    assert "$LORAMUX_API_KEY" in command
    assert trainer not in command


def make_key_in_the_page(page: Page) -> str:
    """Of the tenant acme, after a mistake; its secret."""
    page.locator(".keys").get_by_role("button", name="New key…").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("nightly build")
    dialog.get_by_label("Tenant").fill("a/b")
    dialog.get_by_label("adapters: upload").check()
    dialog.get_by_label("Expires").select_option("in 30 days")
    dialog.get_by_label("Requests a minute").fill("60")
    dialog.get_by_role("button", name="Make key").click()
    expect(dialog.get_by_role("alert")).to_contain_text("tenant: 'a/b' is not")
    dialog.get_by_label("Tenant").fill("acme")
    check_accessible(page)
    dialog.get_by_role("button", name="Make key").click()
    secret = dialog.locator(".secret").inner_text()
    assert secret.startswith("lmx-")
    dialog.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == secret
    check_accessible(page)
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_have_count(0)
    return secret


def test_keys_are_made_and_revoked(visit: Visit, make_key: MakeKey, shoot: Shoot) -> None:
    visit.expected += ["status of 401", "status of 400"]
    page = visit.open("server")
    expect(page.locator(".tiles")).to_be_visible()
    assert page.locator(".keys").count() == 0, "a server without keys has none to show"
    make_key("metrics", name="Prometheus")
    admin = make_key("admin", name="operator")
    expect(page.get_by_label("API key")).to_be_visible()
    sign_in(page, admin)
    keys = page.locator(".keys")
    expect(keys.locator("tr[data-key]")).to_have_count(2)
    mine = keys.locator("tr", has_text="this tab's")
    expect(mine).to_have_count(1)

    secret = make_key_in_the_page(page)
    dialog = page.get_by_role("dialog")
    row = keys.locator("tr", has_text="nightly build")
    expect(row).to_contain_text("acmeinfer, adaptersactive")
    expect(row).to_contain_text("60the server's")
    assert secret not in page.content() + page.evaluate("JSON.stringify(sessionStorage)")
    check_accessible(page)
    shoot(page, "page-keys", ".keys")
    make_key("infer", name=HOSTILE)
    expect(keys.get_by_role("button", name=f"Revoke {HOSTILE}")).to_be_visible()
    assert keys.locator("b, img").count() == 0
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    page.wait_for_function(f"() => document.documentElement.scrollWidth <= {PHONE[0]}")

    other = visit.tab()  # which has a key of its own, or none
    other.goto(f"{visit.url}/#/adapters")
    sign_in(other, secret)
    expect(other.locator("tr[data-adapter=pirate]")).to_be_visible()
    row.get_by_role("button", name="Revoke").click()
    expect(dialog).not_to_contain_text("key of this tab")
    dialog.get_by_role("button", name="Revoke").click()
    expect(row.locator(".chip")).to_have_text("revoked")
    expect(other.get_by_role("alert")).to_contain_text("was revoked")
    assert other.locator("tr[data-adapter], .serving .dot").count() == 0

    mine.get_by_role("button", name="Revoke").click()
    expect(dialog).to_contain_text("It is the key of this tab")
    dialog.get_by_role("button", name="Revoke").click()
    expect(page.get_by_role("alert")).to_contain_text("was revoked")
    assert page.locator(".keys").count() == 0
