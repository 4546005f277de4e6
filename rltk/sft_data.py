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
from rltk.rollout.tokens import render, turn_end
from rltk.tasks import demonstrations, judge_demonstrations, tool_demonstrations

# Words that later uses of the tokenizer (tools, judging, users' problems) meet often.
_WORDS = "system tool python print step answer problem solution paragraph wrong right first result the of and is not"
_CHUNK = 5000  # examples drawn from one random stream
WITH_TOOLS = ("arithmetic_tool",)  # tasks whose responses call tools
IN_PARTS = {"arithmetic_tool": tool_demonstrations, "judging": judge_demonstrations}  # others: demonstrations


@dataclass(frozen=True)
class Examples:
    """ids int32 and learnt bool [total]: tokens, and which of them the model is to write; starts and lengths int64 [n]:
    where each example begins, and its tokens."""

    ids: torch.Tensor
    learnt: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.lengths)


def pack(parts: list[tuple[Examples, torch.Tensor]], width: int, device="cpu") -> dict[str, torch.Tensor]:
    """Model inputs that hold the chosen examples (indices [m] of each part) in rows of `width` tokens, without padding
    between them: `input_ids`, `labels` (-100 on padding and on all that the model is not to write) and `position_ids`
    int64 [R, width], and `attention_mask` bool [R, 1, width, width], causal and confined to each example.
    """
    lengths = torch.cat([e.lengths[chosen] for e, chosen in parts])
    places = [_spans(e.starts[chosen], e.lengths[chosen]) for e, chosen in parts]
    tokens = torch.cat([e.ids[at] for (e, _), at in zip(parts, places, strict=True)]).long()
    learnt = torch.cat([e.learnt[at] for (e, _), at in zip(parts, places, strict=True)])
    slots, rows = _place(lengths.tolist(), width)

    here = _spans(slots, lengths)
    position = _spans(torch.zeros_like(lengths), lengths)
    document = torch.arange(len(lengths)).repeat_interleave(lengths)

    def laid_out(fill: int, values: torch.Tensor) -> torch.Tensor:
        flat = torch.full((rows * width,), fill)
        flat[here] = values
        return flat.view(rows, width).to(device)

    documents = laid_out(-1, document)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return {
        "input_ids": laid_out(parts[0][0].pad, tokens),
        "labels": laid_out(-100, torch.where(learnt, tokens, -100)),
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
                _, solution = _demonstrate(task, record, styles(task)[0], rng)
                yield f"assistant\n{''.join(text for text, _ in solution)}\n"
    for word in _WORDS.split():
        yield f"{word} {word} " * 50


def draw_examples(tokenizer, task, mixture: dict, count: int, seed: int, processes: int = 0) -> Examples:
    """`count` prompts with responses in the styles of `mixture`: {level: {style: share, ..., "right": chance}}.

    Levels are drawn uniformly. The result depends on the arguments but for `processes` (0: one a core).
    """
    for level, shares in mixture.items():
        check_shares(level, shares, task)
    chunks = [min(_CHUNK, count - begin) for begin in range(0, count, _CHUNK)]
    work = [(tokenizer, task, mixture, size, f"sft/{task.name}/{seed}/{i}") for i, size in enumerate(chunks)]
    processes = min(processes or len(os.sched_getaffinity(0)), len(work))
    if processes == 1:
        parts = [_draw_chunk(w) for w in work]
    else:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            parts = pool.map(_draw_chunk, work, chunksize=1)
    ids, learnt, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    starts = np.cumsum(lengths) - lengths
    as_tensors = [torch.from_numpy(a) for a in (ids, learnt, starts, lengths)]
    return Examples(*as_tensors, pad=tokenizer.pad_token_id)


def styles(task) -> tuple[str, ...]:
    """The styles of responses that there are for this task, the sound one first."""
    return IN_PARTS.get(task.name, demonstrations).STYLES


def check_shares(level, shares: dict, task) -> None:
    """Raises ConfigError for a style that the task has not, and for shares that are not all there is."""
    known = [*styles(task), *(() if task.name in IN_PARTS else ("right",))]
    unknown = set(shares) - set(known)
    if unknown:
        raise ConfigError(f"level {level}: unknown style {sorted(unknown)[0]!r}; known: {', '.join(known)}")
    total = sum(share for style, share in shares.items() if style != "right")
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"level {level}: the shares of the styles sum to {total:.3f}; they must sum to 1")


def _demonstrate(task, record, style: str, rng: random.Random, right: float = 0.0):
    """A conversation and the response to it in parts: text, and whether the model is to write it."""
    if task.name in IN_PARTS:
        return IN_PARTS[task.name].demonstrate(record, style, rng)
    return record.messages, [(demonstrations.demonstrate(record, style, rng, right), True)]


def _draw_chunk(work) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every part is tokenized by itself, as in a rollout: what a tool returns never merges with what stands beside."""
    tokenizer, task, mixture, count, stream = work
    rng = random.Random(stream)
    end = turn_end(tokenizer) or tokenizer.eos_token
    levels, known = list(mixture), styles(task)
    parts, examples = [], []
    for number in range(count):
        level = rng.choice(levels)
        shares = mixture[level]
        record = task.sample(rng, level)
        style = rng.choices(known, [shares.get(s, 0.0) for s in known])[0]
        messages, response = _demonstrate(task, record, style, rng, shares.get("right", 0.0))
        parts += [(render(tokenizer, messages, more=True), False), *response, (end, True)]
        examples += [number] * (len(response) + 2)
    ids = tokenizer([text for text, _ in parts], add_special_tokens=False)["input_ids"]
    sizes = np.array([len(part) for part in ids])
    flat = np.fromiter((t for part in ids for t in part), np.int32)
    learnt = np.repeat([learnt for _, learnt in parts], sizes)
    return flat, learnt, np.bincount(examples, weights=sizes).astype(np.int64)
