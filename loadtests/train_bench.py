"""How fast a QLoRA trains and what it takes in memory: loramux beside Hugging Face, PEFT and gradient checkpointing.

    python -m loadtests.train_bench [--model demo] [--max-seq-length 512 2048] [--steps 4] [--threads 2] [--save]

Each contestant is a process of its own and takes the same optimizer steps: the same rows of exactly so many tokens, all of
them trained on, in the same order, from the same initial factors, with the same learning rates and clipping. The peer is
what the QLoRA recipe says: the model in 4 bit by bitsandbytes, `prepare_model_for_kbit_training`, checkpointing,
`get_peft_model`, AdamW, a loop (no Trainer, which would only add to it). tok/s leaves the first step out. Memory is what
resident memory (on CUDA what torch allocates) grows by over the loaded model, and the peak of the whole process. The two
loss curves are held against each other. Prints ratios and goals; asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests import BenchError
from loadtests.adapters import model_directory
from loadtests.plan_check import reset_resident_peak, resident_now, resident_peak_since
from loadtests.report import FORMAT, RESULTS, cpu_model, usable_cores
from loramux_adapters.training.batches import Batches

R, ALPHA, RATE, SEED = 16, 32, 2e-4, 42
LOSS_BOUND = 0.02  # relative, of any step: bf16 products on both sides
GOALS = {"tok/s": 3.0, "memory beside the model": 0.7}  # on a CPU, at least and at most
OURS, PEER = "loramux", "HF + PEFT + checkpointing"
_PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    steps: int
    threads: int


@dataclass(frozen=True)
class Run:
    """`losses` of every step; bytes."""

    losses: list[float]
    tokens_per_second: float
    beside_model: int
    whole_process: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="'demo' or a model directory")
    parser.add_argument("--max-seq-length", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps; the first is not timed")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--save", action="store_true", help="keep the figures in loadtests/results")
    parser.add_argument(
        "--contestant", help=argparse.SUPPRESS
    )  # a name and a case: what a child is started with
    options = parser.parse_args()
    if options.contestant:
        name, case = json.loads(options.contestant)
        print(json.dumps(asdict(CONTESTANTS[name](Case(**case)))))
        return
    if options.steps < 2:
        raise BenchError("--steps must be at least 2: the first is not timed")
    model = str(model_directory(options.model))
    cases = [Case(model, tokens, options.steps, options.threads) for tokens in options.max_seq_length]
    results = [compared(case, {name: _in_child(name, case) for name in CONTESTANTS}) for case in cases]
    show(results)
    if options.save:
        print(save(results, {"model": options.model, "steps": options.steps, "threads": options.threads}))


def compared(case: Case, runs: dict[str, Run]) -> dict[str, Any]:
    ours, peer = runs[OURS], runs[PEER]
    apart = max(abs(a - b) / b for a, b in zip(ours.losses, peer.losses, strict=True))
    return {
        "tokens": case.tokens,
        "runs": {name: asdict(run) for name, run in runs.items()},
        "tok/s": ours.tokens_per_second / peer.tokens_per_second,
        "memory beside the model": ours.beside_model / peer.beside_model,
        "memory of the process": ours.whole_process / peer.whole_process,
        "loss_curves_apart": apart,
        "parity": apart <= LOSS_BOUND,
    }


def _in_child(name: str, case: Case) -> Run:
    print(f"  {case.tokens} tokens: {name}", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "loadtests.train_bench",
        "--contestant",
        json.dumps([name, asdict(case)]),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.threads), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise BenchError(f"{name} failed at {case.tokens} tokens:\n{done.stderr[-2000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def rows(case: Case) -> list[list[int]]:
    """Of ids, a row a step; sentences, so that there is something to learn."""
    from transformers import AutoTokenizer

    from loadtests.prompts import make_prompts

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    return make_prompts(lambda text: tokenizer(text)["input_ids"], case.steps, case.tokens)


# --- ours -----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Run:
    """The trainer of `loramux train`, on rows that are tokenized already."""
    from array import array

    import torch

    from loramux_adapters.spec import AdapterSpec
    from loramux_adapters.training.layerwise import LayerStack
    from loramux_adapters.training.lora import TrainedAdapter
    from loramux_adapters.training.recipe import Recipe, resolve
    from loramux_adapters.training.run import training_base
    from loramux_adapters.training.samples import Sample
    from loramux_adapters.training.trainer import Trainer
    from loramux_adapters.twin import twin_of
    from loramux_server.base.loading import LoadOptions, load_base

    torch.set_num_threads(case.threads)
    base = load_base(LoadOptions(model=case.model, name="base"))
    data = [Sample(array("i", ids), b"\0" + b"\1" * (len(ids) - 1)) for ids in rows(case)]
    recipe, _ = resolve(Recipe.parse(_fields(case)), training_base(base.model, base.geometry), len(data))

    def train() -> tuple[list[float], list[float]]:
        twin = twin_of(base.model)
        spec = AdapterSpec(recipe.r, recipe.lora_alpha, recipe.target_modules)
        adapter = TrainedAdapter.install(twin, spec, base.geometry, seed=recipe.seed)
        trainer = Trainer(LayerStack(twin), adapter, recipe, data, _batches(case))
        losses, ends = [], []
        for _ in range(case.steps):
            slices = trainer.slices()
            while True:
                try:
                    next(slices)
                except StopIteration as end:
                    losses.append(end.value.train_loss)
                    ends.append(time.perf_counter())
                    break
        return losses, ends

    return _measured(case, base.device, train)


def _fields(case: Case) -> dict[str, object]:
    return {
        **{
            "r": R,
            "lora_alpha": float(ALPHA),
            "learning_rate": RATE,
            "lr_scheduler": "constant",
            "seed": SEED,
        },
        **{"warmup_ratio": 0.0, "batch_size": 1, "n_epochs": 1, "max_seq_length": case.tokens},
    }


def _batches(case: Case) -> Batches:
    """A row a step."""
    return Batches([(index,) for index in range(case.steps)], 1, 1, SEED)


# --- the peer -------------------------------------------------------------------------------------------------------


def peer(case: Case) -> Run:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from torch.nn import functional as F
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from loramux_adapters.training.lora import generator_for
    from loramux_server.base.device import pick_device, pick_dtype

    torch.set_num_threads(case.threads)
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        case.model, quantization_config=quantization, dtype=dtype, device_map={"": str(device)}
    )
    data = [torch.tensor(ids, device=device) for ids in rows(case)]

    def train() -> tuple[list[float], list[float]]:
        prepared = prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        targets = sorted(
            {name.rpartition(".")[2] for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
        )
        config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
        trained: Any = get_peft_model(prepared, config).train()
        for name, module in trained.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                factor = module.lora_A["default"].weight
                bound = module.in_features**-0.5
                generator = generator_for(torch.device("cpu"), "lora_A", SEED, name)
                drawn = torch.empty(factor.shape).uniform_(-bound, bound, generator=generator)
                factor.data.copy_(drawn)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        losses, ends = [], []
        for step in range(case.steps):
            ((index,),) = _batches(case).of_step(step)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits = trained(input_ids=data[index][None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), data[index][1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss))
            ends.append(time.perf_counter())
        return losses, ends

    return _measured(case, device, train)


CONTESTANTS: dict[str, Callable[[Case], Run]] = {OURS: ours, PEER: peer}


def _measured(case: Case, device: Any, train: Callable[[], tuple[list[float], list[float]]]) -> Run:
    import torch

    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_resident_peak()
    before = torch.cuda.memory_allocated() if on_gpu else resident_now()
    losses, ends = train()
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_peak_since()
    rate = case.tokens * (len(ends) - 1) / (ends[-1] - ends[0])
    return Run(losses, rate, beside_model=peak - before, whole_process=peak)


# --- what is shown --------------------------------------------------------------------------------------------------


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    rate, memory = result["tok/s"], result["memory beside the model"]
    return [
        {"text": f"tok/s >= {GOALS['tok/s']:g}x {PEER}", "value": rate, "met": rate >= GOALS["tok/s"]},
        {
            "text": f"memory beside the model <= {GOALS['memory beside the model']:g}x {PEER}",
            "value": memory,
            "met": memory <= GOALS["memory beside the model"],
        },
    ]


def show(results: Sequence[dict[str, Any]]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    table = Table(title="QLoRA training, batch of 1", title_justify="left")
    for title in ("tokens", "", "tok/s", "beside the model", "whole process", "loss"):
        table.add_column(title, justify="left" if title == "" else "right")
    for result in results:
        for name, run in result["runs"].items():
            table.add_row(
                str(result["tokens"]),
                name,
                f"{run['tokens_per_second']:.0f}",
                f"{run['beside_model'] / 1e6:,.0f} MB",
                f"{run['whole_process'] / 1e6:,.0f} MB",
                f"{run['losses'][0]:.3f} to {run['losses'][-1]:.3f}",
            )
    console.print(table)
    for result in results:
        said = "as the peer's" if result["parity"] else "WRONG"
        console.print(
            f"  {result['tokens']} tokens: loss curve {said}, {result['loss_curves_apart']:.2%} apart at most"
        )
        for goal in goals(result):
            console.print(
                f"  {'met    ' if goal['met'] else 'NOT MET'}  {goal['text']}: {goal['value']:.2f}",
                highlight=False,
            )


def save(results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> Path:
    """`<date>-training.json` beside the other scenarios' results."""
    written = {
        **{"format": FORMAT, "scenario": "training", "summary": "QLoRA beside HF + PEFT + checkpointing"},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.system()},
        "versions": {
            name: version(name) for name in ("loramux", "torch", "transformers", "peft", "bitsandbytes")
        },
        "settings": settings,
        "results": [{**result, "goals": goals(result)} for result in results],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-training.json"
    path.write_text(json.dumps(written, indent=2) + "\n")
    return path


if __name__ == "__main__":
    try:
        main()
    except BenchError as error:
        sys.exit(f"train_bench: {error}")
