"""The engine as a whole: nothing leaks, faults stay in the request they belong to, sampling is reproducible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loramux_adapters.errors import ContextLengthExceeded, RequestError
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import AbortRequest, AdapterRef, AddRequest, TokenOutput
from loramux_server.engine.pace import Mix
from loramux_server.engine.sampler import Sampling
from loramux_server.engine.sequence import Scheduled
from tests.server.support import (
    EngineFactory,
    Recipe,
    crowded_engine,
    request,
    run,
    step,
    tokens_of,
    write_adapter,
)

# What may happen next: a new request (prompt length, adapter or base, tokens wanted), an abort, some steps.
_ADD = st.tuples(st.integers(1, 60), st.integers(0, 4), st.integers(1, 20))
_EVENTS = st.lists(
    st.one_of(_ADD, st.integers(0, 15).map(lambda n: AbortRequest(f"r{n}")), st.just(None)), max_size=40
)


@pytest.fixture(scope="module")
def crowded(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, list[AdapterRef]]:
    """Two slots for four adapters."""
    engine = crowded_engine(tiny_model, lora_rows=12)
    directory = tmp_path_factory.mktemp("adapters")
    geometry = engine.base.geometry
    refs = [write_adapter(directory / str(i), geometry, Recipe(r=4, seed=i)) for i in range(4)]
    return engine, refs


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=_EVENTS)
def test_no_interleaving_leaks(crowded: tuple[Engine, list[AdapterRef]], events: list[object]) -> None:
    engine, refs = crowded
    finished: set[str] = set()
    added: dict[str, AddRequest] = {}
    aborted: set[str] = set()

    def checked_step() -> None:
        for output in step(engine).outputs:
            assert output.id not in finished
            assert output.error is None
            if output.finish:
                finished.add(output.id)
        engine.check_integrity()

    for event in events:
        if isinstance(event, AbortRequest):
            engine.abort(event.id)
            aborted.add(event.id)
        elif isinstance(event, tuple):
            length, adapter, count = event
            name = f"r{len(added)}"
            ref = refs[adapter - 1] if adapter else None
            added[name] = request(
                # three families, so that many begin alike
                name,
                [5 + (1 + length % 3) * k for k in range(length)],
                ref,
                max_tokens=count,
            )
            engine.add(added[name])
        else:
            checked_step()
    for _ in range(10_000):
        if not engine.has_work:
            break
        checked_step()
    assert not engine.has_work
    assert finished | aborted >= set(added)
    assert engine.blocks.num_used == 0
    assert all(slot.references == 0 for slot in engine.bank.tier.slots.values())


def test_looking_ahead_changes_no_step(make_engine: EngineFactory) -> None:
    """Requests that come and end while others decode, and few blocks: the same tokens in the same steps."""
    wanted = [
        (
            3 * i,
            request(
                f"r{i}", list(range(5, 9 + 7 * i)), max_tokens=6 + 9 * (i % 3), seed=i, temperature=i % 2
            ),
        )
        for i in range(8)
    ]

    def steps(engine: Engine) -> tuple[dict[str, list[int]], list[int], int]:
        sizes: list[int] = []
        real = engine.step

        def noted() -> Any:
            output = real()
            sizes.append(output.stats.batch_tokens)
            engine.check_integrity()
            return output

        engine.step = noted  # type: ignore[method-assign]
        answers = run(engine, wanted)
        return {name: tokens_of(one) for name, one in answers.items()}, sizes, engine.scheduler.preemptions

    ahead, plain = make_engine(num_blocks=6), make_engine(num_blocks=6)
    plain.scheduler.look_ahead = lambda items: []  # type: ignore[method-assign]
    found = steps(ahead)
    assert found == steps(plain)
    assert found[2] > 0


def test_a_step_that_decodes_is_laid_out_before_the_last_one_is_read(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    events: list[str] = []

    def note(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*arguments: Any) -> Any:
            events.append(name)
            return real(*arguments)

        monkeypatch.setattr(owner, name, noted)

    note(engine.runner, "_lay_out")
    note(engine.scheduler, "_continue_running")
    note(Sampling, "read")
    run(engine, [(0, request("a", [5, 6, 7], max_tokens=6)), (0, request("b", [5, 8, 9], max_tokens=4))])
    prompts = ["_lay_out", "read"]  # more than decoding: the next step is made when it comes
    first = ["_continue_running", "_lay_out", "_lay_out", "read"]
    b_ends = ["_lay_out", "read"]  # known beforehand, so `a` alone was laid out
    assert events == [*prompts, *first, "_lay_out", "read", *b_ends, "_lay_out", "read", "read"]


def test_the_pace_of_long_prompts_is_told_what_steps_take(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine on which every token of a step takes a second, and a stream ten: parts of eight tokens and no more."""
    now, engine = [0.0], make_engine(max_num_batched_tokens=48, long_prompt_tokens=24)
    alone = make_engine(max_num_batched_tokens=48)
    real, mixes = engine.runner.run, list[Mix]()

    def clocked(items: list[Scheduled]) -> torch.Tensor:
        now[0] += sum(item.count + 9 * (item.count == 1) for item in items)
        return real(items)

    def took(
        mix: Mix, seconds: float, told: Callable[[Mix, float], None] = engine.scheduler.pace.took
    ) -> None:
        assert seconds == 10 * mix.decoding + mix.long + mix.other
        mixes.append(mix)
        told(mix, seconds)

    monkeypatch.setattr(engine.scheduler.pace, "_least", 4)
    monkeypatch.setattr(engine.scheduler.pace, "took", took)
    monkeypatch.setattr(engine.runner, "run", clocked)
    monkeypatch.setattr("loramux_server.engine.engine.time", SimpleNamespace(perf_counter=lambda: now[0]))
    wanted = [(0, request("talks", [5, 6, 7], max_tokens=25)), (6, request("long", list(range(5, 89))))]
    answers = run(engine, wanted)
    parts = [mix.long for mix in mixes if mix.decoding and mix.long]
    assert parts[0] == 4
    assert set(parts[1:]) == {8}
    assert sum(parts) == 84
    monkeypatch.undo()
    expected = run(alone, wanted)
    assert {name: tokens_of(one) for name, one in answers.items()} == {
        name: tokens_of(one) for name, one in expected.items()
    }


