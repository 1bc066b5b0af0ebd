"""lm-eval over /v1/completions: a local task, whose log-likelihoods must be those that transformers computes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loadtests.adapters import model_directory
from tests.conformance.environment import ConformanceError, Environment
from tests.conformance.outcome import Outcome

TASK = "loramux_facts"
TOLERANCE = 1e-3  # of a sum of log-probabilities, both sides in float32
QUESTIONS = [
    ("Water freezes at zero degrees", ["Celsius", "Kelvin", "bananas"], 0),
    ("The opposite of hot is", ["warm", "cold", "blue"], 1),
    ("A week has seven", ["days", "months", "corners of the house that Jack built"], 0),
    ("Two plus two is", ["five", "four", "twenty-two"], 1),
    ("The sun rises in the", ["west", "north", "east"], 2),
    ("Ein Apfel fällt vom", ["Baum", "Fluß", "Meer"], 0),
    ("def add(a, b):\n    return a", ["+ b", "- c", "import"], 0),
    ("The capital of France is", ["Paris", "Berlin", "Rome"], 0),
]
_TASK = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""


def run_lm_eval(url: str, environment: Environment) -> Outcome:
    model = model_directory("demo")
    folder = environment.folder / "task"
    out = environment.folder / "out"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS]
    data = folder / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "facts.yaml").write_text(_TASK.format(task=TASK, data=data))
    for old in out.rglob("*.json*"):
        old.unlink()
    arguments = f"model=demo,base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={model}"
    environment.run(
        *("lm_eval", "run", "--model", "local-completions", "--model_args", f"{arguments},num_concurrent=4"),
        *("--tasks", TASK, "--include_path", folder, "--output_path", out, "--log_samples"),
        HF_DATASETS_OFFLINE="1",
        HF_HOME=str(environment.folder / "hf"),
    )
    return _compare(out, model)


def _compare(out: Path, model: Path) -> Outcome:
    found = list(out.rglob("samples_*.jsonl"))
    if len(found) != 1:
        raise ConformanceError(f"lm-eval wrote {len(found)} files of samples")
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    outcome = Outcome()
    worst = 0.0
    for line in found[0].read_text().splitlines():
        sample: dict[str, Any] = json.loads(line)
        requests = [sample["arguments"][key] for key in sorted(sample["arguments"])]
        for request, ((loglikelihood, greedy),) in zip(requests, sample["resps"], strict=True):
            context, continuation = request["arg_0"], request["arg_1"]
            expected, is_greedy = _score(reference, tokenizer, context, continuation)
            name = f"{context!r} + {continuation!r}"
            off = abs(expected - float(loglikelihood))
            worst = max(worst, off)
            if off > TOLERANCE or is_greedy != (str(greedy) == "True"):
                outcome.failures[name] = (
                    f"lm-eval got {loglikelihood} {greedy}, transformers {expected} {is_greedy}"
                )
            else:
                outcome.passed += 1
    outcome.figures = {"tolerance": TOLERANCE, "largest_difference": worst}
    return outcome


def _score(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    begin = len(tokenizer.encode(context, add_special_tokens=False))
    tokens = torch.tensor([tokenizer.encode(context + continuation, add_special_tokens=False)])
    with torch.inference_mode():
        logprobs = model(tokens).logits[0, begin - 1 : -1].log_softmax(-1)
    answer = tokens[0, begin:]
    chosen = logprobs.gather(1, answer[:, None])
    return float(chosen.sum()), bool((logprobs.argmax(-1) == answer).all())
