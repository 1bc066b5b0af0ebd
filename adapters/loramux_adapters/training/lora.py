"""The adapter while it is trained: fp32 factors over the linears of a twin of the base, and nothing else.

Promises: the factors are fp32 whatever the base computes in; products are in the base's dtype, as when serving. Initial
values are PEFT's (A uniform, B zero) and, like the dropout of every micro-batch, a function of the seed and names
alone: no generator of the process is read or moved, so training never changes a sampled token, nor the other way
round. Does not know layers, losses or optimizers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from loramux_adapters.spec import AdapterSpec, BaseGeometry
from loramux_adapters.weights import LoraWeights


def generator_for(device: torch.device, *key: object) -> torch.Generator:
    """A generator whose numbers depend on `key` only."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class DropoutMoment:
    """Which piece of which micro-batch is computed; the same moment gives the same masks, in a forward pass and when it
    is repeated."""

    def __init__(self, seed: int, probability: float) -> None:
        self.probability = probability
        self._seed = seed
        self._now: tuple[int, int, int] | None = None

    def enter(self, step: int, micro: int, start: int = 0) -> None:
        """`start` is the piece's first position in its row."""
        self._now = (step, micro, start)

    def leave(self) -> None:
        """Validation drops nothing."""
        self._now = None

    def __call__(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self._now is None or self.probability == 0.0:
            return x
        generator = generator_for(x.device, "dropout", self._seed, *self._now, name)
        kept = torch.empty_like(x).bernoulli_(1.0 - self.probability, generator=generator)
        return x * (kept / (1.0 - self.probability))


class LoraLinear(nn.Module):
    """`base(x) + scaling * B A dropout(x)`; the base gets no gradient, x and the factors do."""

    def __init__(
        self,
        base: nn.Linear,
        name: str,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: DropoutMoment,
    ) -> None:
        super().__init__()
        self.base_layer = base
        self.name = name
        self.scaling = scaling
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(b)
        self._dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base_layer(x)
        x = x.to(y.dtype)
        low = self._dropout(x, self.name) @ self.lora_a.to(x.dtype).T
        return y.float() + low @ (self.lora_b * self.scaling).to(x.dtype).T


class TrainedAdapter:
    """The factors of one adapter, installed in a twin."""

    def __init__(self, spec: AdapterSpec, layers: Mapping[str, LoraLinear], dropout: DropoutMoment) -> None:
        self.spec = spec
        self.layers = layers
        self.dropout = dropout

    @classmethod
    def install(
        cls,
        twin: PreTrainedModel,
        spec: AdapterSpec,
        geometry: BaseGeometry,
        *,
        seed: int,
        dropout: float = 0.0,
        initial: LoraWeights | None = None,
    ) -> TrainedAdapter:
        """Put a `LoraLinear` over every linear of `twin` that `spec` targets; `initial` must be of that spec."""
        moment = DropoutMoment(seed, dropout)
        layers: dict[str, LoraLinear] = {}
        for name in spec.targets(geometry):
            base = twin.get_submodule(name)
            assert isinstance(base, nn.Linear)
            if initial is None:
                a, b = _fresh(seed, name, spec.rank(name), geometry.linear_shapes[name])
            else:
                a, b = (tensor.detach().float().clone() for tensor in initial.tensors[name])
            layers[name] = LoraLinear(
                base, name, a.to(twin.device), b.to(twin.device), spec.scaling(name), moment
            )
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, layers[name])
        return cls(spec, layers, moment)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """In a fixed order, as the optimizer and the checkpoints number them."""
        return {
            f"{name}.{kind}": getattr(self.layers[name], kind)
            for name in sorted(self.layers)
            for kind in ("lora_a", "lora_b")
        }

    def weights(self) -> LoraWeights:
        """A copy on the CPU, in fp32, as it is now."""
        tensors = {}
        for name, layer in self.layers.items():
            a, b = (p.detach().to("cpu", copy=True) for p in (layer.lora_a, layer.lora_b))
            tensors[name] = (a, b)
        return LoraWeights(self.spec, tensors)

    @torch.no_grad()
    def load(self, weights: LoraWeights) -> None:
        """Continue from these values; they must be of the same spec."""
        for name, (a, b) in weights.tensors.items():
            self.layers[name].lora_a.copy_(a)
            self.layers[name].lora_b.copy_(b)


def _fresh(seed: int, name: str, rank: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A as `kaiming_uniform_(a=sqrt(5))` draws it, B zero: the adapter starts as no adapter."""
    out_features, in_features = shape
    bound = 1.0 / math.sqrt(in_features)
    generator = generator_for(torch.device("cpu"), "lora_A", seed, name)
    a = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(out_features, rank)
