"""The lab's stacked model and sampler against transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import rltk
from rltk.errors import ConfigError
from rltk.lab.cache import quantised
from rltk.lab.model import Shape, causal, hidden_states, load, logits, select
from rltk.lab.sampler import Sampler

TINY = Path(rltk.__file__).parent / "models" / "tiny"
CPU = torch.device("cpu")
STOP = [2]
PROMPTS = [[[5, 9, 30, 41, 7], [17, 8, 90]], [[44, 3], [5, 9, 30, 41, 7]], [[60, 61, 62, 63], [5, 6, 7, 8, 9]]]


@pytest.fixture(scope="module")
def stacked():
    """Three runs, each of other weights."""
    shape, weights = load(TINY, 3, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in weights.values():
            value.add_(0.01 * torch.randn(value.shape, generator=generator))
    return shape, weights


def reference(weights, run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.load_state_dict({name: value[run].detach() for name, value in weights.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def forward(shape, weights, ids):
    runs, rows, length = ids.shape
    positions = torch.arange(length).repeat(runs, rows)
    hidden = hidden_states(shape, weights, ids.reshape(runs, -1), positions, causal(rows))
    return logits(weights, hidden).unflatten(1, (rows, length))


def test_every_run_of_the_stack_is_transformers_model(stacked):
    shape, weights = stacked
    ids = torch.randint(3, shape.vocabulary, (3, 4, 17), generator=torch.Generator().manual_seed(0))
    found = forward(shape, weights, ids)
    for run in range(3):
        expected = reference(weights, run)(input_ids=ids[run]).logits
        assert torch.allclose(found[run], expected, atol=2e-5), (found[run] - expected).abs().max()


def test_gradient_reaches_the_run_it_belongs_to_and_no_other(stacked):
    shape, weights = stacked
    ids = torch.randint(3, shape.vocabulary, (1, 2, 9), generator=torch.Generator().manual_seed(2))
    loss = forward(shape, select(weights, slice(1, 2)), ids).log_softmax(-1)[..., 3].sum()
    name = "model.layers.2.self_attn.q_proj.weight"
    (grad,) = torch.autograd.grad(loss, weights[name])
    model = reference(weights, 1)
    model(input_ids=ids[0]).logits.log_softmax(-1)[..., 3].sum().backward()
    expected = model.get_parameter(name).grad
    assert torch.allclose(grad[1], expected, atol=1e-4, rtol=1e-4)
    assert grad[0].abs().max() == 0 and grad[2].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_sampled_token_carries_the_log_prob_of_the_full_forward(stacked, temperature):
    shape, weights = stacked
    sampler = Sampler(shape, weights, rows=2, prompt=6, response=12, stop=STOP, kv_bits=16)
    samples = sampler(weights, PROMPTS, [1, 2, 3], temperature)
    for run in range(3):
        model = reference(weights, run)
        for row in range(2):
            prompt, n = PROMPTS[run][row], int(samples.length[run, row])
            answer = samples.tokens[run, row, :n].tolist()
            table = model(input_ids=torch.tensor([prompt + answer])).logits[0] / temperature
            table = table.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = table.gather(-1, torch.tensor(answer)[:, None])[:, 0].detach().numpy()
            assert np.allclose(samples.logprobs[run, row, :n], expected, atol=2e-5)
            assert (STOP[0] in answer) != samples.truncated[run, row]
            assert STOP[0] not in answer[:-1]


def test_a_run_samples_the_same_alone_as_in_a_stack(stacked):
    shape, weights = stacked
    whole = Sampler(shape, weights, 2, 6, 10, STOP, 16)(weights, PROMPTS, [1, 2, 3])
    own = select(weights, slice(1, 2))
    alone = Sampler(shape, own, 2, 6, 10, STOP, 16)(own, PROMPTS[1:2], [2])
    assert (whole.tokens[1] == alone.tokens[0]).all()
    assert not (Sampler(shape, own, 2, 6, 10, STOP, 16)(own, PROMPTS[1:2], [7]).tokens == alone.tokens).all()


def test_tokens_are_drawn_with_the_probabilities_of_the_model(stacked):
    shape, weights = stacked
    own, rows = select(weights, slice(0, 1)), 1000
    sampler = Sampler(shape, own, rows, 6, 1, STOP, 16)
    drawn = sampler(own, [[PROMPTS[0][1]] * rows], [5]).tokens[0, :, 0]
    expected = reference(weights, 0)(input_ids=torch.tensor([PROMPTS[0][1]])).logits[0, -1].softmax(-1).detach().numpy()
    found = np.bincount(drawn, minlength=shape.vocabulary) / rows
    sd = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(found - expected) <= 5 * sd + 1 / rows).all()
    assert expected.max() < 0.999  # or it would say nothing


def test_greedy_takes_the_likeliest(stacked):
    shape, weights = stacked
    samples = Sampler(shape, weights, 2, 6, 4, STOP, 16)(weights, PROMPTS, [0, 0, 0], greedy=True)
    first = reference(weights, 2)(input_ids=torch.tensor([PROMPTS[2][0]])).logits[0, -1].argmax()
    assert samples.tokens[2, 0, 0] == first


def test_a_quantised_cache_changes_what_is_sampled_by_little_and_says_so(stacked):
    shape, weights = stacked
    exact = Sampler(shape, weights, 2, 6, 2, STOP, 16)(weights, PROMPTS, [1, 2, 3])
    rough = Sampler(shape, weights, 2, 6, 2, STOP, 4)(weights, PROMPTS, [1, 2, 3])
    assert (exact.tokens[..., 0] == rough.tokens[..., 0]).all()  # the first token reads no cache
    same = (exact.tokens == rough.tokens).all(-1)
    gap = np.abs(exact.logprobs - rough.logprobs)[same][:, 1]
    assert gap.max() > 1e-4
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert (quantised(x, 8) - x).abs().max() < (quantised(x, 4) - x).abs().max() < 0.5
    assert quantised(x, 16) is x


def test_other_architectures_are_refused():
    from transformers import LlamaConfig

    with pytest.raises(ConfigError, match="llama"):
        Shape.of(LlamaConfig(tie_word_embeddings=True))
