"""What the front tells a worker at start. No torch: the front builds it from its configuration."""

from __future__ import annotations

from typing import Literal

import msgspec


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
    seed: int | None = None
    threads: int | None = None
    max_model_len: int | None = None
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_loras: int = 8
    max_lora_rank: int = 64
    max_cpu_loras: int = 64
    chat_template: str | None = None  # file; of training rows, which are rendered here
    training_latency_budget: float = 0.01  # seconds
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
