"""Runs in vLLM's environment: reads an export as vLLM serves it, in bf16, and answers greedily.

`python read_vllm.py` with one JSON object on standard input (`directory`, `texts`, `prompts`, `new_tokens`, `answer`);
writes one JSON object to the file `answer`. Imports nothing of this project.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    import vllm

    asked = json.load(sys.stdin)
    longest = max(map(len, asked["prompts"])) + asked["new_tokens"]
    model = vllm.LLM(asked["directory"], dtype="bfloat16", max_model_len=longest + 16, enforce_eager=True)
    parameters = vllm.SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    answers = model.generate(prompts, parameters, use_tqdm=False)
    tokenizer = model.get_tokenizer()
    said = {
        "version": vllm.__version__,
        "ids": [tokenizer.encode(text, add_special_tokens=False) for text in asked["texts"]],
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
    }
    Path(asked["answer"]).write_text(json.dumps(said))


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main()