def test_what_others_left_in_the_cache_reaches_nobody(make_engine: EngineFactory) -> None:
    """One adapter that overflows leaves NaN in the blocks it had: in whole ones, and behind what a new owner writes."""
    lengths = (3, 16, 17, 40)
    wanted = [(i, request(f"r{i}", list(range(5, 5 + n)), max_tokens=20)) for i, n in enumerate(lengths)]
    clean = run(make_engine(), wanted)
    engine = make_engine()
    engine.add(request("overflows", [5, 6, 7], max_tokens=20))
    step(engine)
    for layer in engine.runner.store.layers:
        layer.fill_(float("nan"))
    answers = run(engine, wanted)
    assert answers.pop("overflows")[-1].finish == "error"
    assert {name: tokens_of(out) for name, out in answers.items()} == {
        name: tokens_of(out) for name, out in clean.items()
    }


def test_what_a_running_request_overflows_to_reaches_nobody(make_engine: EngineFactory) -> None:
    """Sequences of unequal lengths decode as one batch; what fills the short ones up is not a stranger's block."""
    short, long = (request(f"r{n}", list(range(5, 5 + n)), max_tokens=30) for n in (3, 40))
    clean = run(make_engine(), [(0, short), (0, long)])
    engine = make_engine()
    engine.add(request("first", [5, 6, 7], max_tokens=3))
    outputs: dict[str, list[TokenOutput]] = {}

    def steps_until(count: int, name: str) -> None:
        for _ in range(200):
            if len(outputs.get(name, ())) >= count:
                return
            for output in step(engine).outputs:
                outputs.setdefault(output.id, []).append(output)
        raise AssertionError(f"{name} got {len(outputs.get(name, ()))} of {count} tokens")

    steps_until(1, "first")
    engine.add(short)
    engine.add(long)
    steps_until(3, "first")  # it had block 0, which the next one gets
    engine.add(request("overflows", list(range(5, 205)), max_tokens=1))
    steps_until(len(outputs["r3"]) + 1, "r3")
    for layer in engine.runner.store.layers:
        layer[0].fill_(float("nan"))
    steps_until(1, "overflows")
    assert outputs["overflows"][0].finish == "error"
    steps_until(len(clean["r3"]), "r3")
    steps_until(len(clean["r40"]), "r40")
    assert {name: tokens_of(outputs[name]) for name in clean} == {
        name: tokens_of(out) for name, out in clean.items()
    }


