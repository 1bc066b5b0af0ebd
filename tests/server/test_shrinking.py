"""A step without memory: it shrinks, and only what does not fit alone fails. The device's refusals are played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loramux_server.engine import engine as engine_module
from loramux_server.engine import sampler
from loramux_server.engine.engine import Engine
from loramux_server.engine.messages import TokenOutput
from loramux_server.engine.sequence import Scheduled
from loramux_server.engine.shrinking import is_out_of_memory
from tests.server.support import EngineFactory, request, run, tokens_of

CPU_REFUSAL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 9 bytes"
)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    CPU_REFUSAL,
]

WANTED = [
    (0, request("short", list(range(5, 12)), max_tokens=12)),
    (0, request("long", list(range(5, 85)), max_tokens=12)),
    (2, request("scored", list(range(20, 60)), max_tokens=6, prompt_logprobs=2)),
    (3, request("late", list(range(40, 70)), max_tokens=12)),
]

Refuses = Callable[[list[Scheduled]], bool]


def short_of_memory(engine: Engine, refuses: Refuses, error: BaseException) -> list[int]:
    """The engine, with a device that refuses some steps; the sizes of those that it was given."""
    real, sizes = engine.runner.run, list[int]()

    def attempt(scheduled: list[Scheduled]) -> torch.Tensor:
        sizes.append(sum(item.count for item in scheduled))
        if refuses(scheduled):
            raise error
        return real(scheduled)

    engine.runner.run = attempt  # type: ignore[assignment,method-assign]
    return sizes


def all_tokens(outputs: dict[str, list[TokenOutput]]) -> dict[str, list[int]]:
    return {name: tokens_of(answers) for name, answers in outputs.items()}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_step_that_is_too_large_is_taken_in_parts(make_engine: EngineFactory, error: BaseException) -> None:
    clean = run(make_engine(), WANTED)
    engine = make_engine()
    sizes = short_of_memory(engine, lambda items: sum(item.count for item in items) > 7, error)
    answers = run(engine, WANTED)
    assert max(sizes) > 7
    assert all_tokens(answers) == all_tokens(clean)
    scores = [output.prompt_logprobs for output in answers["scored"] if output.prompt_logprobs]
    assert [len(one) for one in scores] == [39]
    engine.check_integrity()
    assert engine.blocks.num_used == 0


def test_only_what_does_not_fit_alone_fails(make_engine: EngineFactory) -> None:
    clean = run(make_engine(), WANTED)
    engine = make_engine()
    short_of_memory(engine, lambda items: any(item.sequence.id == "long" for item in items), ERRORS[0])
    answers = run(engine, WANTED)
    [failed] = answers.pop("long")
    assert (failed.finish, failed.error_code) == ("error", "out_of_memory")
    assert "not enough memory" in str(failed.error)
    clean.pop("long")
    assert all_tokens(answers) == all_tokens(clean)
    engine.check_integrity()
    assert (engine.blocks.num_used, engine.sequences) == (0, {})


def test_memory_that_lacks_while_sampling_changes_no_answer(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = run(make_engine(), WANTED)
    """Before the next step was looked at, and after."""
    refused = list[int]()

    class Short(sampler.Sampling):
        def __init__(self, logits: torch.Tensor, *others: Any) -> None:
            self.rows = len(logits)
            self.refuse(0)
            super().__init__(logits, *others)

        def read(self) -> list[sampler.Sampled]:
            self.refuse(1)
            return super().read()

        def refuse(self, turn: int) -> None:
            if self.rows > 1 and len(refused) < 10 and len(refused) % 2 == turn:
                refused.append(self.rows)
                raise ERRORS[0]

    monkeypatch.setattr(engine_module, "Sampling", Short)
    assert all_tokens(run(make_engine(), WANTED)) == all_tokens(clean)
    assert len(refused) == 10


def test_other_errors_of_the_device_are_not_taken_for_it(make_engine: EngineFactory) -> None:
    engine = make_engine()
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    short_of_memory(engine, lambda items: True, fault)
    engine.add(request("unlucky", [5, 6, 7]))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()
    assert not is_out_of_memory(fault)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
