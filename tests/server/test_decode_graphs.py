"""Recorded decoding gives the tokens of steps that are not, and is given up loudly where it does not work.

A tape stands for CUDA's recorder: it keeps the operations on tensors and replays them on the same memory, without any of the
Python around them, and refuses what a graph cannot hold.
"""

from __future__ import annotations

import gc
import itertools
import logging
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loramux_adapters.pool import DevicePool
from loramux_adapters.row_choice import ByRows
from loramux_server.engine import recorded_adapters
from loramux_server.engine.decode_graphs import (
    CudaRecorder,
    DecodeGraphs,
    Record,
    Recording,
    replay_seconds,
    sizes_up_to,
)
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import AdapterRef, AddRequest
from loramux_server.engine.paged_batch import AttentionKernels, Ragged
from loramux_server.engine.recorded_adapters import doubling_up_to
from loramux_server.engine.runner import GraphLimits
from loramux_server.engine.scheduler import Plan
from tests.adapters.support import by_mask
from tests.server.support import EngineFactory, Recipe, request, run, step, tokens_of, write_adapter

ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]


class Tape(TorchDispatchMode):
    """What ran while it was on. A value that the host asks for cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.operations:
            for before, now in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if before.data_ptr() != now.data_ptr():
                    before.copy_(now)


class Recorder:
    def __init__(self) -> None:
        self.replays = 0
        self.recorded: list[weakref.ref[Callable[[], torch.Tensor]]] = []

    def __call__(self, work: Callable[[], torch.Tensor]) -> Recording:
        self.recorded.append(weakref.ref(work))
        tape = Tape()
        with tape:
            result = work()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return Recording(replay, result)


def attend(
    query: torch.Tensor,
    store: torch.Tensor,
    rows: Ragged,
    out: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Decoding rows, in operations whose sizes do not depend on how long sequences are."""
    held = store[rows.block_table].flatten(1, 2)
    keys, values = held.unbind(2)
    positions = torch.arange(keys.shape[1])
    seen = positions < rows.lengths[:, None]
    if window is not None:
        seen &= positions >= rows.lengths[:, None] - window
    count, heads, dim = len(seen), query.shape[1], query.shape[2]
    grouped = query[:count].reshape(count, keys.shape[2], -1, dim)
    scores = torch.einsum("nhgd,nlhd->nhgl", grouped, keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    values = values.masked_fill(~seen[:, :, None, None], 0.0)
    out[:count] = torch.einsum("nhgl,nlhd->nhgd", weights, values).reshape(count, heads, dim)


def attend_prompts(
    query: torch.Tensor, store: torch.Tensor, rows: Ragged, out: torch.Tensor, **options: Any
) -> None:
    """Each row as if it decoded; rows beyond a sequence's own keep what they have."""
    queries, outs = (torch.cat([one, one[: rows.most]]) for one in (query, out))  # room behind the last
    for number, table in enumerate(rows.block_table):
        begin, end = rows.begins[number], rows.begins[number + 1]
        place = begin + torch.arange(rows.most)
        seen = (rows.lengths[number] - end + place + 1).clamp(min=1)
        each = Ragged(table.expand(rows.most, -1), torch.arange(rows.most + 1), seen, most=1)
        found = torch.empty_like(query[: rows.most])
        attend(queries[place], store, each, found, **options)
        outs[place] = torch.where((place < end)[:, None, None], found, outs[place])
    out.copy_(outs[: len(out)])


def record_decoding(
    engine: Engine, record: Record, rows: int = 16, parts: Sequence[int] = (), *, prefill: bool = True
) -> DecodeGraphs:
    kernel = attend_prompts if parts and prefill else None
    engine.runner.kernels = AttentionKernels(decode=attend, prefill=kernel)
    graphs = engine.runner.decode_graphs(GraphLimits(rows, engine.options.max_model_len), record, parts)
    engine.runner.graphs = graphs
    return graphs


def in_parts_of(engine: Engine, *sizes: int) -> None:
    """Long prompts beside streams, one part after the other."""
    turns = itertools.cycle(sizes)
    engine.scheduler.pace.tokens = lambda streams: next(turns)  # type: ignore[method-assign]


def adapters(engine: Engine, directory: Path) -> list[AdapterRef]:
    recipes = [
        Recipe(r=1, seed=1),
        Recipe(r=8, seed=2),
        Recipe(r=16, seed=3, use_rslora=True),
        Recipe(r=4, seed=4),
    ]
    return [
        write_adapter(directory / str(number), engine.base.geometry, recipe)
        for number, recipe in enumerate(recipes)
    ]


def mixed(refs: list[AdapterRef], **params: Any) -> list[tuple[int, AddRequest]]:
    """On the base and the adapters, arriving and ending while others decode."""
    rng = random.Random(5)
    who = [None, *refs, None, *reversed(refs), refs[0]]
    return [
        (
            3 * number,
            request(
                f"r{number}",
                [rng.randrange(3, 320) for _ in range(rng.randrange(3, 60))],
                ref,
                max_tokens=rng.randrange(8, 30),
                ignore_eos=True,
                **params,
            ),
        )
        for number, ref in enumerate(who)
    ]


def decode_alone(engine: Engine, ref: AdapterRef) -> None:
    """Later ones may have company at once: that depends on how long their files take."""
    run(engine, [(0, request("alone", [5, 6, 7], ref, max_tokens=8, ignore_eos=True))])


def answers(engine: Engine, wanted: list[tuple[int, AddRequest]]) -> dict[str, list[int]]:
    found = {name: tokens_of(outputs) for name, outputs in run(engine, wanted).items()}
    engine.check_integrity()
    return found


def same_tokens(engine: Engine, plain: Engine, folder: Path) -> None:
    """Of requests of several adapters and of none, alone and together, by recorded steps and by plain ones."""
    assert engine.runner.graphs is not None
    refs = adapters(plain, folder)
    wanted = mixed(refs)
    decode_alone(engine, refs[0])
    assert answers(engine, wanted) == answers(plain, wanted)
    assert engine.runner.graphs.works


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_steps_that_are_not_recorded(
    architecture: str, make_engine: EngineFactory, tmp_path: Path
) -> None:
    options = {"lora_rows": 32, "max_loras": 4}
    plain, engine = (make_engine(architecture, **options) for _ in range(2))
    recorder = Recorder()
    graphs = record_decoding(engine, recorder)
    same_tokens(engine, plain, tmp_path)
    sizes = set(graphs._recordings)
    assert recorder.replays > 4 * len(sizes)
    gc.collect()
    assert all(work() is not None for work in recorder.recorded), "a graph reads what nobody holds any more"
    assert {shape.decoding for shape, _ in sizes} >= {1, 2, 4}
    assert {ranks for _, ranks in sizes} >= {0, 16, 32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_of_prompts_are_computed_beside_streams(
    architecture: str, make_engine: EngineFactory, tmp_path: Path
) -> None:
    """Of several sizes, on adapters and none; what they left in the cache is what their answers come from."""
    options = {"lora_rows": 32, "max_loras": 4, "max_num_batched_tokens": 64, "long_prompt_tokens": 9}
    plain, engine = (make_engine(architecture, **options) for _ in range(2))
    recorder = Recorder()
    graphs = record_decoding(engine, recorder, rows=32, parts=(4, 8))
    for one in (plain, engine):
        in_parts_of(one, 3, 4, 7, 0, 9)
    same_tokens(engine, plain, tmp_path)
    shapes = {shape for shape, _ in graphs._recordings}
    assert {shape.part for shape in shapes} == {0, 4, 8}
    assert any(ranks for shape, ranks in graphs._recordings if shape.part)
    assert recorder.replays > 2 * len(graphs._recordings)


def test_two_prompts_in_a_step_are_not_for_a_graph(make_engine: EngineFactory) -> None:
    """A part of a long one, and as much of a short one as the step has left."""
    options = {"max_num_batched_tokens": 16, "long_prompt_tokens": 9, "enable_prefix_caching": False}
    plain, engine = (make_engine(**options) for _ in range(2))
    graphs = record_decoding(engine, Recorder(), rows=32, parts=(4, 16))
    talking = [(0, request(f"r{n}", [5 + n, 6, 7], ignore_eos=True, max_tokens=20 + 5 * n)) for n in range(4)]
    long, short = request("long", list(range(5, 45))), request("short", list(range(50, 59)))
    sizes: set[int] = set()

    def asked(engine: Engine) -> dict[str, list[int]]:
        real = engine.scheduler.schedule

        def schedule() -> Plan:
            plan = real()
            sizes.add(sum(item.count > 1 and not item.samples for item in plan.scheduled))
            return plan

        engine.scheduler.schedule = schedule  # type: ignore[method-assign]
        in_parts_of(engine, 4)
        return answers(engine, [*talking, (8, long), (9, short)])

    assert asked(engine) == asked(plain)
    assert sizes == {0, 1, 2}
    assert graphs.works
    assert {shape.part for shape, _ in graphs._recordings} == {0, 4}


def test_without_a_kernel_for_prompts_no_part_is_recorded(make_engine: EngineFactory) -> None:
    """Gathering depends on how long the prompt is by then."""
    plain, engine = (make_engine(long_prompt_tokens=9) for _ in range(2))
    graphs = record_decoding(engine, Recorder(), parts=(4,), prefill=False)
    for one in (plain, engine):
        in_parts_of(one, 4)
    talks = request("talks", [5, 6, 7], ignore_eos=True, max_tokens=30)
    wanted = [(0, talks), (5, request("long", list(range(5, 35))))]
    assert answers(engine, wanted) == answers(plain, wanted)
    assert {shape.part for shape, _ in graphs._recordings} == {0}


def test_a_replay_that_writes_other_keys_is_wrong(
    make_engine: EngineFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """Its logits are right: only the next step would read them."""
    engine = make_engine(long_prompt_tokens=9)
    last = engine.runner.store.layers[-1]

    def forgetful(work: Callable[[], torch.Tensor]) -> Recording:
        result = work().clone()

        def replay() -> None:
            before = last.clone()
            result.copy_(work())
            written = (last != before).flatten(2).any(-1)
            if int(written.sum()) > 1:  # a part beside a stream
                last[written] = before[written]

        return Recording(replay, result)

    graphs = record_decoding(engine, forgetful, parts=(4,))
    in_parts_of(engine, 4)
    wanted = [
        (0, request("talks", [5, 6, 7], ignore_eos=True, max_tokens=30)),
        (5, request("long", list(range(5, 35)))),
    ]
    with caplog.at_level(logging.WARNING):
        found = answers(engine, wanted)
    assert graphs.works is False
    assert "one is wrong (relative error 1," in caplog.text
    plain = make_engine(long_prompt_tokens=9)
    in_parts_of(plain, 4)
    assert found == answers(plain, wanted)


@pytest.mark.parametrize(("sizes", "stacked"), [({16}, {0, 32}), ({32}, {0, 16}), ({16, 32}, {0})])
def test_a_step_takes_the_form_that_its_rank_rows_choose(
    sizes: set[int],
    stacked: set[int],
    make_engine: EngineFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row by row from the pool, or all as one from the stack; from step to step, in one engine."""

    def choose(pool: DevicePool, *_: object) -> ByRows:
        return ByRows(by_mask(pool.memory), frozenset(sizes))

    monkeypatch.setattr(recorded_adapters, "choose_by_rows", choose)
    options = {"lora_rows": 32, "max_loras": 4}
    plain, engine = (make_engine(**options) for _ in range(2))
    graphs = record_decoding(engine, Recorder())
    same_tokens(engine, plain, tmp_path)
    kinds = {kind for _, kind in graphs._recordings}
    every_linear = frozenset(engine.bank.pool.memory)
    assert {kind for kind in kinds if isinstance(kind, int)} == stacked
    assert {kind for kind in kinds if not isinstance(kind, int)} == {every_linear}


@pytest.mark.parametrize("params", [{"prompt_logprobs": 2}, {"logprobs": 2}, {"temperature": 0.3, "seed": 4}])
def test_steps_that_are_not_for_a_graph_run_without_one(
    params: dict[str, Any], make_engine: EngineFactory, tmp_path: Path
) -> None:
    plain, engine = make_engine(), make_engine()
    recorder = Recorder()
    record_decoding(engine, recorder, rows=3)  # and more rows than were recorded
    wanted = mixed(adapters(plain, tmp_path), **params)
    assert answers(engine, wanted) == answers(plain, wanted)
    assert recorder.replays > 10


def test_prompts_that_are_scored_are_not_for_a_graph(make_engine: EngineFactory) -> None:
    plain, engine = (make_engine(long_prompt_tokens=9) for _ in range(2))
    graphs = record_decoding(engine, Recorder(), parts=(4,))
    for one in (plain, engine):
        in_parts_of(one, 4)

    def scored(engine: Engine) -> Any:
        talks = request("talks", [5, 6, 7], ignore_eos=True, max_tokens=20)
        asked = request("asked", list(range(5, 35)), max_tokens=1, prompt_logprobs=0)
        return run(engine, [(0, talks), (5, asked)])["asked"][-1].prompt_logprobs

    found, expected = scored(engine), scored(plain)
    assert len(found) == len(expected) == 29
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert {shape.part for shape, _ in graphs._recordings} == {0}


def test_rows_that_fill_a_step_up_write_to_nobodys_block(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine = make_engine()
    recorder = Recorder()
    graphs = record_decoding(engine, recorder)
    ref = adapters(engine, tmp_path)[1]
    for number in range(3):
        engine.add(
            request(
                f"r{number}", list(range(5, 25)), ref if number else None, ignore_eos=True, max_tokens=200
            )
        )
    while 4 not in {shape.decoding for shape, _ in graphs._recordings}:
        step(engine)
    store, size = engine.runner.store, engine.options.block_size
    # What was written before is written again, which has to be seen as well.
    before = [layer.add_(1.0).clone() for layer in store.layers]
    written = {
        (one.blocks[one.num_computed // size], one.num_computed % size) for one in engine.scheduler.running
    }
    replays = recorder.replays
    step(engine)
    assert recorder.replays == replays + 1
    for layer, old in zip(store.layers, before, strict=True):
        changed = (layer != old).flatten(2).any(-1).nonzero().tolist()
        assert {tuple(place) for place in changed} - {(store.nobodys, 0)} == written


def broken(work: Callable[[], torch.Tensor]) -> Recording:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def stale(work: Callable[[], torch.Tensor]) -> Recording:
    """A replay that leaves what was there."""
    return Recording(lambda: None, torch.zeros_like(work()))


def stuck(work: Callable[[], torch.Tensor]) -> Recording:
    """A replay of what lay in the inputs when it was recorded."""
    return Recording(lambda: None, work().clone())


def undefined(work: Callable[[], torch.Tensor]) -> Recording:
    return Recording(lambda: None, torch.full_like(work(), float("nan")))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (broken, "not permitted"),
        (stale, "one is wrong"),
        (stuck, "one is wrong"),
        (undefined, "one is wrong"),
    ],
)
def test_what_cannot_be_recorded_is_said_once_and_runs_as_before(
    record: Record,
    said: str,
    make_engine: EngineFactory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, engine = make_engine(), make_engine()
    graphs = record_decoding(engine, record)
    wanted = mixed(adapters(plain, tmp_path))
    with caplog.at_level(logging.WARNING):
        assert answers(engine, wanted) == answers(plain, wanted)
    assert not graphs.works
    assert caplog.text.count("decoding runs without recorded steps") == 1
    assert said in caplog.text
    assert "and more" not in caplog.text


def test_a_request_that_overflows_does_not_end_recording(make_engine: EngineFactory, tmp_path: Path) -> None:
    """It is in the very step that is to prove a size."""
    engine = make_engine()
    graphs = record_decoding(engine, Recorder())
    engine.add(request("overflows", [5, 6, 7], max_tokens=20))
    step(engine)
    for layer in engine.runner.store.layers:
        layer[: engine.runner.store.nobodys].fill_(float("nan"))
    assert run(engine, [])["overflows"][-1].finish == "error"
    assert graphs.works
    assert not graphs._recordings
    wanted = mixed(adapters(engine, tmp_path))
    assert answers(engine, wanted) == answers(make_engine(), wanted)
    assert graphs._recordings


def test_a_prompt_that_overflows_proves_nothing_of_its_part(make_engine: EngineFactory) -> None:
    engine = make_engine(long_prompt_tokens=9)
    graphs = record_decoding(engine, Recorder(), parts=(4,))
    in_parts_of(engine, 5, 4)  # the first part is too large for a recording
    engine.add(request("talks", [5, 6, 7], ignore_eos=True, max_tokens=100))
    for _ in range(4):
        step(engine)
    engine.add(request("overflows", list(range(5, 45))))
    step(engine)
    sequence = engine.sequences["overflows"]
    assert sequence.num_computed == 5
    for layer in engine.runner.store.layers[:-1]:
        layer[sequence.blocks[0]] = float("nan")
    step(engine)
    assert sequence.num_computed == 9
    assert {shape.part for shape, _ in graphs._recordings} == {0}
    engine.abort("overflows")
    run(engine, [(0, request("long", list(range(50, 90))))])
    assert graphs.works
    assert {shape.part for shape, _ in graphs._recordings} == {0, 4}


def test_a_prompts_last_token_but_one_is_scored_though_it_comes_alone(make_engine: EngineFactory) -> None:
    plain, engine = (make_engine(max_num_batched_tokens=16, max_num_seqs=16) for _ in range(2))
    record_decoding(engine, Recorder())

    def scored(engine: Engine) -> Any:
        talking = [(0, request(f"r{n}", [5 + n], ignore_eos=True, max_tokens=30)) for n in range(15)]
        asked = request("asked", list(range(5, 17)), max_tokens=1, prompt_logprobs=0)
        return run(engine, [*talking, (3, asked)])["asked"][-1].prompt_logprobs

    found, expected = scored(engine), scored(plain)
    assert len(found) == len(expected) == 11
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_nothing_is_recorded_without_cuda_or_compiled_kernels(make_engine: EngineFactory) -> None:
    assert make_engine().runner.graphs is None


def test_graphs_share_a_pool_while_one_of_them_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses a pool whose graphs are all gone; a device is not needed to see which one is asked for."""
    pools: list[object] = []
    broken = False

    class Graph:
        def replay(self) -> None: ...

    @contextmanager
    def graph(graph: Graph, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        pools.append(pool)
        if broken:
            raise RuntimeError("not permitted")
        yield

    handles = itertools.count()
    fakes = {
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, next(handles)),
        "current_stream": lambda device: None,
        "set_stream": lambda stream: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    record = CudaRecorder(torch.device("cuda"))
    work = partial(torch.zeros, 1)
    record(work)
    kept = [record(work)]
    kept.append(record(work))
    broken = True
    with pytest.raises(RuntimeError):
        record(work)
    broken = False
    del kept[0]
    kept.append(record(work))
    kept.clear()
    record(work)
    assert pools == [(0, 1), (0, 2), (0, 2), (0, 2), (0, 2), (0, 3)]


def test_a_recording_is_timed_after_its_work_has_run() -> None:
    """What compiles at first use must not do so while it is recorded."""
    seen: list[str] = []

    def work() -> torch.Tensor:
        seen.append("work")
        return torch.zeros(1)

    def record(work: Callable[[], torch.Tensor]) -> Recording:
        seen.append("record")
        return Recording(lambda: seen.append("replay"), torch.zeros(1))

    assert replay_seconds(torch.device("cpu"), record)(work) > 0
    assert seen == ["work", "record", *["replay"] * 4]


def test_sizes() -> None:
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(3) == [1, 2, 3]
    assert sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(20) == [1, 2, 4, 8, 16, 20]
    assert doubling_up_to(8) == [8]
    assert doubling_up_to(16) == [16]
    assert doubling_up_to(100) == [16, 32, 64, 100]
