"""The project's own small model: a Qwen3 of a chosen shape and a byte-level BPE tokenizer with a ChatML template."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from rltk.models.generation import savable

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 1024

# Pieces that BPE may not merge across: the box, runs of line ends, single digits, an operator with its spaces, a word
# with the space before it, other signs, spaces. Digits stay single so that sums are learnt place by place.
_PIECES = r"\\boxed\{|\n+|\d| [+\-*=] |: | ?\p{L}+|[^\s\p{L}\d]| +|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `corpus`, to at most `vocabulary` tokens. Any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int):
    """A randomly initialised Qwen3ForCausalLM, fp32, tied embeddings, head_dim 32; vocabulary rounded up to 64."""
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=True, temperature=1.0
    )
    return model


def save(model, tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write an ordinary Hugging Face folder with bfloat16 weights. `model` is converted in place."""
    import torch

    model.generation_config = savable(model.generation_config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