def test_a_seed_gives_the_same_tokens_in_any_company(make_engine: EngineFactory) -> None:
    engine = make_engine()
    seeded = request("s", list(range(30, 50)), temperature=1.0, seed=1234)
    alone = tokens_of(run(engine, [(0, seeded)])["s"])
    noise = [(i, request(f"n{i}", list(range(5 + i, 40)), temperature=1.0)) for i in range(6)]
    assert tokens_of(run(engine, [*noise, (3, seeded)])["s"]) == alone
    other = request("s", list(range(30, 50)), temperature=1.0, seed=4321)
    assert tokens_of(run(engine, [(0, other)])["s"]) != alone


def test_abort_frees_everything_at_once(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine = make_engine()
    ref = write_adapter(tmp_path / "a", engine.base.geometry, Recipe(r=4))
    engine.add(request("a", list(range(5, 40)), ref, max_tokens=100))
    while engine.blocks.num_used == 0:
        step(engine)
    engine.abort("a")
    assert engine.blocks.num_used == 0
    assert not engine.has_work
    engine.check_integrity()


def test_damaged_files_fail_their_own_request_only(make_engine: EngineFactory, tmp_path: Path) -> None:
    engine = make_engine()
    good = write_adapter(tmp_path / "good", engine.base.geometry, Recipe(r=4, seed=1))
    changed = write_adapter(tmp_path / "changed", engine.base.geometry, Recipe(r=4, seed=2))
    write_adapter(
        tmp_path / "changed", engine.base.geometry, Recipe(r=4, seed=3)
    )  # same place, other content
    prompt = list(range(5, 40))
    answers = run(
        engine,
        [
            (0, request("base", prompt)),
            (0, request("changed", prompt, changed)),
            (0, request("missing", prompt, AdapterRef("0" * 64, str(tmp_path / "nowhere")))),
            (0, request("good", prompt, good)),
        ],
    )
    assert answers["changed"][-1].finish == "error"
    assert "hash differs" in str(answers["changed"][-1].error)
    assert answers["missing"][-1].finish == "error"
    assert len(tokens_of(answers["base"])) > 0
    assert tokens_of(answers["good"]) == tokens_of(run(engine, [(0, request("g", prompt, good))])["g"])
    engine.check_integrity()


def test_what_can_never_run_is_refused(make_engine: EngineFactory) -> None:
    engine = make_engine(num_blocks=4, max_model_len=256)
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 256 tokens"):
        engine.add(request("a", list(range(250)), max_tokens=10))
    with pytest.raises(ContextLengthExceeded):
        engine.add(request("b", list(range(60)), max_tokens=10))  # 4 blocks hold 64 tokens
    with pytest.raises(RequestError, match="at least one prompt token"):
        engine.add(request("c", []))
    engine.add(request("d", [5, 6]))
    with pytest.raises(RequestError, match="in use"):
        engine.add(request("d", [5, 6]))


def test_stop_tokens_and_ignore_eos(make_engine: EngineFactory) -> None:
    engine = make_engine()
    prompt = list(range(5, 30))
    free = tokens_of(run(engine, [(0, request("a", prompt, ignore_eos=True))])["a"])
    assert len(free) == 16
    stopped = run(engine, [(0, request("a", prompt, stop_token_ids=(free[3],)))])["a"]
    assert tokens_of(stopped) == free[: free.index(free[3]) + 1]
    assert stopped[-1].finish == "stop"
