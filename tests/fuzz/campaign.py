"""Many trials from one seed, and a file that repeats the one that failed.

Case `n` of seed `s` is the same upload wherever it runs, whatever ran before it.
"""

from __future__ import annotations

import io
import json
import tarfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.fuzz.mutations import mutate
from tests.fuzz.trial import Sandbox, Verdict, bounded_memory
from tests.fuzz.uploads import draft


@dataclass
class Tally:
    """What a campaign saw. `sentences` are the refusals without their names and numbers."""

    cases: int = 0
    accepted: int = 0
    mutations: Counter[str] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.cases} uploads: {self.accepted} accepted, {len(self.sentences)} kinds of refusal"


class Failed(AssertionError):
    """A case broke a rule; the message has all it takes to see it again."""


def upload(seed: int, number: int) -> tuple[dict[str, bytes], list[str]]:
    """The parts of case `number`, and what was done to them."""
    made = draft(Random(f"{seed}:{number}"))
    done = mutate(made)
    return made.parts, done


def run(
    seed: int,
    cases: int,
    sandbox: Sandbox,
    reproducers: Path,
    *,
    first: int = 0,
    progress: Callable[[Tally], None] | None = None,
) -> Tally:
    """Cases `first` to `first + cases`. Raises Failed at the first that breaks a rule."""
    tally = Tally()
    for number in range(first, first + cases):
        parts, done = upload(seed, number)
        try:
            with bounded_memory():
                verdict = sandbox.judge(parts)
                if number % 50 == 0 and sandbox.judge(parts) != verdict:
                    raise AssertionError("the same upload had two different verdicts")
        except Exception as error:
            path = reproducers / f"fuzz-{seed}-{number}.tar"
            _write(
                path,
                parts,
                {"seed": seed, "case": number, "mutations": done, "error": traceback.format_exc()},
            )
            raise Failed(
                f"case {number} of seed {seed} ({', '.join(done) or 'not mutated'}): {type(error).__name__}: {error}\n"
                f"again: python -m tests.fuzz --seed {seed} --first {number} --cases 1\n"
                f"   or: python -m tests.fuzz --replay {path}"
            ) from error
        _count(tally, verdict, done)
        if progress is not None:
            progress(tally)
    return tally


def replay(path: Path, sandbox: Sandbox) -> Verdict:
    """The very bytes of a reproducer, also after the mutations have changed."""
    with tarfile.open(path) as archive:
        parts = {
            member.name.removeprefix("parts/"): file.read()
            for member in archive
            if member.name.startswith("parts/") and (file := archive.extractfile(member))
        }
    with bounded_memory():
        return sandbox.judge(parts)


def _count(tally: Tally, verdict: Verdict, done: list[str]) -> None:
    tally.cases += 1
    tally.accepted += bool(verdict.generation)
    tally.mutations.update(done)
    if verdict.refusal:
        fault = verdict.refusal.removeprefix("the adapter is refused: ").partition("; ")[0]
        problem = fault.partition(": ")[2]
        tally.sentences["".join(char for char in problem if char.isalpha() or char == " ")[:40]] += 1


def _write(path: Path, parts: dict[str, bytes], case: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        content = {"case.json": json.dumps(case, indent=2).encode()}
        content |= {f"parts/{name}": data for name, data in parts.items()}
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
