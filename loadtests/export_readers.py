"""Does another reader see the same model? Loads an export in other Python environments and compares the loss.

    python -m loadtests.export_readers MERGED --python /path/to/venv-with-transformers-4/bin/python [--python ...]

The first 1,000 tokens of the built-in prompts, one prompt at a time, in fp32. Each environment tokenizes and computes for
itself; printed are its transformers version, loss, and the difference from this environment's. Exits with 1 if a loss
differs by more than 1e-4 or an environment cannot load the export.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from loramux_adapters.prompts import PROMPTS

TOKENS = 1000
TOLERANCE = 1e-4

READER = """
import json, sys, torch, transformers
directory, limit, texts = sys.argv[1], int(sys.argv[2]), json.loads(sys.stdin.read())
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
model = transformers.AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
total = count = 0
with torch.inference_mode():
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : limit - count + 1]
        if ids.shape[1] > 1:
            logits = model(ids).logits[0, :-1].double().log_softmax(-1)
            total -= logits.gather(-1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
template = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) \\
    if tokenizer.chat_template else None
print(json.dumps({"transformers": transformers.__version__, "tokens": count, "loss": total / count,
                  "chat": template, "rope_theta": getattr(model.config, "rope_theta", None)}))
"""


def read_with(python: str, merged: Path) -> dict[str, Any]:
    """Loss of the export as that interpreter reads it. Raises RuntimeError with the reader's last words."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", READER, str(merged), str(TOKENS)],
        input=json.dumps(PROMPTS),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("merged", type=Path)
    parser.add_argument("--python", action="append", default=[], help="interpreter of another environment")
    arguments = parser.parse_args()
    here = read_with(sys.executable, arguments.merged)
    print(json.dumps(here))
    failed = False
    for python in arguments.python:
        there = read_with(python, arguments.merged)
        same = abs(there["loss"] - here["loss"]) <= TOLERANCE and there["chat"] == here["chat"]
        print(json.dumps({**there, "difference": there["loss"] - here["loss"], "same": same}))
        failed |= not same
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
