"""Adapters in and out of the device pool, and the right one on every row, whatever was resident before."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from loramux_adapters.errors import AdapterUnavailable, Fault, InvalidAdapter
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights
from tests.adapters.support import Harness

MakeWeights = Callable[..., LoraWeights]
MakeHarness = Callable[..., Harness]


@pytest.fixture
def make(tiny_geometry: BaseGeometry) -> Iterator[MakeHarness]:
    made: list[Harness] = []

    def build(*adapters: LoraWeights, **options: object) -> Harness:
        made.append(Harness(tiny_geometry, adapters, **options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for harness in made:
        harness.bank.close()


@pytest.fixture
def zoo(make_lora_weights: MakeWeights) -> list[LoraWeights]:
    """Ranks 1 to 16, rsLoRA, one linear only, every linear, and another rank and alpha for one of them."""
    return [
        make_lora_weights(1, r=1, lora_alpha=2.0),
        make_lora_weights(2, r=16, lora_alpha=4.0, use_rslora=True),
        make_lora_weights(3, r=4, target_modules=("down_proj",)),
        make_lora_weights(4, r=8, lora_alpha=4.0, target_modules=("q_proj", "v_proj", "down_proj")),
        make_lora_weights(
            5,
            r=2,
            target_modules=("all-linear",),
            rank_pattern={"v_proj": 7, "model.layers.0.mlp.down_proj": 3},
            alpha_pattern={"q_proj": 1.0},
        ),
    ]


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_every_row_gets_its_own_adapter(make: MakeHarness, zoo: list[LoraWeights]) -> None:
    harness = make(*zoo, max_loras=5, rows=64)
    names = list(harness.adapters)
    harness.make_ready(*names)
    rows = [names[0], None, names[1], names[2], names[4], names[3], None, names[1], names[4]]
    mixed = harness.run(rows)
    same(mixed, harness.by_hand(rows))
    base = harness.run([None] * len(rows))
    assert not torch.allclose(mixed[0], base[0], atol=0.05)
    assert torch.equal(mixed[1], base[1])
    assert torch.equal(mixed[6], base[6])


@pytest.mark.parametrize("prepacked", [False, True])
def test_in_bf16_within_rounding(make: MakeHarness, zoo: list[LoraWeights], prepacked: bool) -> None:
    harness = make(*zoo, max_loras=5, rows=64, dtype=torch.bfloat16)
    names = list(harness.adapters)
    harness.make_ready(*names)
    rows = [names[0], None, names[1], names[2], names[4], names[3]]
    for _ in range(12 if prepacked else 1):  # a selection that lasts is reordered
        mixed = harness.run(rows)
    expected = harness.by_hand(rows)
    error = (mixed.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 0.03
    assert torch.equal(mixed[1], harness.run([None] * len(rows))[1])


def test_one_adapter_alone_and_then_none(make: MakeHarness, zoo: list[LoraWeights]) -> None:
    harness = make(*zoo)
    base = harness.run([None] * 3)
    name = list(harness.adapters)[3]
    harness.make_ready(name)
    same(harness.run([name] * 3), harness.by_hand([name] * 3))
    assert harness.batch.foreign is None
    assert torch.equal(harness.run([None] * 3), base)
    assert not harness.batch.expands


def test_an_overflowing_adapter_touches_no_other_row(
    make: MakeHarness, make_lora_weights: MakeWeights
) -> None:
    sick = make_lora_weights(1)
    for a, b in sick.tensors.values():
        a.fill_(1e30)
        b.fill_(1e20)
    harness = make(sick, make_lora_weights(2), make_lora_weights(3))
    bad, one, two = harness.adapters
    harness.make_ready(one, bad, two)
    rows = [one, bad, None, two, one]
    mixed = harness.run(rows)
    assert not bool(torch.isfinite(mixed[1]).all())
    others = [0, 2, 3, 4]
    same(mixed[others], harness.by_hand([rows[i] for i in others], [i + 1 for i in others]))
    assert torch.equal(mixed[2], harness.run([None] * 5)[2])


def test_rows_between_the_active_adapters_are_ignored(make: MakeHarness, zoo: list[LoraWeights]) -> None:
    """The span that is cut out of the pool has a third adapter, and free rows, in the middle."""
    harness = make(*zoo, max_loras=5)
    names = list(harness.adapters)
    harness.make_ready(*names)
    harness.bank.release(names[2])
    harness.tier.remove(names[2])
    rows = [names[0], names[4], None]
    same(harness.run(rows), harness.by_hand(rows))


def test_a_cut_outlives_one_adapter_leaving(make: MakeHarness, zoo: list[LoraWeights]) -> None:
    harness = make(*zoo, max_loras=5, rows=64)
    names = list(harness.adapters)[1:4]
    harness.make_ready(*names)
    harness.run(names)
    cut = harness.bank.pool._cut
    rows = [names[2], names[0], None]
    same(harness.run(rows), harness.by_hand(rows))
    assert harness.bank.pool._cut is cut
    rows = [names[1]]  # too little of it
    same(harness.run(rows), harness.by_hand(rows))
    assert harness.bank.pool._cut is not cut


def test_a_cut_reordered_while_an_adapter_was_away_is_not_used_for_it(
    make: MakeHarness, make_lora_weights: MakeWeights
) -> None:
    """Somebody else lay in its rows when the cut was copied; it came back to the very same place."""
    stays, leaves, other = (
        make_lora_weights(n, r=8, target_modules=("q_proj", "v_proj", "down_proj")) for n in (1, 2, 3)
    )
    harness = make(stays, leaves, other, max_loras=2, rows=16)
    one, two, three = harness.adapters
    harness.make_ready(one, two)
    same(harness.run([one, two]), harness.by_hand([one, two]))
    harness.bank.release(two)
    harness.make_ready(three)  # in the rows of `two`
    for _ in range(12):
        harness.run([one])
    harness.bank.release(three)
    harness.make_ready(two)
    same(harness.run([one, two]), harness.by_hand([one, two]))


def test_loaders_compute_on_one_thread_each(make: MakeHarness, make_lora_weights: MakeWeights) -> None:
    harness = make(make_lora_weights(1))
    seen: list[int] = []
    read = harness.reader

    def count(generation: str, path: str) -> LoraWeights:
        seen.append(torch.get_num_threads())
        return read(generation, path)

    harness.reader = count
    before = torch.get_num_threads()
    harness.make_ready(*harness.adapters)
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_nothing_of_an_evicted_adapter_is_left(make: MakeHarness, make_lora_weights: MakeWeights) -> None:
    """A large adapter of every linear, then a small one of a single linear in the same rows."""
    large = make_lora_weights(1, r=16, target_modules=("q_proj", "v_proj", "down_proj"))
    for a, b in large.tensors.values():
        a.mul_(1e15)
        b.mul_(1e15)
    small = make_lora_weights(
        2, r=16, target_modules=("v_proj",), rank_pattern={"model.layers.0.self_attn.v_proj": 2}
    )
    harness = make(large, small, max_loras=1, rows=16)
    first, second = harness.adapters
    harness.make_ready(first)
    harness.run([first, None])
    harness.bank.release(first)
    harness.make_ready(second)
    same(harness.run([second, second]), harness.by_hand([second, second]))
    same(harness.run([second, None]), harness.by_hand([second, None]))


def test_eviction_and_reload_with_one_slot(make: MakeHarness, zoo: list[LoraWeights]) -> None:
    harness = make(*zoo, max_loras=1, rows=16)
    names = list(harness.adapters)
    for name in [*names, *reversed(names)]:
        harness.make_ready(name)
        same(harness.run([name, None, name]), harness.by_hand([name, None, name]))
        harness.bank.release(name)
        assert harness.bank.resident() == [name]
    assert len(harness.reads) == len(names)  # the second time they come from host memory
    assert len(harness.tier.take_evictions()) == 2 * len(names) - 2


def test_any_order_of_use_gives_the_same_numbers(make: MakeHarness, zoo: list[LoraWeights]) -> None:
    """Three slots, few rows, two host copies: random sets of adapters, some rows the base's."""
    harness = make(*zoo, max_loras=3, rows=26, max_cpu_loras=2)
    rng = random.Random(0)
    for _ in range(40):
        active = rng.sample(list(harness.adapters), rng.choice([1, 1, 2, 2, 3]))
        while sum(max(a.shape[0] for a, _ in harness.adapters[g].tensors.values()) for g in active) > 16:
            active.pop()
        if not active:
            continue
        harness.make_ready(*active)
        harness.tier.check()
        for _ in range(rng.choice([1, 12])):
            rows = [rng.choice([None, *active]) for _ in range(rng.randint(1, 6))]
            tokens = [rng.randrange(64) for _ in rows]
            same(harness.run(rows, tokens), harness.by_hand(rows, tokens))
        for name in active:
            harness.bank.release(name)
        assert len(harness.bank.on_host()) <= 2


