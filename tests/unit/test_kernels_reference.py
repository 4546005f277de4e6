"""The references themselves: a decode step by step equals dense attention under the death times it records."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rltk.kernels.decode_reference import decode
from rltk.kernels.prompt_scores_reference import prompt_scores
from rltk.kernels.state import NO_CAP, DecodeSettings, DecodeState

KV_HEADS, GROUP, DIM, PAGE = 2, 2, 4, 4
NEVER = torch.iinfo(torch.int32).max


class Engine:
    """Two requests decoded side by side, with what an engine does around the kernels: pages, prefill, the record."""

    def __init__(self, mode: str, heads: str, cap: int, sinks: int, prompt: int, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.length, self.prompt, self.cap = prompt + steps, prompt, cap if mode != "append" else NO_CAP
        self.settings = DecodeSettings(mode, 0.7, self.cap, sinks, recent=2)
        blocks = -(-self.length // PAGE)
        self.table = (1 + torch.randperm(2 * blocks).view(2, blocks)).int()
        self.state = DecodeState.allocate(self.settings, 1 + 2 * blocks, KV_HEADS, PAGE, heads=heads, record_rows=2)
        self.cache = torch.full((1 + 2 * blocks, KV_HEADS, PAGE, 2 * DIM), torch.nan, dtype=torch.float64)
        tokens = torch.randn(3, 2, self.length, GROUP * KV_HEADS, DIM, dtype=torch.float64)
        self.query, self.key, self.value = tokens[0], tokens[1][:, :, :KV_HEADS], tokens[2][:, :, :KV_HEADS]
        self.death = torch.full((2, KV_HEADS, self.length), NEVER)
        self.score = torch.zeros(2, self.length, KV_HEADS)  # what h2o's prompt brings along
        self._prefill()

    def _prefill(self) -> None:
        """Keep a prompt's first cap - 1 tokens: which ones is the policy's business, not the kernel's."""
        kept = self.prompt if self.prompt < self.cap else self.cap - 1
        for row in range(2):
            blocks, at = self.table[row].long()[torch.arange(kept) // PAGE], torch.arange(kept) % PAGE
            self.cache[blocks, :, at] = torch.cat((self.key[row, :kept], self.value[row, :kept]), -1)
            self.state.slot_pos[blocks, :, at] = torch.arange(kept).int()[:, None].expand(-1, KV_HEADS)
            self.state.dropped[self.table[row, 0].long()] = self.prompt - kept
            self.death[row, :, kept : self.prompt] = self.prompt

    def step(self, position: int) -> torch.Tensor:
        """[2, Hq, D]: the outputs at a position; files whom it evicted."""
        at = (slice(None), position)
        output = torch.full((2, KV_HEADS * GROUP, DIM), torch.nan, dtype=torch.float64)
        lens = torch.full((2,), position + 1, dtype=torch.int32)
        decode(
            self.query[at],
            self.key[at],
            self.value[at],
            self.cache,
            self.table,
            lens,
            self.state,
            self.settings,
            output,
        )
        for row, head in (self.state.evicted >= 0).nonzero().tolist():
            victim = int(self.state.evicted[row, head])
            assert self.death[row, head, victim] == NEVER, f"{victim} was evicted twice"
            self.death[row, head, victim] = position
        return output

    def dense(self, position: int) -> torch.Tensor:
        """[2, Hq, D]: attention over every earlier token that is not dead yet."""
        alive = self.death[:, :, : position + 1] > position
        k, v = self.key[:, : position + 1].transpose(1, 2), self.value[:, : position + 1].transpose(1, 2)
        q = self.query[:, position].unflatten(1, (KV_HEADS, GROUP))
        logits = (q @ k.transpose(-1, -2) * self.settings.scale).masked_fill(~alive[:, :, None], -torch.inf)
        return (logits.softmax(-1) @ v).flatten(1, 2)


@given(
    mode=st.sampled_from(["longflow", "h2o", "ring", "append"]), heads=st.sampled_from(["shared", "per_kv_head"]),
    cap=st.integers(5, 12), sinks=st.integers(0, 2), prompt=st.integers(0, 20), steps=st.integers(1, 24),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_output_is_dense_attention_under_the_recorded_deaths(mode, heads, cap, sinks, prompt, steps, seed):
    engine = Engine(mode, heads, cap, sinks, prompt, steps, seed)
    for position in range(prompt, prompt + steps):
        torch.testing.assert_close(engine.step(position), engine.dense(position), rtol=1e-9, atol=1e-9)
        alive = (engine.death[:, :, : position + 1] == NEVER).sum(-1)
        lost = max(0, prompt - (cap - 1)) if prompt >= cap and mode != "append" else 0
        assert (alive == min(position + 1 - lost, engine.cap)).all()
    sinks = min(sinks, prompt + steps)
    assert (engine.death[:, :, :sinks] == NEVER).all(), "a sink died"
    if heads == "shared":
        assert torch.equal(engine.death[:, 0], engine.death[:, 1])
    if mode == "ring" and prompt < cap:  # besides the sinks, the newest: the oldest dies first
        dead = (engine.death[0, 0] != NEVER).nonzero().squeeze(1)
        assert dead.tolist() == list(range(sinks, sinks + len(dead)))


@pytest.mark.parametrize("heads", ["shared", "per_kv_head"])
@pytest.mark.parametrize("mode", ["longflow", "h2o"])
def test_the_victim_is_the_token_of_least_score(mode, heads):
    """The same choice, made from the whole sequence a token at a time."""
    cap, sinks, steps = 7, 1, 20
    engine = Engine(mode, heads, cap, sinks, 0, steps, seed=3)
    received = torch.zeros(2, KV_HEADS, steps, dtype=torch.float64)
    expected: torch.Tensor | None = None
    for position in range(steps):
        engine.step(position)
        if expected is not None:
            assert torch.equal(engine.state.evicted.long(), expected)
        alive = engine.death == NEVER
        alive[:, :, position + 1 :] = False
        q = engine.query[:, position].unflatten(1, (KV_HEADS, GROUP))
        logits = torch.einsum("rhgd,rthd->rhgt", q, engine.key) * engine.settings.scale
        alpha = logits.masked_fill(~alive[:, :, None], -torch.inf).softmax(-1).sum(2)
        received += alpha
        score = alpha * engine.value.abs().sum(-1).transpose(1, 2) if mode == "longflow" else received.clone()
        score[~alive] = torch.inf
        score[:, :, :sinks] = torch.inf
        if mode == "h2o":
            score[:, :, position - 1 :] = torch.inf  # the two newest
        if heads == "shared":
            score = score.sum(1, keepdim=True).expand(-1, KV_HEADS, -1)
        expected = score.argmin(-1) if position + 1 >= cap else None


def test_a_new_owner_of_a_block_starts_anew():
    """h2o: what an overwritten slot had received is not the new token's."""
    engine = Engine("h2o", "shared", 5, 0, 0, 9, seed=1)
    for position in range(9):
        engine.step(position)
    total = engine.state.acc[engine.table.long()].sum((1, 3))  # [row, Hkv]
    assert (total < 9 * GROUP).all()  # every step hands out GROUP a head; what died took its share along
    assert torch.equal(engine.state.evicted[:, 0], engine.state.evicted[:, 1])


@pytest.mark.parametrize(("window", "length"), [(1, 1), (3, 9), (300, 300)])
def test_prompt_scores_are_rows_of_causal_attention(window, length):
    torch.manual_seed(0)
    query = torch.randn(2, length, 4, DIM, dtype=torch.float64)
    key = torch.randn(2, length, KV_HEADS, DIM, dtype=torch.float64)
    logits = torch.einsum("nqhgd,nkhd->nhgqk", query.unflatten(2, (KV_HEADS, 2)), key) * 0.5
    whole = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
    seen = whole[..., length - window :, :]
    torch.testing.assert_close(prompt_scores(query[:, -window:], key, 0.5), seen.mean((2, 3)))
    torch.testing.assert_close(prompt_scores(query[:, -window:], key, 0.5, "sum"), seen.sum((2, 3)))


def test_prompt_scores_refuses_what_cannot_be():
    query, key = torch.zeros(1, 3, 2, 4), torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match="3 queries observe 2 keys"):
        prompt_scores(query, key, 1.0)
    with pytest.raises(ValueError, match="'max'"):
        prompt_scores(query[:, :1], key, 1.0, "max")
