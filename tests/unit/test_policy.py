"""The learner's head and attention against plain PyTorch."""

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rltk.learner.attention import register
from rltk.learner.packing import pack
from rltk.learner.policy import Policy, _Fp32Logits


def model(dtype=torch.float32):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = Qwen3Config(**shape, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True)
    config._attn_implementation = register()
    return Qwen3ForCausalLM(config).to(dtype)


def sequences():
    random = np.random.default_rng(1)
    rows = []
    for length in (9, 4, 13, 2):
        mask = random.random(length) < 0.6
        mask[0] = False
        rows.append((random.integers(0, 50, length), mask))
    return rows


@pytest.mark.parametrize("chunks", [None, 1, 3, 40])
def test_packed_log_probs_entropies_and_gradients_are_those_of_each_sequence_alone(chunks):
    policy, plain = Policy(model(), temperature=0.7, head_chunk=5), model()
    plain.config._attn_implementation = "eager"
    found, entropy = policy(pack(sequences()), entropy=True, chunks=chunks)
    expected, entropies = [], []
    for ids, mask in sequences():
        table = (plain(torch.from_numpy(ids)[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        expected.append(table.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(mask[1:])])
        entropies.append(-(table.exp() * table).sum(-1)[torch.tensor(mask[1:])])
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-6, rtol=0)
    torch.testing.assert_close(entropy, torch.cat(entropies).detach(), atol=2e-6, rtol=0)
    found.square().sum().backward()
    torch.cat(expected).square().sum().backward()
    for (name, a), (_, b) in zip(policy.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


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
    assert Policy(model(torch.bfloat16), 1.0)(pack(sequences()))[0].dtype == torch.float32


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