# --- loading -----------------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_loading_blocks_nobody(make: MakeHarness, make_lora_weights: MakeWeights) -> None:
    harness = make(make_lora_weights(1), make_lora_weights(2))
    slow, quick = harness.adapters
    gate = threading.Event()

    def read(generation: str, path: str) -> LoraWeights:
        if generation == slow:
            assert gate.wait(10)
        return harness.adapters[generation]

    harness.reader = read
    assert not harness.prepare(slow)
    harness.tier.tick += 100  # even if nobody has asked about it for long
    harness.make_ready(quick)
    same(harness.run([quick, None]), harness.by_hand([quick, None]))
    assert not harness.prepare(slow)
    gate.set()
    harness.make_ready(slow)
    assert sorted(harness.bank.resident()) == sorted([slow, quick])
    assert harness.reads == [slow, quick]


def test_a_failing_load_is_raised_once_and_tried_again_when_asked_again(
    make: MakeHarness, make_lora_weights: MakeWeights
) -> None:
    harness = make(make_lora_weights(1))
    (name,) = harness.adapters
    answers = iter(["refuse", "read"])

    def read(generation: str, path: str) -> LoraWeights:
        if next(answers) == "refuse":
            raise InvalidAdapter([Fault("r", "must be positive")])
        return harness.adapters[generation]

    harness.reader = read
    assert not harness.prepare(name)
    harness.settle()
    with pytest.raises(InvalidAdapter, match="r: must be positive"):
        harness.prepare(name)
    harness.make_ready(name)
    assert [(event.tier, event.error) for event in harness.bank.take_events()] == [
        ("host", "the adapter is refused: r: must be positive"),
        ("host", ""),
        ("device", ""),
    ]
    assert harness.bank.take_events() == []


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), MemoryError(), RuntimeError("no pinned memory")]
)
def test_any_trouble_of_the_machine_is_the_adapters_own(
    make: MakeHarness, make_lora_weights: MakeWeights, error: Exception
) -> None:
    harness = make(make_lora_weights(1))
    (name,) = harness.adapters

    def read(generation: str, path: str) -> LoraWeights:
        raise error

    harness.reader = read
    assert not harness.prepare(name)
    harness.settle()
    with pytest.raises(AdapterUnavailable, match=f"adapter {name[:12]} could not be loaded"):
        harness.prepare(name)


