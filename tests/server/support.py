"""Random adapters for tiny models, requests, and the reference that engines are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loramux_adapters.nf4 import NF4Weight
from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.weights import LoraWeights
from loramux_server.base.loading import LoadOptions, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from loramux_server.engine.messages import AdapterRef, AddRequest, SamplingParams, StepOutput, TokenOutput
from loramux_server.engine.scheduler import SchedulerLimits
from tests.adapters.training.support import chat, write_jsonl

EngineFactory = Callable[..., Engine]


@contextmanager
def engines_on(tiny_model: Callable[[str], Path], device: str) -> Iterator[EngineFactory]:
    """`make("llama", dtype=..., num_blocks=..., max_loras=...)`, in fp32 if no dtype is given."""
    engines: list[Engine] = []

    def make(architecture: str = "llama", *, dtype: str = "float32", **options: Any) -> Engine:
        directory = str(tiny_model(architecture))
        base = load_base(LoadOptions(model=directory, name="tiny", device=device, dtype=dtype))
        limits = SchedulerLimits(
            options.pop("max_num_seqs", 16),
            options.pop("max_num_batched_tokens", 48),
            long_prompt_tokens=options.pop("long_prompt_tokens", None),
        )
        chosen = {"num_blocks": 128, "max_model_len": 256, "lora_rows": 128, **options}
        engines.append(Engine(base, EngineOptions(limits=limits, **chosen)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def crowded_engine(tiny_model: Callable[[str], Path], **options: Any) -> Engine:
    """Few KV blocks, two slots, small steps: everything has to be shared."""
    base = load_base(LoadOptions(model=str(tiny_model("llama")), name="tiny", device="cpu", dtype="float32"))
    narrow = {"num_blocks": 12, "max_model_len": 128, "max_loras": 2, "max_cpu_loras": 2, **options}
    return Engine(base, EngineOptions(limits=SchedulerLimits(4, 24), **narrow))


def write_colours(directory: Path) -> Path:
    """A training file of a few short conversations."""
    words = ["red", "green", "blue", "white", "black", "grey", "pink"]
    return write_jsonl(directory / "data.jsonl", [chat(f"colour {w}", w * (1 + len(w) % 3)) for w in words])


@dataclass(frozen=True)
class Recipe:
    """A random adapter. `scale` sets how strongly it changes the model."""

    r: int
    use_rslora: bool = False
    targets: tuple[str, ...] | None = None  # leaf names; None: every linear
    seed: int = 0
    scale: float = 0.6


def write_adapter(directory: Path, geometry: BaseGeometry, recipe: Recipe) -> AdapterRef:
    leaves = tuple(sorted({name.rpartition(".")[2] for name in geometry.linear_shapes}))
    spec = AdapterSpec(
        r=recipe.r,
        lora_alpha=2 * recipe.r if not recipe.use_rslora else 2 * recipe.r**0.5,
        target_modules=recipe.targets or leaves,
        use_rslora=recipe.use_rslora,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    tensors = {}
    for name in spec.targets(geometry):
        out_features, in_features = geometry.linear_shapes[name]
        a = torch.randn(recipe.r, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, recipe.r, generator=generator) * (recipe.scale / recipe.r**0.5)
        tensors[name] = (a, b)
    weights = LoraWeights(spec, tensors)
    weights.write(directory)
    return AdapterRef(weights.generation, str(directory))


class Reference:
    """transformers + PEFT `set_adapter`, one request at a time, on the same NF4 values in fp32."""

    def __init__(
        self, model_directory: Path, geometry: BaseGeometry, adapters: dict[str, AdapterRef]
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            model_directory, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for name in geometry.linear_shapes:
                weight = model.get_submodule(name).weight
                weight.copy_(NF4Weight.quantize(weight).dequantize(torch.float32))
        self.end_tokens = {model.config.eos_token_id}
        self._model: Any = model.eval()
        for name, ref in adapters.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(ref.path, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(model, ref.path, adapter_name=name).eval()

    @torch.no_grad()
    def logits(self, tokens: list[int], adapter: str | None) -> torch.Tensor:
        """`[len(tokens), vocab]`."""
        if adapter is None:
            with self._model.disable_adapter():
                return self._model(torch.tensor([tokens]), use_cache=False).logits[0]
        self._model.set_adapter(adapter)
        return self._model(torch.tensor([tokens]), use_cache=False).logits[0]

    def greedy(self, prompt: list[int], count: int, adapter: str | None) -> list[int]:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + count:
            tokens.append(int(self.logits(tokens, adapter)[-1].argmax()))
            if tokens[-1] in self.end_tokens:
                break
        return tokens[len(prompt) :]


def request(name: str, prompt: list[int], adapter: AdapterRef | None = None, **params: Any) -> AddRequest:
    chosen = {"max_tokens": 16, "temperature": 0.0, **params}
    return AddRequest(name, prompt, SamplingParams(**chosen), adapter)


def step(engine: Engine) -> StepOutput:
    """One step, as the worker's loop takes it: when all that could run waits for files, their reader gets the processor."""
    output = engine.step()
    if engine.has_work and output.stats.batch_tokens == 0:
        time.sleep(0.001)
    return output


def run(engine: Engine, arrivals: list[tuple[int, AddRequest]]) -> dict[str, list[TokenOutput]]:
    """Add each request at its step, step until nothing is left, collect outputs by request."""
    outputs: dict[str, list[TokenOutput]] = {}
    pending = sorted(arrivals, key=lambda item: item[0])
    steps = 0
    while pending or engine.has_work:
        while pending and pending[0][0] <= steps:
            engine.add(pending.pop(0)[1])
        for output in step(engine).outputs:
            outputs.setdefault(output.id, []).append(output)
        steps += 1
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    assert outputs[-1].error is None, outputs[-1].error
    return [token for output in outputs for token in output.tokens]
