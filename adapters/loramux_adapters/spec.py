"""AdapterSpec: the part of an adapter_config.json that decides what an adapter computes, and nothing else.

`from_config` REBUILDS the configuration from an allowlist: what an uploader wrote beyond it is refused by
name, or has no meaning at inference and is dropped. Names are literal: no regular expression of theirs is
compiled. Matching and scaling follow PEFT (suffix match at a dot; alpha/r or alpha/sqrt(r)). Promises nothing
about the tensors: that is `weights.py`. No torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from loramux_adapters.config_fields import shown, unsupported
from loramux_adapters.errors import Fault, InvalidAdapter

ALL_LINEAR = "all-linear"
MAX_RANK = 512
MAX_ALPHA = 65536.0  # far above any recipe, far below what overflows bf16 products
MAX_NAMES = 65536
MAX_TEXT = 1024

_MODULE_NAME = re.compile(r"[A-Za-z0-9_]{1,128}(\.[A-Za-z0-9_]{1,128}){0,31}")
_Number = TypeVar("_Number", int, float)
_IDENTITY = re.compile(r"[A-Za-z0-9:._-]{1,256}")


@dataclass(frozen=True, slots=True)
class BaseGeometry:
    """What the gate needs to know of the resident base; `linear_shapes` has the linears one may target."""

    name: str  # as served
    identity: str  # quantization identity, "" if unknown
    linear_shapes: Mapping[str, tuple[int, int]]  # full module name -> (out_features, in_features)
    aliases: tuple[str, ...] = ()  # what else it is called


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """A validated LoRA configuration. Two specs are equal exactly when `canonical()` is."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]  # literal names, sorted: leaf names, dotted suffixes or full names
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    base_identity: str | None = None

    def __post_init__(self) -> None:
        normal = {
            "lora_alpha": float(self.lora_alpha),
            "target_modules": tuple(sorted(set(self.target_modules))),
            "rank_pattern": dict(sorted(self.rank_pattern.items())),
            "alpha_pattern": {key: float(value) for key, value in sorted(self.alpha_pattern.items())},
        }
        for name, value in normal.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_config(cls, config: Mapping[str, object], *, max_rank: int = MAX_RANK) -> AdapterSpec:
        """Rebuild the spec from a parsed adapter_config.json. Raises InvalidAdapter with every fault."""
        reader = _Reader(config, max_rank)
        spec = cls(
            r=reader.rank("r", config.get("r")),
            lora_alpha=reader.alpha("lora_alpha", config.get("lora_alpha")),
            target_modules=reader.targets(),
            use_rslora=reader.flag("use_rslora"),
            rank_pattern=dict(reader.pattern("rank_pattern", reader.rank)),
            alpha_pattern=dict(reader.pattern("alpha_pattern", reader.alpha)),
            base_model_name_or_path=reader.text("base_model_name_or_path"),
            base_identity=reader.identity("loramux_base_identity"),
        )
        reader.kind("peft_type", ("LORA",))
        reader.kind("task_type", ("CAUSAL_LM", None))
        reader.unambiguous("rank_pattern", spec.rank_pattern)
        reader.unambiguous("alpha_pattern", spec.alpha_pattern)
        faults = [*reader.faults, *unsupported(config)]
        if faults:
            raise InvalidAdapter(faults)
        return spec

    def rank(self, module: str) -> int:
        return _lookup(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        return _lookup(self.alpha_pattern, module, self.lora_alpha)

    def scaling(self, module: str) -> float:
        """What B @ A @ x is multiplied by: alpha / r, or alpha / sqrt(r) with rank-stabilized LoRA."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, geometry: BaseGeometry) -> tuple[str, ...]:
        """The full names of the base's linears that this adapter targets, in the geometry's order."""
        if self.target_modules == (ALL_LINEAR,):
            return tuple(geometry.linear_shapes)
        wanted = frozenset(self.target_modules)
        return tuple(
            name for name in geometry.linear_shapes if any(suffix in wanted for suffix in _suffixes(name))
        )

    def warnings(self, geometry: BaseGeometry) -> tuple[str, ...]:
        """What a person should hear though it refuses nothing: the config names another base than ours."""
        trained_on = self.base_model_name_or_path
        names = {_short(name) for name in (geometry.name, *geometry.aliases)}
        if trained_on is None or _short(trained_on) in names:
            return ()
        return (
            f"base_model_name_or_path is {shown(trained_on)}, but this server holds {shown(geometry.name)}",
        )

    def to_config(self) -> dict[str, object]:
        """A complete PEFT adapter_config.json; our base identity, if any, PEFT ignores with a warning."""
        all_linear = self.target_modules == (ALL_LINEAR,)
        config: dict[str, object] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": _number(self.lora_alpha),
            "target_modules": ALL_LINEAR if all_linear else list(self.target_modules),
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {key: _number(value) for key, value in self.alpha_pattern.items()},
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "layers_pattern": None,
            "layers_to_transform": None,
            "modules_to_save": None,
            "revision": None,
            "use_dora": False,
        }
        if self.base_identity is not None:
            config["loramux_base_identity"] = self.base_identity
        return config

    def canonical(self) -> bytes:
        """One byte string per meaning, for the generation's hash."""
        fields = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
            "use_rslora": self.use_rslora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "base_model_name_or_path": self.base_model_name_or_path,
            "base_identity": self.base_identity,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


class _Reader:
    """Reads typed fields out of an untrusted config; notes a fault and goes on with a harmless value."""

    def __init__(self, config: Mapping[str, object], max_rank: int) -> None:
        self.config = config
        self.max_rank = max_rank
        self.faults: list[Fault] = []

    def fault(self, where: str, problem: str) -> None:
        self.faults.append(Fault(where, problem))

    def rank(self, where: str, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= self.max_rank:
            return value
        self.fault(where, f"must be an integer from 1 to {self.max_rank}, not {shown(value)}")
        return 1

    def alpha(self, where: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_ALPHA:
            return float(value)
        self.fault(where, f"must be a number above 0 and at most {MAX_ALPHA:g}, not {shown(value)}")
        return 1.0

    def flag(self, key: str) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.fault(key, f"must be true or false, not {shown(value)}")
        return value is True

    def kind(self, key: str, allowed: tuple[str | None, ...]) -> None:
        value = self.config.get(key)
        if not (value is None or isinstance(value, str)) or value not in allowed:
            self.fault(key, f"{shown(value)} is not served, it must be {shown(allowed[0])}")

    def text(self, key: str) -> str | None:
        value = self.config.get(key)
        if value is None or (isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()):
            return value or None
        self.fault(key, f"must be printable text of at most {MAX_TEXT} characters, not {shown(value)}")
        return None

    def identity(self, key: str) -> str | None:
        value = self.config.get(key)
        if value is None or (isinstance(value, str) and _IDENTITY.fullmatch(value)):
            return value
        self.fault(key, f"must be the identity loramux wrote, not {shown(value)}")
        return None

    def targets(self) -> tuple[str, ...]:
        value = self.config.get("target_modules")
        if value == ALL_LINEAR:
            return (ALL_LINEAR,)
        if isinstance(value, str):
            self.fault(
                "target_modules",
                f"{shown(value)} is a pattern, write the literal module names as a list, for example "
                '["q_proj", "v_proj"], or "all-linear"',
            )
        elif not isinstance(value, list | tuple | set) or not value or len(value) > MAX_NAMES:
            self.fault("target_modules", f"must be a list of 1 to {MAX_NAMES} names, not {shown(value)}")
        else:
            return tuple(name for name in value if self.name("target_modules", name))
        return ()

    def name(self, where: str, value: object) -> bool:
        if isinstance(value, str) and _MODULE_NAME.fullmatch(value):
            return True
        self.fault(where, f"{shown(value)} is not a literal module name such as 'q_proj' or 'mlp.up_proj'")
        return False

    def pattern(self, key: str, number: Callable[[str, object], _Number]) -> Iterator[tuple[str, _Number]]:
        value = self.config.get(key)
        if value is None:
            return
        if not isinstance(value, Mapping) or len(value) > MAX_NAMES:
            self.fault(key, f"must map at most {MAX_NAMES} module names to numbers, not {shown(value)}")
            return
        for name, item in value.items():
            if self.name(key, name):
                yield name, number(f"{key}.{name}", item)

    def unambiguous(self, key: str, pattern: Mapping[str, float]) -> None:
        """PEFT takes the first key that matches, in an order that saving changes: refuse a clash."""
        for name, value in pattern.items():
            for suffix in _suffixes(name):
                if suffix != name and pattern.get(suffix, value) != value:
                    self.fault(
                        key, f"'{suffix}' and '{name}' disagree about one module, write full names only"
                    )


def _suffixes(name: str) -> Iterator[str]:
    """'a.b.c' -> 'a.b.c', 'b.c', 'c': everything PEFT's suffix match accepts for this module."""
    yield name
    while (dot := name.find(".")) >= 0:
        name = name[dot + 1 :]
        yield name


def _lookup(pattern: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    if not pattern:
        return default
    return next((pattern[suffix] for suffix in _suffixes(module) if suffix in pattern), default)


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
