"""Who takes part in `train_bench`: loramux, a loop over Hugging Face's model under PEFT, and trl's SFTTrainer where it is.

Each takes the same optimizer steps: a row of ids a step, all of them trained on, from the same initial factors, with the
same learning rate and clipping. What differs is theirs: trl keeps the factors of a quantized model in bfloat16, the
others in float32. Each runs in a process of its own, whose memory is measured. Nothing is compared here.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loadtests.measured import reset_resident_peak, resident_now, resident_peak_since
from loramux_adapters.training.batches import Batches

R, ALPHA, RATE, SEED = 16, 32, 2e-4, 42
OURS, PEER, TRL = "loramux", "HF + PEFT + checkpointing", "trl SFTTrainer"


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    steps: int
    threads: int


@dataclass(frozen=True)
class Run:
    """`losses` of every step; bytes."""

    losses: list[float]
    tokens_per_second: float
    beside_model: int
    whole_process: int


class _Steps:
    """What was measured of each, told as it comes."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.losses: list[float] = []
        self.ends: list[float] = []

    def done(self, loss: float) -> None:
        self.losses.append(loss)
        self.ends.append(time.perf_counter())
        print(f"step {len(self.losses)} of {self._case.steps}, loss {loss:.3f}", flush=True)


def taking_part() -> list[str]:
    return [OURS, PEER, *([TRL] if importlib.util.find_spec("trl") else [])]


def rows(case: Case) -> list[list[int]]:
    """Of ids, a row a step; sentences, so that there is something to learn."""
    from transformers import AutoTokenizer

    from loadtests.prompts import make_prompts

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    return make_prompts(lambda text: tokenizer(text)["input_ids"], case.steps, case.tokens)


# --- ours -----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Run:
    """The trainer of `loramux train`, on rows that are tokenized already."""
    from array import array

    import torch

    from loramux_adapters.spec import AdapterSpec
    from loramux_adapters.training.layerwise import LayerStack
    from loramux_adapters.training.lora import TrainedAdapter
    from loramux_adapters.training.recipe import Recipe, resolve
    from loramux_adapters.training.run import training_base
    from loramux_adapters.training.samples import Sample
    from loramux_adapters.training.trainer import Trainer
    from loramux_adapters.twin import twin_of
    from loramux_server.base.demo import default_cache_dir
    from loramux_server.base.loading import LoadOptions, load_base

    torch.set_num_threads(case.threads)
    base = load_base(
        LoadOptions(model=case.model, name="base", cpu_kernels=default_cache_dir().absolute() / "kernels")
    )
    data = [Sample(array("i", ids), b"\0" + b"\1" * (len(ids) - 1)) for ids in rows(case)]
    recipe, _ = resolve(Recipe.parse(_fields(case)), training_base(base.model, base.geometry), len(data))

    def train(steps: _Steps) -> None:
        twin = twin_of(base.model)
        spec = AdapterSpec(recipe.r, recipe.lora_alpha, recipe.target_modules)
        adapter = TrainedAdapter.install(twin, spec, base.geometry, seed=recipe.seed)
        trainer = Trainer(LayerStack(twin, alone=True), adapter, recipe, data, _batches(case))
        for _ in range(case.steps):
            slices = trainer.slices()
            while True:
                try:
                    next(slices)
                except StopIteration as end:
                    steps.done(end.value.train_loss)
                    break

    return _measured(case, base.device, train)


def _fields(case: Case) -> dict[str, object]:
    return {
        "r": R, "lora_alpha": float(ALPHA), "learning_rate": RATE, "lr_scheduler": "constant", "seed": SEED,
        "warmup_ratio": 0.0, "batch_size": 1, "n_epochs": 1, "max_seq_length": case.tokens,
    }  # fmt: skip


def _batches(case: Case) -> Batches:
    """A row a step."""
    return Batches([(index,) for index in range(case.steps)], 1, 1, SEED)


def _in_our_order(case: Case) -> list[list[int]]:
    data, batches = rows(case), _batches(case)
    return [data[index] for step in range(case.steps) for (index,) in batches.of_step(step)]


# --- the peers ------------------------------------------------------------------------------------------------------


def peer(case: Case) -> Run:
    """What the QLoRA recipe says, and a plain loop."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from torch.nn import functional as F

    model, device, dtype = _in_four_bits(case)
    data = [torch.tensor(ids, device=device) for ids in _in_our_order(case)]

    def train(steps: _Steps) -> None:
        prepared = prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        trained: Any = get_peft_model(prepared, _lora_config(model)).train()
        _start_as_ours(trained)
        parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        for ids in data:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logits = trained(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), ids[1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps.done(float(loss))

    return _measured(case, device, train)


def trl_trainer(case: Case) -> Run:
    """SFTTrainer with its own defaults, but for what all of them have in common."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model, device, dtype = _in_four_bits(case)
    data = _in_our_order(case)

    def train(steps: _Steps) -> None:
        class Watch(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
                if "loss" in logs:
                    steps.done(float(logs["loss"]))

        with tempfile.TemporaryDirectory() as directory:
            settings = SFTConfig(
                output_dir=directory, use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, seed=SEED,
                per_device_train_batch_size=1, max_steps=case.steps, max_length=case.tokens,
                learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0,
                train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True},
                logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=model,
                args=settings,
                train_dataset=Dataset.from_dict({"input_ids": data, "labels": data}),
                processing_class=AutoTokenizer.from_pretrained(case.model),
                peft_config=_lora_config(model),
                callbacks=[Watch()],
            )
            trainer.remove_callback(PrinterCallback)  # `Watch` says it
            _start_as_ours(trainer.model)
            trainer.train()

    return _measured(case, device, train)


def _in_four_bits(case: Case) -> tuple[Any, Any, Any]:
    """The model by bitsandbytes, its device, and the dtype that it computes in."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from loramux_server.base.device import pick_device, pick_dtype

    torch.set_num_threads(case.threads)
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        case.model, quantization_config=quantization, dtype=dtype, device_map={"": str(device)}
    )
    return model, device, dtype


def _lora_config(model: Any) -> Any:
    from peft import LoraConfig

    quantized = {
        name.rpartition(".")[2] for name, m in model.named_modules() if type(m).__name__ == "Linear4bit"
    }
    return LoraConfig(r=R, lora_alpha=ALPHA, target_modules=sorted(quantized), task_type="CAUSAL_LM")


def _start_as_ours(trained: Any) -> None:
    """Give a PEFT model the initial factors that the trainer of loramux draws."""
    import torch

    from loramux_adapters.training.lora import generator_for

    for name, module in trained.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            factor = module.lora_A["default"].weight
            bound = module.in_features**-0.5
            generator = generator_for(torch.device("cpu"), "lora_A", SEED, name)
            factor.data.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))


CONTESTANTS: dict[str, Callable[[Case], Run]] = {OURS: ours, PEER: peer, TRL: trl_trainer}


def _measured(case: Case, device: Any, train: Callable[[_Steps], None]) -> Run:
    import torch

    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_resident_peak()
    before = torch.cuda.memory_allocated() if on_gpu else resident_now()
    steps = _Steps(case)
    train(steps)
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_peak_since()
    rate = case.tokens * (len(steps.ends) - 1) / (steps.ends[-1] - steps.ends[0])
    return Run(steps.losses, rate, beside_model=peak - before, whole_process=peak)
