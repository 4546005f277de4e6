"""Compressed caches against stock vLLM and a transformers forward: what the CPU tests and tests/gpu/kv.py share.

A case starts engines, one at a time, and asserts. `python -m tests.integration.kv_cases NAME ...` runs cases in one
process, each on its own: a failure hides none of the others. The last line is JSON: {case: null or what went wrong}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rltk.rollout import kv
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import Settings
from tests.integration.places import TINY

POLICIES = ("longflow", "h2o", "streaming", "dapq", "snapkv", "dapq_longflow")
CONTEXT, BUDGET, BLOCK, RESPONSE = 160, 41, 16, 50  # the budget is no multiple of the block
STOCK_BLOCK = 32  # the stock CPU backend's least
LENGTHS = (1, 5, 40, 41, 42, 100, 17)  # of prompts: under, at and over the budget


@dataclass(frozen=True)
class Place:
    """Where cases run, and how exactly: log-probs apart at most, on average; and how many requests may go other ways
    because two scores nearly tied and a GPU's sums depend on the batch."""

    device: str = "cpu"
    dtype: str = "float32"
    arguments: tuple[tuple[str, Any], ...] = (("enforce_eager", True),)
    most: float = 1e-4
    mean: float = 1e-4
    ties: int = 0


@dataclass
class Sample:
    ids: list[int]
    logprobs: np.ndarray


def set_environment() -> None:
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_USE_FLASHINFER_SAMPLER="0", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
        TRITON_F32_DEFAULT="ieee", VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    )  # fmt: skip
    torch.set_num_threads(1)


