"""Sampling from R stacked models: each token with the exact log-prob it was sampled with.

One uniform number a token, drawn in advance from each run's own generator, and the inverse of the distribution
function: the tokens of a run depend on its seed alone, not on its neighbours in the stack. On a GPU the decode step is
a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rltk.lab.cache import build_cache
from rltk.lab.model import Shape, Weights, causal, hidden_states, logits
from rltk.rollout.kv.options import KVOptions

FULL = KVOptions()
CHECK = 8  # decode steps between two looks at whether everybody is done


@dataclass(frozen=True)
class Samples:
    """tokens int64 [R, B, T] and their log-probs float32 [R, B, T]; length int64 [R, B], the stop token included."""

    tokens: np.ndarray
    logprobs: np.ndarray
    length: np.ndarray
    truncated: np.ndarray  # bool [R, B]


class Sampler:
    """For `rows` prompts a run of at most `prompt` tokens, `response` tokens at most. The weights are copied in.

    `kv` and `kv_bits` say what the cache keeps (rltk.lab.cache): what is sampled, and its log-prob, is that of a model
    with a compressed or quantised cache.
    """

    def __init__(
        self, shape: Shape, weights: Weights, rows: int, prompt: int, response: int, stop: Sequence[int],
        kv_bits: int = 16, kv: KVOptions = FULL,
    ) -> None:  # fmt: skip
        self.shape, self.rows, self.prompt, self.response = shape, rows, prompt, response
        self.weights = {name: value.detach().clone() for name, value in weights.items()}
        first = next(iter(self.weights.values()))
        self.runs, self.device = first.shape[0], first.device
        self.stop = torch.tensor(list(stop), device=self.device)
        self.cache = build_cache(kv, kv_bits, shape, self.runs * rows, prompt, response, self.device)
        self.token = torch.zeros(self.runs, rows, dtype=torch.long, device=self.device)
        self.position = torch.zeros_like(self.token)  # of `token` in its sequence
        self.done = torch.zeros(self.runs, rows, dtype=torch.bool, device=self.device)
        self.step = torch.zeros(1, dtype=torch.long, device=self.device)
        self.chance = torch.zeros(self.runs, rows, response, device=self.device)
        self.tokens = torch.zeros(self.runs, rows, response, dtype=torch.long, device=self.device)
        self.logprobs = torch.zeros(self.runs, rows, response, device=self.device)
        self.greedy = torch.zeros(1, dtype=torch.bool, device=self.device)
        self.temperature = torch.ones(1, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(
        self,
        weights: Weights,
        prompts: Sequence[Sequence[Sequence[int]]],
        seeds: Sequence[int],
        temperature: float = 1.0,
        greedy: bool = False,
    ) -> Samples:
        """prompts [R][B] ids; one seed a run. Log-probs are of softmax(logits / temperature)."""
        for name, value in self.weights.items():
            value.copy_(weights[name])
        for run, seed in enumerate(seeds):
            generator = torch.Generator(self.device).manual_seed(seed)
            self.chance[run] = torch.rand(self.rows, self.response, generator=generator, device=self.device)
        self.temperature.fill_(temperature)
        self.greedy.fill_(greedy)
        for state in (self.done, self.step, self.tokens, self.logprobs):
            state.zero_()
        self.cache.reset()
        self._choose(self._prefill(prompts))
        for turn in range(1, self.response):
            self._decode()
            if turn % CHECK == 0 and bool(self.done.all()):
                break
        tokens, stopped = self.tokens.cpu().numpy(), torch.isin(self.tokens, self.stop).cpu().numpy()
        ends = stopped.any(-1)
        length = np.where(ends, stopped.argmax(-1) + 1, self.response)
        return Samples(tokens, self.logprobs.cpu().numpy(), length, ~ends)

    def _prefill(self, prompts: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Fill the cache; the hidden state [R, B, d] of each prompt's last token."""
        ids = np.zeros((self.runs, self.rows, self.prompt), np.int64)
        length = np.zeros((self.runs, self.rows), np.int64)
        for run, row in np.ndindex(self.runs, self.rows):
            prompt = prompts[run][row]
            ids[run, row, : len(prompt)], length[run, row] = prompt, len(prompt)
        attend, places = causal(self.rows), torch.arange(self.prompt, device=self.device)
        tokens = torch.from_numpy(length).to(self.device)

        def store(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            def split(x: Tensor) -> Tensor:  # [S, heads, P, h]
                return x.reshape(self.runs * self.rows, self.prompt, *x.shape[2:]).transpose(1, 2)

            grouped = split(q).unflatten(1, (self.shape.kv_heads, -1))
            self.cache.fill(layer, grouped, split(k), split(v), tokens.flatten())
            return attend(layer, q, k, v)

        flat = torch.from_numpy(ids).to(self.device).reshape(self.runs, -1)
        hidden = hidden_states(self.shape, self.weights, flat, places.repeat(self.runs, self.rows), store)
        last = tokens - 1
        self.position.copy_(last)
        hidden = hidden.unflatten(1, (self.rows, self.prompt))
        return hidden.gather(2, last[..., None, None].expand(-1, -1, 1, hidden.shape[-1]))[:, :, 0]

    def _decode(self) -> None:
        """One more token for everybody; on a GPU the recorded graph of it."""
        if self.device.type != "cuda":
            self._advance()
        elif self.graph is not None:
            self.graph.replay()
        else:
            self._record()

    def _record(self) -> None:
        """Run the step once for real (which also warms the libraries up), then capture it; capture computes nothing."""
        self._advance()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._advance()

    def _advance(self) -> None:
        self.position += 1
        hidden = hidden_states(self.shape, self.weights, self.token, self.position, self._attend)
        self._choose(hidden)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The query heads that share a key head are the rows of one product.
        shape = (self.runs * self.rows, self.shape.kv_heads, -1, self.shape.head_dim)
        grouped, key, value = q.reshape(shape), k.reshape(shape), v.reshape(shape)
        return self.cache.attend(layer, grouped, key, value, self.position.flatten() + 1).reshape(q.shape)

    def _choose(self, hidden: Tensor) -> None:
        """Sample the next token from hidden states [R, B, d]; whoever is done gets nothing more."""
        logprobs = (logits(self.weights, hidden) / self.temperature).log_softmax(-1)
        below = logprobs.exp().cumsum(-1)
        chance = self.chance.gather(2, self.step.expand(self.runs, self.rows, 1)) * below[..., -1:]
        drawn = (below <= chance).sum(-1).clamp(max=self.shape.vocabulary - 1)
        token = torch.where(self.greedy, logprobs.argmax(-1), drawn)
        chosen = logprobs.gather(-1, token[..., None])[..., 0]
        place = self.step.expand(self.runs, self.rows, 1)
        self.tokens.scatter_(2, place, torch.where(self.done, 0, token)[..., None])
        self.logprobs.scatter_(2, place, torch.where(self.done, 0.0, chosen)[..., None])
        self.token.copy_(token)
        self.done |= torch.isin(token, self.stop)
        self.step += 1
