"""Which adapter_config.json fields loramux serves, which it ignores, and what it says about the others.

PEFT writes some forty fields; most switch on something that changes what the adapter computes. A field is
*read* (`spec.py` does that), *ignored* because it has no meaning at inference, or *neutral*: accepted at the
value that switches its feature off, refused at every other with advice. A field in no list may only be null,
false or empty, so a feature PEFT adds tomorrow is refused by name, not served wrongly. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from loramux_adapters.errors import Fault

READ = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "base_model_name_or_path",
        "loramux_base_identity",
    }
)

# Training or bookkeeping only: the saved tensors mean the same whatever stands here.
IGNORED = frozenset(
    {"peft_version", "inference_mode", "lora_dropout", "qalora_group_size", "ensure_weight_tying"}
)

_CONVERT = (
    "this initialisation changes the base weights when training starts, and the base is shared: convert the "
    "adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...) and upload the result"
)
_INIT_ADVICE = {
    "pissa": _CONVERT,
    "olora": _CONVERT,
    "corda": _CONVERT,
    "lora_ga": _CONVERT,
    "loftq": "LoftQ replaces the base weights, and the base is shared: train on the served NF4 base instead",
    "eva": "EVA only chooses where training starts: set init_lora_weights to true and eva_config to null",
}
# Start values that leave the base alone; the trained tensors replace them.
_SAFE_INITS = (True, False, "gaussian", "orthogonal")

_ADVICE: Mapping[str, str] = {
    "use_dora": "DoRA is not served: train with use_dora=false, or merge the adapter into a model of its own",
    "modules_to_save": "full copies of base modules are not served: train with modules_to_save=null",
    "bias": "trained biases belong to the base, which is shared: train with bias='none'",
    "lora_bias": "LoRA biases are not served: train with lora_bias=false",
    "layers_to_transform": "write the full module names of these layers into target_modules instead",
    "layers_pattern": "write the full module names of these layers into target_modules instead",
    "exclude_modules": "write only the modules that carry LoRA weights into target_modules instead",
    "fan_in_fan_out": "Conv1D layouts are not served: transpose the weights and set fan_in_fan_out to false",
    "trainable_token_indices": "trained embedding rows belong to the base, which is shared: set it to null",
    "target_parameters": "LoRA on bare parameters is not served: target linear modules",
    "layer_replication": "replicated layers would change the base, which is shared: set it to null",
    "megatron_config": "Megatron layers are not served: set it to null",
    "megatron_core": "no module is imported on an adapter's word: set it to null",
    "auto_mapping": "no class is imported on an adapter's word: set it to null",
    "revision": "the base and its revision are the operator's choice: set it to null",
    "runtime_config": "runtime settings are the operator's choice: set it to null",
    "loftq_config": "LoftQ replaces the base weights, and the base is shared: set it to null",
    "eva_config": "it only guides the start of training: set it to null and init_lora_weights to true",
    "corda_config": "it names files to read when training starts: convert the adapter and set it to null",
    "lora_ga_config": "it names files to read when training starts: convert the adapter and set it to null",
    "alora_invocation_tokens": "aLoRA is not served: train a plain LoRA",
    "use_qalora": "QA-LoRA is not served: train with use_qalora=false",
    "use_bdlora": "block-diagonal LoRA is not served: train a plain LoRA",
    "arrow_config": "adapter routing is not served: upload the adapters one by one",
    "kasa_config": "KaSA is not served: train a plain LoRA",
    "velora_config": "VeLoRA is not served: train a plain LoRA",
    "monteclora_config": "MonteCLoRA is not served: train a plain LoRA",
}
# Neutral values beside null, false and empty.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "revision": ("main",),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}

_TRANSFORMERS_MODULE = re.compile(r"transformers(\.\w+)*", re.ASCII)


def shown(value: object, limit: int = 80) -> str:
    """`value` as JSON fit for a message: escaped, on one line and bounded, whatever an uploader wrote."""
    try:
        text = json.dumps(value, default=ascii, skipkeys=True)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def unsupported(config: Mapping[str, object]) -> Iterator[Fault]:
    """A fault for every field that asks for something other than plain LoRA inference, in file order."""
    for key, value in config.items():
        if key in READ or key in IGNORED:
            continue
        if key == "init_lora_weights":
            if not any(value is safe or (isinstance(value, str) and value == safe) for safe in _SAFE_INITS):
                yield Fault(key, f"{shown(value)} is not accepted: {_init_advice(value)}")
        elif not _is_neutral(key, value):
            if key in _ADVICE:
                yield Fault(key, f"{shown(value)} is not supported: {_ADVICE[key]}")
            else:
                yield Fault(
                    shown(key), f"unknown field with value {shown(value)}, remove it or set it to null"
                )


def _is_neutral(key: str, value: object) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return True
    if key == "auto_mapping":
        return _is_plain_auto_mapping(value)
    return value in _NEUTRAL.get(key, ())


def _is_plain_auto_mapping(value: object) -> bool:
    """What PEFT (and Unsloth) write when a task type was not given: two names, which nothing here uses."""
    if not isinstance(value, Mapping) or value.keys() - {"unsloth_fixed"} != {
        "base_model_class",
        "parent_library",
    }:
        return False
    name, library = value["base_model_class"], value["parent_library"]
    return (
        isinstance(name, str)
        and name.isidentifier()
        and isinstance(library, str)
        and _TRANSFORMERS_MODULE.fullmatch(library) is not None
    )


def _init_advice(value: object) -> str:
    if isinstance(value, str):
        for prefix, advice in _INIT_ADVICE.items():
            if value.startswith(prefix):
                return advice
    return "set it to true"
