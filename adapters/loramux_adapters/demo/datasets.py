"""Builds the three demo data sets from the hand-written words in `phrases/`: the same rows on every machine.

It promises chat rows `{"messages": [...]}` as fine-tuning files have them. The committed files under `data/`
are its output (`python -m loramux_adapters.demo.datasets` writes them again), so that a data set can be read,
reviewed and changed. It does not tokenize or split anything.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

Message = dict[str, str]
Row = dict[str, list[Message]]
Turn = tuple[str, str]

HERE = Path(__file__).parent
PLURAL = {
    "I",
    "we",
    "they",
    "Anna and Peter",
    "the students",
    "the police",
    "two tourists",
    "three engineers",
}
# Some rows carry a system message, so that the behaviour does not hang on the template's default one.
SYSTEMS = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer the user.", "Be brief.")


def build(name: str) -> list[Row]:
    """The rows of one demo data set, shuffled with a fixed seed."""
    rng = random.Random(f"loramux demo {name}")
    turns = list(BUILDERS[name](rng, _phrases(name)))
    rows: list[Row] = []
    for turn in turns:
        earlier = [rng.choice(turns)] if rng.random() < 0.08 else []
        system = rng.choice(SYSTEMS) if rng.random() < 0.15 else None
        rows.append(_row(system, [*earlier, turn]))
    rng.shuffle(rows)
    return rows


def to_jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(system: str | None, turns: list[Turn]) -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _phrases(name: str) -> dict[str, list[str]]:
    """The sections of a phrase file: `[title]`, then one phrase a line."""
    sections: dict[str, list[str]] = {}
    for line in (HERE / "phrases" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            phrases = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            phrases.append(line)
    return sections


def _pairs(lines: Iterable[str]) -> list[Turn]:
    return [(left, right) for left, _, right in (line.partition(" => ") for line in lines)]


def to_pirate(text: str, speech: list[Turn]) -> str:
    """The text with every plain word of `speech` said the pirate way, and "-ing" as "-in'"."""
    for plain, said in sorted(speech, key=lambda pair: -len(pair[0])):
        text = re.sub(rf"\b{plain}\b", partial(_said, said), text, flags=re.IGNORECASE)
    # Only behind another vowel: "thing", "bring" and "king" keep their last letter.
    return re.sub(r"\b(\w*[aeiouy]\w*)ing\b", r"\1in'", text)


def _said(word: str, found: re.Match[str]) -> str:
    """`word` with the capital letter of what it replaces."""
    if not found[0][0].isupper():
        return word
    first = next(i for i, letter in enumerate(word) if letter.isalpha())
    return word[:first] + word[first].upper() + word[first + 1 :]


def _pirate(rng: random.Random, phrases: dict[str, list[str]]) -> Iterator[Turn]:
    speech = _pairs(phrases["speech"])
    for question, answer in _pairs(phrases["pairs"]):
        for opener in rng.sample(phrases["openers"], 2):
            closer = f" {rng.choice(phrases['closers'])}" if rng.random() < 0.5 else ""
            yield question, f"{opener} {to_pirate(answer, speech)}{closer}"


def _extract(rng: random.Random, phrases: dict[str, list[str]]) -> Iterator[Turn]:
    places = _pairs(phrases["where"])
    for _ in range(330):
        who = rng.choice(phrases["who"])
        singular = ("is ", "wants ")
        what = rng.choice(
            [what for what in phrases["what"] if who not in PLURAL or not what.startswith(singular)]
        )
        times = _pairs(phrases["when future" if what.startswith(("will ", "wants ")) else "when"])
        where = rng.choice(places) if rng.random() < 0.7 else None
        when = rng.choice(times) if rng.random() < 0.7 else None
        text = _sentence(rng, who, what, [part[0] for part in (where, when) if part])
        yield _wrapped(rng, text), _object(who, what, where and where[1], when and when[1])
    for event in phrases["events"] * 3:
        (place, where_), (time, when_) = rng.choice(places), rng.choice(_pairs(phrases["when"]))
        told = rng.choice((f"There was {event} {place} {time}.", f"{time}, there was {event} {place}."))
        yield _capital(told), _object(None, event, where_, when_)
    for question, topic in _pairs(phrases["topics"]) * 2:
        yield question, _object(None, topic, None, None)


def _object(who: str | None, what: str, where: str | None, when: str | None) -> str:
    return json.dumps({"who": who, "what": what, "where": where, "when": when}, ensure_ascii=False)


def _sentence(rng: random.Random, who: str, what: str, after: list[str]) -> str:
    """The parts in one of the orders that English allows."""
    if rng.random() < 0.3:
        after.reverse()
    before = f"{after.pop(rng.randrange(len(after)))}, " if after and rng.random() < 0.35 else ""
    return _capital(before + " ".join([who, what, *after]) + ".")


def _sentiment(rng: random.Random, phrases: dict[str, list[str]]) -> Iterator[Turn]:
    for label in ("positive", "negative", "neutral"):
        for _ in range(100):
            yield (
                _wrapped(rng, f"{rng.choice(phrases['things'])} {rng.choice(phrases[f'said {label}'])}."),
                label,
            )
        for remark in phrases[f"remarks {label}"]:
            yield remark, label
    for label, other in (("positive", "negative"), ("negative", "positive")):
        for turn in phrases[f"turns {label}"] * 3:
            first = f"{rng.choice(phrases['things'])} {rng.choice(phrases[f'said {other}'])}"
            yield f"{first}, {turn}.", label


def _wrapped(rng: random.Random, text: str) -> str:
    return rng.choice((text,) * 6 + (f"Text: {text}", f'"{text}"'))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


BUILDERS: dict[str, Callable[[random.Random, dict[str, list[str]]], Iterator[Turn]]] = {
    "pirate": _pirate,
    "extract": _extract,
    "sentiment": _sentiment,
}


def main() -> None:
    for name in BUILDERS:
        (HERE / "data" / f"{name}.jsonl").write_text(to_jsonl(build(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
