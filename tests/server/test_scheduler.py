"""Who runs in a step: decoding first, the budget kept, memory given back, and one adapter's trouble its own.

The adapters are a fake that counts references and becomes ready when told; `Driver` plays the engine: it runs what was
planned and checks after every step that nothing leaked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from loramux_adapters.errors import AdapterUnavailable
from loramux_server.engine.kv_cache import BlockManager
from loramux_server.engine.messages import AdapterRef, SamplingParams
from loramux_server.engine.pace import Mix, PromptPace
from loramux_server.engine.scheduler import Plan, Scheduler, SchedulerLimits
from loramux_server.engine.sequence import Sequence, Status

BLOCK = 8


class FakeResidency:
    """An adapter is ready `delay` calls after the first; at most `slots` are, idle ones making room."""

    def __init__(self, *, slots: int = 8, delay: int = 0) -> None:
        self.slots = slots
        self.delay = delay
        self.broken: set[str] = set()
        self.closed: set[str] = set()
        self.references: Counter[str] = Counter()
        self.ready: set[str] = set()
        self.asked: Counter[str] = Counter()

    def prepare(self, generation: str, path: str) -> bool:
        assert path == f"/{generation}"
        if generation in self.broken:
            raise AdapterUnavailable(f"adapter {generation} is damaged")
        if generation in self.ready:
            return True
        self.asked[generation] += 1
        if self.asked[generation] <= self.delay:
            return False
        idle = sorted(g for g in self.ready if not self.references[g])
        if len(self.ready) >= self.slots:
            if not idle:
                return False
            self.ready.discard(idle[0])
        self.ready.add(generation)
        self.asked[generation] = 0
        return True

    def accepts(self, generation: str) -> bool:
        return generation not in self.closed

    def acquire(self, generation: str) -> None:
        assert generation in self.ready
        self.references[generation] += 1

    def release(self, generation: str) -> None:
        assert self.references[generation] > 0
        self.references[generation] -= 1


class RecordingScheduler(Scheduler):
    preempted: list[Sequence]  # in the latest step

    def schedule(self) -> Plan:
        self.preempted = []
        return super().schedule()

    def _preempt(self, sequence: Sequence) -> None:
        self.preempted.append(sequence)
        super()._preempt(sequence)


class FixedPace(PromptPace):
    """The same share for long prompts in every step that decodes."""

    def __init__(self, share: int) -> None:
        super().__init__(0, share)
        self.share = share

    def tokens(self, streams: int) -> int:
        assert streams > 0
        return self.share


class Driver:
    def __init__(
        self,
        *,
        blocks: int = 64,
        seqs: int = 8,
        budget: int = 32,
        quantum: int = 64,
        caching: bool = False,
        long: int | None = None,
        **residency: int,
    ) -> None:
        self.adapters = FakeResidency(**residency)
        self.blocks = BlockManager(blocks, BLOCK, prefix_caching=caching)  # prompts all begin alike
        limits = SchedulerLimits(seqs, budget, quantum, long)
        self.pace = FixedPace(long or 0)
        self.scheduler = RecordingScheduler(limits, self.blocks, self.adapters, self.pace)
        self.alive: list[Sequence] = []
        self.failed: list[str] = []
        self.done: list[str] = []
        self._count = 0

    def add(
        self,
        prompt: int,
        answer: int = 4,
        adapter: str | None = None,
        name: str | None = None,
        priority: int = 0,
    ) -> Sequence:
        self._count += 1
        ref = None if adapter is None else AdapterRef(adapter, f"/{adapter}")
        params = SamplingParams(max_tokens=answer, priority=priority)
        made = Sequence(name or f"s{self._count}", [1] * prompt, params, ref)
        assert self.blocks.blocks_for(prompt + answer) <= self.blocks.num_blocks  # as the engine refuses
        self.alive.append(made)
        self.scheduler.add(made)
        return made

    def abort(self, sequence: Sequence) -> None:
        self.alive.remove(sequence)
        self.scheduler.finish(sequence)
        self.check()

    def step(self) -> Plan:
        decoding = [s for s in self.scheduler.running if s.num_pending == 1]
        plan = self.scheduler.schedule()
        self._check_plan(plan, decoding)
        for sequence, error in plan.failed:
            assert sequence.generation in str(error)
            self.failed.append(sequence.id)
            self.alive.remove(sequence)
        for item in plan.scheduled:
            samples, start = item.samples, item.sequence.num_computed
            item.sequence.num_computed += item.count
            self.blocks.publish(item.sequence, start)
            if samples:
                item.sequence.output.append(1)
                if len(item.sequence.output) == item.sequence.params.max_tokens:
                    self.scheduler.finish(item.sequence)
                    self.alive.remove(item.sequence)
                    self.done.append(item.sequence.id)
        self.check()
        return plan

    def run(self, steps: int = 2000) -> None:
        for _ in range(steps):
            if not self.scheduler.has_work:
                return
            self.step()
        pytest.fail(f"{len(self.alive)} sequences did not end within {steps} steps")

    def _check_plan(self, plan: Plan, decoding: list[Sequence]) -> None:
        limits = self.scheduler.limits
        scheduled = [item.sequence for item in plan.scheduled]
        assert sum(item.count for item in plan.scheduled) <= limits.max_num_batched_tokens
        assert len(self.scheduler.running) <= limits.max_num_seqs
        assert len(set(scheduled)) == len(scheduled)
        for item in plan.scheduled:
            assert item.sequence.status is Status.RUNNING
            assert 1 <= item.count <= item.sequence.num_pending
            assert len(item.sequence.blocks) * BLOCK >= item.sequence.num_computed + item.count
        still = [s for s in decoding if s not in self.scheduler.preempted]
        assert scheduled[: len(still)] == still, "a decoding sequence was not first, or not at all"
        assert not decoding or plan.mix.long <= self.pace.share

    def check(self) -> None:
        self.blocks.check(self.alive)
        held = Counter(s.generation for s in self.alive if s.holds_adapter)
        assert +self.adapters.references == held
        assert set(self.scheduler.running) | set(self.scheduler.waiting) == set(self.alive)
        for sequence in self.alive:
            running = sequence.status is Status.RUNNING
            assert running == (sequence in self.scheduler.running)
            assert sequence.holds_adapter == (running and sequence.adapter is not None)
            assert running or (not sequence.blocks and not sequence.num_computed)


def counts(plan: Plan) -> dict[str, int]:
    return {item.sequence.id: item.count for item in plan.scheduled}


# --- the order of a step -----------------------------------------------------------------------------------------------


def test_a_long_prompt_is_cut_into_chunks_beside_the_decoding() -> None:
    driver = Driver(budget=32)
    driver.add(4, answer=50, name="talks")
    driver.step()
    driver.add(100, name="long")
    assert counts(driver.step()) == {"talks": 1, "long": 31}
    assert counts(driver.step()) == {"talks": 1, "long": 31}
    assert counts(driver.step()) == {"talks": 1, "long": 31}
    assert counts(driver.step()) == {"talks": 1, "long": 7}
    assert counts(driver.step()) == {"talks": 1, "long": 1}


def test_long_prompts_share_less_of_a_step_that_decodes() -> None:
    driver = Driver(budget=32, long=8)
    driver.add(40, name="first")
    assert counts(driver.step()) == {"first": 32}  # nobody waits for a token
    driver.add(20, name="second")
    assert counts(driver.step()) == {"first": 8, "second": 20}
    driver.add(30, name="long")
    driver.add(30, name="longer")
    driver.add(8, name="short", adapter="a")
    assert counts(driver.step()) == {"first": 1, "second": 1, "long": 8, "short": 8}
    driver.add(3, name="shorter", adapter="a")
    assert counts(driver.step()) == {"first": 1, "second": 1, "short": 1, "long": 8, "shorter": 3}
    driver.run()
    assert driver.done.index("long") < driver.done.index("longer")


def test_short_prompts_go_past_long_ones_of_their_own_queue() -> None:
    driver = Driver(budget=32, long=8)
    driver.add(4, answer=50, name="talks")
    driver.step()
    for name, length in (("long", 30), ("longer", 40), ("short", 5), ("urgent", 3)):
        driver.add(length, name=name, priority=-1 if name == "urgent" else 0)
    assert counts(driver.step()) == {"talks": 1, "urgent": 3, "long": 8, "short": 5}
    assert counts(driver.step()) == {"talks": 1, "urgent": 1, "short": 1, "long": 8}
    driver.add(30, name="urgent and long", priority=-1)
    others = {"talks": 1, "urgent": 1, "short": 1}
    assert counts(driver.step()) == {**others, "long": 8}  # it takes its seat, and then its turn
    assert counts(driver.step()) == {**others, "urgent and long": 8}


def test_a_long_prompt_is_long_to_its_end() -> None:
    driver = Driver(budget=32, long=8)
    driver.add(4, answer=50, name="talks")
    driver.step()
    driver.add(10, name="long")
    driver.pace.share = 4
    assert [counts(driver.step()).get("long", 0) for _ in range(2)] == [4, 4]
    driver.pace.share = 0
    assert counts(driver.step()) == {"talks": 1}
    driver.pace.share = 1
    assert [counts(driver.step())["long"] for _ in range(4)] == [
        1,
        1,
        1,
        1,
    ]  # two of the prompt, two of the answer
    driver.pace.share = 0
    assert counts(driver.step()) == {"talks": 1, "long": 1}, "it decodes"


def test_what_a_step_is_made_of() -> None:
    driver = Driver(budget=32, long=8)
    assert driver.step().mix == Mix(0, 0, 0)
    for name, length in (("first", 4), ("long", 30)):
        driver.add(length, answer=50, name=name)
    mixes = list[Mix]()

    def schedule(real: Callable[[], Plan] = driver.scheduler.schedule) -> Plan:
        plan = real()
        mixes.append(plan.mix)
        return plan

    driver.scheduler.schedule = schedule  # type: ignore[method-assign]
    driver.step()
    driver.add(3, name="short")
    for _ in range(2):
        driver.step()
    assert mixes == [Mix(0, 28, 4), Mix(1, 2, 3), Mix(3, 0, 0)]


def test_a_long_prompt_that_is_in_the_cache_is_not_long() -> None:
    driver = Driver(budget=64, long=8, caching=True)
    driver.add(33, answer=50, name="talks")
    driver.step()
    driver.add(120, name="long")
    assert counts(driver.step()) == {"talks": 1, "long": 8}
    driver.add(100, name="longer")
    driver.add(35, name="begins alike")
    assert counts(driver.step()) == {"talks": 1, "long": 8, "begins alike": 3}


def test_a_started_prompt_goes_before_new_ones() -> None:
    driver = Driver(budget=32)
    driver.add(40, name="first")
    driver.add(40, name="second")
    assert counts(driver.step()) == {"first": 32}
    assert counts(driver.step()) == {"first": 8, "second": 24}
    assert counts(driver.step()) == {"first": 1, "second": 16}


def test_a_full_house_of_decoding_leaves_no_room_for_prompts() -> None:
    driver = Driver(seqs=8, budget=8)
    for _ in range(8):
        driver.add(1, answer=5)
    driver.step()
    driver.add(20, name="late")
    for _ in range(3):
        assert "late" not in counts(driver.step())
    driver.run()


def test_at_most_max_num_seqs_run() -> None:
    driver = Driver(seqs=3, budget=32)
    for _ in range(7):
        driver.add(2, answer=3)
    assert len(driver.step().scheduled) == 3
    driver.run()
    assert len(driver.done) == 7


# --- memory ------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_admitted_only_with_all_its_blocks() -> None:
    driver = Driver(blocks=10, budget=16)
    driver.add(48, answer=1, name="first")  # 6 of 10 blocks
    driver.add(40, answer=1, name="second")  # needs 5
    driver.step()
    assert driver.blocks.num_used == 6
    assert counts(driver.step()) == {"first": 16}
    assert counts(driver.step()) == {"first": 16}
    assert counts(driver.step()) == {"second": 16}
    assert driver.blocks.num_used == 5


def test_the_youngest_gives_way_and_is_recomputed() -> None:
    driver = Driver(blocks=4, budget=32)
    old = driver.add(15, answer=10, name="old")
    young = driver.add(15, answer=10, name="young")
    driver.step()
    driver.step()
    assert driver.blocks.num_free == 0
    assert counts(driver.step()) == {"old": 1}  # its 17th token needs a third block
    assert driver.scheduler.preemptions == 1
    assert young.status is Status.WAITING
    assert (young.num_computed, len(young.output), young.blocks) == (0, 2, [])
    while old in driver.alive:
        assert "young" not in counts(driver.step())
    assert counts(driver.step()) == {"young": 17}  # prompt and output again, in one piece
    driver.run()
    assert driver.done == ["old", "young"]


def test_urgent_prompts_go_first() -> None:
    driver = Driver(budget=32, seqs=3)
    driver.add(40, name="begun")
    driver.step()
    driver.add(40, name="later", priority=7)
    driver.add(40, name="usual")
    driver.add(40, name="urgent", priority=-1)
    assert counts(driver.step()) == {"begun": 8, "urgent": 24}
    assert counts(driver.step()) == {"begun": 1, "urgent": 16, "usual": 15}
    assert counts(driver.step()) == {"begun": 1, "urgent": 1, "usual": 25}
    driver.run()
    assert driver.done == ["begun", "urgent", "usual", "later"]


def test_an_urgent_prompt_overtakes_one_that_is_half_computed() -> None:
    driver = Driver(budget=32)
    driver.add(70, name="usual")
    driver.step()
    driver.add(40, name="urgent", priority=-1)
    assert counts(driver.step()) == {"usual": 32}  # nothing was left to admit it with
    assert counts(driver.step()) == {"usual": 6, "urgent": 26}
    driver.add(70, name="long")
    assert counts(driver.step()) == {"usual": 1, "urgent": 14, "long": 17}
    driver.add(40, name="second", priority=-1)
    assert counts(driver.step()) == {"usual": 1, "urgent": 1, "long": 30}


def test_the_least_urgent_gives_way_though_it_is_older() -> None:
    driver = Driver(blocks=4, budget=32)
    later = driver.add(15, answer=10, name="later", priority=1)
    driver.step()
    driver.add(15, answer=10, name="usual")
    driver.step()
    assert [s.id for s in driver.scheduler.running] == ["later", "usual"]
    assert counts(driver.step()) == {"usual": 1}
    assert later.status is Status.WAITING
    driver.run()
    assert driver.done == ["usual", "later"]


def test_the_preempted_comes_before_what_was_queued_behind_it() -> None:
    driver = Driver(blocks=4, budget=32)
    driver.add(15, answer=10, name="old")
    driver.add(15, answer=3, name="young")
    driver.add(15, answer=3, name="queued")
    driver.run()
    assert driver.scheduler.preemptions >= 1
    assert driver.done == ["old", "young", "queued"]


def test_a_sequence_may_have_to_give_way_to_itself() -> None:
    """The youngest asks for a block, and is the one preempted; the older ones are in the same step."""
    driver = Driver(blocks=4, budget=32)
    driver.add(9, answer=20, name="old")
    driver.add(16, answer=16, name="young")
    driver.step()
    assert counts(driver.step()) == {"old": 1}
    driver.run()
    assert sorted(driver.done) == ["old", "young"]


# --- adapters ----------------------------------------------------------------------------------------------------------


def test_a_sequence_whose_adapter_is_not_resident_waits_alone() -> None:
    driver = Driver(delay=3)
    driver.add(4, adapter="cold", name="cold")
    driver.add(4, name="base")
    assert counts(driver.step()) == {"base": 4}
    assert counts(driver.step()) == {"base": 1}
    assert counts(driver.step()) == {"base": 1}
    assert counts(driver.step()) == {"base": 1, "cold": 4}


def test_an_adapter_being_drained_takes_nothing_new() -> None:
    driver = Driver()
    driver.add(4, answer=8, adapter="a", name="running")
    driver.step()
    driver.adapters.closed.add("a")
    driver.add(4, adapter="a", name="new")
    assert counts(driver.step()) == {"running": 1}
    driver.adapters.closed.clear()
    assert counts(driver.step()) == {"running": 1, "new": 4}


def test_a_failing_adapter_fails_only_its_own() -> None:
    driver = Driver()
    driver.adapters.broken.add("bad")
    driver.add(4, adapter="good", name="g1")
    driver.add(4, adapter="bad", name="b1")
    driver.add(4, name="base")
    driver.add(4, adapter="bad", name="b2")
    assert counts(driver.step()) == {"g1": 4, "base": 4}
    assert driver.failed == ["b1", "b2"]
    driver.run()
    assert sorted(driver.done) == ["base", "g1"]


def test_what_the_cache_has_is_not_scheduled_again() -> None:
    driver = Driver(caching=True)
    driver.add(30, answer=1, name="first")
    driver.step()
    driver.add(31, answer=1, name="second")
    driver.add(31, answer=1, adapter="a", name="other weights")
    assert counts(driver.step()) == {"second": 7, "other weights": 25}


def test_references_are_given_back_when_preempted() -> None:
    driver = Driver(blocks=4, budget=32)
    driver.add(15, answer=10, adapter="a", name="old")
    driver.add(15, answer=10, adapter="b", name="young")
    for _ in range(3):
        driver.step()
    assert driver.scheduler.preemptions == 1
    assert +driver.adapters.references == {"a": 1}


def test_a_cold_adapter_is_not_kept_waiting_by_a_hot_ones_queue() -> None:
    driver = Driver(seqs=4, budget=32, quantum=64, blocks=200)
    for _ in range(100):
        driver.add(16, answer=2, adapter="hot")
    driver.step()
    driver.add(16, answer=2, adapter="cold", name="cold")
    steps = 0
    while "cold" not in driver.done:
        driver.step()
        steps += 1
    # one turn of the hot one is 64 tokens, four prompts at 32 tokens a step; then it is the cold one's turn
    assert steps <= 6
    driver.run()


def test_a_long_prompt_gets_the_memory_it_waits_for() -> None:
    """Short prompts of other adapters arrive in every step and would fill every block that comes free."""
    driver = Driver(blocks=16, seqs=16, budget=64, quantum=64)
    for _ in range(16):
        driver.add(6, answer=2, adapter="short")
    driver.step()
    driver.add(110, answer=2, adapter="long", name="long")
    for _ in range(60):
        driver.add(6, answer=2, adapter="short")
        driver.add(6, answer=2)
        driver.step()
        if "long" in driver.done:
            break
    assert "long" in driver.done
    driver.run()


# --- anything at all ---------------------------------------------------------------------------------------------------


class SchedulerMachine(RuleBasedStateMachine):
    """Any interleaving of arrivals, aborts, breaking adapters and steps; `Driver` checks after each."""

    caching = False

    def __init__(self) -> None:
        super().__init__()
        sizes = {"blocks": 12, "seqs": 4, "budget": 16, "quantum": 24, "long": 8}
        self.driver = Driver(**sizes, slots=2, delay=1, caching=self.caching)

    @rule(
        prompt=st.integers(1, 60),
        answer=st.integers(1, 30),
        adapter=st.sampled_from([None, "a", "b", "c", "bad"]),
        priority=st.sampled_from([0, 0, 0, -1, 5]),
    )
    def add(self, prompt: int, answer: int, adapter: str | None, priority: int) -> None:
        self.driver.add(prompt, answer, adapter, priority=priority)

    @precondition(lambda self: self.driver.alive)
    @rule(pick=st.integers(0, 99))
    def abort(self, pick: int) -> None:
        self.driver.abort(self.driver.alive[pick % len(self.driver.alive)])

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.driver.step()

    @rule(share=st.sampled_from([0, 3, 8]))
    def change_the_pace(self, share: int) -> None:
        self.driver.pace.share = share

    @rule(generation=st.sampled_from(["bad", "c"]))
    def break_or_mend(self, generation: str) -> None:
        self.driver.adapters.broken ^= {generation}

    @rule(generation=st.sampled_from(["a", "b"]))
    def close_or_open(self, generation: str) -> None:
        self.driver.adapters.closed ^= {generation}

    def teardown(self) -> None:
        self.driver.adapters.closed.clear()
        self.driver.pace.share = 8
        self.driver.run()
        assert self.driver.blocks.num_used == 0
        assert not +self.driver.adapters.references


class CachingMachine(SchedulerMachine):
    caching = True


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
CachingMachine.TestCase.settings = SchedulerMachine.TestCase.settings
test_any_interleaving_ends_and_leaks_nothing = SchedulerMachine.TestCase
test_any_interleaving_with_shared_prefixes_ends_and_leaks_nothing = CachingMachine.TestCase
