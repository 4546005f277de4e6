"""What a policy keeps of a prompt, against plain loops in float64; and the recorder's arithmetic."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rltk.kernels.prompt_scores_reference import prompt_scores
from rltk.kernels.state import DecodeSettings, DecodeState
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.policies.policy import build_policy
from rltk.rollout.kv.prefill import Prefill, prefill, rewrite_positions
from rltk.rollout.kv.recorder import NEVER, Deaths
from rltk.rollout.kv.settings import Settings

SCALE = 0.3


def tokens(length, pseudo=0, seed=0):
    """query [T, 4, 8], key and value [T, 2, 8]: two query heads a KV head."""
    draw = torch.Generator().manual_seed(seed)
    shape = (length + pseudo, 2, 8)
    q = torch.randn(length + pseudo, 4, 8, generator=draw, dtype=torch.float64)
    return q, torch.randn(shape, generator=draw, dtype=torch.float64), torch.randn(shape, generator=draw).double()


def attention(query, key):
    """[Hq, T, T] causal attention probabilities."""
    logits = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) * SCALE
    return logits.masked_fill(torch.ones(len(key), len(key)).triu(1).bool(), -math.inf).softmax(-1)


def kept(name, length, keep, *, sinks=2, shared=False, **options):
    policy = build_policy(name, options)
    query, key, _ = tokens(length, policy.pseudo)
    scores = policy.scores(query[None], key[None], length, SCALE, prompt_scores)
    assert scores.shape == (1, 2, length)
    (chosen,) = policy.choose(scores, keep, sinks, shared)
    assert chosen.shape == (1 if shared else 2, keep)
    assert (chosen[:, 1:] > chosen[:, :-1]).all() and (chosen[:, :sinks] == torch.arange(sinks)).all()
    return chosen, attention(query, key)


def best(scores, keep, always):
    """The indices of the `keep` best, `always` among them, ascending."""
    ranked = sorted(range(len(scores)), key=lambda i: (i not in always, -scores[i]))
    return sorted(ranked[:keep])


def test_dapq_keeps_what_the_pseudo_tokens_attend_to():
    length, pseudo, keep = 24, 6, 9
    chosen, probabilities = kept("dapq", length, keep, pseudo=pseudo)
    for head in range(2):
        seen = probabilities[2 * head : 2 * head + 2, length:, :length].mean((0, 1))
        assert chosen[head].tolist() == best(seen.tolist(), keep, {0, 1})


@pytest.mark.parametrize("name", ["snapkv", "longflow"])
def test_snapkv_pools_the_attention_of_the_window_and_keeps_it(name):
    length, window, keep = 30, 4, 11
    chosen, probabilities = kept(name, length, keep, window=window, pool=3)
    for head in range(2):
        seen = probabilities[2 * head : 2 * head + 2, -window:, : length - window].mean((0, 1))
        padded = [0.0, *seen.tolist(), 0.0]
        pooled = [sum(padded[i : i + 3]) / 3 for i in range(len(seen))] + [0.0] * window
        assert chosen[head].tolist() == best(pooled, keep, {0, 1, *range(length - window, length)})


def test_h2o_keeps_what_every_query_attended_to_and_the_newest():
    length, keep = 30, 12
    chosen, probabilities = kept("h2o", length, keep)
    for head in range(2):
        seen = probabilities[2 * head : 2 * head + 2].sum((0, 1))
        assert chosen[head].tolist() == best(seen.tolist(), keep, {0, 1, *range(length - (keep - 2) // 2, length)})


def test_streaming_keeps_the_first_and_the_newest():
    chosen, _ = kept("streaming", 30, 8, shared=True)
    assert chosen[0].tolist() == [0, 1, 24, 25, 26, 27, 28, 29]


def test_heads_that_share_sum_their_scores():
    policy = build_policy("dapq", {})
    scores = torch.tensor([[[0.0, 5, 1, 0, 0], [0.0, 0, 2, 4, 0]]])
    assert policy.choose(scores, 2, 0, True).tolist() == [[[1, 3]]]
    assert policy.choose(scores, 2, 0, False).tolist() == [[[1, 2], [2, 3]]]
    assert scores[0, 0].tolist() == [0, 5, 1, 0, 0]  # left as it was: h2o goes on adding to it


def test_a_window_wider_than_the_budget_leaves_the_sinks():
    chosen, _ = kept("snapkv", 40, 6, window=32)
    assert chosen[0, :2].tolist() == [0, 1] and (chosen >= 0).all()


def cache_of(settings, blocks=12, page=4):
    policy = settings.policy
    decode = DecodeSettings(policy.mode, SCALE, settings.cap, settings.options.sinks, 3 if policy.mode == "h2o" else 0)
    state = DecodeState.allocate(decode, blocks, 2, page, heads=settings.options.heads, record_rows=4)
    state.dropped[:] = 99  # whoever had the blocks before
    memory = SimpleNamespace(settings=settings, block_size=page, dropped=state.dropped)
    return state, memory, torch.full((blocks, 2, page, 16), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize("heads", ["shared", "per_kv_head"])
@pytest.mark.parametrize("name", ["dapq", "h2o"])
def test_prompts_of_a_batch_land_in_their_slots(name, heads):
    """Two of a length over the budget, which are cut together, and one within it between them; a decoding row after
    the first; pseudo tokens in the middle of each prompt."""
    settings = Settings(KVOptions(name, budget=10, heads=heads, sinks=2), 64)
    pseudo, lengths, firsts = settings.pseudo, (17, 5, 17), (9, 3, 4)
    state, memory, cache = cache_of(settings)
    rows, parts, start = [], [], 0
    for number, length in enumerate(lengths):
        q, k, v = tokens(length, pseudo, seed=number)
        engine = [*range(length - 1), *range(length, length + pseudo), length - 1]  # as vLLM computes them
        rows.append((start, length + pseudo, pseudo))
        parts += [(q[engine], k[engine], v[engine])]
        start += length + pseudo
        if number == 0:
            parts.append(tuple(torch.zeros(1, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)))
            start += 1
    query, key, value = (torch.cat(same) for same in zip(*parts, strict=True))
    tables = torch.tensor([[9, 2, 5, 0], [3, 7, 1, 0], [4, 6, 8, 0]], dtype=torch.int32)
    plan = Prefill.plan(rows, list(firsts), tables, memory)
    output = torch.zeros_like(query)
    chosen = prefill(query, key, value, cache, state, plan, settings, SCALE, output)

    keep = settings.kept(17)
    cut = next(number for number, group in enumerate(plan.groups) if group.length == 17)
    assert list(chosen) == [cut] and [prompt.first for prompt in plan.groups[cut].prompts] == [9, 4]
    assert chosen[cut].shape == (2, 1 if heads == "shared" else 2, keep)
    assert state.dropped[list(firsts)].tolist() == [17 + pseudo - keep, pseudo, 17 + pseudo - keep]
    for number, length in enumerate(lengths):
        q, k, v = tokens(length, pseudo, seed=number)
        found = attention(q, k) @ v.repeat_interleave(2, 1).transpose(0, 1)  # [Hq, T, D]
        engine = [*range(length - 1), *range(length, length + pseudo), length - 1]
        at = rows[number][0]
        assert torch.allclose(output[at : at + length + pseudo], found.transpose(0, 1)[engine])
        mine = torch.arange(length)[None] if number == 1 else chosen[cut][number // 2]
        for head in range(2):
            picked = mine[head % len(mine)].tolist()
            slots = cache[tables[number].long(), head].flatten(0, 1)
            assert torch.equal(slots[: len(picked)], torch.cat((k, v), -1)[picked, head])
            assert slots[len(picked) : 12].isnan().all()
            positions = state.slot_pos[tables[number].long(), head].flatten()
            assert positions[: len(picked)].tolist() == picked
            if state.acc is not None:
                received = attention(q, k)[2 * head : 2 * head + 2].sum((0, 1))[picked]
                assert torch.allclose(
                    state.acc[tables[number].long(), head].flatten()[: len(picked)].double(), received
                )


def test_positions_put_pseudo_tokens_behind_the_prompt():
    settings = Settings(KVOptions("dapq", budget=10, options={"pseudo": 3}), 64)
    _, memory, _ = cache_of(settings)
    # A decode row at real position 20, a wrapped prompt of 4, a plain one of 2 (a probe).
    positions = torch.tensor([23, 0, 1, 2, 3, 4, 5, 6, 0, 1])
    tables = torch.tensor([[1, 0], [2, 0]], dtype=torch.int32)
    plan = Prefill.plan([(1, 7, 3), (8, 2, 0)], [1, 2], tables, memory)
    rewrite_positions(
        positions, 3, SimpleNamespace(decode=SimpleNamespace(rows=1, tokens=torch.tensor([0])), prefill=plan)
    )
    assert positions.tolist() == [20, 0, 1, 2, 4, 5, 6, 3, 0, 1]
    padded = torch.tensor([23, 40, 0, 0])
    rewrite_positions(padded, 3, SimpleNamespace(decode=SimpleNamespace(rows=3, tokens=None), prefill=None))
    assert padded.tolist() == [20, 37, 0, 0]


def test_death_times_of_cut_and_overwritten_tokens():
    kept_tokens = np.array([[[0, 2]], [[1, 3]]])  # [layers, heads, kept] of a prompt of 4
    deaths = Deaths(4, 0, kept_tokens)
    deaths.evicted = [(5, np.array([[2], [-1]], np.int32)), (6, np.array([[4], [1]], np.int32))]
    deaths.evicted.append((7, np.array([[5], [3]], np.int32)))  # a step run ahead of the end
    died = deaths.times(8, layers=2, heads=1)
    assert died[0, 0].tolist() == [NEVER, 4, 5, 4, 6, NEVER, NEVER, NEVER]
    assert died[1, 0].tolist() == [4, 6, 4, NEVER, NEVER, NEVER, NEVER, NEVER]
    assert (Deaths(4, 0).times(6, 2, 3) == NEVER).all()
