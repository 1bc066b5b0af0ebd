"""The two files an adapter consists of, and how large they may be. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from loramux_adapters.spec import MAX_RANK

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)

PICKLE_ADVICE = "it is a pickle, which can run code and is never read: save the adapter as safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What an adapter may cost before it is refused unread."""

    max_rank: int = MAX_RANK
    max_config_bytes: int = 256 * 1024
    max_header_bytes: int = 1024 * 1024
    max_tensors: int = 8192
    max_file_bytes: int = 2 * 1024**3

    def max_bytes(self, file: str) -> int:
        return self.max_config_bytes if file == CONFIG_FILE else self.max_file_bytes


DEFAULT_LIMITS = GateLimits()
