"""A plan in lines for people: aligned columns, GB of 10^9 bytes, nothing that is not in the plan. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loramux_adapters.planning.fit import CUDA_CONTEXT, Fit
from loramux_adapters.planning.plan import METHODS, MemoryFit, Plan
from loramux_adapters.planning.serving import slot_rows
from loramux_adapters.planning.training import Method

_TITLES: dict[Method, str] = {"full": "full fine-tuning", "lora": "LoRA 16-bit", "qlora": "QLoRA"}
_BESIDE = "serving + QLoRA"
_ROWS = {
    "weights": "weights",
    "adapter": "LoRA factors (fp32)",
    "gradients": "gradients **",
    "optimizer": "optimizer",
    "layer_inputs": "layer inputs **",
    "layer_activations": "activations of a layer *",
    "logits": "logits of a chunk *",
    "total": "total",
}


def plan_lines(plan: Plan) -> Iterator[str]:
    model = plan.model
    yield (
        f"{model.name}: {model.architecture}, {model.parameters / 1e9:.2f} B parameters, {model.decoder.layers} layers, "
        f"{plan.dtype} on {plan.device}"
    )
    yield ""
    yield from _training(plan)
    yield ""
    yield from _parameters(plan)
    yield ""
    yield from _serving(plan)
    if plan.fit is not None:
        yield ""
        yield from _fit(plan, plan.fit)


def _training(plan: Plan) -> Iterator[str]:
    options = plan.training
    filled = "filled by packing" if options.packing else "at most"
    yield (
        f"Training, batches of {options.batch_size} x {options.max_seq_length} tokens ({filled}), r {options.r}, "
        f"{options.optimizer}"
    )
    title16 = _TITLES["lora"] if plan.dtype != "float32" else "LoRA 32-bit"
    rows = [["", _TITLES["full"], title16, _TITLES["qlora"]]]
    for field, title in _ROWS.items():
        rows.append([title, *(_gb(getattr(plan.methods[method], field)) for method in METHODS)])
    rows.append(["trainable parameters", *(f"{plan.methods[method].trainable:,}" for method in METHODS)])
    yield from _columns(rows)
    yield "* and ** are never alive together: the total has the larger of each two"


def _parameters(plan: Plan) -> Iterator[str]:
    yield f"Trainable parameters, of {plan.model.parameters:,}"
    rows = [["", *(f"r {r}" for r in plan.ranks)]]
    rows += [[targets, *(f"{count:,}" for count in counts)] for targets, counts in plan.parameters.items()]
    yield from _columns(rows)


def _serving(plan: Plan) -> Iterator[str]:
    options, memory = plan.serving_options, plan.serving
    yield "Serving"
    kept = "NF4 and 16-bit embeddings and head" if options.quantization == "nf4" else "not quantized"
    if plan.device == "cpu":
        kept += ", and the dense copy that CPUs without compiled kernels multiply"
    length, count = options.max_model_len, options.max_num_seqs
    ranks = slot_rows(options, plan.device)
    rows = [
        ("weights", memory.weights, kept),
        ("adapter slots", memory.adapter_slots, f"{ranks} rank rows, of --max-loras {options.max_loras}"),
        ("KV cache, 1 sequence", memory.kv_sequence, f"of {length} tokens, {memory.kv_per_token:,} bytes each"),
        (f"KV cache, {count} sequences", memory.kv_cache, "none ever waits for room; the server takes what is free"),
        ("total", memory.total, f"with one sequence {_gb(memory.least)}"),
    ]  # fmt: skip
    width = max(len(_gb(size)) for _, size, _ in rows)
    titles = max(len(title) for title, _, _ in rows)
    for title, size, note in rows:
        yield f"  {title:<{titles}}  {_gb(size):>{width}}  {note}"


def _fit(plan: Plan, fit: MemoryFit) -> Iterator[str]:
    yield f"In {_gb(fit.memory)}, of which CUDA itself takes about {_gb(CUDA_CONTEXT)}"
    width = max(map(len, (*_TITLES.values(), _BESIDE)))
    for method in METHODS:
        yield f"  {_TITLES[method]:<{width}}  {_verdict(fit.methods[method])}"
    serving, options = fit.serving, plan.serving_options
    said = _verdict(serving.fit)
    if serving.fit.fits:
        said = (
            f"fits: room for {serving.kv_tokens:,} tokens of KV cache, {min(serving.sequences, options.max_num_seqs)} of "
            f"{options.max_num_seqs} sequences at full length"
        )
        if serving.sequences < options.max_num_seqs and serving.length_for_all is not None:
            said += f" (all with --max-model-len {serving.length_for_all})"
    yield f"  {'serving':<{width}}  {said}"
    if fit.kv_beside_training >= plan.serving.kv_sequence:
        said = f"fits: --kv-cache-memory {_mib(fit.kv_beside_training)} leaves room to train"
    else:
        said = "does not fit: too little is left for the KV cache of one sequence"
    yield f"  {_BESIDE:<{width}}  {said}"


def _verdict(fit: Fit) -> str:
    if fit.fits:
        return f"fits, {_gb(fit.left)} left"
    missing = f"does not fit, {_gb(-fit.left)} too much"
    return f"{missing}; fits with {' or '.join(fit.changes)}" if fit.changes else missing


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield ("  " + "  ".join(cells)).rstrip()


def _gb(size: int) -> str:
    if size == 0:
        return "-"
    return f"{size / 1e9:,.2f} GB" if size >= 10**7 else f"{size / 1e6:,.2f} MB"


def _mib(size: int) -> str:
    return f"{size // 2**20}MiB"
