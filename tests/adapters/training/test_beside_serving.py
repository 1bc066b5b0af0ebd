"""A run and an engine on one base, slice by step: neither changes what the other computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loramux_adapters.training.recipe import Recipe
from loramux_adapters.training.run import TrainingRun
from loramux_adapters.weights import WEIGHTS_FILE
from loramux_server.engine.engine import Engine, EngineOptions
from tests.adapters.training.support import byte_tokenizer, chat, load_tiny, run_slices, write_jsonl
from tests.server.support import Recipe as AdapterRecipe
from tests.server.support import request, tokens_of, write_adapter


def test_streams_and_the_adapter_are_the_same_with_and_without_each_other(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Greedy and sampled streams, of the base and of an adapter, in bf16 with the fused kernels of a CPU."""
    engine = Engine(
        load_tiny(tiny_model("llama"), "bfloat16"), EngineOptions(num_blocks=64, max_model_len=256)
    )
    base = engine.base
    data = write_jsonl(tmp_path / "data.jsonl", [chat(f"say {i}", "yes" * (1 + i % 3)) for i in range(6)])
    asked = Recipe.parse({"r": 4, "batch_size": 2, "n_epochs": 2, "lora_dropout": 0.2})

    def training(out: str) -> TrainingRun:
        return TrainingRun.prepare(base.model, base.geometry, byte_tokenizer(), asked, data, tmp_path / out)

    try:
        ref = write_adapter(tmp_path / "served", base.geometry, AdapterRecipe(r=4, seed=1))
        requests = [
            request(f"r{i}", list(range(9 + i, 30)), ref if i % 2 else None, max_tokens=40, **sampling)
            for i, sampling in enumerate(({}, {}, {"temperature": 1.0, "seed": 3}))
        ]

        def decode(between: Iterator[object]) -> dict[str, list[int]]:
            outputs: dict[str, list[Any]] = {item.id: [] for item in requests}
            for item in requests:
                engine.add(item)
            while engine.has_work:
                next(between, None)
                for output in engine.step().outputs:
                    outputs[output.id].append(output)
            return {name: tokens_of(found) for name, found in outputs.items()}

        expected = decode(iter(()))
        run_slices(training("alone").slices())
        beside = training("beside").slices()
        done = 0

        def counted() -> Iterator[object]:
            nonlocal done
            for _ in beside:
                done += 1
                yield

        slices = counted()
        while not (tmp_path / "beside" / WEIGHTS_FILE).exists():
            assert decode(slices) == expected
            assert done > 30
        assert (tmp_path / "beside" / WEIGHTS_FILE).read_bytes() == (
            tmp_path / "alone" / WEIGHTS_FILE
        ).read_bytes()
        assert decode(iter(())) == expected
    finally:
        engine.close()
