"""What a checkpoint's own `quantization_config` says: NF4 by bitsandbytes is served as it is, all else refused by name."""

from __future__ import annotations

from typing import Any

from loramux_adapters.errors import BaseModelError


def is_nf4_checkpoint(config: Any, model: str, quantization: str) -> bool:
    """True if the checkpoint is already NF4, False if it is not quantized. Raises BaseModelError for the rest.

    `config` is transformers' of the checkpoint, `model` its name, `quantization` what was asked for.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return False
    fields = quantized if isinstance(quantized, dict) else quantized.to_dict()
    method = str(fields.get("quant_method", "")).rsplit(".", 1)[-1].lower()
    if fields.get("load_in_8bit", fields.get("_load_in_8bit")):
        method += " int8"
    if "bitsandbytes" not in method or not fields.get("load_in_4bit", fields.get("_load_in_4bit")):
        raise BaseModelError(
            f"'{model}' is quantized with {method or 'an unknown method'}; use the 16-bit checkpoint or one "
            "quantized to NF4 by bitsandbytes",
            param="quantization_config",
        )
    if fields.get("bnb_4bit_quant_type") != "nf4":
        raise BaseModelError(
            f"'{model}' is quantized as {fields.get('bnb_4bit_quant_type')}; only nf4 is supported",
            param="quantization_config.bnb_4bit_quant_type",
        )
    if quantization == "none":
        raise BaseModelError(
            f"'{model}' is already quantized to NF4; --quantization none needs the 16-bit checkpoint",
            param="quantization",
        )
    return True
