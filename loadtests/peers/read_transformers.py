"""Runs in another environment: reads an export with whatever transformers that has, and says what it sees.

`python read_transformers.py` with one JSON object on standard input (`directory`, `texts`, `prompts`, `new_tokens`,
`loss_tokens`, `answer`); writes one JSON object to the file `answer`. In fp32, one prompt at a time. Imports nothing of
this project.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

asked = json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(asked["directory"])
model = transformers.AutoModelForCausalLM.from_pretrained(
    asked["directory"], torch_dtype=torch.float32
).eval()
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0
total = count = 0
answers = []
with torch.inference_mode():
    for text in asked["texts"]:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : asked["loss_tokens"] - count + 1]
        if ids.shape[1] > 1:
            logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
            total -= logprobs.gather(-1, ids[0, 1:, None]).sum().item()
            count += ids.shape[1] - 1
    for prompt in asked["prompts"]:
        rows = torch.tensor([prompt])
        mask = torch.ones_like(rows)
        answer = model.generate(
            rows, attention_mask=mask, do_sample=False, max_new_tokens=asked["new_tokens"]
        )
        answers.append(answer[0, len(prompt) :].tolist())
chat = None
if tokenizer.chat_template:
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
said = {
    "version": transformers.__version__,
    "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in asked["texts"]],
    "tokens": answers,
    "loss": total / count,
    "chat": chat,
}
Path(asked["answer"]).write_text(json.dumps(said))
