"""What a person asks of an export, as frozen values, and how the command line's words become them.

Promises: a value that exists is usable (positive sizes, finite weights). Does not look at any file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from loramux_adapters.errors import ExportError

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}

BUILT_IN_PROMPTS = 8


class Format(StrEnum):
    """How linears are stored. The float formats hold every tensor in that dtype; nf4 is bitsandbytes' layout."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    NF4 = "nf4"


class Onto(StrEnum):
    """Which weights the delta is added to: those that were served, or those the checkpoint came with."""

    DEQUANTIZED = "dequantized"
    ORIGINAL = "original"


class ServedDtype(StrEnum):
    """The compute dtype of the server whose function is exported; `auto` follows the checkpoint's dtype."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class Quantization(StrEnum):
    """How the server holds the base: quantized to NF4, or with the checkpoint's own weights."""

    NF4 = "nf4"
    NONE = "none"


class Device(StrEnum):
    """Where the base is quantized: equal values give other scales on a GPU, so it is where it was served."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    """An adapter directory and its factor in the sum of deltas."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightedAdapter:
        """`PATH` or `PATH=0.7`. A path that contains "=" but does not end in a number is a path."""
        path, separator, factor = text.rpartition("=")
        if separator:
            try:
                weight = float(factor)
            except ValueError:
                return cls(Path(text))
            if not math.isfinite(weight) or weight == 0:
                raise ExportError(
                    f"--adapter {text}: the weight must be a number other than 0", param="adapter"
                )
            return cls(Path(path), weight)
        return cls(Path(text))


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How much is compared. `prompts` 0 switches the comparison off; `compare` measures the other base too.

    `strict` keeps to `max_kl` and `min_top1` even where the server's own arithmetic is noisier than that.
    """

    prompts: int = BUILT_IN_PROMPTS
    tokens: int = 160  # of each prompt at most: eight built-in prompts then give over 1,000 positions
    texts: tuple[str, ...] = ()  # instead of the built-in ones
    compare: bool = False
    max_kl: float = 1e-5
    min_top1: float = 0.999
    strict: bool = False

    def __post_init__(self) -> None:
        if self.prompts < 0:
            raise ExportError(f"--verify {self.prompts}: give 0 or more prompts", param="verify")
        available = len(self.texts) or BUILT_IN_PROMPTS
        if self.prompts > available:
            raise ExportError(
                f"--verify {self.prompts}: there are {available} prompts; name a file of more with "
                "--verify-file",
                param="verify",
            )
        if self.tokens < 2:
            raise ExportError(
                f"--verify-tokens {self.tokens}: two tokens are needed for a loss", param="verify"
            )


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """One export: a base directory, adapters, where to and how."""

    model: Path
    adapters: tuple[WeightedAdapter, ...]
    out: Path
    name: str = ""  # the base's name for people; the directory's name when empty
    format: Format = Format.BF16
    onto: Onto = Onto.DEQUANTIZED
    served_dtype: ServedDtype = ServedDtype.AUTO
    quantization: Quantization = Quantization.NF4
    device: Device = Device.CPU
    base_identity: str | None = None  # the quantization identity the base must have
    shard_bytes: int = 5 * 10**9
    verify: VerifyOptions = field(default_factory=VerifyOptions)

    def __post_init__(self) -> None:
        if not self.adapters:
            raise ExportError("name at least one adapter with --adapter", param="adapter")
        if self.shard_bytes < 1:
            raise ExportError("--shard-size must be positive", param="shard_size")
        if self.quantization is Quantization.NONE and self.format is Format.NF4:
            raise ExportError(
                "--format nf4: a base served with --quantization none has no NF4 codes; choose bf16, fp16 or fp32",
                param="format",
            )

    @property
    def base_name(self) -> str:
        return self.name or self.model.resolve().name

    @property
    def partial(self) -> Path:
        """Where the export grows until it is proven."""
        return self.out.with_name(self.out.name + ".partial")


def parse_size(text: str) -> int:
    """A plain number such as '5GB' or '500 MiB', with an optional decimal (KB) or binary (KiB) unit, in
    bytes.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ExportError(f"--shard-size {text}: write a size such as 5GB or 500MiB", param="shard_size")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()])
    if size < 1:
        raise ExportError(f"--shard-size {text}: must be positive", param="shard_size")
    return size


def parse_format(text: str) -> Format:
    """Raises ExportError naming the formats, and for GGUF the way there."""
    if text.lower() == "gguf":
        raise ExportError(
            "--format gguf: export bf16 and convert it with llama.cpp's convert_hf_to_gguf.py --outtype bf16 "
            "(see docs/export.md)",
            param="format",
        )
    try:
        return Format(text.lower())
    except ValueError:
        known = ", ".join(Format)
        raise ExportError(f"--format {text}: choose one of {known}", param="format") from None


def parse_onto(text: str) -> Onto:
    """Raises ExportError naming the choices."""
    try:
        return Onto(text.lower())
    except ValueError:
        raise ExportError(f"--onto {text}: choose one of {', '.join(Onto)}", param="onto") from None


def parse_served_dtype(text: str) -> ServedDtype:
    """Raises ExportError naming the choices."""
    try:
        return ServedDtype(text.lower())
    except ValueError:
        known = ", ".join(ServedDtype)
        raise ExportError(f"--served-dtype {text}: choose one of {known}", param="served_dtype") from None


def parse_quantization(text: str) -> Quantization:
    """Raises ExportError naming the choices."""
    try:
        return Quantization(text.lower())
    except ValueError:
        known = ", ".join(Quantization)
        raise ExportError(f"--quantization {text}: choose one of {known}", param="quantization") from None


def parse_device(text: str) -> Device:
    """Raises ExportError naming the choices."""
    try:
        return Device(text.lower())
    except ValueError:
        raise ExportError(f"--device {text}: choose one of {', '.join(Device)}", param="device") from None


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """The lines of a text file that are not blank; none without a file."""
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"--verify-file {path}: cannot be read: {error}", param="verify_file") from error
    texts = tuple(line for line in lines if line.strip())
    if not texts:
        raise ExportError(f"--verify-file {path}: holds no text", param="verify_file")
    return texts
