"""What the front tells a worker at start. No torch: the front builds it from its configuration."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Policy = Literal["fcfs", "priority"]  # vLLM's --scheduling-policy
_Drafts = Annotated[int, msgspec.Meta(ge=1, le=64)]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
# What vLLM looks up if neither bound is given.
_LOOKUP = 5


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Drafts from the sequence's own tokens; names and defaults are vLLM's."""

    method: Literal["ngram"]
    num_speculative_tokens: _Drafts  # of a sequence in a step, at most
    prompt_lookup_max: _Positive | None = None  # tokens that are looked up, at most and
    prompt_lookup_min: _Positive | None = None  # at least; if one is not given, it is the other

    def __post_init__(self) -> None:
        shortest, longest = self.window
        if shortest > longest:
            raise ValueError(
                f"prompt_lookup_min: {shortest} must not be more than prompt_lookup_max, {longest}"
            )

    @property
    def window(self) -> tuple[int, int]:
        """The fewest and the most tokens that are looked up."""
        longest = self.prompt_lookup_max or self.prompt_lookup_min or _LOOKUP
        return self.prompt_lookup_min or longest, longest


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker needs to load the base and size the engine. Bytes are plain integers; None means auto."""

    address: str  # of the front's socket
    parent_pid: int
    model: str
    name: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: Literal["nf4", "none"] = "nf4"
    nf4_cache: str | None = None  # directory of quantized copies
    cpu_kernels: str | None = None  # directory they are built into; without one torch does their work
    seed: int | None = None
    threads: int | None = None
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    speculative_config: SpeculativeConfig | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    scheduling_policy: Policy = "fcfs"
    max_loras: int = 8
    max_lora_rank: int = 64
    max_cpu_loras: int = 64
    chat_template: str | None = None  # file; of training rows, which are rendered here
    training_latency_budget: float = 0.01  # seconds
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
