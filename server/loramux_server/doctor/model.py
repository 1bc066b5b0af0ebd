"""The base and an adapter of it, as far as that can be known without loading weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loramux_server.base.location import check_location
from loramux_server.doctor.finding import Finding, fault, look, note, ok

if TYPE_CHECKING:
    from loramux_adapters.spec import BaseGeometry

GIB = 2**30
_MODEL_ADVICE = "name a directory, or a hub id, of a decoder in safetensors; download a damaged one again"
_ADAPTER_ADVICE = "save it again with PEFT as LoRA for this base; docs/api.md says what an adapter may be"


def model(name: str, adapters: Sequence[Path]) -> list[Finding]:
    """The base called `name`, then each adapter directory against it."""
    geometries: list[BaseGeometry] = []

    def base() -> list[Finding]:
        return list(_base(name, geometries))

    found = list(look("model", _MODEL_ADVICE, base))
    for directory in adapters:
        found += _adapter(directory, geometries[0] if geometries else None)
    return found


def adapters_alone(adapters: Sequence[Path]) -> list[Finding]:
    """Adapter directories without a base to compare them with."""
    return [finding for directory in adapters for finding in _adapter(directory, None)]


def _base(name: str, geometries: list[BaseGeometry]) -> Iterator[Finding]:
    from loramux_adapters.export.checkpoint import Checkpoint
    from loramux_adapters.export.skeleton import read_skeleton, unmatched
    from loramux_server.base.demo import DEMO_MODEL_ID

    directory = _directory(name)
    if directory is None:
        yield note(
            "model", f"{name} is not on this machine yet", "it is downloaded when the server starts with it"
        )
        return
    if not (directory / "config.json").is_file():
        yield fault("model", f"{directory} holds no config.json", _MODEL_ADVICE)
        return
    checkpoint = Checkpoint.open(directory)
    skeleton = read_skeleton(directory, checkpoint)
    geometries.append(skeleton.geometry(DEMO_MODEL_ID if name == "demo" else name))
    size = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    faults = unmatched(skeleton, checkpoint)
    if faults:
        yield fault("model", f"{len(faults)} tensors do not fit the config: {faults[0]}", _MODEL_ADVICE)
    else:
        kind = (skeleton.config.architectures or ["?"])[0]
        held = "NF4" if skeleton.prequantized else str(skeleton.dtype).removeprefix("torch.")
        linears = len(skeleton.linears)
        yield ok("model", f"{kind}, {size / GIB:.2f} GiB of {held} weights, {linears} linears in {directory}")
    yield _tokenizer(directory)


def _directory(name: str) -> Path | None:
    """Where the model lies; None if it is still on the hub. Raises BaseModelError for what cannot be a model."""
    if name == "demo":
        from loramux_server.base.demo import DIRECTORY, damage_of, default_cache_dir

        made = default_cache_dir().absolute() / "models" / DIRECTORY
        return made if damage_of(made) is None else None
    check_location(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None


def _tokenizer(directory: Path) -> Finding:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return fault("tokenizer", reason, "copy tokenizer.json and tokenizer_config.json beside the weights")
    if tokenizer.chat_template is None:
        return note(
            "tokenizer", "has no chat template: chat completions are refused", "give one with --chat-template"
        )
    return ok("tokenizer", f"{len(tokenizer)} tokens, with a chat template")


def _adapter(directory: Path, geometry: BaseGeometry | None) -> Sequence[Finding]:
    """Through the gate: against the base if it could be read, else by itself."""
    from loramux_adapters.adapter_files import DEFAULT_LIMITS
    from loramux_adapters.gate import smallest_geometry
    from loramux_adapters.weights import LoraWeights

    check = f"adapter {directory.name}"

    def gate() -> list[Finding]:
        fits = geometry or smallest_geometry(directory, DEFAULT_LIMITS)
        weights = LoraWeights.read(directory, fits)
        found = f"rank {weights.rank}, {len(weights.tensors)} linears, {weights.num_bytes / 2**20:.1f} MiB"
        if geometry is None:
            return [note(check, f"{found}; not compared with the base", "name its base with --model")]
        warnings = weights.spec.warnings(geometry)
        return [note(check, found, warnings[0]) if warnings else ok(check, found)]

    return look(check, _ADAPTER_ADVICE, gate)
