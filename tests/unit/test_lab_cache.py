"""The lab's compressed caches: the engine's rules, and the log-prob of exactly what was seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import rltk
from rltk.errors import ConfigError
from rltk.kernels.decode_reference import decode
from rltk.kernels.prompt_scores_reference import prompt_scores
from rltk.kernels.state import DecodeSettings, DecodeState
from rltk.lab.cache import build_cache
from rltk.lab.model import Shape, hidden_states, load, logits
from rltk.lab.sampler import Sampler
from rltk.rollout.kv.options import KVOptions

TINY = Path(rltk.__file__).parent / "models" / "tiny"
CPU = torch.device("cpu")
KEYS, GROUP, DIM, PROMPT, CAP, STEPS, PAGE = 2, 3, 8, 7, 12, 20, 16
SHAPE = Shape(1, KEYS * GROUP, KEYS, DIM, 1e-6, 1e4, 9, 16)
LENGTHS = [7, 3, 5]
POLICIES = [("longflow", "longflow"), ("h2o", "h2o"), ("streaming", "ring")]


def cache(kv, prompt=PROMPT, response=STEPS, bits=16):
    return build_cache(kv, bits, SHAPE, len(LENGTHS), prompt, response, CPU)


@pytest.mark.parametrize("heads", ["shared", "per_kv_head"])
@pytest.mark.parametrize(("name", "mode"), POLICIES)
def test_every_step_is_the_engines(name, mode, heads):
    """Same outputs and, slot by slot, the same keys as the reference that serves the CPU engine."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    ours = cache(KVOptions(name, CAP, heads, sinks=2))
    recent = getattr(ours, "recent", 0)
    settings = DecodeSettings(mode, DIM**-0.5, CAP, sinks=2, recent=recent)
    state = DecodeState.allocate(settings, len(LENGTHS), KEYS, PAGE, heads=heads)
    pages = torch.zeros(len(LENGTHS), KEYS, PAGE, 2 * DIM)
    table = torch.arange(len(LENGTHS), dtype=torch.int32)[:, None]
    assert name != "h2o" or recent > 1

    q, k, v = draw(3, KEYS, GROUP, PROMPT, DIM), draw(3, KEYS, PROMPT, DIM), draw(3, KEYS, PROMPT, DIM)
    length = torch.tensor(LENGTHS)
    ours.fill(0, q, k, v, length)
    pages[:, :, :PROMPT] = torch.cat((k, v), -1)
    for row, n in enumerate(LENGTHS):
        if state.slot_pos is not None:
            state.slot_pos[row] = torch.arange(PAGE, dtype=torch.int32)
        if state.acc is not None:
            queries = q[row, :, :, :n].flatten(0, 1).transpose(0, 1)[None]
            state.acc[row, :, :n] = prompt_scores(queries, k[row, None, :, :n].transpose(1, 2), DIM**-0.5, "sum")[0]
    evicted = 0
    for step in range(STEPS):
        n = length + step + 1
        q, k, v = draw(3, KEYS, GROUP, DIM), draw(3, KEYS, 1, DIM), draw(3, KEYS, 1, DIM) * draw(3, 1, 1, 1).exp()
        expected = torch.zeros(3, KEYS * GROUP, DIM)
        decode(q.flatten(1, 2), k[:, :, 0], v[:, :, 0], pages, table, n.to(torch.int32), state, settings, expected)
        found = ours.attend(0, q, k, v, n)
        assert torch.allclose(found.flatten(1, 2), expected, atol=1e-5)
        for row in range(3):
            held = min(int(n[row]), CAP)
            evicted += int(n[row]) > CAP
            assert torch.equal(ours.stored[0, 0, row, :, :held], pages[row, :, :held, :DIM]), (step, row)
    assert evicted > 30


def deaths(sampler, prompts, seeds):
    """Samples and, for each layer, sequence, KV head and token, the first place of a query that no longer sees it."""
    made, shape = sampler.cache, sampler.shape
    size = (shape.layers, sampler.runs * sampler.rows, shape.kv_heads)
    death = torch.full((*size, sampler.prompt + sampler.response), 10**6)
    holds = torch.arange(made.slots).expand(*size, -1).clone()
    choose = made.slot

    def slot(layer, n):
        at = choose(layer, n).expand(-1, shape.kv_heads)[..., None]
        old = holds[layer].gather(2, at)
        place = (n[:, None, None] - 1).expand_as(at)
        death[layer].scatter_(2, old, torch.where(n[:, None, None] > made.slots, place, 10**6))
        holds[layer].scatter_(2, at, place)
        return choose(layer, n)

    made.slot = slot
    return sampler(sampler.weights, prompts, seeds), death


