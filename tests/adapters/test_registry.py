"""The registry: names, histories, leases and sweeps, alone and in random order, across restarts."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loramux_adapters.access import OPERATOR, Access
from loramux_adapters.errors import (
    AccessDenied,
    AdapterConflict,
    NameTaken,
    RequestError,
    StorageError,
    UnknownAdapter,
)
from loramux_adapters.registry import AdapterRegistry, Lease, Scanned
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.store import GenerationStore
from loramux_adapters.weights import LoraWeights

MakeWeights = Callable[..., LoraWeights]


@pytest.fixture
def store(tmp_path: Path) -> GenerationStore:
    return GenerationStore(tmp_path / "store")


@pytest.fixture
def registry(tmp_path: Path, store: GenerationStore) -> Iterator[AdapterRegistry]:
    registry = AdapterRegistry(tmp_path / "registry.db", store, reserved={"org/base"})
    yield registry
    registry.close()


@pytest.fixture
def generations(store: GenerationStore, make_lora_weights: MakeWeights) -> list[str]:
    return [store.publish(make_lora_weights(seed)) for seed in range(3)]


def reopened(registry: AdapterRegistry, tmp_path: Path) -> AdapterRegistry:
    registry.close()
    return AdapterRegistry(tmp_path / "registry.db", GenerationStore(tmp_path / "store"))


def test_put_get_and_reopen(registry: AdapterRegistry, generations: list[str], tmp_path: Path) -> None:
    record = registry.put(
        "team/sql",
        generations[0],
        source="hub",
        origin="hf://org/sql@abc",
        access=Access("tenant-1"),
        pinned=True,
        description="writes SQL — ümlaut",
        metadata={"ticket": 7, "nested": {"a": [1, None]}},
        default_sampling={"temperature": 0.2},
    )
    assert registry.get("team/sql") == record
    assert record.state == "available"
    assert "team/sql" in registry
    again = reopened(registry, tmp_path)
    assert again.get("team/sql") == record
    assert len(again) == 1
    again.close()


def test_put_again_keeps_what_is_not_said(registry: AdapterRegistry, generations: list[str]) -> None:
    registry.put("a", generations[0], source="upload", pinned=True, metadata={"k": 1}, description="d")
    created = registry.get("a").created
    record = registry.put("a", generations[1], source="training", origin="job-1")
    assert (record.generation, record.source, record.origin) == (generations[1], "training", "job-1")
    assert (record.pinned, record.metadata, record.description) == (True, {"k": 1}, "d")
    assert record.created == created
    assert record.updated >= created
    assert [entry.generation for entry in record.history] == [generations[1], generations[0]]
    assert [entry.source for entry in record.history] == ["training", "upload"]


def test_a_record_never_changes(registry: AdapterRegistry, generations: list[str]) -> None:
    metadata = {"k": 1}
    before = registry.put("a", generations[0], source="upload", metadata=metadata)
    metadata["k"] = 2
    registry.put("a", generations[1], source="upload")
    registry.set_state(generations[0], "failed", "why")
    assert (before.generation, before.metadata, before.state) == (generations[0], {"k": 1}, "available")


def test_update(registry: AdapterRegistry, generations: list[str], tmp_path: Path) -> None:
    registry.put("a", generations[0], source="upload", metadata={"k": 1})
    registry.update("a", pinned=True, default_sampling={"top_p": 0.9})
    again = reopened(registry, tmp_path)
    record = again.get("a")
    assert (record.pinned, record.metadata, record.default_sampling) == (True, {"k": 1}, {"top_p": 0.9})
    assert record.generation == generations[0]
    again.close()


def test_without_overwrite_a_taken_name_is_a_conflict(
    registry: AdapterRegistry, generations: list[str]
) -> None:
    registry.put("a", generations[0], source="upload", overwrite=False)
    registry.put(
        "a", generations[0], source="upload", overwrite=False
    )  # the same content: what was asked for
    with pytest.raises(AdapterConflict, match="name: 'a' is taken") as caught:
        registry.put("a", generations[1], source="upload", overwrite=False)
    assert caught.value.param == "name"
    assert registry.get("a").generation == generations[0]


def test_another_owner_cannot_take_a_name(registry: AdapterRegistry, generations: list[str]) -> None:
    one, two = Access("one"), Access("two")
    registry.put("a", generations[0], source="upload", access=one)
    with pytest.raises(NameTaken, match="name: 'a' is taken; choose another name") as caught:
        registry.put("a", generations[0], source="upload", access=two)
    assert "one" not in caught.value.message
    assert registry.put("a", generations[1], source="upload", access=OPERATOR).owner == "one"


def test_what_an_owner_may_not_see_does_not_exist_for_others(
    registry: AdapterRegistry, generations: list[str]
) -> None:
    one, two = Access("one"), Access("two")
    for name, access in (("ones", one), ("shared", OPERATOR), ("twos", two)):
        registry.put(name, generations[0], source="upload", access=access)
    assert [record.name for record in registry.list(access=one)] == ["ones", "shared"]
    assert [record.name for record in registry.list(after="ones", limit=1, access=two)] == ["shared"]
    assert len(registry.list(access=OPERATOR)) == 3
    pinned = f"twos@{generations[0][:8]}"
    for model in ("twos", pinned, f"twos@{'0' * 8}"):
        for ask in (registry.resolve, registry.lease):
            with pytest.raises(UnknownAdapter) as caught:
                ask(model, one)
            name = model.partition("@")[0]
            assert caught.value.message == f"model: there is no adapter named '{name}'"
    assert registry.in_use("twos") == 0
    changes: list[Callable[[str, Access], object]] = [
        lambda name, access: registry.update(name, access, description="x"),
        lambda name, access: registry.rollback(name, None, access),
        registry.delete,
        registry.get,
    ]
    for change in changes:
        with pytest.raises(UnknownAdapter, match="there is no adapter named 'twos'"):
            change("twos", one)
    for change in changes[:-1]:
        with pytest.raises(AccessDenied, match="'shared' is shared"):
            change("shared", one)
    with pytest.raises(AccessDenied, match="'shared' is shared"):
        registry.put("shared", generations[1], source="upload", access=one)
    registry.delete("ones", one)
    registry.delete("twos", OPERATOR)
    assert [record.name for record in registry.list()] == ["shared"]


def test_only_published_generations_get_names(registry: AdapterRegistry) -> None:
    with pytest.raises(StorageError, match="is not in the adapter store"):
        registry.put("a", "f" * 64, source="upload")
    assert "a" not in registry


@pytest.mark.parametrize("name", ["a", "A-1", "org/name", "job:step-200", "a.b_c/d.e", "x" * 128])
def test_good_names(registry: AdapterRegistry, name: str) -> None:
    assert registry.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/a",
        "a/",
        "a//b",
        "a/../b",
        "a/.b",
        "-a",
        "_a",
        "a b",
        "a@b",
        "a\n",
        "ä",
        "x" * 129,
        "a\\b",
    ],
)
def test_bad_names(registry: AdapterRegistry, generations: list[str], name: str) -> None:
    with pytest.raises(RequestError, match="name: .* is not an adapter name") as caught:
        registry.put(name, generations[0], source="upload")
    assert caught.value.param == "name"
    assert str(caught.value).isprintable()


def test_the_bases_name_is_reserved(registry: AdapterRegistry, generations: list[str]) -> None:
    with pytest.raises(AdapterConflict, match="name: 'org/base' is the base model's name"):
        registry.put("org/base", generations[0], source="upload")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"metadata": {"a": float("nan")}}, "metadata: must be a JSON object"),
        ({"metadata": {"a": object()}}, "metadata: must be a JSON object"),
        ({"metadata": {"a": "\ud800"}}, "metadata: must be at most"),
        ({"default_sampling": {"a": "x" * 20000}}, "default_sampling: must be at most 16384 bytes"),
        ({"description": "x" * 4097}, "description: must be text of at most 4096"),
        ({"description": "\udfff"}, "description: must be text"),
    ],
)
def test_what_cannot_be_stored_is_refused(
    registry: AdapterRegistry, generations: list[str], fields: dict[str, object], problem: str
) -> None:
    with pytest.raises(RequestError, match=problem):
        registry.put("a", generations[0], source="upload", **fields)  # type: ignore[arg-type]
    assert "a" not in registry


def test_resolve_pins_a_generation_of_the_names_history(
    registry: AdapterRegistry, generations: list[str]
) -> None:
    registry.put("a", generations[0], source="upload", origin="")
    registry.put("a", generations[1], source="training", origin="job-1")
    registry.put("b", generations[2], source="upload")
    assert registry.resolve("a").generation == generations[1]
    pinned = registry.resolve(f"a@{generations[0][:8]}")
    assert (pinned.name, pinned.generation, pinned.source) == ("a", generations[0], "upload")
    assert registry.resolve(f"a@{generations[0]}").generation == generations[0]
    for model in [
        f"a@{generations[2][:8]}",
        f"a@{generations[0][:7]}",
        "a@",
        "@",
        "zzz",
        f"z@{generations[0]}",
    ]:
        with pytest.raises(UnknownAdapter) as caught:
            registry.resolve(model)
        assert caught.value.param == "model"
        assert caught.value.code == "model_not_found"


def test_an_ambiguous_pin_is_refused(
    registry: AdapterRegistry, generations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenerationStore, "__contains__", lambda *_: True)
    registry.put("a", "12345678" + "a" * 56, source="upload")
    registry.put("a", "12345678" + "b" * 56, source="upload")
    with pytest.raises(UnknownAdapter, match="has 2 generations beginning with '12345678'"):
        registry.resolve("a@12345678")
    assert registry.resolve("a@12345678a").generation.endswith("a")


def test_rollback_goes_back_and_forth(
    registry: AdapterRegistry, generations: list[str], tmp_path: Path
) -> None:
    for generation in generations:
        registry.put("a", generation, source="upload")
    assert registry.rollback("a").generation == generations[1]
    assert registry.rollback("a").generation == generations[2]
    assert registry.rollback("a", generations[0][:8]).generation == generations[0]
    again = reopened(registry, tmp_path)
    history = [entry.generation for entry in again.get("a").history]
    assert history == [generations[0], generations[2], generations[1]]
    again.close()


def test_rollback_without_a_past(registry: AdapterRegistry, generations: list[str]) -> None:
    registry.put("a", generations[0], source="upload")
    with pytest.raises(UnknownAdapter, match="'a' has no earlier generation"):
        registry.rollback("a")
    with pytest.raises(UnknownAdapter, match="has no generation beginning with"):
        registry.rollback("a", generations[1][:8])


def test_rollback_to_what_is_lost(registry: AdapterRegistry, generations: list[str]) -> None:
    registry.put("a", generations[0], source="upload")
    registry.put("a", generations[1], source="upload")
    registry.store.delete(generations[0])
    with pytest.raises(StorageError, match="is not in the adapter store"):
        registry.rollback("a")
    assert registry.get("a").generation == generations[1]


def test_history_is_bounded(tmp_path: Path, store: GenerationStore, make_lora_weights: MakeWeights) -> None:
    registry = AdapterRegistry(tmp_path / "short.db", store, keep_history=2)
    made = [store.publish(make_lora_weights(seed)) for seed in range(4)]
    for generation in made:
        registry.put("a", generation, source="upload")
    assert [entry.generation for entry in registry.get("a").history] == [made[3], made[2]]
    assert set(registry.sweep(min_age=0)) == {made[0], made[1]}
    registry.close()


def test_list_is_paged_by_name(registry: AdapterRegistry, generations: list[str]) -> None:
    for name in ["b", "a", "c/x", "c-x"]:
        registry.put(name, generations[0], source="upload")
    assert [record.name for record in registry.list()] == ["a", "b", "c-x", "c/x"]
    assert [record.name for record in registry.list(limit=2)] == ["a", "b"]
    assert [record.name for record in registry.list(after="b", limit=1)] == ["c-x"]
    registry.delete("c-x")
    assert [record.name for record in registry.list(after="bb")] == ["c/x"]
    assert registry.list(after="zzz") == ()


def test_delete(registry: AdapterRegistry, generations: list[str], tmp_path: Path) -> None:
    registry.put("a", generations[0], source="upload")
    assert registry.delete("a").generation == generations[0]
    with pytest.raises(UnknownAdapter, match="name: there is no adapter named 'a'"):
        registry.get("a")
    with pytest.raises(UnknownAdapter):
        registry.delete("a")
    again = reopened(registry, tmp_path)
    assert len(again) == 0
    again.close()


def test_a_lease_outlives_replacement_and_deletion(registry: AdapterRegistry, generations: list[str]) -> None:
    registry.put("a", generations[0], source="upload")
    with registry.lease("a") as lease, registry.lease("a"):
        registry.put("a", generations[1], source="upload")
        registry.delete("a")
        assert lease.record.generation == generations[0]
        assert registry.in_flight(generations[0]) == 2
        assert set(registry.sweep(min_age=0)) == set(generations[1:])
        assert generations[0] in registry.store
    assert registry.in_flight(generations[0]) == 0
    lease.release()
    assert registry.in_flight(generations[0]) == 0
    assert registry.sweep(min_age=0) == (generations[0],)


def test_a_lease_of_a_pinned_generation(registry: AdapterRegistry, generations: list[str]) -> None:
    registry.put("a", generations[0], source="upload")
    registry.put("a", generations[1], source="upload")
    with registry.lease(f"a@{generations[0][:10]}"):
        assert registry.in_flight(generations[0]) == 1
        assert registry.in_flight(generations[1]) == 0


def test_states_belong_to_generations(registry: AdapterRegistry, generations: list[str]) -> None:
    registry.put("a", generations[0], source="upload")
    registry.put("b", generations[0], source="upload")
    registry.set_state(generations[0], "failed", "does not fit")
    assert [(record.state, record.failure) for record in registry.list()] == [("failed", "does not fit")] * 2
    registry.put("a", generations[1], source="upload")
    assert registry.get("a").state == "available"
    registry.delete("b")
    registry.sweep(min_age=0)
    registry.set_state(generations[1], "ready")
    assert registry.resolve("a").state == "ready"


def test_a_state_ends_with_its_generation(
    registry: AdapterRegistry, generations: list[str], make_lora_weights: MakeWeights
) -> None:
    registry.put("a", generations[0], source="upload")
    registry.set_state(generations[0], "failed", "does not fit")
    registry.delete("a")
    registry.sweep(min_age=0)
    registry.put("a", registry.store.publish(make_lora_weights(0)), source="upload")
    assert registry.get("a").state == "available"


def test_scanned_folders_are_remembered(registry: AdapterRegistry, tmp_path: Path) -> None:
    registry.save_scanned("/adapters/a", Scanned("a", "1-2-3"))
    registry.save_scanned("/adapters/a", Scanned("a", "4-5-6"))
    registry.save_scanned("/adapters/b", Scanned("b", "7"))
    registry.save_scanned("/adapters/b", None)
    again = reopened(registry, tmp_path)
    assert again.scanned() == {"/adapters/a": Scanned("a", "4-5-6")}
    again.close()


def test_a_failed_write_changes_nothing(
    registry: AdapterRegistry, generations: list[str], tmp_path: Path
) -> None:
    registry.put("a", generations[0], source="upload")
    blocker = sqlite3.connect(tmp_path / "registry.db", isolation_level=None)
    registry._database._connection.execute("PRAGMA busy_timeout = 10")
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="the adapter registry cannot be written"):
        registry.put("a", generations[1], source="upload")
    with pytest.raises(StorageError):
        registry.delete("a")
    assert registry.get("a").generation == generations[0]
    blocker.execute("ROLLBACK")
    blocker.close()
    registry.put("a", generations[1], source="upload")


def test_what_is_no_database_is_refused(tmp_path: Path, store: GenerationStore) -> None:
    (tmp_path / "broken.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="the adapter registry is damaged"):
        AdapterRegistry(tmp_path / "broken.db", store)


def test_a_newer_schema_is_refused(registry: AdapterRegistry, tmp_path: Path, store: GenerationStore) -> None:
    registry._database._connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="schema 99 was written by another version"):
        AdapterRegistry(tmp_path / "registry.db", store)


def test_a_thousand_adapters_open_at_once(
    registry: AdapterRegistry, generations: list[str], tmp_path: Path
) -> None:
    registry._database._connection.execute("PRAGMA synchronous = OFF")
    for index in range(1000):
        registry.put(f"tenant-{index}", generations[index % 3], source="upload", metadata={"index": index})
    registry.close()
    start = time.process_time()
    again = AdapterRegistry(tmp_path / "registry.db", registry.store)
    assert time.process_time() - start < 1.0
    assert len(again) == 1000
    assert again.resolve("tenant-999").metadata == {"index": 999}
    again.close()


def test_readers_never_see_a_mixture(registry: AdapterRegistry, generations: list[str]) -> None:
    """While one thread replaces, rolls back and sweeps, every lease holds a generation that exists."""
    registry.put("a", generations[0], source="upload", origin="0")
    registry.put("a", generations[1], source="upload", origin="1")
    origins = {generations[0]: "0", generations[1]: "1"}
    done = threading.Event()
    seen: Counter[str] = Counter()
    wrong: list[str] = []

    def read() -> None:
        while not done.is_set():
            with registry.lease("a") as lease:
                record = lease.record
                seen[record.generation] += 1
                if origins[record.generation] != record.origin or record.generation not in registry.store:
                    wrong.append(record.generation)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(40):
        registry.rollback("a")
        registry.sweep(min_age=0)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert set(seen) == set(generations[:2])


NAMES = st.sampled_from(["a", "b", "c"])
SEEDS = st.integers(0, 3)


class RegistryMachine(RuleBasedStateMachine):
    """Random lives of three names over four contents, compared with a model of dicts."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.home = TemporaryDirectory()
        self.store = GenerationStore(Path(self.home.name) / "store")
        self.registry = self.open()
        self.histories: dict[str, list[str]] = {}
        self.held: Counter[str] = Counter()

    def open(self) -> AdapterRegistry:
        registry = AdapterRegistry(Path(self.home.name) / "registry.db", self.store, keep_history=3)
        registry._database._connection.execute("PRAGMA synchronous = OFF")
        return registry

    def teardown(self) -> None:
        self.registry.close()
        self.home.cleanup()

    @rule(name=NAMES, seed=SEEDS)
    def put(self, name: str, seed: int) -> None:
        import torch

        spec = AdapterSpec(r=1, lora_alpha=1, target_modules=("q",))
        weights = LoraWeights(spec, {"m.q": (torch.full((1, 2), float(seed)), torch.ones(2, 1))})
        generation = self.store.publish(weights)
        self.registry.put(name, generation, source="upload")
        self.point(name, generation)

    def point(self, name: str, generation: str) -> None:
        older = [old for old in self.histories.get(name, []) if old != generation]
        self.histories[name] = [generation, *older][:3]

    @rule(name=NAMES, back=st.integers(0, 3))
    def rollback(self, name: str, back: int) -> None:
        history = self.histories.get(name, [])
        if back < len(history):
            self.registry.rollback(name, history[back][:12])
            self.point(name, history[back])
        elif not history:
            with pytest.raises(UnknownAdapter):
                self.registry.rollback(name)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name in self.histories:
            self.registry.delete(name)
            del self.histories[name]

    @rule(target=leases, name=NAMES)
    def lease(self, name: str) -> Lease | None:
        if name not in self.histories:
            return None
        lease = self.registry.lease(name)
        assert lease.record.generation == self.histories[name][0]
        self.held[lease.record.generation] += 1
        return lease

    @rule(lease=consumes(leases))
    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            lease.release()
            lease.release()
            self.held[lease.record.generation] -= 1

    @rule()
    def sweep(self) -> None:
        before = set(self.store)
        removed = set(self.registry.sweep(min_age=0))
        assert removed == before - self.needed()

    @rule()
    def reopen(self) -> None:
        if not +self.held:
            self.registry.close()
            self.registry = self.open()

    def needed(self) -> set[str]:
        return {generation for history in self.histories.values() for generation in history} | set(+self.held)

    @invariant()
    def agrees(self) -> None:
        assert {
            record.name: [entry.generation for entry in record.history] for record in self.registry.list()
        } == (self.histories)
        assert all(generation in self.store for generation in self.needed())
        assert all(self.registry.in_flight(generation) == self.held[generation] for generation in self.store)


RegistryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestRegistryInRandomOrder = RegistryMachine.TestCase
