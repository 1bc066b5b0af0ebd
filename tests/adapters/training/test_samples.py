"""What is trained on: the assistant's words and the token that ends them, under any template, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.errors import TrainingError
from loramux_adapters.training.rows import read_rows
from loramux_adapters.training.samples import DataSet, Sample, Tokenize, tokenize_rows
from tests.adapters.training.support import CHATML, byte_tokenizer, chat, write_jsonl

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As some reasoning models' templates: what the assistant thought is written in its last turn only.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if loop.last and message['role'] == 'assistant' %}<think></think>{% endif %}{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHERWISE = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>answer:{% endif %}")
ENDLESS = CHATML.replace("<|im_end|>", "")


def data(
    tmp_path: Path,
    rows: list[dict[str, object]],
    *,
    template: str | None = CHATML,
    length: int = 512,
    **options: Any,
) -> tuple[DataSet, Any]:
    file = read_rows(write_jsonl(tmp_path / "data.jsonl", rows))
    tokenizer = byte_tokenizer(template)
    tokenize = Tokenize(tokenizer, **options)
    return tokenize_rows(file.rows, tokenize, length, file=file.name, sha256=file.sha256), tokenizer


def said(sample: Sample, tokenizer: Any) -> str:
    """The trained tokens as text, | where some are left out."""
    parts: list[str] = []
    last = -1
    for place, (token, trained) in enumerate(zip(sample.ids, sample.mask, strict=True)):
        if trained:
            parts.append(("|" if parts and place != last + 1 else "") + tokenizer.decode([token]))
            last = place
    return "".join(parts)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_only_the_assistant_is_trained_on(tmp_path: Path, template: str) -> None:
    dataset, tokenizer = data(tmp_path, [chat("ask", "one", "more", "two")], template=template)
    (sample,) = dataset.samples
    assert said(sample, tokenizer) == "one<|im_end|>|two<|im_end|>"
    assert tokenizer.decode(sample.ids).startswith(
        "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\none<|im_end|>"
    )
    assert ("marks" in dataset.report.marked_by) == (template is MARKED)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_weight_zero_is_context_only(tmp_path: Path, template: str) -> None:
    row = chat("ask", "one", "more", "two")
    row["messages"][1]["weight"] = 0  # type: ignore[index]
    dataset, tokenizer = data(tmp_path, [row], template=template)
    assert said(dataset.samples[0], tokenizer) == "two<|im_end|>"


def test_what_is_trained_follows_the_prompt_the_server_renders(tmp_path: Path) -> None:
    dataset, tokenizer = data(tmp_path, [chat("ask", "one")])
    (sample,) = dataset.samples
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "ask"}], tokenize=False, add_generation_prompt=True
    )
    served = tokenizer.encode(prompt, add_special_tokens=False)
    assert list(sample.ids[: len(served)]) == served
    assert sample.mask.index(1) == len(served)


def test_turns_a_template_rewrites_become_samples(tmp_path: Path) -> None:
    dataset, tokenizer = data(tmp_path, [chat("a", "one", "b", "two")], template=FORGETFUL)
    assert [said(sample, tokenizer) for sample in dataset.samples] == [
        "<think></think>one<|im_end|>",
        "<think></think>two<|im_end|>",
    ]
    assert (dataset.report.rows, dataset.report.samples) == (1, 2)
    assert any("1 conversations" in warning for warning in dataset.report.warnings)


def test_a_template_that_cannot_be_marked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Line 1, message 2: .* set train_on_inputs") as caught:
        data(tmp_path, [chat("a", "b")], template=OTHERWISE)
    assert caught.value.code == "assistant_tokens_unknown"
    dataset, tokenizer = data(tmp_path, [chat("a", "b")], template=OTHERWISE, train_on_inputs=True)
    assert said(dataset.samples[0], tokenizer).startswith("user\na")
    assert any("train_on_inputs" in warning for warning in dataset.report.warnings)


def test_a_base_without_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no chat template"):
        data(tmp_path, [chat("a", "b")], template=None)


def test_a_template_that_fails_names_the_line(tmp_path: Path) -> None:
    failing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(TrainingError, match="Line 1: .* roles must alternate"):
        data(tmp_path, [chat("a", "b")], template=failing)


def test_missing_end_tokens_are_said(tmp_path: Path) -> None:
    dataset, _ = data(tmp_path, [chat("a", "b")] * 12, template=ENDLESS)
    assert dataset.report.warnings == [
        "12 samples end without a special token, so the model is not taught where to stop: the chat template writes none "
        "after the assistant's words"
    ]
    assert data(tmp_path, [chat("a", "b")] * 12)[0].report.warnings == []


def test_completions_and_texts_end_with_the_end_token(tmp_path: Path) -> None:
    dataset, tokenizer = data(tmp_path, [{"prompt": "2+2=", "completion": "4"}])
    assert said(dataset.samples[0], tokenizer) == "4<|im_end|>"
    dataset, tokenizer = data(tmp_path, [{"text": "abc"}])
    assert said(dataset.samples[0], tokenizer) == "bc<|im_end|>"  # nothing comes before the first token


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{{ tools[0]['function']['name'] if tools }}" + CHATML
    row = chat("a", "b", tools=[{"type": "function", "function": {"name": "weather"}}])
    dataset, tokenizer = data(tmp_path, [row], template=template)
    assert tokenizer.decode(dataset.samples[0].ids).startswith("weather<|im_start|>")


def test_cut_and_dropped_rows_are_counted(tmp_path: Path) -> None:
    rows = [chat("a", "b"), chat("a", "b" * 40), chat("a" * 60, "b")]
    dataset, _ = data(tmp_path, rows, length=48)
    report = dataset.report
    assert (report.rows, report.samples) == (3, 2)
    assert (report.truncated_rows, report.dropped_rows) == (2, 1)
    assert max(len(sample) for sample in dataset.samples) == 48 == report.longest
    assert report.trained_tokens == sum(sum(sample.mask) for sample in dataset.samples)
    assert any("2 of 3 rows are longer" in warning for warning in report.warnings)
    assert any("1 of 3 rows were dropped" in warning for warning in report.warnings)
    with pytest.raises(TrainingError, match="no row has anything to learn within max_seq_length 8"):
        data(tmp_path, rows, length=8)


def test_the_digest_is_of_tokens_and_masks(tmp_path: Path) -> None:
    one = data(tmp_path, [chat("a", "b")])[0].digest()
    assert one == data(tmp_path, [chat("a", "b")], template=MARKED)[0].digest()
    assert one != data(tmp_path, [chat("a", "b")], train_on_inputs=True)[0].digest()
    assert one != data(tmp_path, [chat("a", "c")])[0].digest()
