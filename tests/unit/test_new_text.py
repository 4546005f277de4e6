"""New text in a trajectory: harmless, of a bounded length, tokenized once, and exactly what was written."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.errors import MismatchError
from rltk.rollout.new_text import MOST, NewText
from rltk.rollout.tokens import decode, token_span
from tests.unit.some_tokenizers import NAMES, tokenizer

every_tokenizer = pytest.mark.parametrize("name", NAMES)
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<tool_call>", "</tool_call>", "<think>", "<|start_header_id|>"]
WORDS = [
    *SPECIAL,
    "<",
    "|im_end|>",
    "<|",
    "42",
    "\n",
    "\n\n",
    "  ",
    "print(1)",
    "```",
    "é",
    "漢字",
    "🙂",
    "\x00",
    "\x1b[31m",
]
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("".join)
few = settings(max_examples=60)


@functools.cache
def new_text(name):
    return NewText(tokenizer(name))


@every_tokenizer
@few
@given(texts)
def test_special_tokens_in_a_result_are_text(name, text):
    new = new_text(name)
    escaped = new.escape(text)
    assert not new.specials(new.encode(escaped))
    assert escaped.replace(" ", "") == text.replace(" ", "")  # nothing is lost: spaces come between
    if not any(token in text for token in new.special):
        assert escaped == text


def test_white_space_and_single_characters_are_nobodys_special_token():
    assert set(new_text("llama").special) == {
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    }
    assert list(new_text("qwen").special)[0] == "</tool_response>"  # longest first


def test_runs_of_spaces_that_are_added_tokens_are_white_space():
    new = new_text("gemma")
    assert set(new.special) == {"<unk>", "<eos>", "<start_of_turn>", "<end_of_turn>"}
    text = "a  table\n    of   it"
    assert {new.encode("  ")[0], new.encode("    ")[0]} <= set(new.tokenizer.get_added_vocab().values())
    assert new.escape(text) == text
    assert new.decode(new.append(new.encode("x"), lambda results: f"\n{results[0]}\n", [text])) == f"\n{text}\n"


def test_a_tokenizer_that_normalizes_finds_no_special_token_either():
    from tokenizers import AddedToken, normalizers

    from tests.unit.some_tokenizers import CHATML, byte_level

    odd = byte_level(["<|im_end|>"], [], CHATML, "<|im_end|>")
    odd.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    odd.backend_tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=True)])
    new = NewText(odd)
    assert new.specials(new.encode("<CALL>"))
    assert not new.specials(new.encode(new.escape("see <CALL> and \uff1ccall\uff1e")))


@every_tokenizer
@few
@given(text=texts, tokens=st.integers(0, 40))
def test_a_long_result_keeps_head_and_tail_within_its_tokens(name, text, tokens):
    new = new_text(name)
    text = new.escape(text)
    short = new.shorten(text, tokens)
    assert len(new.encode(short)) <= tokens or len(new.encode(text)) <= tokens
    if len(new.encode(text)) <= tokens:
        assert short == text
    elif "characters cut" in short:
        head, _, rest = short.partition("\n[... ")
        gone, _, tail = rest.partition(" characters cut ...]\n")
        assert int(gone) + len(head) + len(tail) == len(text)
        assert not new.specials(new.encode(short))


def test_what_is_cut_is_the_middle():
    new = new_text("tiny")
    text = "begin " + "0123456789" * 500 + " end"
    short = new.shorten(text, 64)
    assert short.startswith("begin 0123") and short.endswith("789 end") and len(new.encode(short)) > 56
    assert new.shorten("x" * (3 * MOST), 64).startswith("xxx")
    with_a_cut_character = new.shorten("🙂" * 100, 48)
    assert "\ufffd" not in with_a_cut_character and with_a_cut_character.count("🙂") >= 2


@every_tokenizer
@few
@given(before=texts, result=texts)
def test_what_is_appended_is_what_was_written(name, before, result):
    """Whatever precedes it, and however that was tokenized: no space, no special token comes in."""
    new = new_text(name)
    result = new.escape(result)
    ids = new.encode(f"A result:{before}\n```output")
    try:
        added = new.append(ids, lambda results: f"\n{results[0]}\n```\n", [result])
    except MismatchError:
        # Only what stands around a result can make it special, which our formats do not: nothing else is refused.
        pytest.fail("an escaped result was refused")
    whole = new.decode([*ids, *added])
    if new.decode(new.encode(f"x{result}x")) != f"x{result}x":
        return  # SmolLM2's vocabulary lacks some bytes
    assert whole == new.decode(ids) + f"\n{result}\n```\n"


def test_a_result_that_its_surroundings_make_special_is_refused():
    new = new_text("tiny")
    with pytest.raises(MismatchError, match="would become special tokens"):
        new.append(new.encode("x"), lambda results: f"<|im_{results[0]}", ["end|>"])


@every_tokenizer
@few
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), min_size=1, max_size=8), st.data())
def test_the_tokens_of_a_span_are_those_with_one_of_its_characters(name, pieces, data):
    """Against every token's characters, found one prefix at a time."""
    new = new_text(name)
    ids = [i for piece in pieces for i in new.encode(piece)]  # not as the whole text would be tokenized
    text = decode(tokenizer(name), ids)
    if not text or "\ufffd" in text:
        return
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    grown = [0]
    for count in range(1, len(ids) + 1):
        prefix = decode(tokenizer(name), ids[:count])
        common = next((n for n, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(prefix))
        grown.append(max(grown[-1], common))
    # A token that ends no character is part of the one that follows.
    reach = [(a, max(b, a + 1)) for a, b in zip(grown, grown[1:], strict=False)]
    held = [t for t, (a, b) in enumerate(reach) if a < end and b > start]
    found = token_span(tokenizer(name), ids, text, start, end)
    assert found is not None and list(range(*found)) == held


def test_a_span_that_is_not_in_the_text_has_no_tokens():
    ids = new_text("tiny").encode("one two")
    assert token_span(tokenizer("tiny"), ids, "one two", 3, 3) is None
    assert token_span(tokenizer("tiny"), ids, "one two", 3, 90) is None
    assert token_span(tokenizer("tiny"), ids, "something else", 0, 4) is None
