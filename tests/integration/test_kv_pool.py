"""The block pool under a compressed cache, without an engine: vLLM's pool, our manager, random comings and goings."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from rltk.errors import RltkError
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.settings import Settings
from rltk.rollout.kv.spec import CompressedManager, CompressedSpec

BLOCK, CONTEXT = 16, 256


def manager(blocks, **options):
    stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    spec = CompressedSpec.of(stock, Settings(KVOptions(**options), CONTEXT))
    assert KVCacheSpecRegistry.get_manager_class(spec) is CompressedManager
    pool = BlockPool(num_gpu_blocks=blocks + 1, enable_caching=False, hash_block_size=BLOCK)
    return CompressedManager(
        spec, block_pool=pool, enable_caching=False, kv_cache_group_id=0, scheduler_block_size=BLOCK
    )


def allocate(manager, uid, tokens):
    """What vLLM's scheduler does: ask, compare with the free blocks, take. False: it does not fit."""
    need = manager.get_num_blocks_to_allocate(uid, tokens, [], 0, 0, tokens)
    if need > manager.block_pool.get_num_free_blocks():
        return False
    manager.allocate_new_blocks(uid, tokens, tokens)
    return True


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([("longflow", 40), ("dapq", 40), ("dapq", 0.3), ("dapq_longflow", 50), ("snapkv", 0.5)]),
    st.integers(20, 60),
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 100)), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_whoever_was_admitted_never_waits_for_a_block(policy, blocks, requests, chance):
    pool = manager(blocks, name=policy[0], budget=policy[1])
    chosen, waiting, running = pool.settings, list(enumerate(requests)), {}
    for number, (prompt, response) in waiting:
        pool.expect(f"r{number}", prompt, chosen.pseudo, response)
    while waiting or running:
        for uid in list(running):
            tokens, last = running[uid]
            if tokens == last or chance.random() < 0.01:  # ended, or aborted
                pool.free(uid)
                del running[uid]
                continue
            assert allocate(pool, uid, tokens + 1), "a running request did not get its block: vLLM would preempt"
            running[uid] = tokens + 1, last
            held = len(pool.req_to_blocks[uid])
            kept = chosen.kept(requests[int(uid[1:])][0])
            assert held * BLOCK >= min(kept + tokens + 1 - requests[int(uid[1:])][0] - chosen.pseudo, chosen.cap)
        number, (prompt, response) = waiting[0] if waiting else (0, (0, 0))
        if waiting and allocate(pool, f"r{number}", prompt + chosen.pseudo):
            waiting.pop(0)
            running[f"r{number}"] = prompt + chosen.pseudo, prompt + chosen.pseudo + response - 1
        elif waiting:
            assert running, "nothing runs and the next request is not let in"
    assert pool.block_pool.get_num_free_blocks() == blocks and not pool.plans and pool.most_blocks <= blocks


@pytest.mark.parametrize(
    "options, prompt, response, blocks_of_one",
    [
        (dict(name="longflow", budget=100), 200, 56, 7),
        (dict(name="longflow", budget=100), 20, 30, 4),  # a request too short for its cap holds less
        (dict(name="dapq", budget=0.25), 128, 64, 6),
        (dict(name="dapq", budget=16), 128, 64, 5),
    ],
)
def test_as_many_run_as_the_arithmetic_says(options, prompt, response, blocks_of_one):
    pool, blocks = manager(60, **options), 60
    for number in range(blocks):
        pool.expect(f"r{number}", prompt, pool.settings.pseudo, response)
    admitted = sum(allocate(pool, f"r{n}", prompt + pool.settings.pseudo) for n in range(blocks))
    assert admitted == blocks // blocks_of_one


def test_a_request_that_lost_its_blocks_is_an_error():
    pool = manager(20, name="longflow", budget=40)
    pool.expect("r", 10, 0, 10)
    assert allocate(pool, "r", 10)
    pool.free("r")
    with pytest.raises(RltkError, match="lost its blocks"):
        allocate(pool, "r", 11)


def test_layers_of_different_shapes_do_not_merge():
    specs = []
    for heads in (1, 2):
        stock = FullAttentionSpec(block_size=BLOCK, num_kv_heads=heads, head_size=32, dtype=torch.float32)
        specs.append(CompressedSpec.of(stock, Settings(KVOptions("longflow", budget=64), CONTEXT)))
    assert CompressedSpec.merge([specs[0], specs[0]]) == specs[0]
    with pytest.raises(RltkError, match="one shape in every layer"):
        CompressedSpec.merge(specs)
