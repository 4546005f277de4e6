"""Text becomes ids: what ends a response, and what a template says of prompts that it cannot render."""

import json

import pytest

from rltk.errors import ConfigError
from rltk.rollout.tokens import load_tokenizer, render_prompt, stop_ids, turn_end
from tests.integration.places import TINY
from tests.unit.some_tokenizers import CHATML, SPECIAL, byte_level, tokenizer

MARKS = ["<eos>", "<end>", "<more>", "<user>", "<assistant>", "<|return|>", "<|end|>"]
TURN = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + 'END' }}{% endfor %}"
LAST = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"


def with_template(template, eos="<eos>"):
    return byte_level(MARKS, [], template, eos)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURN.replace("END", "<end>\\n"), "<end>"),
        (TURN.replace("END", "<end>") + "{{ '<eos>' if not add_generation_prompt }}", "<end>"),  # Phi
        (TURN.replace("END", "<end>") + "<assistant>", "<end>"),  # always asks for the next turn, as Llama 3 once did
        (TURN.replace("END", "<end><more>") + "<more>", "<end>"),
        (TURN.replace("END", "<more><eos>"), "<eos>"),  # Cohere
        (TURN.replace("END", "<eos>"), "<eos>"),
        (TURN.replace("END", ""), None),  # GLM: the next turn's marker
        (TURN.replace("END", "\\n"), None),
        (TURN.replace("END", "\\n<end>"), None),
        (TURN.replace("END", "</s>"), None),  # no token of this vocabulary
        (LAST + "{% endfor %}", None),  # gpt-oss: eos is what ends the last turn, and the other ends thoughts too
        (TURN.replace("m.content", "m.role").replace("END", "<end>"), None),  # nothing is to be told
        ("{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages }}", None),
    ],
)
def test_the_end_of_a_turn_is_the_token_behind_what_was_said(template, end):
    assert turn_end(with_template(template)) == end


@pytest.mark.parametrize(
    ("name", "end"),
    [("tiny", "<|im_end|>"), ("qwen", "<|im_end|>"), ("llama", "<|eot_id|>"), ("gemma", "<end_of_turn>")],
)
def test_known_templates(name, end):
    assert turn_end(tokenizer(name)) == end


def test_a_response_ends_where_the_template_ends_a_turn_whatever_else_the_folder_names(tmp_path):
    gemma = tokenizer("gemma")
    eos, end = gemma.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert stop_ids(gemma, str(tmp_path)) == sorted([eos, end])  # no generation_config.json
    for named, stops in ((eos, [eos, end]), ([7, eos], [7, eos, end]), (None, [eos, end])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert stop_ids(gemma, str(tmp_path)) == sorted(stops)
    base = byte_level(["<|endoftext|>", *SPECIAL], [], CHATML, "<|endoftext|>")  # as Qwen2.5's
    assert stop_ids(base, "nowhere") == base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])


@pytest.mark.parametrize("name", ["tiny", "tiny_tool", "tiny_judge"])
def test_the_shipped_models_end_at_their_eos_alone(name):
    folder = str(TINY.parent / name)
    shipped = load_tokenizer(folder)
    assert stop_ids(shipped, folder) == [shipped.eos_token_id] == [2]


def test_a_template_that_refuses_a_prompt_names_the_key_to_change():
    user = {"role": "user", "content": "one"}
    with pytest.raises(ConfigError, match=r"system, user: .*not supported.*model\.chat_template=<file>.*task\.system="):
        render_prompt(tokenizer("gemma"), ({"role": "system", "content": "two"}, user))
    with pytest.raises(ConfigError, match=r"of user: .*odd.*that can \(model\.chat_template=<file>\)\.$"):
        render_prompt(with_template("{{ raise_exception('odd') }}"), (user,))
