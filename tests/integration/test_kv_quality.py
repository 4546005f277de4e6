"""The study of quality forces tokens through a transformers model: does the engine see the same?"""

import numpy as np
import pytest
import torch

from bench.kv_model import StudyModel
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.kv.policies.policy import build_policy
from tests.integration.kv_cases import CONTEXT, Place, engine, set_environment
from tests.integration.places import TINY

PROMPT, BUDGET, RESPONSE = 100, 41, 24


@pytest.mark.parametrize(
    ("policy", "heads"),
    [("full", ""), ("dapq", "per_kv_head"), ("snapkv", "shared"), ("h2o", "per_kv_head"), ("streaming", "shared")],
)
def test_forced_tokens_have_the_engines_logprobs(policy, heads):
    """Eviction at the prompt and in every one of the steps (h2o, streaming)."""
    from vllm import SamplingParams

    set_environment()
    options = KVOptions() if policy == "full" else KVOptions(policy, budget=BUDGET, heads=heads)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 380, PROMPT).tolist() for _ in range(3)]
    sampling = SamplingParams(temperature=1.0, max_tokens=RESPONSE, ignore_eos=True, logprobs=0, seed=1)
    with engine(Place(), options, block_size=32) as running:  # stock vLLM's on a CPU
        for number, prompt in enumerate(prompts):
            running.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        done = {}
        while running.has_unfinished_requests():
            done |= {output.request_id: output.outputs[0] for output in running.step() if output.finished}
    answers = [list(done[str(number)].token_ids) for number in range(len(prompts))]
    engines = [
        [step[token].logprob for step, token in zip(done[str(n)].logprobs, answers[n], strict=True)]
        for n in range(len(prompts))
    ]
    names = [] if policy == "full" else [policy]
    model = StudyModel(str(TINY), {name: build_policy(name, {}) for name in names})
    logprobs = model.continued(model.prefill(prompts), options, answers)
    own = logprobs.gather(2, torch.tensor(answers)[..., None])[..., 0]
    torch.testing.assert_close(own, torch.tensor(engines), atol=1e-4, rtol=0)
    full = model.continued(model.prefill(prompts), KVOptions(), answers)
    assert policy == "full" or not torch.allclose(full[:, 1:], logprobs[:, 1:], atol=1e-2), "nothing was dropped"
    assert torch.equal(full[:, 0], logprobs[:, 0]) and BUDGET < PROMPT < CONTEXT - RESPONSE
