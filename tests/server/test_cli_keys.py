"""`loramux keys`, and the settings of `loramux serve` that are about keys."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loramux_adapters.errors import ConfigError
from loramux_server import cli
from loramux_server.banner import banner, exposure
from loramux_server.config import read_config
from loramux_server.keys.keyring import Keyring
from loramux_server.keys.limits import RateLimited
from loramux_server.keys.store import KeyStore
from loramux_server.server_client import credentials

Run = Callable[..., tuple[str, str]]
SECRET = "s3cret-key"


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`keys(*arguments)` gives both outputs of `loramux keys ...`, which must end with exit code `code`."""
    monkeypatch.setenv("LORAMUX_DATA_DIR", str(tmp_path))

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["loramux", "keys", *arguments])
        ended: object = 0
        try:
            cli.main()
        except SystemExit as exit:
            ended = exit.code or 0
        out, err = capsys.readouterr()
        assert ended == code, err
        return out, err

    return run


# --- loramux keys ----------------------------------------------------------------------------------------------------------


def test_a_key_alone_on_standard_output(keys: Run, tmp_path: Path) -> None:
    out, err = keys(
        "create", "--tenant", "acme", "--scope", "infer,train", "--scope", "adapters", "--rpm", "5"
    )
    key = out.strip()
    assert key.startswith("lmx-")
    assert "not shown again" in err
    assert key not in err
    store = KeyStore(tmp_path)
    who = Keyring(store).find(key)
    store.close()
    assert who is not None
    assert (who.tenant, who.scopes, who.requests_per_minute) == ("acme", {"infer", "adapters", "train"}, 5)
    assert keys("list")[0].count(key) == 0
    assert key not in keys("list", "--json")[0]


def test_the_data_directory_of_the_servers_file(
    keys: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text(f'max_loras = 3\ndata_dir = "{tmp_path / "of-the-file"}"\n')
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "default"))
    monkeypatch.setenv("LORAMUX_CONFIG", str(file))
    flag = ("--data-dir", str(tmp_path / "of-the-flag"))
    keys("create", "--name", "by variable")  # LORAMUX_DATA_DIR
    keys("create", "--name", "by flag", *flag)
    monkeypatch.delenv("LORAMUX_DATA_DIR")
    made = json.loads(keys("create", "--name", "by file", "--json")[0])
    monkeypatch.delenv("LORAMUX_CONFIG")
    keys("create", "--name", "by default")
    named = ("--config", str(file))
    for options, name in (((), "by default"), (named, "by file"), ((*named, *flag), "by flag")):
        assert [one["name"] for one in json.loads(keys("list", "--json", *options)[0])] == [name]
    keys("revoke", made["id"], *named)
    assert json.loads(keys("list", "--json", *named)[0])[0]["state"] == "revoked"
    assert read_config(["m", *named]).data_dir == tmp_path / "of-the-file", "where the server looks, too"
    monkeypatch.setenv("LORAMUX_DATA_DIR", str(tmp_path))
    assert [one["name"] for one in json.loads(keys("list", "--json")[0])] == ["by variable"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data_dir = 3", "data_dir: is not a path"),
        ("data_dri = 'x'", "data_dri is not a setting"),
        (None, "No such file"),
    ],
)
def test_a_file_that_names_no_data_directory_is_refused(
    text: str | None, sentence: str, keys: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORAMUX_DATA_DIR")
    file = tmp_path / "loramux.toml"
    if text is not None:
        file.write_text(text)
    assert sentence in keys("list", "--config", str(file), code=1)[1]


def test_list_and_revoke(keys: Run) -> None:
    first = json.loads(keys("create", "--name", "ci", "--expires-in", "2h", "--json")[0])
    second = json.loads(keys("create", "--scope", "admin", "--tpm", "0", "--json")[0])
    assert first["key"] != second["key"]
    assert 7100 < first["expires"] - time.time() <= 7200
    assert keys("revoke", first["id"])[0] == f"{first['id']} is revoked\n"
    listed = json.loads(keys("list", "--json")[0])
    assert [one["state"] for one in listed] == ["revoked", "active"]
    assert all("key" not in one for one in listed)
    assert [one["tokens_per_minute"] for one in listed] == [None, 0]
    table = keys("list")[0]
    assert all(
        word in table for word in (first["id"], second["id"], "ci", "revoked", "active", "admin", "default")
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("create", "--scope", "everything"), "scope: is one or more of infer, adapters"),
        (("create", "--tenant", "a/b"), "tenant: 'a/b' is not"),
        (("create", "--expires-in", "soon"), "expires-in: 'soon' is not a time"),
        (("create", "--expires-in", "0d"), "expires-in: '0d' is not a time"),
        (("revoke", "key_1"), "id: there is no key 'key_1'"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], sentence: str, keys: Run) -> None:
    out, err = keys(*arguments, code=1)
    assert out == ""
    assert err.startswith(f"loramux: {sentence}")
    assert err.count("\n") == 1


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom loramux_server import cli\n"
        f"sys.argv = ['loramux', 'keys', 'list', '--data-dir', {str(tmp_path)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'fastapi'} & set(sys.modules), 'too much is imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# --- settings of the server ------------------------------------------------------------------------------------------------


