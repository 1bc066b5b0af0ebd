"""`python -m tests.fuzz`: mutated uploads against gate, archives and store. `make fuzz` runs 100,000 of them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from tests.fuzz.campaign import Failed, Tally, replay, run
from tests.fuzz.trial import open_sandbox


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--reproducers", type=Path, default=Path("build/fuzz"), help="where a failure is written"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one reproducer instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}", flush=True)
    started = time.monotonic()

    def progress(tally: Tally) -> None:
        if tally.cases % 5000 == 0:
            print(f"{tally}, {tally.cases / (time.monotonic() - started):.0f} a second", flush=True)

    with open_sandbox() as sandbox:
        if options.replay:
            print(replay(options.replay, sandbox))
            return 0
        try:
            tally = run(
                options.seed,
                options.cases,
                sandbox,
                options.reproducers,
                first=options.first,
                progress=progress,
            )
        except Failed as failure:
            print(failure, file=sys.stderr)
            return 1
    print(tally)
    return 0


if __name__ == "__main__":
    sys.exit(main())
