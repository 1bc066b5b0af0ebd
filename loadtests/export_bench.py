"""What an export costs, and what it keeps, next to the tools one would use instead.

    python -m loadtests.export_bench [--layers 2] [--width 4096] [--rank 16] [--work DIR] [--save]

On a synthetic sharded checkpoint with the geometry of a 7B Llama, cut to `--layers` layers: peak resident memory and time
of `run_export`, of a plain copy of the same bytes, of quantizing the same linears and nothing else, and of PEFT's
`merge_and_unload` on the 4-bit model, each in a process of its own. Prints ratios, and the share of the adapter's change
that survives in one linear. Needs disk for three times the checkpoint (4 GB with the defaults).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loadtests.report import FORMAT, RESULTS, Spread, cpu_model, usable_cores

VOCABULARY = 32000
PROBE = "model.layers.0.self_attn.q_proj"
TIME_RATIO = "ours_time / (copy + quantize)"
MEMORY_RATIO = "ours_rss / allowed (1 GB + 12 bytes x largest tensor)"
GOALS = {TIME_RATIO: 3.0, MEMORY_RATIO: 1.0}
DELTA = 0.002  # standard deviation of lora_B: a change of about 1 % of the weight


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    rank: int

    @property
    def inner(self) -> int:
        return self.width * 11008 // 4096 // 64 * 64

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 128,
            num_key_value_heads=self.width // 128,
            vocab_size=VOCABULARY,
            architectures=["LlamaForCausalLM"],
            dtype="bfloat16",
            tie_word_embeddings=False,
        )

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for layer in range(self.layers):
            for name in "qkvo":
                yield f"model.layers.{layer}.self_attn.{name}_proj", (self.width, self.width)
            for name, size in {
                "gate_proj": (self.inner, self.width),
                "up_proj": (self.inner, self.width),
                "down_proj": (self.width, self.inner),
            }.items():
                yield f"model.layers.{layer}.mlp.{name}", size

    @property
    def largest_tensor(self) -> int:
        return max(VOCABULARY * self.width, self.inner * self.width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--verify", type=int, default=0, help="prompts; 0 measures the merge alone")
    parser.add_argument("--work", type=Path, default=None, help="where to put the checkpoint")
    parser.add_argument("--save", action="store_true", help="keep the figures in loadtests/results")
    arguments = parser.parse_args()
    shape = Shape(arguments.layers, arguments.width, arguments.rank)
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        measured = measure(shape, Path(directory), verify=arguments.verify)
    print(json.dumps(measured, indent=2))
    if arguments.save:
        settings = {"layers": shape.layers, "width": shape.width, "rank": shape.rank}
        print(save(measured, settings | {"verify_prompts": arguments.verify}))


def save(measured: dict[str, Any], settings: dict[str, Any]) -> Path:
    """`<date>-export.json` beside the other scenarios' results, with the same keys."""
    result = {
        "format": FORMAT,
        "scenario": "export",
        "summary": "a merge of 7B geometry, beside copy, quantize, PEFT",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "system": platform.system()},
        "versions": {
            name: version(name) for name in ("loramux", "torch", "transformers", "peft", "bitsandbytes")
        },
        "settings": {**settings, "checkpoint_bytes": measured["checkpoint_bytes"]},
        "figures": [
            {"name": name, "unit": "s", "rounds": [seconds], **asdict(Spread.of([seconds]))}
            | {"details": {"peak_rss_bytes": measured["peak_rss_bytes"][name]}}
            for name, seconds in measured["seconds"].items()
        ],
        "ratios": {name: value for name, value in measured.items() if " / " in name},
        "goals": [
            {"text": f"{name} <= {bound:g}", "value": measured[name], "met": measured[name] <= bound}
            for name, bound in GOALS.items()
        ],
        "survival_of_the_change": measured["survival_of_the_change"],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-export.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def measure(shape: Shape, work: Path, *, verify: int = 0) -> dict[str, Any]:
    """Run every contender on the same files; the figures and their ratios."""
    apart(make_files, shape, work)
    runs = {
        "copy": apart(plain_copy, work),
        "quantize": apart(quantize_only, work),
        "ours": apart(ours_merged, work, verify),
        "peft": apart(peft_merged, work),
    }
    seconds = {name: run["seconds"] for name, run in runs.items()}
    peaks = {name: run["peak_rss"] for name, run in runs.items()}
    allowed = 10**9 + 12 * shape.largest_tensor
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in (work / "base").glob("*.safetensors")),
        "seconds": seconds,
        "peak_rss_bytes": peaks,
        TIME_RATIO: seconds["ours"] / (seconds["copy"] + seconds["quantize"]),
        MEMORY_RATIO: peaks["ours"] / allowed,
        "peft_rss / ours_rss": peaks["peft"] / peaks["ours"],
        "peft_time / ours_time": seconds["peft"] / seconds["ours"],
        "survival_of_the_change": {name: runs[name]["survival"] for name in ("ours", "peft")},
    }