def secrets(*arguments: str) -> list[str]:
    return [key.get_secret_value() for key in read_config(["m", *arguments]).api_key]


def test_keys_come_by_flags_variable_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert secrets() == []
    assert secrets("--api-key", "one") == ["one"]
    assert secrets("--api-key", "one", "--api-key", "two") == ["one", "two"]
    assert secrets("--api-key", '["x"]') == ['["x"]']  # a key is never read as anything else
    (tmp_path / "c.toml").write_text('api_key = ["three", "four"]\n')
    assert secrets("--config", str(tmp_path / "c.toml")) == ["three", "four"]
    monkeypatch.setenv("LORAMUX_API_KEY", "five,six")
    assert secrets() == ["five", "six"]
    assert secrets("--api-key", "one") == ["one"]


def test_a_key_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LORAMUX_API_KEY", SECRET)
    config = read_config(["m"])
    for shown in (repr(config), str(config), config.model_dump_json(), repr(config.api_key)):
        assert SECRET not in shown
    with pytest.raises(SystemExit):
        read_config(["--help"])
    out, err = capsys.readouterr()
    assert "--api-key" in out
    assert SECRET not in out + err


@pytest.mark.parametrize("key", [f"{SECRET} x", "", f"{SECRET},,x", f"{SECRET}ä", "x" * 513])
def test_a_key_that_cannot_be_sent_is_refused_without_being_told(key: str) -> None:
    with pytest.raises(ConfigError, match="^api_key: a key is 1 to 512 printable ASCII") as caught:
        read_config(["m", f"--api-key={key}"])
    assert caught.value.param == "api_key"
    assert SECRET not in str(caught.value)


def test_limits_and_quotas() -> None:
    limits = ("--rate-limit-requests", "60", "--rate-limit-tokens", "1000", "--max-queued-per-key", "4")
    quotas = ("--max-adapters-per-tenant", "3", "--max-adapter-bytes-per-tenant", "1GiB")
    config = read_config(["m", *limits, *quotas])
    assert (config.rate_limit_requests, config.rate_limit_tokens, config.max_queued_per_key) == (60, 1000, 4)
    assert (config.max_adapters_per_tenant, config.max_adapter_bytes_per_tenant) == (3, 2**30)
    assert read_config(["m"]).rate_limit_tokens is None


async def test_what_the_server_is_started_with(tmp_path: Path) -> None:
    from loramux_server.serve import _guarded

    flags = ["--data-dir", str(tmp_path), "--api-key", SECRET, "--rate-limit-requests", "1"]
    with _guarded(read_config(["m", *flags, "--max-queued-per-key", "1"])) as guard:
        who = guard.keys.find(SECRET)
        assert who is not None
        assert who.is_admin
        await guard.limits.admit(who)
        with pytest.raises(RateLimited, match="1 requests a minute"):
            await guard.limits.admit(who)
        with guard.limits.queued(who), pytest.raises(RateLimited), guard.limits.queued(who):
            pass


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        ("127.0.0.1", False),
        ("127.8.9.1", False),
        ("::1", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.0.7", True),
    ],
)
def test_who_reaches_a_server_without_keys_is_said(address: str, exposed: bool) -> None:
    warning = exposure(address)
    assert (warning is not None) is exposed
    if warning:
        assert address in warning
        assert "ANYBODY" in warning
        assert "loramux keys create" in warning


def test_the_banner_shows_where_a_key_goes(capsys: pytest.CaptureFixture[str]) -> None:
    banner("http://h:1", "base", ["one"], needs_key=True)
    shown = capsys.readouterr().out
    for form in ("authorization: Bearer KEY", "api_key='KEY'", "LORAMUX_API_KEY=KEY .venv/bin/loramux ask"):
        assert form in shown
    banner("http://h:1", "base", ["one"])
    assert "KEY" not in capsys.readouterr().out


def test_client_commands_send_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORAMUX_API_KEY", raising=False)
    assert credentials() == {}
    monkeypatch.setenv("LORAMUX_API_KEY", SECRET)
    assert credentials() == {"authorization": f"Bearer {SECRET}"}
