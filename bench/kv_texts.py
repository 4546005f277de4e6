"""Texts for the study of compressed caches, from what is installed: nothing is fetched.

The haystack is a story, *In the Year 2889* (J. and M. Verne, 1889, public domain), that reasoning-gym ships: 7.6K
tokens, read round and round from a random place. Continuations are cut from it and from Python's own reference
(pydoc's topics), which differs a little between versions of Python.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

THINGS = ("amber", "banana", "cedar", "dolphin", "eagle", "falcon", "garnet", "harbor", "island", "lantern", "meadow")
DIGITS = 7


@dataclass(frozen=True)
class Sample:
    """Token ids. `answer` is what the prompt is to be continued with; depth: where the needle lies, 0 to 1."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float = 0.0
    source: str = ""


def story() -> str:
    """The story's text on one line."""
    found = importlib.util.find_spec("reasoning_gym")
    assert found is not None and found.submodule_search_locations, "pip install reasoning-gym"
    text = (Path(found.submodule_search_locations[0]) / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    body = re.search(r"\*\*\* START OF.*?\*\*\*(.*)\*\*\* END OF", text, re.DOTALL)
    assert body, "the story is not the Project Gutenberg file it was"
    return " ".join(body[1].split())


def reference() -> str:
    """Prose of Python's reference: its long topics, without code and markup characters."""
    from pydoc_data.topics import topics

    paragraphs = [" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n")]
    prose = [
        p for p in dict.fromkeys(paragraphs) if len(p) > 200 and not re.search(r">>>|::=|\|  |\*\*\*|====|----", p)
    ]
    return " ".join(prose)


def needles(tokenizer: Any, length: int, depths: int, each: int, seed: int = 0) -> list[Sample]:
    """`each` prompts of exactly `length` tokens at every one of `depths` depths, 0 to 1 inclusive: somewhere in the
    story stands "The special magic number for <thing> is <7 digits>.", and the chat asks for it. The answer is begun
    for the model, up to the number, so that only retrieval is asked of it."""
    haystack = _ids(tokenizer, story())
    samples = []
    for place in range(depths):
        for number in range(each):
            rng = Random(f"needle/{seed}/{length}/{place}/{number}")
            thing, digits = rng.choice(THINGS), "".join(rng.choice("0123456789") for _ in range(DIGITS))
            depth = place / max(1, depths - 1)
            start = _ids(tokenizer, "<|im_start|>user\n")
            needle = _ids(tokenizer, f" The special magic number for {thing} is {digits}.")
            question = f"\n\nWhat is the special magic number for {thing}?<|im_end|>\n<|im_start|>assistant\n"
            end = _ids(tokenizer, f"{question}The special magic number for {thing} is ")
            room = length - len(start) - len(needle) - len(end)
            if room < 1:
                raise ValueError(f"a prompt of {length} tokens has no room for the needle and the question")
            first = rng.randrange(len(haystack))
            hay = [haystack[(first + token) % len(haystack)] for token in range(room)]
            cut = round(depth * room)
            prompt = (*start, *hay[:cut], *needle, *hay[cut:], *end)
            samples.append(Sample(prompt, tuple(_ids(tokenizer, digits)), depth))
    return samples


def continuations(tokenizer: Any, length: int, answer: int, count: int, seed: int = 0) -> list[Sample]:
    """`count` pieces of running text, alternately from Python's reference and the story: `length` tokens, then `answer`
    more that do not overlap with another sample's."""
    rng = Random(f"continuation/{seed}/{length}")
    samples: list[Sample] = []
    texts = {"reference": _ids(tokenizer, reference()), "story": _ids(tokenizer, story())}
    for name, ids in texts.items():
        wanted = count - len(samples) if name == "story" else (count + 1) // 2
        # The same grid whatever the length, so that the continuations of different lengths stand at like places.
        ends = range(length, len(ids) - answer + 1, answer)
        if len(ends) < wanted:
            raise ValueError(
                f"the {name} has {len(ends)} continuations of {answer} tokens after {length}, not {wanted}"
            )
        for end in sorted(rng.sample(ends, wanted)):
            samples.append(Sample(tuple(ids[end - length : end]), tuple(ids[end : end + answer]), source=name))
    return samples


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
