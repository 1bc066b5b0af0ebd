"""A tape repeats what ran, on what lies in its inputs now; memory is used again, and never while somebody needs it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.native.library import Native
from loramux_adapters.native.recording import recorder
from loramux_server.engine.tape import Arena, Tape, TapeRecorder

Work = Callable[[torch.Tensor], torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def constant_that_changes(x: torch.Tensor) -> torch.Tensor:
    made = torch.zeros(x.shape)
    made += x
    return made + torch.ones_like(x)


def columns_as_views(x: torch.Tensor) -> torch.Tensor:
    left, right = x.split(4, dim=-1)
    left = left * 2
    right = right.t().contiguous().t()
    return torch.cat((right, left), dim=-1)


def copies_that_may_be_views(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).contiguous().to(torch.float32).view(x.shape).transpose(0, 1).reshape(x.shape)


def several_results(x: torch.Tensor) -> torch.Tensor:
    values, indices = x.sort(dim=-1)
    return values * indices


def memory_in_turns(x: torch.Tensor) -> torch.Tensor:
    for factor in range(1, 30):
        x = torch.tanh(x * factor) + x
    return x


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 1:3].mul_(3.0)
    y.masked_fill_(y > 1.0, 0.5)
    return y.index_select(0, torch.tensor([2, 0, 1]))


def by_kind(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_strided((8, 3), (1, 8))
    y.copy_(x.T)
    return torch.nn.functional.embedding(torch.tensor([[1, 0]]), y.bfloat16()).float() + torch.arange(3)


WORKS: list[Work] = [
    constant_that_changes,
    columns_as_views,
    copies_that_may_be_views,
    several_results,
    memory_in_turns,
    in_place,
    by_kind,
]


@torch.inference_mode()
@pytest.mark.parametrize("work", WORKS)
def test_a_replay_is_the_work_again(work: Work) -> None:
    x = random(3, 8)
    recording = TapeRecorder()(lambda: work(x))
    assert torch.equal(recording.result, work(x))
    for seed in (1, 2):
        x.copy_(random(3, 8, seed=seed))
        expected = work(x)
        assert not torch.equal(recording.result, expected)
        recording.replay()
        assert torch.equal(recording.result, expected)


@torch.inference_mode()
def test_tapes_of_one_arena_leave_each_other_alone() -> None:
    record, inputs = TapeRecorder(), [random(3, 8, seed=seed) for seed in range(len(WORKS))]
    recordings = [record(lambda w=work, x=x: w(x)) for work, x in zip(WORKS, inputs, strict=True)]  # type: ignore[misc]
    gc.collect()
    for _ in range(2):
        for work, x, recording in zip(WORKS, inputs, recordings, strict=True):
            x.add_(0.5)
            recording.replay()
            assert torch.equal(recording.result, work(x))


@torch.inference_mode()
def test_kernels_are_called_again(native: Native) -> None:
    x, weight, up = (
        random(1, 5, 64).bfloat16(),
        random(64, seed=1).bfloat16(),
        random(1, 5, 64, seed=2).bfloat16(),
    )

    other = Native(native.library, native.openmp)  # of a base that was loaded later

    def work() -> torch.Tensor:
        return native.gate(other.rms_norm(x + 1, weight, 1e-5, around_one=False), up) * 2

    recording = TapeRecorder()(work)
    assert recorder.calls is None
    x.copy_(random(1, 5, 64, seed=3))
    recording.replay()
    assert torch.equal(recording.result, work())


@torch.inference_mode()
def test_what_fails_ends_the_recording() -> None:
    x = random(3)
    asking: list[Callable[[], torch.Tensor]] = [
        lambda: x * x[0].item(),
        lambda: x if bool((x > 0).all()) else -x,
        lambda: x if x.equal(x + 1) else -x,
        lambda: x[x > 0],
        lambda: x[torch.where(x > 0)],
        lambda: x.masked_select(x > 0),
        lambda: x.nonzero().float(),
        lambda: torch.stack(list(x.unique())),
    ]
    for work in asking:
        with pytest.raises(RuntimeError, match="what follows depends on values"):
            TapeRecorder()(work)
    assert recorder.calls is None
    assert float(x[0].item()) == float(x[0])


def test_a_kernel_without_memory_is_an_error() -> None:
    tape = Tape(Arena(1 << 16))
    done: list[int] = []
    tape._calls = [lambda: done.append(1), lambda: 0, lambda: 1, lambda: done.append(2)]
    with pytest.raises(MemoryError, match="no memory for a step's results"):
        tape.replay()
    assert done == [1]


@torch.inference_mode()
def test_memory_is_used_again_but_not_what_is_looked_at() -> None:
    arena = Arena(1 << 20)
    first = arena.like(torch.empty(100))
    view = first[3:7].view(2, 2)
    address = first.data_ptr()
    assert address % 64 == 0
    del first
    second = arena.like(torch.empty(100))
    assert second.data_ptr() != address
    view.fill_(1.0)
    del view
    assert arena.like(torch.empty(90)).data_ptr() == address
    tall = arena.like(torch.empty(10, 4).t())
    assert tall.shape == (4, 10)
    assert tall.stride() == (1, 4)
    assert arena.like(torch.empty(0, 4)).shape == (0, 4)
    assert arena.like(torch.empty(5, dtype=torch.bool)).dtype == torch.bool


def test_an_arena_ends() -> None:
    arena = Arena(1 << 12)
    held = arena.like(torch.empty(900))
    with pytest.raises(RuntimeError, match="a step's results take more than"):
        arena.like(torch.empty(900))
    del held
    assert arena.like(torch.empty(900)).shape == (900,)


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40), dropped=st.integers(0, 2**40))
def test_living_tensors_never_share_memory(sizes: list[int], dropped: int) -> None:
    arena = Arena(1 << 20)
    living: dict[int, torch.Tensor] = {}
    for number, size in enumerate(sizes):
        living[number] = arena.like(torch.empty(size)).fill_(number)
        if dropped >> number & 1:
            living.pop(min(living))
        for value, tensor in living.items():
            assert bool((tensor == value).all())
