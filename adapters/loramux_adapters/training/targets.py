"""Which linears an adapter is trained on: presets and literal names -> names that this base has. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from loramux_adapters.config_fields import shown
from loramux_adapters.errors import TrainingError
from loramux_adapters.spec import ALL_LINEAR, BaseGeometry

ATTENTION = "attention"
ATTENTION_QV = "attention-qv"

# How architectures call the projections of queries and of values; fused ones hold both.
_QUERY_OR_VALUE = frozenset(
    {
        *("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "wq", "wv"),
        *("qkv_proj", "query_key_value", "qkv", "c_attn", "Wqkv", "W_pack"),
    }
)


def targets_of_text(text: str) -> str | list[str]:
    """What a command line gives for target_modules: a preset, or names as in q_proj,v_proj."""
    if text in ("auto", ALL_LINEAR, ATTENTION, ATTENTION_QV):
        return text
    return [part.strip() for part in text.split(",")]


def resolve_targets(choice: str | Sequence[str], geometry: BaseGeometry) -> tuple[str, ...]:
    """Literal names for an adapter_config, sorted. Raises TrainingError for what this base does not have."""
    names = list(geometry.linear_shapes)
    if choice == ALL_LINEAR:
        chosen = {_leaf(name) for name in names}
    elif choice in (ATTENTION, ATTENTION_QV):
        inside = {_leaf(name) for name in names if _in_attention(name)}
        chosen = inside if choice == ATTENTION else inside & _QUERY_OR_VALUE
        outside = {_leaf(name) for name in names if not _in_attention(name)}
        if not chosen or chosen & outside:
            raise TrainingError(
                f"target_modules {choice}: this base does not name such linears in a known way; list them, of "
                f"{_known(geometry)}",
                param="target_modules",
            )
    else:
        chosen = set(choice)
        for wanted in choice:
            if not any(name == wanted or name.endswith("." + wanted) for name in names):
                raise TrainingError(
                    f"target_modules: this base has no linear {shown(wanted)}; it has {_known(geometry)}",
                    param="target_modules",
                )
    return tuple(sorted(chosen))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _in_attention(name: str) -> bool:
    parent = name.rpartition(".")[0].rpartition(".")[2].lower()
    return "attn" in parent or "attention" in parent


def _known(geometry: BaseGeometry) -> str:
    return ", ".join(sorted({_leaf(name) for name in geometry.linear_shapes}))
