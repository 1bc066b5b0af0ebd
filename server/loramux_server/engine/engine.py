"""The engine: `add`, `abort`, `step`. A plain object that knows no process, no text and no HTTP.

`step` is the program: schedule -> run -> postprocess; a run that only decodes schedules the next one while it waits for the
device. Unit tests and the offline benchmark use it as it is; the worker process drives it in a loop.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from loramux_adapters import layers
from loramux_adapters.bank import AdapterBank
from loramux_adapters.errors import AdapterUnavailable, ContextLengthExceeded, RequestError
from loramux_adapters.pool import DevicePool
from loramux_adapters.residency import DeviceTier
from loramux_adapters.weights import LoraWeights
from loramux_server.base.loading import ResidentBase
from loramux_server.engine.constraints import Grammars
from loramux_server.engine.drafts import STEP_TOKENS, Drafter, num_kept
from loramux_server.engine.kv_cache import BlockManager
from loramux_server.engine.messages import (
    AdapterEviction,
    AdapterLoad,
    AddRequest,
    DeviceSlot,
    EngineStats,
    FinishReason,
    StepOutput,
    TokenOutput,
)
from loramux_server.engine.options import Policy, SpeculativeConfig
from loramux_server.engine.pace import LEAST_TOKENS, PromptPace
from loramux_server.engine.runner import GraphLimits, ModelRunner
from loramux_server.engine.sampler import Sampled, Sampling
from loramux_server.engine.scheduler import Plan, Scheduler, SchedulerLimits
from loramux_server.engine.sequence import Scheduled, Sequence, Status
from loramux_server.engine.shrinking import run_within_memory

logger = logging.getLogger(__name__)

_NO_MEMORY = "there is not enough memory to compute this request, even alone; try again shortly"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Sizes of the engine. `lora_rows` is the device pool's rank rows, shared by all resident adapters."""

    num_blocks: int
    block_size: int = 16
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_model_len: int = 2048
    scheduling_policy: Policy = "fcfs"
    max_loras: int = 8
    max_cpu_loras: int = 64
    lora_rows: int = 512
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    speculative_config: SpeculativeConfig | None = None


