"""Random adapters for the benchmark: rank 16, every linear, the same bytes on every machine.

The base is only looked at (its config, on the meta device); the adapters are real PEFT directories, so the server
and its peers read the same files. Their effect is as large as the base's own layers have, so that an answer of the wrong
adapter, or of none, is off by several logits and the parity check cannot miss it.

    python -m loadtests.adapters DIRECTORY    # write them and print how to serve them
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loadtests import BenchError
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.weights import LoraWeights
from loramux_server.base.demo import ensure_demo_model

RANK = 16
COUNT = 8
_STRENGTH = 0.8  # size of an adapter's output relative to its input


@dataclass(frozen=True)
class BenchAdapter:
    """An adapter on disk. `generation` is its content, as the server names it."""

    name: str
    path: Path
    generation: str


def model_directory(model: str) -> Path:
    """The directory of `model`: "demo" or a path."""
    if model == "demo":
        return ensure_demo_model()
    if not (Path(model) / "config.json").is_file():
        raise BenchError(f"--model {model}: give 'demo' or a model directory; the reference reads it too")
    return Path(model)


def read_geometry(model: Path) -> BaseGeometry:
    """The linears of a base, without its weights."""
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    head = empty.get_output_embeddings()
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in empty.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return BaseGeometry(name=model.name, identity="", linear_shapes=shapes)


def write_adapters(model: Path, directory: Path, count: int = COUNT, first: int = 0) -> list[BenchAdapter]:
    """Write `bench-<first>` and those after it for the base in `model`, each with its own seed."""
    geometry = read_geometry(model)
    leaves = tuple({name.rpartition(".")[2] for name in geometry.linear_shapes})
    spec = AdapterSpec(r=RANK, lora_alpha=RANK, target_modules=leaves)
    written = []
    for index in range(first, first + count):
        name = f"bench-{index}"
        weights = LoraWeights(spec, random_tensors(geometry.linear_shapes, RANK, seed=index + 1))
        weights.write(directory / name)
        written.append(BenchAdapter(name, directory / name, weights.generation))
    return written


def random_tensors(
    shapes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B for each linear, `(out_features, in_features)` by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, rank, generator=generator) * (_STRENGTH / rank**0.5)
        tensors[name] = (a.bfloat16(), b.bfloat16())
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the benchmark's adapters.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="demo", help="'demo' or a model directory")
    parser.add_argument("--count", type=int, default=COUNT)
    options = parser.parse_args()
    try:
        adapters = write_adapters(model_directory(options.model), options.directory.absolute(), options.count)
    except BenchError as error:
        raise SystemExit(f"bench: {error}") from error
    print(f"loramux serve {options.model} --lora-modules " + " ".join(f"{a.name}={a.path}" for a in adapters))


if __name__ == "__main__":
    main()
