"""How fast a QLoRA trains and what it takes in memory: loramux beside Hugging Face, PEFT and gradient checkpointing.

    python -m loadtests.train_bench [--model demo] [--max-seq-length 512 2048] [--steps 4] [--threads 2] [--save]

Each contestant is a process of its own and takes the same optimizer steps: the same rows of exactly so many tokens, all of
them trained on, in the same order, from the same initial factors, with the same learning rates and clipping. The peer is
what the QLoRA recipe says: the model in 4 bit by bitsandbytes, `prepare_model_for_kbit_training`, checkpointing,
`get_peft_model`, AdamW, a loop; if trl can be imported, its SFTTrainer takes part too. tok/s leaves the first step out.
Memory is what resident memory (on CUDA what torch allocates) grows by over the loaded model, and the peak of the whole
process. The loss curves are held against ours. Prints ratios and goals; asserts nothing.

Unless told otherwise a contestant takes 4 steps of 512 tokens and 3 of 2,048: minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from loadtests import BenchError
from loadtests.adapters import model_directory
from loadtests.measured import answer, console, goal_line, in_child, options_parser, run_as_script, save
from loadtests.train_contestants import CONTESTANTS, OURS, PEER, Case, Run, taking_part

LOSS_BOUND = 0.02  # relative, of any step: bf16 products on both sides
# On a CPU, at least and at most.
RATE, MEMORY = "tok/s", "memory beside the model"
GOALS = {RATE: 3.0, MEMORY: 0.7}
_FEWEST_STEPS, _TOKENS = 3, 2048  # of a contestant, by default


def main() -> None:
    parser = options_parser(__doc__)
    parser.add_argument("--max-seq-length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, help="optimizer steps; the first is not timed")
    options = parser.parse_args()
    if options.measure:
        case = Case(**options.measure["case"])
        answer(CONTESTANTS[options.measure["contestant"]](case))
        return
    if options.steps is not None and options.steps < 2:
        raise BenchError("--steps must be at least 2: the first is not timed")
    model = str(model_directory(options.model))
    cases = [
        Case(model, tokens, options.steps or max(_FEWEST_STEPS, _TOKENS // tokens), options.threads)
        for tokens in options.max_seq_length
    ]
    results = [compared(case, {name: _measured(name, case) for name in taking_part()}) for case in cases]
    show(results)
    if options.save:
        settings = {"model": options.model, "threads": options.threads}
        found = {"results": [{**result, "goals": goals(result)} for result in results]}
        print(save("training", "QLoRA beside HF + PEFT + checkpointing", settings, found))


def _measured(name: str, case: Case) -> Run:
    argument = {"contestant": name, "case": asdict(case)}
    return Run(**in_child("loadtests.train_bench", f"{case.tokens} tokens, {name}", argument, case.threads))


def compared(case: Case, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Ours beside each of the others."""
    peers = {name: run for name, run in runs.items() if name != OURS}
    return {
        "tokens": case.tokens,
        "steps": case.steps,
        "runs": {name: asdict(run) for name, run in runs.items()},
        "beside": {name: _beside(runs[OURS], run) for name, run in peers.items()},
    }


def _beside(ours: Run, peer: Run) -> dict[str, Any]:
    apart = max(abs(a - b) / b for a, b in zip(ours.losses, peer.losses, strict=True))
    return {
        RATE: ours.tokens_per_second / peer.tokens_per_second,
        MEMORY: ours.beside_model / peer.beside_model,
        "memory of the process": ours.whole_process / peer.whole_process,
        "loss_curves_apart": apart,
        "parity": apart <= LOSS_BOUND,
    }


def goals(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """They are about the loop, which has nothing that it does not need."""
    rate, memory = (result["beside"][PEER][what] for what in (RATE, MEMORY))
    return [
        {"text": f"{RATE} >= {GOALS[RATE]:g}x {PEER}", "value": rate, "met": rate >= GOALS[RATE]},
        {"text": f"{MEMORY} <= {GOALS[MEMORY]:g}x {PEER}", "value": memory, "met": memory <= GOALS[MEMORY]},
    ]


def show(results: Sequence[Mapping[str, Any]]) -> None:
    out = console()
    table = Table(title="QLoRA training, batch of 1", title_justify="left")
    for title in ("tokens", "", "tok/s", "beside the model", "whole process", "loss"):
        table.add_column(title, justify="left" if title == "" else "right")
    for result in results:
        for name, one in result["runs"].items():
            table.add_row(
                str(result["tokens"]),
                name,
                f"{one['tokens_per_second']:.0f}",
                f"{one['beside_model'] / 1e6:,.0f} MB",
                f"{one['whole_process'] / 1e6:,.0f} MB",
                f"{one['losses'][0]:.3f} to {one['losses'][-1]:.3f}",
            )
    out.print(table)
    for result in results:
        for name, beside in result["beside"].items():
            said = "as the peer's" if beside["parity"] else "WRONG"
            out.print(
                f"  {result['tokens']} tokens, over {name}: {beside[RATE]:.2f}x tok/s, "
                f"{beside[MEMORY]:.2f}x {MEMORY}; loss curve {said}, {beside['loss_curves_apart']:.2%} apart at most",
                highlight=False,
                soft_wrap=True,
            )
        for goal in goals(result):
            out.print(goal_line(goal), highlight=False)


if __name__ == "__main__":
    run_as_script(main, "train_bench")
