"""Builds the three demo data sets from the hand-written words in `phrases/`: the same rows on every machine.

It promises chat rows `{"messages": [...]}` as fine-tuning files have them. The committed files under `data/` are
its output (`python -m loramux_adapters.demo.datasets` writes them again), so a data set can be read, reviewed and
changed. It does not tokenize or split anything.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from loramux_adapters.demo.phrases import extract, pirate, sentiment

Message = dict[str, str]
Row = dict[str, list[Message]]

DATA = Path(__file__).parent / "data"
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
FUTURE = ("will ", "wants to ")
# Some rows carry a system message, so that the behaviour does not hang on the template's default one.
SYSTEMS = ("You are a helpful assistant.", "You are a friendly assistant.", "Answer the user.", "Be brief.")


def build(name: str) -> list[Row]:
    """The rows of one demo data set, shuffled with a fixed seed."""
    random_ = random.Random(f"loramux demo {name}")
    turns = list(BUILDERS[name](random_))
    rows: list[Row] = []
    for question, answer in turns:
        earlier = random_.choice(turns) if random_.random() < 0.08 else None
        system = random_.choice(SYSTEMS) if random_.random() < 0.15 else None
        rows.append(_row(system, [earlier, (question, answer)] if earlier else [(question, answer)]))
    random_.shuffle(rows)
    return rows


def to_jsonl(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(system: str | None, turns: list[tuple[str, str]]) -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def to_pirate(text: str) -> str:
    """The text in pirate speech, by word: the rules are in `phrases/pirate.py`."""
    for plain, said in sorted(pirate.SPEECH, key=lambda pair: -len(pair[0])):
        text = re.sub(
            rf"\b{plain}\b", lambda found, said=said: _cased(said, found[0]), text, flags=re.IGNORECASE
        )
    # The last letter of "-ing" goes, but not that of "thing", "bring" or "king".
    return re.sub(r"\b(\w*[aeiouy]\w*)ing\b", r"\1in'", text)


def _cased(word: str, like: str) -> str:
    if not like[0].isupper():
        return word
    first = next(i for i, letter in enumerate(word) if letter.isalpha())
    return word[:first] + word[first].upper() + word[first + 1 :]


def _pirate(random_: random.Random) -> Iterable[tuple[str, str]]:
    for question, answer in pirate.PAIRS:
        for opener in random_.sample(pirate.OPENERS, 2):
            closer = f" {random_.choice(pirate.CLOSERS)}" if random_.random() < 0.5 else ""
            yield question, f"{opener} {to_pirate(answer)}{closer}"


def _extract(random_: random.Random) -> Iterable[tuple[str, str]]:
    def answer(who: str | None, what: str, where: str | None, when: str | None) -> str:
        return json.dumps({"who": who, "what": what, "where": where, "when": when}, ensure_ascii=False)

    for _ in range(330):
        who = random_.choice(extract.WHO)
        fitting = [
            what for what in extract.WHAT if who not in PLURAL or not what.startswith(("is ", "wants "))
        ]
        what = random_.choice(fitting)
        times = extract.WHEN_FUTURE if what.startswith(FUTURE) else extract.WHEN
        where = random_.choice(extract.WHERE) if random_.random() < 0.7 else (None, None)
        when = random_.choice(times) if random_.random() < 0.7 else (None, None)
        yield (
            _wrapped(random_, _sentence(random_, who, what, where[0], when[0])),
            answer(who, what, where[1], when[1]),
        )
    for event in extract.EVENTS * 3:
        where, when = random_.choice(extract.WHERE), random_.choice(extract.WHEN)
        told = random_.choice(("There was {event} {where} {when}.", "{when}, there was {event} {where}."))
        text = _capital(told.format(event=event, where=where[0], when=when[0]))
        yield text, answer(None, event, where[1], when[1])
    for question, topic in extract.TOPICS * 2:
        yield question, answer(None, topic, None, None)


def _sentence(random_: random.Random, who: str, what: str, where: str | None, when: str | None) -> str:
    """The parts in one of the orders that English allows."""
    after = [part for part in (where, when) if part]
    if random_.random() < 0.3:
        after.reverse()
    before = f"{after.pop(random_.randrange(len(after)))}, " if after and random_.random() < 0.35 else ""
    return _capital(before + " ".join([who, what, *after]) + ".")


def _sentiment(random_: random.Random) -> Iterable[tuple[str, str]]:
    for label, said in sentiment.SAID.items():
        for _ in range(100):
            text = f"{random_.choice(sentiment.THINGS)} {random_.choice(said)}."
            yield _wrapped(random_, text), label
    for label, remarks in sentiment.REMARKS.items():
        for remark in remarks:
            yield remark, label
    for label, turns in sentiment.TURNS.items():
        other = "negative" if label == "positive" else "positive"
        for turn in turns * 3:
            first = f"{random_.choice(sentiment.THINGS)} {random_.choice(sentiment.SAID[other])}"
            yield f"{first}, {turn}.", label


def _wrapped(random_: random.Random, text: str) -> str:
    return random_.choice((text,) * 6 + (f"Text: {text}", f'"{text}"'))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


BUILDERS: dict[str, Callable[[random.Random], Iterable[tuple[str, str]]]] = {
    "pirate": _pirate,
    "extract": _extract,
    "sentiment": _sentiment,
}


def main() -> None:
    for name in BUILDERS:
        (DATA / f"{name}.jsonl").write_text(to_jsonl(build(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
