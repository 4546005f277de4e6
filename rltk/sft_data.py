"""Examples for the warm start: drawn from the tasks' training side, tokenized, kept ragged, packed into rows."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rltk.errors import ConfigError
from rltk.tasks.demonstrations import STYLES, demonstrate

# Words that later uses of the tokenizer (tools, judging, users' problems) meet often.
_WORDS = "system tool python print step answer problem solution paragraph wrong right first result the of and is not"
_CHUNK = 5000  # examples drawn from one random stream


@dataclass(frozen=True)
class Examples:
    """ids int32 [total]; starts, lengths, prompts int64 [n]: where each example begins, its tokens, its prompt."""

    ids: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    prompts: torch.Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.lengths)


def pack(parts: list[tuple[Examples, torch.Tensor]], width: int, device="cpu") -> dict[str, torch.Tensor]:
    """Model inputs that hold the chosen examples (indices [m] of each part) in rows of `width` tokens, without padding
    between them: `input_ids`, `labels` (-100 on prompts and padding) and `position_ids` int64 [R, width], and
    `attention_mask` bool [R, 1, width, width], causal and confined to each example.
    """
    lengths = torch.cat([e.lengths[chosen] for e, chosen in parts])
    tokens = torch.cat([e.ids[_spans(e.starts[chosen], e.lengths[chosen])] for e, chosen in parts]).long()
    prompts = torch.cat([e.prompts[chosen] for e, chosen in parts])
    slots, rows = _place(lengths.tolist(), width)

    here = _spans(slots, lengths)
    position = _spans(torch.zeros_like(lengths), lengths)
    answer = position >= prompts.repeat_interleave(lengths)
    document = torch.arange(len(lengths)).repeat_interleave(lengths)

    def laid_out(fill: int, values: torch.Tensor) -> torch.Tensor:
        flat = torch.full((rows * width,), fill)
        flat[here] = values
        return flat.view(rows, width).to(device)

    documents = laid_out(-1, document)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return {
        "input_ids": laid_out(parts[0][0].pad, tokens),
        "labels": laid_out(-100, torch.where(answer, tokens, -100)),
        "position_ids": laid_out(0, position),
        "attention_mask": same.tril(),
    }


def _spans(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[sum of lengths]: starts[0], starts[0] + 1, ... for lengths[0] places, then from starts[1], and so on."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


def _place(lengths: list[int], width: int) -> tuple[torch.Tensor, int]:
    """Where each example goes in the flattened rows, and how many rows that takes: longest first, next fit."""
    if max(lengths) > width:
        raise ConfigError(f"an example has {max(lengths)} tokens, more than a row of tokens_per_row={width}; raise it")
    slots, row, used = torch.zeros(len(lengths), dtype=torch.int64), 0, 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if used + lengths[index] > width:
            row, used = row + 1, 0
        slots[index] = row * width + used
        used += lengths[index]
    return slots, row + 1


def corpus(tasks: Iterable, problems: int = 300) -> Iterator[str]:
    """Texts that the tokenizer is trained on: problems and sound solutions of every level, and common words."""
    rng = random.Random("tokenizer")
    for task in tasks:
        for level in task.levels:
            for _ in range(problems):
                record = task.sample(rng, level)
                yield f"user\n{record.messages[-1]['content']}\n"
                yield f"assistant\n{demonstrate(record, 'sound', rng)}\n"
    for word in _WORDS.split():
        yield f"{word} {word} " * 50


def draw_examples(tokenizer, task, mixture: dict, count: int, seed: int, processes: int = 0) -> Examples:
    """`count` prompts with responses in the styles of `mixture`: {level: {style: share, ..., "right": chance}}.

    Levels are drawn uniformly. The result depends on the arguments but for `processes` (0: one a core).
    """
    for level, shares in mixture.items():
        check_shares(level, shares)
    chunks = [min(_CHUNK, count - begin) for begin in range(0, count, _CHUNK)]
    work = [(tokenizer, task, mixture, size, f"sft/{task.name}/{seed}/{i}") for i, size in enumerate(chunks)]
    processes = min(processes or len(os.sched_getaffinity(0)), len(work))
    if processes == 1:
        parts = [_draw_chunk(w) for w in work]
    else:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            parts = pool.map(_draw_chunk, work, chunksize=1)
    ids, lengths, prompts = (np.concatenate(column) for column in zip(*parts, strict=True))
    starts = np.cumsum(lengths) - lengths
    as_tensors = [torch.from_numpy(a) for a in (ids, starts, lengths, prompts)]
    return Examples(*as_tensors, pad=tokenizer.pad_token_id)


def check_shares(level, shares: dict) -> None:
    unknown = set(shares) - {*STYLES, "right"}
    if unknown:
        raise ConfigError(f"level {level}: unknown style {sorted(unknown)[0]!r}; known: {', '.join(STYLES)}, right")
    total = sum(shares.get(style, 0.0) for style in STYLES)
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"level {level}: the shares of the styles sum to {total:.3f}; they must sum to 1")


def _draw_chunk(work) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokenizer, task, mixture, count, stream = work
    rng = random.Random(stream)
    levels = list(mixture)
    questions, answers = [], []
    for _ in range(count):
        level = rng.choice(levels)
        shares = mixture[level]
        record = task.sample(rng, level)
        style = rng.choices(STYLES, [shares.get(s, 0.0) for s in STYLES])[0]
        chat = tokenizer.apply_chat_template(list(record.messages), add_generation_prompt=True, tokenize=False)
        questions.append(chat)
        answers.append(demonstrate(record, style, rng, shares.get("right", 0.0)) + tokenizer.eos_token)
    prompt_ids = tokenizer(questions, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    rows = [p + a for p, a in zip(prompt_ids, answer_ids, strict=True)]
    flat = np.fromiter((t for row in rows for t in row), np.int32)
    return flat, np.array([len(r) for r in rows]), np.array([len(p) for p in prompt_ids])