def apart(action: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """The action's result with its time and peak memory, from a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, action, arguments).result()


def _measured(action: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    result = action(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**result, "peak_rss": peak}


def make_files(shape: Shape, work: Path) -> dict[str, Any]:
    """A base of one shard a layer, without a tokenizer, and an adapter on all its linears."""
    from safetensors.torch import save_file

    base, adapter = work / "base", work / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, std: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype).normal_(std=std, generator=generator)

    shards = [{"model.embed_tokens.weight": random(VOCABULARY, shape.width)}]
    ones = torch.ones(shape.width, dtype=torch.bfloat16)
    shards.append({"lm_head.weight": random(VOCABULARY, shape.width), "model.norm.weight": ones})
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        names = [(name, size) for name, size in shape.linears() if name.startswith(prefix)]
        shard = {f"{name}.weight": random(*size) for name, size in names}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}{norm}.weight"] = ones.clone()
        shards.append(shard)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, base / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    shape.config().save_pretrained(base)
    lora = {}
    for name, (rows, columns) in shape.linears():
        lora[f"base_model.model.{name}.lora_A.weight"] = random(
            shape.rank, columns, std=columns**-0.5, dtype=torch.float32
        )
        lora[f"base_model.model.{name}.lora_B.weight"] = random(
            rows, shape.rank, std=DELTA, dtype=torch.float32
        )
    save_file(lora, adapter / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name, _ in shape.linears()})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": shape.rank,
        "lora_alpha": shape.rank,
        "target_modules": targets,
        "base_model_name_or_path": str(base),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return {}


def plain_copy(work: Path) -> dict[str, Any]:
    """Read and write the bytes, on the disk when done."""
    started = time.monotonic()
    target = work / "copy"
    target.mkdir()
    for path in sorted((work / "base").glob("*.safetensors")):
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return {"seconds": seconds}


def quantize_only(work: Path) -> dict[str, Any]:
    """bitsandbytes' NF4 with double quantization, one linear after the other; reading is not timed."""
    from safetensors import safe_open

    from loramux_adapters.nf4 import NF4Weight

    seconds = 0.0
    for path in sorted((work / "base").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if "_proj" in name:
                    weight = file.get_tensor(name)
                    started = time.monotonic()
                    NF4Weight.quantize(weight)
                    seconds += time.monotonic() - started
    return {"seconds": seconds}


def ours_merged(work: Path, verify: int) -> dict[str, Any]:
    from loramux_adapters.export import ExportOptions, VerifyOptions, WeightedAdapter, plan_export, run_export

    started = time.monotonic()
    options = ExportOptions(
        work / "base",
        (WeightedAdapter(work / "adapter"),),
        work / "merged",
        verify=VerifyOptions(prompts=verify, min_top1=0.0),  # random weights are full of ties
    )
    report = run_export(plan_export(options)).report
    seconds = time.monotonic() - started
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    return {"seconds": seconds, "survival": tensors[f"{PROBE}.weight"]["survival"]}


def peft_merged(work: Path) -> dict[str, Any]:
    """`merge_and_unload` on the model loaded in 4 bit: it quantizes the sum again."""
    import bitsandbytes.functional as bnb
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    started = time.monotonic()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(work / "base", quantization_config=quantization)
    before = _dense(bnb, model.get_submodule(PROBE).weight)
    merged = PeftModel.from_pretrained(model, work / "adapter").merge_and_unload()
    after = _dense(bnb, merged.get_submodule(PROBE).weight)
    merged.save_pretrained(work / "peft")
    seconds = time.monotonic() - started
    lora = load_file(work / "adapter" / "adapter_model.safetensors")
    a, b = (lora[f"base_model.model.{PROBE}.lora_{side}.weight"] for side in "AB")
    delta = b @ a
    survival = float(((after - before) * delta).sum() / (delta * delta).sum())
    shutil.rmtree(work / "peft")
    return {"seconds": seconds, "survival": survival}


def _dense(bnb: Any, weight: Any) -> torch.Tensor:
    dense: torch.Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    return dense


if __name__ == "__main__":
    main()
