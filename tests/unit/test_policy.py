"""The learner's head and attention against plain PyTorch."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from rltk.learner.attention import register
from rltk.learner.packing import pack
from rltk.learner.policy import Policy, _Fp32Logits

EVERYTHING = ("entropy", "ref", "hellinger", "forward_kl", "hidden")


def model(dtype=torch.float32, seed=0, vocabulary=50, width=32):
    torch.manual_seed(seed)
    shape = dict(vocab_size=vocabulary, hidden_size=width, intermediate_size=48, num_hidden_layers=2)
    shape |= dict(num_attention_heads=4, initializer_range=0.1)  # as far apart as trained models of two seeds
    config = Qwen3Config(**shape, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    config._attn_implementation = register()
    return Qwen3ForCausalLM(config).to(dtype)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are ten times slower on two threads where another process has a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences():
    random = np.random.default_rng(1)
    rows = []
    for length in (9, 4, 13, 2):
        mask = random.random(length) < 0.6
        mask[0] = False
        rows.append((random.integers(0, 50, length), mask))
    return rows


def plain_tables(which, temperature):
    """Log-probs [n, V] at the places that predict a sampled token, of each sequence alone, end to end; their targets;
    the hidden states that they come from."""
    which.config._attn_implementation = "eager"
    tables, targets, states = [], [], []
    for ids, mask in sequences():
        out = which(torch.from_numpy(ids)[None], output_hidden_states=True)
        sampled = torch.tensor(mask[1:])
        tables.append((out.logits[0, :-1] / temperature).log_softmax(-1)[sampled])
        targets.append(torch.tensor(ids[1:])[sampled])
        states.append(out.hidden_states[-1][0, :-1][sampled])
    return torch.cat(tables), torch.cat(targets), torch.cat(states)


@pytest.mark.parametrize("chunks", [None, 1, 3, 40])
def test_packed_log_probs_figures_and_gradients_are_those_of_each_sequence_alone(chunks):
    policy, plain = Policy(model(), temperature=0.7, head_chunk=5), model()
    reference = Policy(model(seed=1).requires_grad_(False), temperature=1.3, head_chunk=5)
    found = policy(pack(sequences()), also=EVERYTHING, chunks=chunks, reference=reference)
    table, target, states = plain_tables(plain, 0.7)
    ref = plain_tables(model(seed=1), 0.7)[0].detach().double()
    new = table.detach().double()
    logprobs = table.gather(-1, target[:, None])[:, 0]
    expected = {
        "logprobs": logprobs,
        "ref": ref.gather(-1, target[:, None])[:, 0],
        "entropy": -(new.exp() * new).sum(-1),
        "hellinger": 1 - ((new + ref) / 2).exp().sum(-1),
        "forward_kl": (ref.exp() * (ref - new)).sum(-1),
        "hidden": states,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert found[name].requires_grad == (name == "logprobs")
    found["logprobs"].square().sum().backward()
    logprobs.square().sum().backward()
    for (name, a), (_, b) in zip(policy.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


class Largest(TorchDispatchMode):
    """The largest float tensor that any operation makes, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("need", ["", "entropy", "ref", "hellinger", "forward_kl", "hidden", "all"])
def test_no_float_tensor_of_tokens_times_vocabulary_is_made(need):
    vocabulary, chunk, tokens = 1000, 20, 61
    policy, reference = (Policy(model(vocabulary=vocabulary, width=8), 1.0, chunk) for _ in range(2))
    reference.requires_grad_(False)
    ids = np.arange(tokens + 1) % vocabulary
    packed = pack([(ids, np.arange(tokens + 1) > 0)])
    also = EVERYTHING if need == "all" else [need]
    needed = reference if need in ("ref", "hellinger", "forward_kl", "all") else None
    with Largest() as largest:
        policy(packed, also=also, reference=needed)["logprobs"].sum().backward()
    # Had the logits not been seen at all, the largest would be the embedding, 8 x 1000.
    assert 8 * vocabulary < largest.elements <= chunk * vocabulary < tokens * vocabulary


def test_backward_runs_our_head_again_but_not_the_references():
    policy, reference = Policy(model(), 1.0, head_chunk=5), Policy(model(), 1.0).requires_grad_(False)
    packed, calls = pack(sequences()), {"ours": 0, "theirs": 0}

    def count(name, module):
        module.register_forward_hook(lambda *_: calls.update({name: calls[name] + 1}))

    count("ours", policy.model.lm_head)
    count("theirs", reference.model.lm_head)
    policy(packed, also=("hellinger",), reference=reference)["logprobs"].sum().backward()
    chunks = policy.chunks(packed)
    assert chunks > 1 and calls == {"ours": 2 * chunks, "theirs": chunks}


def test_logits_of_a_bf16_head_are_not_rounded_and_their_gradient_is_right():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(6, 16) * 3).bfloat16(), torch.randn(40, 16).bfloat16()
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = _Fp32Logits.apply(a, b)
    exact = hidden.double() @ weight.double().t()
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-4 < (hidden @ weight.t() - exact).abs().max()
    upstream = torch.randn(6, 40)
    logits.backward(upstream)
    torch.testing.assert_close(a.grad.double(), upstream.double() @ weight.double(), atol=0.1, rtol=0.02)
    torch.testing.assert_close(b.grad.double(), upstream.double().t() @ hidden.double(), atol=0.1, rtol=0.02)
    assert Policy(model(torch.bfloat16), 1.0)(pack(sequences()))["logprobs"].dtype == torch.float32


def test_an_attention_that_would_be_computed_wrongly_is_refused():
    layer = torch.zeros(1, 2, 3, 4)
    packing = (torch.tensor([[0, 1, 2]]), torch.tensor([0, 1, 2]))
    from rltk.learner.attention import packed_attention

    with pytest.raises(ValueError, match="sliding-window"):
        packed_attention(torch.nn.Identity(), layer, layer, layer, None, packing=packing, sliding_window=2)
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(torch.nn.Identity(), layer, layer, layer, None, packing=packing, softcap=30.0)
    with pytest.raises(ValueError, match="without `packing`"):
        packed_attention(torch.nn.Identity(), layer, layer, layer, None)
