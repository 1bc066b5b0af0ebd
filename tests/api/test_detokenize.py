"""Text from tokens: equal to the tokenizer's own decode, whatever the tokens and however they come."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loramux_server.api.detokenize import REPLACEMENT, Detokenizer, Pieces
from loramux_server.api.stops import StopMatcher
from tests.api.conftest import CORPUS, byte_level_tokenizer

FAMILIES = ["byte_level", "byte_fallback", "word_level"]
many = settings(max_examples=150, deadline=None)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: pieces with a visible space, bytes for what the vocabulary lacks."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(CORPUS[:2], trainer)
    made = Tokenizer.from_str(re.sub(r'("content":"<0x..>".*?"special":)true', r"\1false", backend.to_str()))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def word_level_tokenizer() -> PreTrainedTokenizerFast:
    """No decoder at all: only the tokenizer itself knows that words are joined by spaces."""
    backend = Tokenizer(
        models.WordLevel({"<s>": 0, "a": 1, "bc": 2, "def": 3, "é": 4, "�": 5}, unk_token="a")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    if name == "byte_fallback":
        return byte_fallback_tokenizer()
    if name == "word_level":
        return word_level_tokenizer()
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("two words"), AddedToken("日本")])
    return tokenizer


@cache
def pieces_of(name: str) -> Pieces:
    return Pieces(family(name))


def deltas(name: str, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(pieces_of(name))
    return [*map(detokenizer.push, tokens), detokenizer.flush()]


def reference(name: str, tokens: list[int]) -> str:
    return str(family(name).decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@st.composite
def token_sequences(draw: st.DrawFn, name: str) -> list[int]:
    # Some ids lie behind the vocabulary: a model's embedding is often padded.
    token = st.integers(0, len(family(name)) + 3)
    return draw(st.lists(token, max_size=40))


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_expected_families_are_bytewise(name: str) -> None:
    assert pieces_of(name).bytewise == (name != "word_level")


@pytest.mark.parametrize("name", ["byte_level", "word_level"])
@given(data=st.data())
@many
def test_random_tokens_give_what_decode_gives(name: str, data: st.DataObject) -> None:
    tokens = data.draw(token_sequences(name))
    assert "".join(deltas(name, tokens)) == reference(name, tokens)


@given(data=st.data())
@many
def test_byte_fallback_gives_what_decode_gives_wherever_the_bytes_are_text(data: st.DataObject) -> None:
    tokens = data.draw(token_sequences("byte_fallback"))
    text, expected = "".join(deltas("byte_fallback", tokens)), reference("byte_fallback", tokens)
    if REPLACEMENT in expected:
        # decode() gives up a whole run of bytes for one bad byte in it; what surrounds the runs is the same.
        assert REPLACEMENT in text
        edges = re.split(f"{REPLACEMENT}+", expected)
        assert text.startswith(edges[0])
        assert text.endswith(edges[-1])
    else:
        assert text == expected


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(text=st.text(max_size=30))
@many
def test_written_text_comes_back_without_a_torn_character(name: str, text: str) -> None:
    tokens = family(name).encode(text, add_special_tokens=False)
    parts = deltas(name, tokens)
    assert "".join(parts) == reference(name, tokens)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in part for part in parts)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_a_character_over_four_tokens_comes_at_once_when_it_is_complete(name: str) -> None:
    pieces = pieces_of(name)
    by_bytes = {pieces.bytes_of(token): token for token in range(len(family(name)))}
    tokens = [by_bytes[bytes([byte])] for byte in "😀".encode()]
    assert deltas(name, tokens) == ["", "", "", "😀", ""]
    assert deltas(name, tokens[:2]) == ["", "", REPLACEMENT]


def test_an_endless_run_of_bad_bytes_is_not_withheld() -> None:
    pieces = pieces_of("byte_level")
    bad = next(token for token in range(len(family("byte_level"))) if pieces.bytes_of(token) == b"\xff")
    assert deltas("byte_level", [bad] * 5)[:5] == [REPLACEMENT] * 5


def test_without_a_known_decoder_nothing_is_withheld_or_lost_either() -> None:
    padding = len(family("word_level")) + 1
    tokens = [1, *[padding] * 9, 2]
    assert "".join(deltas("word_level", tokens)) == reference("word_level", tokens) == "a bc"
    bad = deltas("word_level", [5] * 20)[:-1]
    assert "".join(bad).count(REPLACEMENT) >= 16


def test_special_tokens_are_named_but_not_text() -> None:
    tokenizer, pieces = family("byte_level"), pieces_of("byte_level")
    token = tokenizer.vocab["<|im_end|>"]
    assert pieces.bytes_of(token) == b"<|im_end|>"
    assert deltas("byte_level", [token]) == ["", ""]


def cut_text(text: str, stops: tuple[str, ...]) -> str:
    """Before the first stop string to be complete; the longest of those complete at the same place."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@given(
    chunks=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_the_same_however_the_text_is_chunked(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    sent = ""
    whole = "".join(chunks)
    for place, chunk in enumerate(chunks):
        sent += matcher.push(chunk)
        if matcher.cut is not None:
            break
        # Held back only what may become a stop string.
        held = "".join(chunks[: place + 1])[len(sent) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    else:
        sent += matcher.flush()
    assert sent == cut_text(whole, tuple(stops))
    assert matcher.cut in (None, len(sent))
