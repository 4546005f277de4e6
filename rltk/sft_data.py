"""Examples for the warm start: drawn from the tasks' training side, tokenized, kept ragged, padded by micro-batch."""

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
    """ids int16 [total]; starts, lengths, prompts int64 [n]: where each row begins, its tokens, those of its prompt."""

    ids: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    prompts: torch.Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device) -> Examples:
        """Moves the ids; the index tensors stay on the CPU, where micro-batches are cut."""
        return Examples(self.ids.to(device), self.starts, self.lengths, self.prompts, self.pad)

    def micro_batches(self, rows: torch.Tensor, budget: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The rows, shortest first, as (ids, labels) pairs of at most `budget` padded tokens (or one row)."""
        rows = rows[self.lengths[rows].argsort()]
        lengths = self.lengths[rows].tolist()
        pairs, begin = [], 0
        for end in range(1, len(rows) + 1):
            full = end == len(rows) or lengths[end] * (end + 1 - begin) > budget
            if full:
                pairs.append(self._pad(rows[begin:end]))
                begin = end
        return pairs

    def _pad(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.ids.device
        lengths, prompts = self.lengths[rows][:, None].to(device), self.prompts[rows][:, None].to(device)
        width = -(-int(self.lengths[rows].max()) // 8) * 8  # kernels like multiples of 8
        at = torch.arange(width, device=device)[None]
        here = (self.starts[rows][:, None].to(device) + at).clamp(max=len(self.ids) - 1)
        inside = at < lengths
        ids = torch.where(inside, self.ids[here].long(), self.pad)
        labels = torch.where(inside & (at >= prompts), ids, -100)
        return ids, labels


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
