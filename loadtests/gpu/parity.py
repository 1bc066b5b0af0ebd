"""Are the device's answers right? Two layers of the geometry, base and adapters in one batch, held against fp32.

The reference is transformers' own model with the dequantized weights and each adapter merged, which shares no kernel and
no masked product with the engine; it computes on the same device and is given the engine's own answers. The check has a
contrast: the same answers held against the base without the adapter must be off by more than the tolerance, or it
could not have noticed a wrong adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadtests.gpu.measures import Driver, answers
from loadtests.gpu.model import dense_twin
from loadtests.parity import TOLERANCES, Parity, StreamCheck, summarize
from loramux_adapters.weights import LoraWeights
from loramux_server.engine.messages import AdapterRef


@dataclass(frozen=True)
class Checked:
    parity: Parity
    contrast: float  # the smallest deficit of a stream with an adapter, held against the base

    @property
    def right(self) -> bool:
        return self.parity.right and self.contrast > self.parity.tolerance

    @property
    def verdict(self) -> str:
        if self.parity.right and not self.right:
            return f"NOT CHECKED: another adapter's answer would be off by {self.contrast:.2f} only"
        return self.parity.verdict

    def as_json(self) -> dict[str, Any]:
        return {**self.parity.as_json(), "contrast": self.contrast}


def check(driver: Driver, adapters: Sequence[AdapterRef], prompt_tokens: int, new_tokens: int) -> Checked:
    """Streams on the base and on each adapter twice, prompts of different lengths."""
    who: list[AdapterRef | None] = [None, *adapters] * 2
    prompts = [driver.prompt(prompt_tokens + 3 * i) for i in range(len(who))]
    given = answers(driver, prompts, who, new_tokens)
    checks: list[StreamCheck] = []
    contrasts: list[float] = []
    for adapter in dict.fromkeys(who):
        own = [i for i, one in enumerate(who) if one == adapter]
        checks += [_against(driver, adapter, prompts[i], given[i]) for i in own]
        if adapter is not None:
            contrasts += [_against(driver, None, prompts[i], given[i]).deficit for i in own]
    dtype = str(driver.base.dtype).removeprefix("torch.")
    return Checked(summarize(checks, TOLERANCES[dtype]), min(contrasts))


@torch.no_grad()
def _against(driver: Driver, adapter: AdapterRef | None, prompt: list[int], answer: list[int]) -> StreamCheck:
    base = driver.base
    weights = None if adapter is None else LoraWeights.read(Path(adapter.path), base.geometry)
    model: Any = dense_twin(base, weights)
    tokens = torch.tensor([prompt + answer], device=base.device)
    logits = model(tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    best = logits.topk(2, dim=-1)
    taken = logits.gather(1, torch.tensor(answer, device=base.device)[:, None])[:, 0]
    behind = best.values[:, 0] - taken
    differing = (best.indices[:, 0].cpu() != torch.tensor(answer)).nonzero()[:, 0].tolist()
    first = differing[0] if differing else None
    margin = None if first is None else float(best.values[first, 0] - best.values[first, 1])
    return StreamCheck(first, margin, float(behind.max()))