@contextlib.contextmanager
def engine(place: Place, options: KVOptions, **arguments: Any) -> Iterator[Any]:
    """An LLMEngine that is gone afterwards: vLLM keeps one set of process groups."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    memory = {"kv_cache_memory_bytes": 2**26, "max_num_seqs": 16, "max_num_batched_tokens": 8192}
    if place.device != "cpu":
        memory["gpu_memory_utilization"] = 0.1
    stock = {"max_model_len": CONTEXT, "enable_prefix_caching": False, "enable_chunked_prefill": False}
    common = {
        "model": str(TINY), "dtype": place.dtype, "block_size": BLOCK,
        "logprobs_mode": "processed_logprobs", "generation_config": "vllm", "disable_log_stats": True, "seed": 0,
    }  # fmt: skip
    merged = {**memory, **stock, **common, **kv.engine_args(options, CONTEXT), **dict(place.arguments), **arguments}
    running = LLMEngine.from_engine_args(EngineArgs(**merged))
    try:
        yield running
    finally:
        running.engine_core.shutdown()
        del running
        gc.collect()
        if place.device != "cpu":
            torch.cuda.empty_cache()


def add(running: Any, prompts: dict[str, list[int]], **changes: Any) -> None:
    from vllm import SamplingParams

    for number, (uid, prompt) in enumerate(prompts.items()):
        values = {"temperature": 1.0, "max_tokens": RESPONSE, "seed": number, "logprobs": 0, "ignore_eos": True}
        params = SamplingParams(detokenize=False, **{**values, **changes})
        running.add_request(uid, {"prompt_token_ids": prompt}, params)


def finish(running: Any) -> dict[str, Sample]:
    found = {}
    while running.has_unfinished_requests():
        for output in running.step():
            if output.finished:
                sample = output.outputs[0]
                pairs = zip(sample.token_ids, sample.logprobs or [], strict=False)
                logprobs = np.array([at[token].logprob for token, at in pairs], np.float32)
                found[output.request_id] = Sample(list(sample.token_ids), logprobs)
    return found


def sample(running: Any, prompts: dict[str, list[int]], **changes: Any) -> dict[str, Sample]:
    add(running, prompts, **changes)
    return finish(running)


def some_prompts(lengths: tuple[int, ...] = LENGTHS) -> dict[str, list[int]]:
    """Token soup: the weights are trained, so what they make of it does not repeat itself."""
    draw = torch.Generator().manual_seed(0)
    return {f"p{n}": torch.randint(3, 380, (n,), generator=draw).tolist() for n in lengths}


def assert_same(found: dict[str, Sample], expected: dict[str, Sample], place: Place) -> None:
    wrong = []
    for uid in found:
        same = found[uid].ids == expected[uid].ids
        apart = np.abs(found[uid].logprobs - expected[uid].logprobs).max() if same else np.inf
        if apart > place.most:
            wrong.append(f"{uid}: log-probs {apart:.2g} apart" if same else f"{uid}: other tokens")
    assert len(wrong) <= place.ties, "; ".join(wrong)


class Reference:
    """The model in transformers, attending with the mask `key <= query < death[layer, head, key]`."""

    def __init__(self, device: str, noise: int | None = None) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("death_times", self._attend)
        self.device = "cpu" if device == "cpu" else "cuda"
        self.model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="death_times")
        if noise is not None:
            draw = torch.Generator().manual_seed(noise)
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        self.model.to(self.device)
        self._deaths: torch.Tensor | None = None

    def _attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
        groups, length = query.shape[1] // key.shape[1], query.shape[2]
        at = torch.arange(length, device=query.device)
        seen = (at <= at[:, None])[None]  # [1, query, key]
        if self._deaths is not None:
            seen = seen & (at[:, None] < self._deaths[module.layer_idx][:, None])
            seen = seen.repeat_interleave(query.shape[1] // len(seen), 0)
        logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
        weights = logits.masked_fill(~seen[None], -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    def logprobs(self, ids: list[int], deaths: np.ndarray | None = None) -> np.ndarray:
        """float32 [n - 1], of every token after the first."""
        self._deaths = None if deaths is None else torch.from_numpy(deaths).to(self.device)
        with torch.no_grad():
            logits = self.model(torch.tensor([ids], device=self.device)).logits[0, :-1].float()
        targets = torch.tensor(ids[1:], device=self.device)
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].cpu().numpy()


def assert_replays(
    running: Any, prompts: dict[str, list[int]], samples: dict[str, Sample], reference: Reference, settings: Settings,
    place: Place,
) -> None:  # fmt: skip
    """Every sampled token's log-prob is that of a forward under the recorded death times, which are the policy's."""
    lengths = {uid: len(prompts[uid]) + len(found.ids) for uid, found in samples.items()}
    deaths = kv.take_death_times(running, lengths)
    dead = 0
    for uid, found in samples.items():
        prompt, died = prompts[uid], deaths[uid]
        layers, heads = reference.model.config.num_hidden_layers, reference.model.config.num_key_value_heads
        heads = 1 if settings.options.heads == "shared" else heads
        assert died.shape == (layers, heads, lengths[uid]) and died.dtype == np.int32
        alive = (died > np.arange(lengths[uid] - 1)[:, None, None, None]) & (
            np.arange(lengths[uid]) <= np.arange(lengths[uid] - 1)[:, None, None, None]
        )  # [query, layer, head, key]
        held = alive[len(prompt) :].sum(-1)  # slots that each decode step saw
        most = np.minimum(np.arange(len(prompt), lengths[uid] - 1) + 1, settings.cap)
        if not settings.policy.evicts:
            most = settings.kept(len(prompt)) + 1 + np.arange(len(held))
        assert (held == most[:, None, None]).all(), f"{uid}: a step saw {held.min()} to {held.max()} slots"
        assert (died[..., : settings.options.sinks] > lengths[uid]).all(), f"{uid}: a sink died"
        dead += int((died < lengths[uid]).sum())
        expected = reference.logprobs(prompt + found.ids, died)[len(prompt) - 1 :]
        apart = np.abs(expected - found.logprobs)
        assert apart.max() < place.most and apart.mean() < place.mean, (
            f"{uid}: log-probs {apart.max():.2g}, {apart.mean():.2g} on average, from a forward under the death times"
        )
        if len(prompt) > settings.cap:
            plain = reference.logprobs(prompt + found.ids)[len(prompt) - 1 :]
            assert np.abs(plain - found.logprobs).max() > 0.01, f"{uid}: as if nothing had been evicted"
    assert dead, "no token ever died"


def assert_scores(running: Any, reference: Reference, place: Place) -> None:
    """Prompt log-probs (the weight probe's) are the whole prompt's under full attention, whatever the budget."""
    from vllm import SamplingParams

    draw = torch.Generator().manual_seed(1)
    sequences = {f"s{n}": torch.randint(3, 380, (n,), generator=draw).tolist() for n in (2, 30, 120)}
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    for uid, sequence in sequences.items():
        running.add_request(uid, {"prompt_token_ids": sequence}, params)
    while running.has_unfinished_requests():
        for output in running.step():
            rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            found = np.array([row[token].logprob for token, row in rows])
            apart = np.abs(found - reference.logprobs(sequences[output.request_id])).max()
            assert apart < place.most, (
                f"prompt log-probs of {len(sequences[output.request_id])} tokens are {apart:.2g} off"
            )


def assert_graphs(running: Any, place: Place) -> None:
    """A decode step inside a CUDA graph never enters Python; an eager one does, in every layer."""
    from rltk.rollout.kv.backend import CompressedAttention

    original, entered = CompressedAttention.forward, []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        entered.append(self)
        return original(self, *args, **kwargs)

    CompressedAttention.forward = forward
    try:
        sample(running, {"counted": [5, 6, 7]}, max_tokens=12)
    finally:
        CompressedAttention.forward = original
    times = len(entered) / len(set(entered))
    if dict(place.arguments).get("enforce_eager"):
        assert times >= 12, f"an eager engine ran attention {times} times a layer for 12 tokens"
    else:
        assert times <= 2, f"attention ran {times} times a layer outside graphs: once for the prompt is enough"


def preemptions(running: Any) -> int:
    return sum(request.num_preemptions for request in scheduler(running).requests.values())


def scheduler(running: Any) -> Any:
    return running.engine_core.engine_core.scheduler


# --- cases ---


def equals_stock(place: Place) -> None:
    """At a budget no sequence reaches, every policy gives the stock cache's tokens and log-probs."""
    prompts, blocks = some_prompts((1, 33, 100)), {"block_size": STOCK_BLOCK}
    with engine(place, KVOptions(), **blocks) as stock:
        assert kv.prove_active(stock, KVOptions()) is None
        expected = sample(stock, prompts, max_tokens=32)
    assert len({tuple(found.ids) for found in expected.values()}) == len(prompts)
    for name in POLICIES:
        heads = "per_kv_head" if name in ("longflow", "dapq") else "shared"
        options = KVOptions(name, budget=CONTEXT, heads=heads)
        with engine(place, options, **blocks) as running:
            active = kv.prove_active(running, options)
            assert active is not None and active.cap_blocks == CONTEXT // STOCK_BLOCK
            assert_same(sample(running, prompts, max_tokens=32), expected, place)


def policy(place: Place, name: str, heads: str) -> dict[str, Sample]:
    """One engine with too small a budget and too small a pool: what it samples is exactly what its death times say,
    whoever ran in the same blocks before."""
    options = KVOptions(name, budget=BUDGET, heads=heads, record=True)
    settings, prompts = Settings(options, CONTEXT), some_prompts()
    blocks = 11 if settings.policy.evicts else 21  # some wait, and blocks change hands
    reference = Reference(place.device)
    with engine(place, options, num_gpu_blocks_override=blocks) as running:
        active = kv.prove_active(running, options)
        assert active is not None and active.blocks == blocks - 1
        together = sample(running, prompts)
        assert_replays(running, prompts, together, reference, settings, place)
        alone = {uid: sample(running, {uid: prompts[uid]}, seed=number)[uid] for number, uid in enumerate(prompts)
                 if uid in ("p1", "p42", "p100")}  # fmt: skip
        assert_same(alone, together, place)
        assert_scores(running, reference, place)
        assert len(sample(running, {"one": prompts["p100"]}, max_tokens=1)["one"].ids) == 1
        assert_graphs(running, place)
    return together


def abort_pause_and_new_weights(place: Place, tmp: str) -> None:
    """Requests cut off, an engine held in mid-sequence, other weights: what runs afterwards is its solo run."""
    from rltk.rollout import weight_file

    options = KVOptions("longflow", budget=BUDGET, record=True)
    settings, prompts = Settings(options, CONTEXT), some_prompts()
    extension = "rltk.rollout.weights.WeightReceiver"
    with engine(place, options, num_gpu_blocks_override=11, worker_extension_cls=extension) as running:
        expected = sample(running, prompts)
        add(running, prompts)
        for _ in range(20):
            running.step()
        running.abort_request(list(prompts)[::2])
        for _ in range(20):
            running.step()
        core = running.engine_core.engine_core
        core.pause_scheduler("keep", clear_cache=False)
        running.step()  # what was under way when the pause came may still arrive
        assert not any(running.step() for _ in range(3)) and running.has_unfinished_requests()
        core.resume_scheduler()
        survivors = finish(running)
        assert set(survivors) == set(list(prompts)[1::2])
        assert_same(survivors, expected, place)
        assert_same(sample(running, prompts), expected, place)
        assert preemptions(running) == 0

        moved = Reference(place.device, noise=1)
        weight_file.write(_path(tmp), moved.model.named_parameters(), (0, 1))
        running.collective_rpc("rltk_load_weights", args=(str(_path(tmp)),))
        assert running.reset_prefix_cache()
        after = sample(running, prompts)
        assert [found.ids for found in after.values()] != [found.ids for found in expected.values()]
        assert_replays(running, prompts, after, moved, settings, place)
        assert_scores(running, moved, place)


def tool_turns(name: str) -> None:
    """Trajectories by turns: each turn is a request over all that came before, prefilled and compressed again, and its
    log-probs are those of a forward under its own death times. Several have two tool turns or more."""
    from rltk.rollout.engine import EngineOptions, RolloutEngine
    from rltk.rollout.steps import Call, Done
    from rltk.rollout.turns import Turns
    from tests.integration import turn_cases

    options, reference = KVOptions(name, budget=BUDGET, record=True), Reference("cpu")
    running = RolloutEngine(EngineOptions(str(TINY), "float32", 208, "cpu", 16, kv_cache_gib=0.06, kv=options))
    shared = turn_cases.settings()
    problem = "What is 31 + 71 - 17 + 72 + 15?"  # worked out in up to four calls: from the second on over the budget
    compressed, most, apart_without = 0, 0.0, 0.0
    calls: list[int] = []  # by trajectory
    try:
        for number in range(8):
            turns = Turns(turn_cases.problem(number, problem), shared, [])
            while not isinstance(step := turns.next(), Done):
                if isinstance(step, Call):
                    turns.results([turn_cases.worked_out(request) for request in step.requests])
                    continue
                running.add([step.request])
                found: list[Any] = []
                while running.unfinished:
                    found += running.step()
                turns.sampled(found[0])
                sent, died = step.request.prompt_ids, found[0].deaths
                ids = sent + found[0].ids.tolist()
                assert died.shape[-1] == len(ids)
                most = max(most, np.abs(reference.logprobs(ids, died)[len(sent) - 1 :] - found[0].logprobs).max())
                if len(sent) <= BUDGET:
                    continue
                held = (died[..., : len(sent)] > len(sent)).sum(-1)  # of the prefix, by this turn's first token
                assert (held <= BUDGET).all(), f"{held.max()} of a prefix of {len(sent)} tokens"
                compressed += 1
                plain = reference.logprobs(ids)[len(sent) - 1 :]
                apart_without = max(apart_without, np.abs(plain - found[0].logprobs).max())
            trajectory = turns.trajectory()
            assert trajectory.ids.tolist() == ids and len(trajectory.logprobs) == trajectory.length
            calls.append(sum(use.status == "ok" for use in trajectory.calls))
    finally:
        running._engine.engine_core.shutdown()
    seen = f"{compressed} compressed prefixes; calls by trajectory: {calls}"
    assert sum(number >= 2 for number in calls) >= 3 and compressed >= 6, seen
    assert most < 1e-4, f"log-probs {most:.2g} from a forward under the turn's death times"
    assert apart_without > 0.01, "as if nothing had been evicted"


def pool(place: Place, stock: bool = True) -> None:
    """As many sequences at once as the arithmetic says, none preempted; the stock cache in the same pool preempts."""
    blocks, response, prompt = 10, 120, some_prompts((17,))["p17"]
    prompts = {f"q{i}": prompt for i in range(blocks)}
    cases = {"longflow": (KVOptions("longflow", budget=2 * STOCK_BLOCK), 2)}  # options, blocks of one sequence
    if stock:
        cases["stock"] = KVOptions(), None
    steps = {}
    for name, (chosen, held) in cases.items():
        with engine(place, chosen, num_gpu_blocks_override=blocks + 1, block_size=STOCK_BLOCK) as running:
            most = preempted = steps[name] = 0
            add(running, prompts, max_tokens=response)
            while running.has_unfinished_requests():
                running.step()
                steps[name] += 1
                most = max(most, len(scheduler(running).running))
                preempted = max(preempted, preemptions(running))
            if held is None:
                assert preempted > 0, "the pool is too large to show anything"
                continue
            assert preempted == 0 and most == blocks // held, f"{name}: {most} at once, {preempted} preempted"
            manager = scheduler(running).kv_cache_manager.coordinator.single_type_managers[0]
            assert manager.most_blocks <= blocks and not manager.plans
            assert manager.block_pool.get_num_free_blocks() == blocks
    assert not stock or steps["longflow"] < 0.7 * steps["stock"], steps


def refused(place: Place) -> None:
    """Arguments and requests that contradict the cache: an error before a token."""
    import pytest
    from vllm import EngineArgs, SamplingParams
    from vllm.exceptions import VLLMValidationError

    from rltk.errors import ConfigError, RltkError

    options = KVOptions("dapq", budget=BUDGET)
    wrong = {
        "prefix caching": {"enable_prefix_caching": True},
        "chunked prefill": {"enable_chunked_prefill": True},
        "speculative": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
        "one block of 48": {"block_size": 48},
        "max_model_len=400": {"max_model_len": 400},
    }
    for match, arguments in wrong.items():
        given = {"block_size": BLOCK, **kv.engine_args(options, CONTEXT), **arguments}
        with pytest.raises(ConfigError, match=match):
            EngineArgs(str(TINY), dtype=place.dtype, **given).create_engine_config()
    with engine(place, options) as running:
        prompt = {"prompt_token_ids": [5] * 20}
        with pytest.raises(VLLMValidationError, match="max_tokens=1"):
            running.add_request("a", prompt, SamplingParams(max_tokens=2, prompt_logprobs=0))
        with pytest.raises(VLLMValidationError, match="min_tokens"):
            running.add_request("b", prompt, SamplingParams(max_tokens=2, min_tokens=1))
        with pytest.raises(VLLMValidationError, match="context of 160"):
            running.add_request("c", {"prompt_token_ids": [5] * 170}, SamplingParams(max_tokens=2))
        assert not running.has_unfinished_requests()
        with pytest.raises(RltkError, match="keeps no death times"):
            kv.take_death_times(running, {"a": 3})
        for other in (KVOptions("dapq", budget=BUDGET + 1), KVOptions("longflow", budget=BUDGET), KVOptions()):
            with pytest.raises(RltkError):
                kv.prove_active(running, other)
        core = running.engine_core.engine_core
        add(running, {"lost": [5] * 20})
        running.step()
        core.pause_scheduler("keep", clear_cache=True)
        core.resume_scheduler()
        with pytest.raises(RltkError, match="lost its blocks"):
            finish(running)


def without_the_plugin(place: Place) -> None:
    """In a process that has not loaded the plugin (VLLM_PLUGINS is empty), no engine passes for a compressed one."""
    import pytest

    from rltk.errors import ConfigError, RltkError

    options, blocks = KVOptions("longflow", budget=BUDGET), {"block_size": STOCK_BLOCK}
    with pytest.raises(ConfigError, match="has not loaded the vLLM plugin rltk_kv"), engine(place, options, **blocks):
        pass
    gone = {"worker_extension_cls": ""}  # nor one whose guard was taken away
    with engine(place, options, **blocks, **gone) as running, pytest.raises(RltkError, match="its cache would be full"):
        kv.prove_active(running, options)


def child_process(place: Place) -> None:
    """LLM(...) as anybody starts it, its engine in a process of its own."""
    from vllm import LLM, SamplingParams

    from rltk.errors import RltkError

    options = KVOptions("dapq", budget=BUDGET, record=True)
    memory = {"kv_cache_memory_bytes": 2**26} if place.device == "cpu" else {"gpu_memory_utilization": 0.15}
    llm = LLM(str(TINY), dtype=place.dtype, block_size=BLOCK, seed=0, generation_config="vllm", enforce_eager=True,
              logprobs_mode="processed_logprobs", **memory, **kv.engine_args(options, CONTEXT))  # fmt: skip
    active = kv.prove_active(llm, options)
    assert active is not None and active.workers == 1
    prompts = list(some_prompts().values())
    params = SamplingParams(temperature=1.0, max_tokens=RESPONSE, seed=0, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    found = {}
    for output in outputs:
        pairs = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        logprobs = np.array([at[token].logprob for token, at in pairs], np.float32)
        found[output.request_id] = Sample(list(output.outputs[0].token_ids), logprobs)
    sent = {output.request_id: output.prompt_token_ids for output in outputs}
    assert list(sent.values()) == prompts  # as they were sent: pseudo tokens are the engine's own business
    assert_replays(llm, sent, found, Reference(place.device), Settings(options, CONTEXT), place)
    try:
        kv.prove_active(llm, KVOptions("longflow", budget=BUDGET))
    except RltkError:
        return
    raise AssertionError("an engine with dapq passed for one with longflow")


def _path(folder: str) -> Any:
    from pathlib import Path

    return Path(folder) / "weights"


def cases(place: Place, tmp: str) -> dict[str, Callable[[], Any]]:
    """By name; those that pytest leaves to `make test-full` end in ` full`."""
    found: dict[str, Callable[[], Any]] = {
        "equals stock": lambda: equals_stock(place),
        "pool": lambda: pool(place),
        "abort, pause, weights": lambda: abort_pause_and_new_weights(place, tmp),
        "refused": lambda: refused(place),
    }
    if place.device == "cpu":
        found |= {f"tool turns {name}": lambda n=name: tool_turns(n) for name in ("longflow", "dapq")}
    for name in POLICIES:
        for heads in ("shared", "per_kv_head"):
            quick = (heads == "per_kv_head") == (name in ("h2o", "dapq_longflow")) or name == "longflow"
            found[f"{name} {heads}{'' if quick else ' full'}"] = lambda n=name, h=heads: policy(place, n, h)
    return found


def run(chosen: dict[str, Callable[[], Any]]) -> dict[str, str | None]:
    """Every case, whatever the others do: None, or what went wrong."""
    results: dict[str, str | None] = {}
    for name, case in chosen.items():
        start, busy, results[name] = time.perf_counter(), time.process_time(), None
        try:
            case()
        except BaseException as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
        seconds = f"{time.perf_counter() - start:.1f} s, {time.process_time() - busy:.1f} busy"
        print(f"{name:32}{results[name] or 'ok':.90}  {seconds}", file=sys.stderr, flush=True)
    return results


# Cases that want a process of their own, and what its environment must say.
ALONE: dict[str, tuple[Callable[[Place], None], dict[str, str]]] = {
    "without the plugin": (without_the_plugin, {"VLLM_PLUGINS": ""}),
    "child process": (child_process, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
}


def main(names: list[str]) -> None:
    import tempfile

    set_environment()
    with tempfile.TemporaryDirectory() as tmp:
        every = cases(Place(), tmp)
        if names and names[0] in ALONE:
            case, environment = ALONE[names[0]]
            os.environ.update(environment)
            every = {names[0]: lambda: case(Place())}
        print("\n" + json.dumps(run({name: every[name] for name in names or every})))


if __name__ == "__main__":
    main(sys.argv[1:])