def test_a_failing_copy_gives_its_rows_back(
    make: MakeHarness, make_lora_weights: MakeWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = make(make_lora_weights(1), max_loras=1)
    (name,) = harness.adapters
    fill = harness.bank.pool.fill

    def broken(*arguments: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(harness.bank.pool, "fill", broken)
    with pytest.raises(AdapterUnavailable, match="device lost"):
        harness.make_ready(name)
    assert not harness.tier.slots
    harness.tier.check()
    monkeypatch.setattr(harness.bank.pool, "fill", fill)
    harness.make_ready(name)
    same(harness.run([name]), harness.by_hand([name]))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e37), (torch.bfloat16, 1e37), (torch.float16, 1e4)]
)
def test_weights_that_overflow_the_compute_type_are_refused(
    make: MakeHarness, make_lora_weights: MakeWeights, dtype: torch.dtype, scale: float
) -> None:
    """Finite in the file, but not after the scaling or in the smaller type."""
    weights = make_lora_weights(1, r=1, lora_alpha=1000.0)
    for _, b in weights.tensors.values():
        b.fill_(scale)
    harness = make(weights, dtype=dtype)
    (name,) = harness.adapters
    with pytest.raises(AdapterUnavailable, match="overflow"):
        harness.make_ready(name)
    assert not harness.bank.resident()


def test_an_adapter_too_large_for_the_device_is_an_error(
    make: MakeHarness, make_lora_weights: MakeWeights
) -> None:
    harness = make(make_lora_weights(1, r=16), rows=8)
    (name,) = harness.adapters
    with pytest.raises(AdapterUnavailable, match="rank 16 does not fit"):
        harness.make_ready(name)


def test_host_memory_keeps_the_most_recent(make: MakeHarness, make_lora_weights: MakeWeights) -> None:
    harness = make(*(make_lora_weights(seed) for seed in range(4)), max_loras=1, max_cpu_loras=2)
    names = list(harness.adapters)
    for name in names:
        harness.make_ready(name)
        harness.bank.release(name)
    assert harness.bank.on_host() == names[-2:]
    harness.make_ready(names[0])
    assert harness.reads == [*names, names[0]]


def test_two_cold_adapters_and_one_slot(make: MakeHarness, make_lora_weights: MakeWeights) -> None:
    """Both are asked for in every step: neither may take the slot from under the other's copy."""
    harness = make(make_lora_weights(1), make_lora_weights(2), max_loras=1)
    left = list(harness.adapters)
    for _ in range(2000):
        for name in list(left):
            if harness.prepare(name):
                harness.bank.acquire(name)
                same(harness.run([name]), harness.by_hand([name]))
                harness.bank.release(name)
                left.remove(name)
        time.sleep(0.0005)
        if not left:
            return
    pytest.fail("an adapter never became ready")


@pytest.mark.parametrize("stage", ["host", "device"])
def test_a_request_that_goes_away_while_its_adapter_loads_blocks_no_slot(
    make: MakeHarness, make_lora_weights: MakeWeights, stage: str
) -> None:
    harness = make(make_lora_weights(1), make_lora_weights(2), max_loras=1, max_cpu_loras=1)
    gone, other = harness.adapters
    while True:
        harness.prepare(gone)
        harness.settle()
        if stage == "host" or harness.tier.get(gone) is not None:
            break
    harness.tier.tick += 100  # nobody asks for it any more
    harness.make_ready(other)
    same(harness.run([other]), harness.by_hand([other]))
    assert harness.bank.resident() == [other]
    assert not harness.bank._moves
    harness.bank.release(other)
    harness.make_ready(gone)
    same(harness.run([gone]), harness.by_hand([gone]))
