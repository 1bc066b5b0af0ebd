"""`python -m loadtests.gpu`: is it right, and then how fast, on this device. Prints figures, asserts none.

Exits with 1, before anything is timed, if the answers are wrong. `--device cpu --tiny` runs the same program on a model
of a few thousand weights, which says nothing about speed: it keeps the script alive.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from loadtests import BenchError
from loadtests.adapters import RANK, random_tensors
from loadtests.gpu import measures, parity, roof
from loadtests.gpu.measures import Driver
from loadtests.gpu.model import GEOMETRIES, geometry, random_base
from loadtests.gpu.report import Figure, Report
from loramux_adapters.spec import AdapterSpec
from loramux_adapters.weights import LoraWeights
from loramux_server.base.device import pick_device, pick_dtype
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.messages import AdapterRef
from loramux_server.engine.runner import kv_bytes_per_token
from loramux_server.engine.scheduler import SchedulerLimits

_BLOCK = 16
_ROOM = 0.85  # of the memory that is free for KV cache and rank rows; the rest is activations and logits


@dataclass(frozen=True)
class Sizes:
    streams: tuple[int, ...] = (1, 8, 32, 64)
    adapters: tuple[int, ...] = (0, 1, 8, 32)
    context: int = 512
    steps: int = 32
    rounds: int = 3
    prompt: int = 2048
    training_tokens: int = 2048
    batched_tokens: int = 2048
    copy_megabytes: int = 1024
    matmul: int = 8192
    check_tokens: int = 100


TINY = Sizes((1, 4), (0, 1, 2), 12, 2, 2, 40, 24, 48, 4, 64, 20)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--geometry", nargs="+", choices=list(GEOMETRIES), default=["llama-3-8b", "llama-2-7b"]
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--dtype", default="auto", help="as the server's --dtype")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand weights")
    parser.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--rounds", type=int, help="of each measurement (default: 3)")
    parser.add_argument("--save", action="store_true", help="keep the figures in loadtests/results")
    parser.add_argument("--json", type=Path, metavar="DIRECTORY", help="write the figures there")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="  %(message)s")
    console = Console()
    for name in options.geometry:
        with tempfile.TemporaryDirectory(prefix="loramux-gpu-") as directory:
            report = run(name, options, Path(directory))
        report.show(console)
        if options.save:
            console.print(str(report.save()))
        if options.json is not None:
            console.print(str(report.save(options.json)))


def run(name: str, options: argparse.Namespace, directory: Path) -> Report:
    sizes = TINY if options.tiny else Sizes()
    rounds = options.rounds or sizes.rounds
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    checked = check(name, options, sizes, device, dtype, directory)
    if not checked.right:
        raise BenchError(f"{name}: {checked.verdict}")
    base = random_base(name, geometry(name, tiny=options.tiny), device, dtype)
    report = Report(
        scenario=f"gpu-{name}{'-tiny' if options.tiny else ''}",
        device=device,
        settings={
            **{
                "tiny": options.tiny,
                "cuda_graphs": device.type == "cuda" and not options.enforce_eager,
                "dtype": str(dtype).removeprefix("torch."),
                "rank": RANK,
                "rounds": rounds,
            },
            **{"context": sizes.context, "steps": sizes.steps, "prompt_tokens": sizes.prompt},
            "training_tokens": sizes.training_tokens,
        },
        parity=checked,
        roofs={
            "copy_bytes_per_second": roof.copy_bandwidth(device, sizes.copy_megabytes),
            "matmul_operations_per_second": roof.matmul_rate(device, dtype, sizes.matmul),
        },
    )
    adapters = write_adapters(base, directory / "adapters", max(sizes.adapters) + rounds)
    streams = fitting(base, sizes, rounds, report)
    measure(base, adapters, streams, sizes, rounds, options.enforce_eager, report)
    gc.collect()  # the engine's cache, before training is given the memory
    train(base, sizes, rounds, report)
    return report


def check(
    name: str,
    options: argparse.Namespace,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    directory: Path,
) -> parity.Checked:
    base = random_base(name, geometry(name, tiny=options.tiny, layers=2), device, dtype)
    adapters = write_adapters(base, directory / "checked", 3)
    with closing(engine_for(base, 8, sizes, 1, eager=options.enforce_eager)) as engine:
        return parity.check(Driver(engine), adapters, sizes.check_tokens, new_tokens=16)


def write_adapters(base: ResidentBase, directory: Path, count: int) -> list[AdapterRef]:
    shapes = base.geometry.linear_shapes
    leaves = tuple(sorted({name.rpartition(".")[2] for name in shapes}))
    spec = AdapterSpec(r=RANK, lora_alpha=RANK, target_modules=leaves)
    written = []
    for index in range(count):
        weights = LoraWeights(spec, random_tensors(shapes, RANK, seed=index + 1))
        weights.write(directory / str(index))
        written.append(AdapterRef(weights.generation, str(directory / str(index))))
    return written


def sequence_tokens(streams: int, sizes: Sizes, rounds: int) -> int:
    decoded = sizes.context + measures.decode_tokens(streams, sizes.steps, rounds)
    return max(decoded, sizes.prompt + 1, sizes.check_tokens + 64)


def engine_for(base: ResidentBase, streams: int, sizes: Sizes, rounds: int, *, eager: bool) -> Engine:
    longest = sequence_tokens(streams, sizes, rounds)
    slots = max(sizes.adapters)
    return Engine(
        base,
        EngineOptions(
            num_blocks=streams * -(-longest // _BLOCK) + 1,
            block_size=_BLOCK,
            limits=SchedulerLimits(max(streams, 8), sizes.batched_tokens),
            max_model_len=longest,
            max_loras=max(slots, 3),
            max_cpu_loras=slots,
            lora_rows=max(slots, 3) * RANK,
            enforce_eager=eager,
            enable_prefix_caching=False,
        ),
    )


def rank_row_bytes(base: ResidentBase) -> int:
    """Of A and B over all linears."""
    return sum(map(sum, base.geometry.linear_shapes.values())) * base.dtype.itemsize


def fitting(base: ResidentBase, sizes: Sizes, rounds: int, report: Report) -> list[int]:
    """Numbers of streams whose KV cache fits beside the rank rows."""
    if base.device.type != "cuda":
        return list(sizes.streams)
    free, _ = torch.cuda.mem_get_info(base.device)
    # Twice: what CUDA graphs read is a copy.
    room = _ROOM * free - 2 * max(sizes.adapters) * RANK * rank_row_bytes(base)
    found = []
    for streams in sizes.streams:
        needed = streams * sequence_tokens(streams, sizes, rounds) * kv_bytes_per_token(base)
        if needed <= room:
            found.append(streams)
        else:
            report.left_out.append(
                f"{streams} streams need {needed / 1e9:.1f} GB of KV cache, {room / 1e9:.1f} fit"
            )
    if not found:
        raise BenchError("the KV cache of a single stream does not fit beside the base")
    return found


def measure(
    base: ResidentBase,
    adapters: list[AdapterRef],
    streams: list[int],
    sizes: Sizes,
    rounds: int,
    eager: bool,
    report: Report,
) -> None:
    with closing(engine_for(base, max(streams), sizes, rounds, eager=eager)) as engine:
        measure_engine(Driver(engine), adapters, streams, sizes, rounds, report)


def measure_engine(
    driver: Driver, adapters: list[AdapterRef], streams: list[int], sizes: Sizes, rounds: int, report: Report
) -> None:
    """Decode for every number of streams and adapters, prefill, and adapters that come from their files."""
    base = driver.base
    bandwidth, rate = report.roofs["copy_bytes_per_second"], report.roofs["matmul_operations_per_second"]
    row_bytes = RANK * driver.engine.bank.pool.row_bytes
    middle = sizes.context + rounds * sizes.steps / 2
    for number in streams:
        for used in sizes.adapters:
            if used > number:
                continue
            rows = [adapters[i % used] if used else None for i in range(number)]
            taken = measures.decode(driver, rows, sizes.context, sizes.steps, rounds)
            floor = roof.decode_bytes(base, number, middle, used * row_bytes) / bandwidth
            label = {0: "base", 1: "1 adapter"}.get(used, f"{used} adapters")
            details = {
                "step_ms": 1e3 * median(taken),
                "floor_ms": 1e3 * floor,
                "share_of_memory_roof": floor / median(taken),
            }
            rates = [number / seconds for seconds in taken]
            report.figures.append(Figure(f"decode {number}, {label}", "tok/s", rates, details))
    for label, adapter in (("base", None), ("1 adapter", adapters[0])):
        taken = measures.prefill(driver, adapter, sizes.prompt, rounds)
        floor = roof.prefill_operations(base, sizes.prompt) / rate
        details = {"share_of_matmul_roof": floor / median(taken)}
        rates = [sizes.prompt / seconds for seconds in taken]
        report.figures.append(Figure(f"prefill, {label}", "tok/s", rates, details))
    added = measures.cold_adapters(driver, adapters[max(sizes.adapters) :], sizes.check_tokens)
    size = {"adapter_bytes": float(row_bytes)}
    report.figures.append(Figure("cold adapter adds", "ms", [1e3 * seconds for seconds in added], size))


def train(base: ResidentBase, sizes: Sizes, rounds: int, report: Report) -> None:
    taken, peak = measures.training_steps(base, sizes.training_tokens, rounds)
    # Forward, forward again, and back for the inputs: three passes over every linear.
    floor = (
        3
        * roof.prefill_operations(base, sizes.training_tokens)
        / report.roofs["matmul_operations_per_second"]
    )
    details = {"share_of_matmul_roof": floor / median(taken), "peak_bytes_beside_model": float(peak)}
    rates = [sizes.training_tokens / seconds for seconds in taken]
    report.figures.append(Figure("training step", "tok/s", rates, details))


if __name__ == "__main__":
    try:
        main()
    except BenchError as error:
        sys.exit(f"gpu: {error}")