@pytest.mark.parametrize("heads", ["shared", "per_kv_head"])
@pytest.mark.parametrize("name", ["longflow", "h2o", "streaming"])
def test_log_probs_are_those_of_a_dense_forward_that_sees_what_was_kept(name, heads):
    shape, weights = load(TINY, 2, CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in weights.values():
            value.add_(0.02 * torch.randn(value.shape, generator=generator))
    prompts = [[[5, 9, 30, 41, 7], [17, 8, 90]], [[44, 3], [5, 9, 30, 41, 7]]]
    never = [shape.vocabulary]  # no token: everybody samples to the end
    sampler = Sampler(shape, weights, 2, 6, 24, never, kv=KVOptions(name, 12, heads, sinks=2))
    samples, death = deaths(sampler, prompts, [1, 2])
    full = Sampler(shape, weights, 2, 6, 24, never)(weights, prompts, [1, 2])
    assert (samples.length == 24).all()
    seen_less = 0.0
    for run, row in np.ndindex(2, 2):
        answer = samples.tokens[run, row, : samples.length[run, row]].tolist()
        ids = torch.tensor([prompts[run][row] + answer])
        place = torch.arange(ids.shape[1])
        dead = death[:, run * 2 + row, :, : ids.shape[1]]  # [layers, K, T]

        def attend(layer, q, k, v, dead=dead, place=place):
            seen = (place <= place[:, None]) & (place[:, None] < dead[layer][:, None])  # [K, query, key]
            q = q[0].unflatten(1, (shape.kv_heads, -1)).permute(1, 2, 0, 3)
            k, v = (x[0].transpose(0, 1)[:, None] for x in (k, v))
            alpha = (q @ k.mT * shape.head_dim**-0.5).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
            return (alpha @ v).permute(2, 0, 1, 3).flatten(1, 2)[None]

        own = {n: w[run : run + 1] for n, w in weights.items()}
        with torch.no_grad():
            table = logits(own, hidden_states(shape, own, ids, place[None], attend))[0].log_softmax(-1)
        table = table[len(prompts[run][row]) - 1 : -1]
        expected = table.gather(-1, torch.tensor(answer)[:, None])[:, 0].numpy()
        assert np.allclose(samples.logprobs[run, row, : len(answer)], expected, atol=1e-4)
        gap = samples.logprobs[run, row] - full.logprobs[run, row]
        seen_less = max(seen_less, float(np.abs(gap).max()))
    assert seen_less > 0.01  # the mask matters


@pytest.mark.parametrize("name", ["longflow", "h2o", "streaming"])
def test_a_budget_that_holds_everything_is_the_full_cache(name):
    shape, weights = load(TINY, 1, CPU)
    prompts = [[[5, 9, 30, 41, 7], [17, 8, 90]]]
    full = Sampler(shape, weights, 2, 6, 10, [2])(weights, prompts, [4])
    held = Sampler(shape, weights, 2, 6, 10, [2], kv=KVOptions(name, 999.0))(weights, prompts, [4])
    assert (full.tokens == held.tokens).all() and np.allclose(full.logprobs, held.logprobs, atol=1e-6)


def test_a_second_call_remembers_nothing_of_the_first():
    shape, weights = load(TINY, 1, CPU)
    first, second = [[[5, 9, 30, 41, 7], [17, 8, 90]]], [[[44, 3], [60, 61, 62]]]
    used = Sampler(shape, weights, 2, 6, 20, [2], kv=KVOptions("h2o", 10))
    used(weights, first, [1])
    again = used(weights, second, [2])
    fresh = Sampler(shape, weights, 2, 6, 20, [2], kv=KVOptions("h2o", 10))(weights, second, [2])
    assert (again.tokens == fresh.tokens).all() and np.array_equal(again.logprobs, fresh.logprobs)


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        (KVOptions("snapkv", 0.5), "compresses prompts alone"),
        (KVOptions("fp8"), "lab.kv_bits=8"),
        (KVOptions("longflow", 0.2), "must hold the longest prompt"),
        (KVOptions("longflow", 10, sinks=10), "10 sinks"),
        (KVOptions("longflow"), "keeps nothing"),
        (KVOptions("longflw", 0.5), "no cache policy"),
    ],
)
def test_caches_that_the_lab_does_not_have_are_refused_by_name(kv, words):
    with pytest.raises(ConfigError, match=words):
        cache(kv)
