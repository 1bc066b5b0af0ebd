"""A decode loop with nothing around it: the speed limit that plain torch operations set for one Llama-style model.

No server, no scheduler, no cache blocks, no adapters, no modules: weights fused by hand, one contiguous cache, prompts of
one length. What a general engine loses against it is what the engine costs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F


class LeanLoop:
    """Greedy decoding of a batch on the weights of a loaded `LlamaForCausalLM`, which it shares."""

    def __init__(self, model: Any) -> None:
        self._model = model
        config = model.config
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._eps = config.rms_norm_eps
        self._layers = [
            (
                layer.input_layernorm.weight,
                torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                layer.mlp.down_proj.weight,
            )
            for layer in model.model.layers
        ]

    @torch.inference_mode()
    def generate(self, prompts: torch.Tensor, new_tokens: int) -> tuple[float, list[list[int]]]:
        """prompts `[batch, length]` -> seconds of the decode steps alone, and `new_tokens` for each prompt.

        The first token comes from the prompt's own pass, so `new_tokens - 1` steps are timed.
        """
        output = self._model(prompts, use_cache=True, logits_to_keep=1)
        tokens = [output.logits[:, -1].argmax(-1)]
        caches = [self._room(layer.keys, layer.values, new_tokens) for layer in output.past_key_values.layers]
        start = time.perf_counter()
        for position in range(prompts.shape[1], prompts.shape[1] + new_tokens - 1):
            tokens.append(self._step(tokens[-1], position, caches))
        return time.perf_counter() - start, torch.stack(tokens, 1).tolist()

    @staticmethod
    def _room(keys: torch.Tensor, values: torch.Tensor, more: int) -> torch.Tensor:
        """`[2, batch, kv_heads, length + more, head_dim]`, filled up to length."""
        return F.pad(torch.stack((keys, values)), (0, 0, 0, more))

    def _step(self, tokens: torch.Tensor, position: int, caches: list[torch.Tensor]) -> torch.Tensor:
        inner = self._model.model
        x = inner.embed_tokens.weight[tokens]
        size = x.shape[-1:]
        cos, sin = (t[0] for t in inner.rotary_emb(x, torch.tensor([[position]], device=x.device)))
        split = [self._heads * self._dim, self._kv_heads * self._dim, self._kv_heads * self._dim]
        for (norm_1, qkv, out, norm_2, gate_up, down), cache in zip(self._layers, caches, strict=True):
            h = F.rms_norm(x, size, norm_1, self._eps)
            q, k, v = (part.unflatten(-1, (-1, self._dim)) for part in F.linear(h, qkv).split(split, -1))
            cache[0, :, :, position] = _rotate(k, cos, sin)
            cache[1, :, :, position] = v
            grouped = _rotate(q, cos, sin).unflatten(1, (self._kv_heads, -1))
            keys, values = cache[:, :, :, : position + 1]
            mixed = F.scaled_dot_product_attention(grouped, keys, values)
            x = x + F.linear(mixed.reshape(x.shape[0], -1), out)
            gate, up = F.linear(F.rms_norm(x, size, norm_2, self._eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        head: torch.Tensor = self._model.lm_head.weight
        return F.linear(F.rms_norm(x, size, inner.norm.weight, self._eps), head).argmax(-1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[batch, heads, head_dim]` at one position, halves paired (Su et al. 2021, arXiv:2104.09864)."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin
