"""The served base as a plain checkpoint: what a server that knows no NF4 has to read to compute the same function.

Every linear but the head holds dequantize(NF4(W)) in bf16, as the reference computes with; the tokenizer and config are the
base's own files. One model in memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from loadtests.peers.peft_peer import round_to_nf4


def write_served_base(model: Path, directory: Path) -> None:
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype="auto", local_files_only=True)
    round_to_nf4(base, torch.bfloat16)
    torch.nn.Module.to(base, torch.bfloat16)
    base.save_pretrained(directory)
    for file in model.iterdir():
        if (
            file.is_file()
            and file.suffix in (".json", ".jinja", ".model", ".txt")
            and "index" not in file.name
        ):
            shutil.copyfile(file, directory / file.name)
