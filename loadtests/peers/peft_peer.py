"""transformers + PEFT on the same NF4 values: the peer to be faster than, and the reference to be equal to.

Its decoder linears are plain dense layers that hold dequantize(NF4(W)) in the dtype our server computes in, which is
faster here than bitsandbytes' own 4-bit layers. Without adapters it is transformers alone, without PEFT's wrappers.
Answers one JSON object per line on standard output; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loadtests.peers.lean import LeanLoop
from loramux_adapters.nf4 import NF4Weight
from loramux_server.base.device import pick_device, pick_dtype

BASE_ROW = "__base__"  # PEFT's name for "no adapter" in adapter_names
_ROWS_PER_CHECK = 8
_LOAD: dict[str, Any] = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class PeftPeer:
    """One model with its adapters, in eval mode, without gradients."""

    def __init__(self, model: Path, adapters: dict[str, str], threads: int) -> None:
        torch.set_num_threads(threads)
        self.device = pick_device("auto")
        self.dtype = pick_dtype("auto", self.device)
        base = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
        round_to_nf4(base, self.dtype)
        base.generation_config.eos_token_id = None  # as ignore_eos: an end token is a token like others
        base.generation_config.pad_token_id = 0
        self._adapters = list(adapters)
        self._model: Any = base
        for name, path in adapters.items():
            if isinstance(self._model, PeftModel):
                self.load(path, name)
            else:
                self._model = PeftModel.from_pretrained(base, path, name, **_LOAD)
        self._cast(self.dtype)
        self._model.to(self.device).eval().requires_grad_(False)

    def load(self, path: str, name: str) -> None:
        self._model.load_adapter(path, name, **_LOAD)

    def unload(self, name: str) -> None:
        """One that was loaded beside those of the beginning, of which the first becomes active."""
        self._model.set_adapter(self._adapters[0])
        self._model.delete_adapter(name)

    def generate(self, mode: str, requests: Sequence[dict[str, Any]]) -> tuple[float, list[list[int]]]:
        """Greedy answers and the seconds they took. `mode`: "each" request alone, all as one "batch", or "lean"."""
        if mode == "lean":
            prompts = torch.tensor([request["prompt"] for request in requests], device=self.device)
            return LeanLoop(self._model).generate(prompts, requests[0]["new_tokens"])
        groups = [[request] for request in requests] if mode == "each" else [list(requests)]
        start = time.perf_counter()
        tokens = [answer for group in groups for answer in self._batch(group)]
        return time.perf_counter() - start, tokens

    def check(self, streams: Sequence[dict[str, Any]], without: Sequence[int] = ()) -> list[dict[str, Any]]:
        """For each `{prompt, adapter, tokens}`: where it leaves the reference's best tokens, and how far.

        The weights stay what they are; the arithmetic is fp32's, so that the reference adds no rounding of its own. There
        are prompts and adapters that make a model so sensitive that rounding alone moves its logits by whole units; a
        token is therefore as far off as the nearer of two references says: fp32's, and this peer's own dtype's. Tokens in
        `without` do not count: the contestant was never to take them.
        """
        self._cast(torch.float32)
        exact = self._deficits(streams, without)
        self._cast(self.dtype)
        rounded = self._deficits(streams, without)
        for one, other in zip(exact, rounded, strict=True):
            one["deficit"] = float(torch.minimum(one.pop("deficits"), other["deficits"]).max())
        return exact

    def _deficits(self, streams: Sequence[dict[str, Any]], without: Sequence[int]) -> list[dict[str, Any]]:
        """In the dtype that the parameters have; the order is that of `streams`."""
        groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, stream in enumerate(streams):
            groups[stream["adapter"], len(stream["prompt"]), len(stream["tokens"])].append(index)
        checks: dict[int, dict[str, Any]] = {}
        for members in groups.values():
            for at in range(0, len(members), _ROWS_PER_CHECK):
                rows = members[at : at + _ROWS_PER_CHECK]
                found = self._check([streams[row] for row in rows], without)
                checks.update(zip(rows, found, strict=True))
        return [checks[index] for index in range(len(streams))]

    def _cast(self, dtype: torch.dtype) -> None:
        """Parameters only: buffers such as rotary frequencies stay in fp32."""
        for parameter in self._model.parameters():
            parameter.data = parameter.data.to(dtype)

    def _batch(self, requests: Sequence[dict[str, Any]]) -> list[list[int]]:
        prompts = torch.tensor([request["prompt"] for request in requests], device=self.device)
        names = {request["adapter"] for request in requests}
        mixed = {"adapter_names": [request["adapter"] or BASE_ROW for request in requests]}
        with self._active(names.pop()) if len(names) == 1 else contextlib.nullcontext(), torch.no_grad():
            answers = self._model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=requests[0]["new_tokens"],
                **(mixed if names else {}),
            )
        tokens: list[list[int]] = answers[:, prompts.shape[1] :].tolist()
        return tokens

    @torch.no_grad()
    def _check(self, streams: Sequence[dict[str, Any]], without: Sequence[int]) -> Iterator[dict[str, Any]]:
        """All of one adapter, one prompt length and one answer length."""
        rows = torch.tensor([stream["prompt"] + stream["tokens"] for stream in streams], device=self.device)
        count = len(streams[0]["tokens"])
        with self._active(streams[0]["adapter"]):
            logits = self._model(rows, use_cache=False, logits_to_keep=count + 1).logits[:, :-1]
        logits[..., list(without)] = -torch.inf
        best = logits.topk(2, dim=-1).values
        ours = logits.gather(-1, rows[:, -count:, None])[..., 0]
        deficits = (best[..., 0] - ours).float()
        for row, other in enumerate(rows[:, -count:] != logits.argmax(-1)):
            first = int(other.nonzero()[0]) if other.any() else None
            margin = None if first is None else float(best[row, first, 0] - best[row, first, 1])
            yield {"first_difference": first, "margin": margin, "deficits": deficits[row]}

    @contextlib.contextmanager
    def _active(self, adapter: str | None) -> Iterator[None]:
        if adapter is not None:
            self._model.set_adapter(adapter)
        with (
            self._model.disable_adapter() if adapter is None and self._adapters else contextlib.nullcontext()
        ):
            yield


def round_to_nf4(model: Any, dtype: torch.dtype) -> None:
    """Every linear but the head becomes what the server's is worth: quantized from the checkpoint's own dtype."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.weight.data = NF4Weight.quantize(module.weight).dequantize(dtype)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    setup = json.loads(sys.stdin.readline())
    peer = PeftPeer(Path(setup["model"]), setup["adapters"], setup["threads"])
    versions = {library: version(library) for library in _LIBRARIES}
    answer(
        {"dtype": str(peer.dtype).removeprefix("torch."), "device": str(peer.device), "versions": versions}
    )
    for line in sys.stdin:
        match json.loads(line):
            case {"op": "generate", "mode": mode, "requests": requests}:
                seconds, tokens = peer.generate(mode, requests)
                answer({"seconds": seconds, "tokens": tokens})
            case {"op": "check", "streams": streams, "without": without}:
                answer({"checks": peer.check(streams, without)})
            case {"op": "check", "streams": streams}:
                answer({"checks": peer.check(streams)})


if __name__ == "__main__":
    main()
