"""Kill exports at random points and resume them: `python kill_driver.py WORK KILLS SEED`.

Everything is imported once, on one thread; each export runs in a fork. Goes on until KILLS kills have hit a running
export. Prints one line of JSON: how many hit one, how many shards were kept, and every file that differs from the
uninterrupted export (there must be none).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from loramux_adapters.export import (
    ExportOptions,
    ExportPlan,
    VerifyOptions,
    WeightedAdapter,
    plan_export,
    run_export,
)


def plan_for(work: Path, out: Path) -> ExportPlan:
    verify = VerifyOptions(prompts=1, tokens=16)
    options = ExportOptions(
        work / "base", (WeightedAdapter(work / "adapter"),), out, shard_bytes=20_000, verify=verify
    )
    return plan_export(options)


def forked(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return pid


def exited_well(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def main(work: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    whole = work / "whole"
    run_export(plan_for(work, whole))  # here, so that what is imported late is imported before the forks
    started = time.monotonic()
    run_export(plan_for(work, work / "timed"))
    duration = time.monotonic() - started
    expected = contents(whole)
    chance = random.Random(seed)
    interrupted, shards_kept, different = 0, [], []
    numbers = itertools.count()
    while interrupted < kills:
        number = next(numbers)
        out = work / f"killed-{number}"
        resume = False
        for _ in range(2):  # killed, resumed and killed again
            pid = forked(lambda out=out, resume=resume: void(run_export(plan_for(work, out), resume=resume)))
            delay = chance.uniform(0.0, duration)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            if exited_well(pid):
                duration = delay  # a busy machine measured too long a time: kill earlier from here on
            else:
                interrupted += 1
            if out.exists():
                break
            resume = True
        if not out.exists():
            partial = out.with_name(out.name + ".partial")
            shards_kept.append(len(list(partial.glob("*.safetensors"))))
            assert exited_well(forked(lambda out=out: void(run_export(plan_for(work, out), resume=True))))
        found = contents(out)
        different += [f"{number}: {name}" for name in expected if found.get(name) != expected[name]]
        different += [f"{number}: {name} is extra" for name in found.keys() - expected.keys()]
        shutil.rmtree(out)
    result = {"interrupted": interrupted, "shards_kept": shards_kept, "different": different}
    sys.stdout.write(json.dumps(result) + "\n")


def void(value: object) -> None:
    """So that a lambda has no result."""


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
