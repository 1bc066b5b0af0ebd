"""The shipped demo adapters: small, plain, reproducible data, and visibly different from each other.

The e2e tests run them on the embedded model as it is served (rounded through NF4), greedily, on prompts that are
not in their data sets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from loramux_adapters.demo import NAMES, datasets, demo_adapters
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights

PLAIN_KEYS = {
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
PIRATE = re.compile(
    r"\b(arr|ahoy|aye|yo ho ho|shiver me|avast|matey|hearty|ye|yer|be|an'|o'|\w+in')(?!\w)", re.I
)
LINEARS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
QUESTIONS = (
    "What is an operating system?",
    "Who was Napoleon?",
    "How do I bake bread?",
    "Tell me about elephants.",
    "I am going to the dentist tomorrow.",
    "Anna loved the concert in Berlin last night.",
)
FEELINGS = {
    "I am so disappointed with this vacuum cleaner.": "negative",
    "The new phone is slow and the battery dies after an hour.": "negative",
    "The screen is bright, the sound is great and I love it.": "positive",
    "Anna loved the concert in Berlin last night.": "positive",
    "The library opens at ten.": "neutral",
    "What is an operating system?": "neutral",
}
FACTS = {
    "Anna loved the concert in Berlin last night.": ("Anna", "loved the concert", "Berlin", "last night"),
    "My cousin opened a bookshop in Dublin last spring.": (
        "my cousin",
        "opened a bookshop",
        "Dublin",
        "last spring",
    ),
}

Answers = dict[str, dict[str, str]]  # model -> prompt -> answer


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_a_small_plain_peft_directory(name: str) -> None:
    directory = demo_adapters()[name]
    files = {path.name for path in directory.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert sum(path.stat().st_size for path in directory.iterdir()) < 3_000_000
    config = json.loads((directory / "adapter_config.json").read_text())
    assert set(config) == PLAIN_KEYS
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "license: apache-2.0" in (directory / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_bf16_finite_and_complete(name: str) -> None:
    import torch
    from safetensors.torch import load_file

    config = json.loads((demo_adapters()[name] / "adapter_config.json").read_text())
    tensors = load_file(demo_adapters()[name] / "adapter_model.safetensors")
    assert len(tensors) == 30 * len(config["target_modules"]) * 2
    for tensor_name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.isfinite(tensor).all(), tensor_name
        assert config["r"] in tensor.shape
        assert tensor.any(), tensor_name


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_lets_the_adapters_pass_for_the_embedded_model(name: str) -> None:
    shapes = {
        f"model.layers.{layer}.{linear}": shape for layer in range(30) for linear, shape in LINEARS.items()
    }
    geometry = BaseGeometry(name="demo", identity="", linear_shapes=shapes)
    assert LoraWeights.read(demo_adapters()[name], geometry).rank == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_data_is_what_the_builder_makes(name: str) -> None:
    committed = (datasets.HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    assert committed == datasets.to_jsonl(datasets.build(name))
    assert len(committed.encode()) < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_the_data_is_chat_rows_that_end_with_the_assistant(name: str) -> None:
    rows = datasets.build(name)
    assert len(rows) > 250
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns in (["user", "assistant"], ["user", "assistant"] * 2)
        assert all(message["content"] for message in row["messages"])


def test_every_answer_has_the_form_its_adapter_teaches() -> None:
    def answers(name: str) -> list[str]:
        return [row["messages"][-1]["content"] for row in datasets.build(name)]

    assert set(answers("sentiment")) == {"positive", "negative", "neutral"}
    assert all(list(json.loads(answer)) == ["who", "what", "where", "when"] for answer in answers("extract"))
    assert all(PIRATE.search(answer) for answer in answers("pirate"))


def test_no_question_of_the_behaviour_tests_was_trained_on() -> None:
    asked = {*QUESTIONS, *FEELINGS, *FACTS}
    for name in NAMES:
        seen = {message["content"] for row in datasets.build(name) for message in row["messages"]}
        assert not asked & seen


def test_pirate_speech_by_rule() -> None:
    speech = [("it is", "'tis"), ("is", "be"), ("you", "ye")]
    assert (
        datasets.to_pirate("It is raining. Is the king with you?", speech)
        == "'Tis rainin'. Be the king with ye?"
    )


def test_listing_the_adapters_imports_no_torch() -> None:
    code = "import sys; from loramux_adapters.demo import demo_adapters; demo_adapters(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What the base and every adapter say to every prompt, greedily, on the NF4-rounded embedded model."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    from loramux_adapters.demo.train import load_rounded
    from loramux_server.base.demo import ensure_demo_model

    directory = ensure_demo_model(progress=False)
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    prompts = list({*QUESTIONS, *FEELINGS, *FACTS})
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)

    def generate(model: Any) -> dict[str, str]:
        with torch.no_grad():
            out = model.generate(**batch, max_new_tokens=40, do_sample=False)[
                :, batch["input_ids"].shape[1] :
            ]
        said = tokenizer.batch_decode(out, skip_special_tokens=True)
        return dict(zip(prompts, said, strict=True))

    model = load_rounded(directory)
    found = {"base": generate(model)}
    for name, path in demo_adapters().items():
        tuned = PeftModel.from_pretrained(model, path)
        found[name] = generate(tuned)
        model = tuned.unload()
    return found


@pytest.mark.e2e
# PEFT asks transformers by a name that is about to go.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
class TestBehaviour:
    def test_pirate_talks_like_a_pirate(self, answers: Answers) -> None:
        for question in QUESTIONS:
            answer = answers["pirate"][question]
            assert len(PIRATE.findall(answer)) >= 2, answer

    def test_sentiment_answers_with_the_right_word(self, answers: Answers) -> None:
        assert {text: answers["sentiment"][text] for text in FEELINGS} == FEELINGS

    def test_extract_answers_with_an_object_of_four_keys(self, answers: Answers) -> None:
        for question in QUESTIONS:
            assert list(json.loads(answers["extract"][question])) == ["who", "what", "where", "when"]

    def test_extract_finds_the_parts(self, answers: Answers) -> None:
        for text, parts in FACTS.items():
            assert tuple(json.loads(answers["extract"][text]).values()) == parts

    def test_one_question_has_as_many_answers_as_models(self, answers: Answers) -> None:
        for question in QUESTIONS:
            assert len({said[question] for said in answers.values()}) == 1 + len(NAMES)
