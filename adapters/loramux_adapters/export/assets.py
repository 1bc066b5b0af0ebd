"""Everything of a model directory that is not weights: config, tokenizer, chat template, licence.

The base's own files are copied, not re-saved by a library, and only what older readers misread is added:
transformers 4.x takes rotary settings from the top level and silently uses its default when they stand only
in `rope_parameters`; it knows no tokenizer class called TokenizersBackend and no list of
`extra_special_tokens`. Promises: transformers 4.57 and 5.x read the same model from what is written. Does not
touch the base directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loramux_adapters.export.checkpoint import read_json, write_json
from loramux_adapters.export.options import Format
from loramux_adapters.export.plan import ExportPlan
from loramux_adapters.export.quantized import quantization_config
from loramux_adapters.files import replace_file

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_CARRIED_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
    }
)
_CARRIED_SUFFIXES = (".jinja", ".model", ".py", ".tiktoken")
_CARRIED_NAMES = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([._-].*)?", re.IGNORECASE)
_MAX_CARRIED_BYTES = 256 * 2**20


def carried_files(base: Path) -> Iterator[Path]:
    """The files of the base that are copied unchanged: tokenizer, template, generation config, code, licence."""
    for path in sorted(base.iterdir()):
        wanted = path.name in _CARRIED_FILES or path.suffix in _CARRIED_SUFFIXES
        if not (wanted or _CARRIED_NAMES.fullmatch(path.name)) or path.name.startswith("."):
            continue
        if path.is_file() and path.stat().st_size <= _MAX_CARRIED_BYTES:
            yield path


def write_assets(directory: Path, plan: ExportPlan) -> None:
    """Write config.json and carry everything else. Running it again gives the same bytes."""
    base = plan.checkpoint.directory
    for path in carried_files(base):
        replace_file(directory / path.name, [path.read_bytes()])
    config = portable_config(read_json(base / CONFIG), plan)
    replace_file(directory / CONFIG, [write_json(config)])
    if (base / TOKENIZER_CONFIG).is_file():
        tokenizer = portable_tokenizer_config(read_json(base / TOKENIZER_CONFIG))
        template = tokenizer.get("chat_template")
        if (base / CHAT_TEMPLATE).is_file():
            tokenizer["chat_template"] = (base / CHAT_TEMPLATE).read_text(encoding="utf-8")
        elif isinstance(template, str):
            replace_file(directory / CHAT_TEMPLATE, [template.encode()])
        replace_file(directory / TOKENIZER_CONFIG, [write_json(tokenizer)])


def portable_config(raw: Mapping[str, Any], plan: ExportPlan) -> dict[str, Any]:
    """The base's config.json with the export's dtype and quantization, and with rotary fields in both
    spellings.
    """
    config = {key: value for key, value in raw.items() if key not in _QUANTIZATION_KEYS}
    name = str(plan.output_dtype).removeprefix("torch.")
    config["torch_dtype"] = config["dtype"] = name
    config["tie_word_embeddings"] = bool(getattr(plan.skeleton.config, "tie_word_embeddings", False))
    config |= rope_fields(raw, plan.skeleton.config)
    if plan.options.format is Format.NF4:
        config["quantization_config"] = raw.get("quantization_config") or quantization_config(
            plan.skeleton.dtype
        )
    return config


def rope_fields(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """`rope_parameters` for transformers 5, `rope_theta`, `rope_scaling` and `partial_rotary_factor` for 4.x.

    `config` is the parsed config: transformers has filled in the model's defaults. Fields the base wrote
    itself win.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return {}
    fields: dict[str, Any] = {"rope_parameters": parameters}
    if "rope_theta" not in parameters:  # one set for each layer type, as in Gemma 3
        full, sliding = parameters.get("full_attention"), parameters.get("sliding_attention")
        if isinstance(full, dict) and "rope_theta" in full:
            fields["rope_theta"] = full["rope_theta"]
        if isinstance(sliding, dict) and "rope_theta" in sliding:
            fields["rope_local_base_freq"] = sliding["rope_theta"]
    else:
        fields["rope_theta"] = parameters["rope_theta"]
        if "partial_rotary_factor" in parameters:
            fields["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        fields["rope_scaling"] = _scaling(parameters)
    return {key: raw[key] if raw.get(key) is not None else value for key, value in fields.items()}


def portable_tokenizer_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes, in words that 4.x knows too."""
    config = dict(raw)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = config.get("additional_special_tokens") or extra
    return config


_QUANTIZATION_KEYS = frozenset({"quantization_config", "_pre_quantization_dtype"})


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """`rope_scaling` as 4.x spells it; None without scaling."""
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "longrope":  # Phi-3 in 4.x accepts these three fields and no other
        keys = ("short_factor", "long_factor")
        return {"type": "longrope", **{key: parameters[key] for key in keys if key in parameters}}
    left_out = {"rope_theta", "partial_rotary_factor"}
    return {key: value for key, value in parameters.items() if key not in left_out}
