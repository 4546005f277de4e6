"""How much a prompt's keys are attended to, in torch: serves the CPU engine, is the oracle of kernels/prompt_scores.py.

One function for every policy, because the observing queries always are the *last* tokens of the keys' sequence:

    snapkv (arXiv 2404.14469), longflow over budget: the prompt's last `window` queries over the prompt's keys
    dapq (arXiv 2603.11564): the pseudo tokens' queries over the prompt's keys followed by the pseudo tokens' own; the
        softmax runs over both, as in the forward that produced the queries; the caller cuts the pseudo columns off
    h2o: every query of the prompt, reduce="sum", which is what decoding goes on adding to
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 256  # queries at a time: 16 384 keys x 256 queries x 16 heads are 268 MB in fp32


def prompt_scores(query: Tensor, key: Tensor, scale: float, reduce: str = "mean") -> Tensor:
    """Causal attention of the last W tokens over all T keys: [N, W, Hq, D], [N, T, Hkv, D] -> [N, Hkv, T] fp32.

    N prompts of one length. Query w sees keys 0 .. T - W + w. reduce: mean or sum over the queries and over the query
    heads of a KV head. Computes in fp32; in float64, which it then returns, if `query` is.
    """
    prompts, window, q_heads, _ = query.shape
    _, length, kv_heads, _ = key.shape
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce={reduce!r}; use mean or sum")
    if window > length:
        raise ValueError(f"{window} queries observe {length} keys; the queries are the last of the keys' tokens")
    dtype = torch.promote_types(query.dtype, torch.float32)
    k = key.to(dtype).permute(0, 2, 3, 1)  # [N, Hkv, D, T]
    columns = torch.arange(length, device=key.device)
    total = torch.zeros(prompts, kv_heads, length, dtype=dtype, device=key.device)
    for start in range(0, window, ROWS):
        rows = torch.arange(start, min(start + ROWS, window), device=key.device)
        q = query[:, rows].to(dtype).unflatten(2, (kv_heads, -1)).transpose(1, 2)  # [N, Hkv, w, G, D]
        last = length - window + rows  # the newest key that each sees
        seen = length - window + start + len(rows)
        logits = (q.flatten(2, 3) @ k[..., :seen]).unflatten(2, (len(rows), -1)) * scale  # [N, Hkv, w, G, seen]
        unseen = columns[:seen] > last[:, None]
        total[..., :seen] += logits.masked_fill_(unseen[:, None], -torch.inf).softmax(-1).sum((2, 3))
    return total / (window * q_heads // kv_heads) if reduce == "mean" else total
