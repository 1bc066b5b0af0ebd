"""A causal LM that is run with one module's weights in memory at a time.

Every leaf module that owns parameters gets them right before its forward and loses them right after; all
prompts go through as one batch, so each tensor is read once a pass. Promises: the function is transformers'
own modeling code in fp32 with eager attention; peak memory is one module, the activations and (for logits)
the output head. Does not cache, generate, or know where weights come from: a `WeightSource` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from loramux_adapters.errors import ExportError
from loramux_adapters.export.memory import Trimmer
from loramux_adapters.export.skeleton import empty_model


class WeightSource(Protocol):
    """Where a streamed model's numbers come from."""

    def load(self, name: str) -> torch.Tensor:
        """The parameter of that full name."""

    def adapt(self, module: str, x: torch.Tensor) -> torch.Tensor | None:
        """What an adapter adds to a linear's output for input `x`, or None."""


class StreamedModel:
    """`hidden` runs the decoder, `logits` the head over its result, both in `dtype`."""

    def __init__(self, config: Any, source: WeightSource, dtype: torch.dtype = torch.float32) -> None:
        self._model = empty_model(config, dtype)
        self._source = source
        self._dtype = dtype
        self._held: set[str] = set()
        self._trimmer = Trimmer()
        for name, module in self._model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                self._stream(name, module)

    @torch.inference_mode()
    def hidden(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids `[batch, length]` -> last hidden states `[batch, length, width]`.

        Causal: padding on the right changes nothing before it, so no attention mask is needed.
        """
        try:
            output = self._model.base_model(input_ids=token_ids, use_cache=False)
        except NotImplementedError as error:  # a parameter still on the meta device was used
            raise ExportError(
                f"{type(self._model).__name__} uses a weight outside of the module that owns it, so it "
                "cannot be verified in pieces; export with --verify 0",
                param="verify",
            ) from error
        states: torch.Tensor = output.last_hidden_state
        return states

    @contextmanager
    def head(self) -> Iterator[StreamedHead]:
        """The output head with its weights held in memory."""
        module = self._model.get_output_embeddings()
        name = next(name for name, candidate in self._model.named_modules() if candidate is module)
        self._fill(name, module)
        self._held.add(name)
        try:
            yield StreamedHead(self._model, module)
        finally:
            self._held.discard(name)
            self._empty(module)

    def _stream(self, name: str, module: nn.Module) -> None:
        def before(module: nn.Module, inputs: Any) -> None:
            if name not in self._held:
                self._fill(name, module)

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            added = self._source.adapt(name, inputs[0]) if inputs else None
            if name not in self._held:
                self._empty(module)
            return output if added is None else output + added

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _fill(self, name: str, module: nn.Module) -> None:
        for key in list(module._parameters):
            if module._parameters[key] is not None:
                value = self._source.load(f"{name}.{key}").to(self._dtype)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)

    def _empty(self, module: nn.Module) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
                self._trimmer.freed(parameter.nbytes)


class StreamedHead:
    """The causal LM's own code after the decoder: output projection, soft-capping, scaling."""

    def __init__(self, model: Any, module: nn.Module) -> None:
        self._model = model
        self._module = module

    @property
    def _weight(self) -> torch.Tensor:
        weight = self._module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def vocabulary(self) -> int:
        return len(self._weight)

    def share(self, other: StreamedHead) -> None:
        """Hold one copy with `other` if the weights are equal, which they are unless the dtype differs."""
        if self._weight.dtype == other._weight.dtype and torch.equal(self._weight, other._weight):
            self._module.weight = other._module.weight

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[positions, width]` -> logits `[positions, vocabulary]` in fp32."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        decoder = self._model.base_model
        decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden.unsqueeze(0))
        try:
            output = self._model(input_ids=torch.zeros(1, len(hidden), dtype=torch.long), use_cache=False)
        finally:
            del decoder.forward
        logits: torch.Tensor = output.logits[0].float()
        return logits