class Engine:
    def __init__(self, base: ResidentBase, options: EngineOptions, grammars: Grammars | None = None) -> None:
        """Without `grammars` a request that has one is refused."""
        self.base = base
        self.grammars = grammars
        self.options = options
        names = list(base.geometry.linear_shapes)
        modules, batch = layers.install(base.model, names)
        self.bank = AdapterBank(
            DevicePool(
                modules, base.input_groups, batch, options.lora_rows, base.dtype, base.device, base.native
            ),
            DeviceTier(max_loras=options.max_loras, rows=options.lora_rows),
            self._read_adapter,
            max_cpu_loras=options.max_cpu_loras,
            dtype=base.dtype,
        )
        self.blocks = BlockManager(
            options.num_blocks, options.block_size, prefix_caching=options.enable_prefix_caching
        )
        self.drafter: Drafter | None = None
        if options.speculative_config is not None:
            self.drafter = Drafter(options.speculative_config, STEP_TOKENS[base.device.type])
        pace = PromptPace(LEAST_TOKENS[base.device.type], options.limits.long_prompt_tokens or 0)
        self.scheduler = Scheduler(options.limits, self.blocks, self.bank, pace, self.drafter)
        recorded = GraphLimits(options.limits.max_num_seqs, options.max_model_len)
        self.runner = ModelRunner(
            base,
            self.bank,
            num_blocks=options.num_blocks,
            block_size=options.block_size,
            graph_limits=None if options.enforce_eager else recorded,
        )
        self.sequences: dict[str, Sequence] = {}
        self._compiling: dict[str, Sequence] = {}  # wait for their grammar, in no queue yet
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.bank.is_pinning or bool(self._compiling)

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises RequestError if it could never run."""
        longest = len(request.prompt) + request.params.max_tokens
        if not request.prompt or request.params.max_tokens < 1:
            raise RequestError(
                "a request needs at least one prompt token and max_tokens >= 1", param="prompt"
            )
        if longest > self.options.max_model_len or self.blocks.blocks_for(longest) > self.blocks.num_blocks:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, the request "
                f"needs {longest} tokens ({len(request.prompt)} in the prompt, {request.params.max_tokens} to generate)",
                param="prompt",
            )
        if request.id in self.sequences:
            raise RequestError(f"request id '{request.id}' is in use", param="id")
        sequence = Sequence(
            request.id, request.prompt, request.params, request.adapter, arrived=time.perf_counter()
        )
        grammar = request.params.grammar
        if grammar is not None and self.grammars is None:
            raise RequestError("this engine has no tokenizer to constrain answers with", param="grammar")
        self.sequences[request.id] = sequence
        if grammar is None or self.grammars is None:
            self.scheduler.add(sequence)
        else:
            sequence.constraint = self.grammars.compile(grammar)
            self._compiling[request.id] = sequence

    def abort(self, request_id: str) -> None:
        """Drop a request; its blocks and its hold on the adapter are free at once. Unknown ids are ignored."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is not None and self._compiling.pop(request_id, None) is None:
            self.scheduler.finish(sequence)

    def step(self) -> StepOutput:
        """Advance every scheduled sequence and say what came of it."""
        self._steps += 1
        self.bank.tier.tick += 1
        self.bank.keep_pinned()
        outputs = self._queue_compiled()
        plan = self.scheduler.schedule()
        outputs += [self._failure(sequence, error.message, error.code) for sequence, error in plan.failed]
        began = time.perf_counter()
        plan.begins(began)
        if plan.scheduled:
            mix = plan.mix
            done = run_within_memory(plan.scheduled, self._run)
            self.scheduler.pace.took(mix, time.perf_counter() - began)
            outputs += done.outputs
            outputs += [self._failure(sequence, _NO_MEMORY, "out_of_memory") for sequence in done.failed]
        loads = [
            AdapterLoad(event.generation, event.tier, event.seconds, ok=not event.error, error=event.error)
            for event in self.bank.take_events()
        ]
        evictions = [AdapterEviction(e.generation, e.tier, e.reason) for e in self.bank.tier.take_evictions()]
        return StepOutput(outputs=outputs, stats=self.stats(plan), loads=loads, evictions=evictions)

    def check_integrity(self) -> None:
        """Nothing leaked: blocks, rank rows, adapter references. Raises AssertionError."""
        self.blocks.check(list(self.sequences.values()))
        self.bank.tier.check()
        holders = [s.generation for s in self.scheduler.running if s.holds_adapter]
        for generation, slot in self.bank.tier.slots.items():
            if slot.references != holders.count(generation):
                raise AssertionError(
                    f"adapter {generation[:12]}: {slot.references} references, not {holders}"
                )

    def close(self) -> None:
        self.bank.close()
        if self.grammars is not None:
            self.grammars.close()

    def _queue_compiled(self) -> list[TokenOutput]:
        """Sequences whose grammar is ready go into the queue; those whose grammar is unusable fail."""
        failures = []
        for sequence in [
            one for one in self._compiling.values() if one.constraint and one.constraint.is_ready
        ]:
            del self._compiling[sequence.id]
            self.scheduler.add(sequence)
            if sequence.constraint is not None and sequence.constraint.error:
                failures.append(self._failure(sequence, sequence.constraint.error, RequestError.code))
        return failures

    def _read_adapter(self, generation: str, path: str) -> LoraWeights:
        """The gate once more, and the hash: a file that changed under the store must not answer in its name."""
        weights = LoraWeights.read(Path(path), self.base.geometry)
        if weights.generation != generation:
            raise AdapterUnavailable(
                f"the files of generation {generation[:12]} are damaged: their hash differs"
            )
        return weights

    def _run(self, scheduled: list[Scheduled]) -> list[TokenOutput]:
        """What needs memory comes first, what changes a sequence afterwards: a run that failed can be repeated.

        On CUDA the next step is scheduled and laid out while the device computes this one.
        """
        logits = self.runner.run(scheduled)
        draws = [draw for item in scheduled for draw in item.draws]
        sampling = Sampling(logits, draws, self.base.eos_token_ids) if draws else None
        if ahead := self.scheduler.look_ahead(scheduled):
            self.runner.prepare(ahead)
        sampled = iter(sampling.read() if sampling is not None else [])
        outputs = []
        for item in scheduled:
            sequence, start, samples = item.sequence, item.sequence.num_computed, item.samples
            taken = self._take(item, list(islice(sampled, len(item.drafts) + 1))) if samples else []
            # Behind the last token that was taken the cache may hold drafts that were wrong: they are overwritten.
            sequence.num_computed += item.num_known + max(0, len(taken) - 1)
            if taken or not samples:  # what gave no finite logits must not be found by those who begin alike
                self.blocks.publish(sequence, start)
            if self.drafter is not None:
                accepted = sum(one.token == draft for one, draft in zip(taken, item.drafts, strict=False))
                self.drafter.verified(sequence, len(item.drafts), accepted)
                self.blocks.trim(sequence)
            if samples:
                outputs.append(self._advance(sequence, taken))
        return outputs

    def _take(self, item: Scheduled, drawn: list[Sampled]) -> list[Sampled]:
        """The tokens that the sequence goes on with; none if the logits are not finite."""
        sequence, taken = item.sequence, list[Sampled]()
        for result in drawn[: num_kept(item.drafts, [one.token for one in drawn])]:
            if result.token is None:  # behind a right draft the next step comes back to it
                break
            taken.append(result)
            sequence.output.append(result.token)
            if sequence.constraint is not None:
                sequence.constraint.accept(result.token)
            sequence.finish = self._finish_reason(sequence, result.token)
            if sequence.finish is not None:
                break
        return taken

    def _advance(self, sequence: Sequence, taken: list[Sampled]) -> TokenOutput:
        constraint = sequence.constraint
        if not taken and constraint is not None and constraint.error:
            return self._failure(sequence, constraint.error, RequestError.code)
        if not taken:
            return self._failure(sequence, "the model's logits are not finite for this request", "not_finite")
        if sequence.finish is not None:
            self.scheduler.finish(sequence)
            del self.sequences[sequence.id]
        tokens = [one.token for one in taken if one.token is not None]
        logprobs = [one.logprobs for one in taken if one.logprobs is not None]
        output = TokenOutput(sequence.id, tokens, finish=sequence.finish, logprobs=logprobs or None)
        if len(sequence.output) == len(tokens):
            output.prompt_logprobs = sequence.prompt_scores or None
            output.cached_tokens = sequence.num_cached or 0
            output.queue_seconds = sequence.queue_seconds
        return output

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.params
        if token in params.stop_token_ids or (token in self.base.eos_token_ids and not params.ignore_eos):
            return "stop"
        return "length" if sequence.num_left <= 0 else None

    def _failure(self, sequence: Sequence, message: str, code: str) -> TokenOutput:
        if sequence.status is not Status.FINISHED:
            self.scheduler.finish(sequence)
        del self.sequences[sequence.id]
        return TokenOutput(sequence.id, [], finish="error", error=message, error_code=code)

    def stats(self, plan: Plan | None = None) -> EngineStats:
        """The engine's state now; `plan` is what ran in the step just made."""
        scheduled = [] if plan is None else plan.scheduled
        generations = {item.sequence.generation for item in scheduled} - {None}
        return EngineStats(
            step=self._steps,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self._compiling),
            kv_blocks_used=self.blocks.num_used,
            kv_blocks_total=self.blocks.num_blocks,
            kv_blocks_cached=self.blocks.num_cached,
            prefix_cache_queries=self.blocks.queries,
            prefix_cache_hits=self.blocks.hits,
            batch_tokens=sum(item.count for item in scheduled),
            batch_adapters=len(generations),
            preemptions=self.scheduler.preemptions,
            spec_decode=self.drafter.counts if self.drafter is not None else None,
            device_adapters=self.bank.resident(),
            host_adapters=self.bank.on_host(),
            loading_adapters=self.bank.loading(),
            device_slots=[
                DeviceSlot(one.generation, one.offset, one.rows, one.references, one.pinned, one.filling)
                for one in self.bank.tier.slots.values()
            ],
            host_bytes=self.bank.host_bytes,
            device_bytes=self.bank.device_bytes,
        )
