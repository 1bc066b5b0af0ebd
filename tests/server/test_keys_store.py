"""Keys on disk, keys in mind, and limits, without HTTP."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import RequestError, StorageError
from loramux_server.keys.keyring import Keyring
from loramux_server.keys.limits import KeyLimits, Limits, RateLimited
from loramux_server.keys.principal import ANYBODY, Principal, acting_as, current_access
from loramux_server.keys.store import FILE_NAME, KeyStore, NewKey, digest_of


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(tmp_path)
    yield store
    store.close()


def someone(**more: int) -> Principal:
    return Principal("key_1", "acme", frozenset({"infer"}), **more)


# --- the file ------------------------------------------------------------------------------------------------------------


def test_a_key_is_told_once_and_found_again(store: KeyStore, tmp_path: Path) -> None:
    record, key = store.create(
        NewKey(name="ci", tenant="acme", scopes=("train", "infer"), tokens_per_minute=5)
    )
    assert key.startswith("lmx-")
    assert len(key) >= 4 + 256 // 6
    assert record.digest == digest_of(key)
    assert record.scopes == ("infer", "train")
    assert (record.requests_per_minute, record.tokens_per_minute) == (None, 5)
    again = KeyStore(tmp_path)
    assert again.all() == [record]
    again.close()
    assert store.create(NewKey())[1] != key


def test_keys_cannot_be_read_from_the_file(store: KeyStore, tmp_path: Path) -> None:
    _, key = store.create(NewKey())
    files = list(tmp_path.glob(f"{FILE_NAME}*"))
    assert files
    for file in files:
        assert key.removeprefix("lmx-").encode() not in file.read_bytes()


def test_revoking_is_for_good_and_can_be_repeated(store: KeyStore) -> None:
    record, _ = store.create(NewKey())
    other, _ = store.create(NewKey())
    revoked = store.revoke(record.id)
    assert revoked.state(time.time()) == "revoked"
    assert store.revoke(record.id) == revoked
    assert [one.state(time.time()) for one in store.all()] == ["revoked", "active"]
    assert other in store.all()
    with pytest.raises(RequestError, match="id: there is no key 'key_0'") as caught:
        store.revoke("key_0")
    assert caught.value.param == "id"


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": "-a"}, "tenant"),
        ({"tenant": "a" * 65}, "tenant"),
        ({"tenant": "ä"}, "tenant"),
        ({"scopes": ()}, "scope"),
        ({"scopes": ("infer", "everything")}, "scope"),
        ({"name": "x" * 129}, "name"),
        ({"name": "a\nb"}, "name"),
    ],
)
def test_what_no_key_can_be(wanted: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError, match=f"^{param}: ") as caught:
        NewKey(**wanted)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"x" * 4096)
    with pytest.raises(StorageError, match="the key database is damaged"):
        KeyStore(tmp_path)


# --- who somebody is -------------------------------------------------------------------------------------------------------


def test_a_keyring_follows_the_file(store: KeyStore, tmp_path: Path) -> None:
    keyring = Keyring(store)
    assert (keyring.is_open, keyring.anybody(), keyring.find("lmx-x")) == (True, ANYBODY, None)
    commands = KeyStore(tmp_path)
    record, key = commands.create(NewKey(tenant="acme", requests_per_minute=0))
    assert keyring.anybody() is None
    assert keyring.find(key) == Principal(record.id, "acme", frozenset({"infer"}), 0, None)
    assert keyring.find(key + "x") is None
    assert keyring.find(key[:-1]) is None
    commands.revoke(record.id)
    assert keyring.find(key) is None
    assert not keyring.is_open  # there was one
    commands.close()


def test_the_file_is_read_again_only_when_it_has_changed(
    store: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    every = KeyStore.all
    monkeypatch.setattr(KeyStore, "all", lambda self: reads.append(1) or every(self))
    keyring = Keyring(store)
    _, key = store.create(NewKey())
    for _ in range(5):
        assert keyring.find(key) is not None
    assert len(reads) == 1
    store.create(NewKey())
    assert keyring.find(key) is not None
    assert len(reads) == 2


def test_a_key_expires_while_the_server_runs(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = Keyring(store)
    now = time.time()
    _, key = store.create(NewKey(expires=now + 60))
    assert keyring.find(key) is not None
    monkeypatch.setattr(time, "time", lambda: now + 60)
    assert keyring.find(key) is None
    assert keyring.anybody() is None


def test_keys_of_the_configuration_are_admins(store: KeyStore) -> None:
    keyring = Keyring(store, ["one", "two", "one"])
    assert not keyring.is_open
    found = [keyring.find(key) for key in ("one", "two", "three", "")]
    assert [who and who.key_id for who in found] == ["api-key-1", "api-key-2", None, None]
    assert found[0] is not None
    assert found[0].access == OPERATOR
    assert "one" not in repr(vars(keyring)).replace("None", "")


def test_an_admins_tenant_counts_for_nothing(store: KeyStore) -> None:
    _, key = store.create(NewKey(tenant="acme", scopes=("admin",)))
    who = Keyring(store).find(key)
    assert who is not None
    assert who.access == OPERATOR


def test_who_acts() -> None:
    with acting_as(someone()):
        assert current_access() == Access("acme")
    with pytest.raises(LookupError):
        current_access()
    with (
        acting_as(Principal("key_2", "", frozenset({"infer"}))),
        pytest.raises(ValueError, match="neither a tenant"),
    ):
        current_access()


def test_a_scope_of_a_later_version_is_none(store: KeyStore, tmp_path: Path) -> None:
    _, key = store.create(NewKey(scopes=("infer",)))
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("UPDATE keys SET scopes = 'infer fly'")
    connection.close()
    who = Keyring(store).find(key)
    assert who is not None
    assert who.scopes == {"infer"}


# --- limits ----------------------------------------------------------------------------------------------------------------


async def test_a_minute_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = KeyLimits(Limits(requests_per_minute=1))
    now = time.time()
    await limits.admit(someone())
    with pytest.raises(RateLimited) as caught:
        await limits.admit(someone())
    assert 0 < caught.value.retry_after <= 60
    monkeypatch.setattr(time, "time", lambda: now + 61)
    headers = await limits.admit(someone())
    assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_more_tokens_than_were_left_are_charged() -> None:
    limits = KeyLimits(Limits(tokens_per_minute=10))
    for charged, left in ((0, "10"), (4, "6"), (0, "6")):
        await limits.charge(someone(), charged)
        assert (await limits.admit(someone()))["x-ratelimit-remaining-tokens"] == left
    await limits.charge(someone(), 1000)
    with pytest.raises(RateLimited, match="10 tokens a minute"):
        await limits.admit(someone())
    assert await limits.admit(someone(tokens_per_minute=0)) == {}


def test_a_place_is_given_back_after_an_error() -> None:
    limits = KeyLimits(Limits(queued=1))
    with pytest.raises(OSError, match="broken"), limits.queued(someone()):
        raise OSError("broken")
    with (
        limits.queued(someone()),
        pytest.raises(RateLimited, match="1 answers waiting"),
        limits.queued(someone()),
    ):
        pass
    with limits.queued(someone()):
        pass
