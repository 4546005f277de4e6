"""The real vLLM engine against transformers: log-probs, seeds, weight updates, the tied-embedding trap."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rltk.errors import MismatchError, RltkError, WeightMismatchError
from rltk.rollout import weight_file, weights
from rltk.rollout.engine import EngineOptions, Request, RolloutEngine
from rltk.sync.probe import compare
from tests.integration.places import TINY

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [5, 6, 7, 8, 12, 13]]
STOP = (2,)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Of a folder that has its weights a second time as Mistral's have them, but wrong: they are not read."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(TINY, folder)
    (folder / "params.json").write_text("{}")
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": {name: "model.safetensors" for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return RolloutEngine(
        EngineOptions(str(folder), "float32", context=96, device="cpu", max_sequences=16, kv_cache_gib=0.1)
    )


def reference(seed=None):
    """The model in transformers, its weights moved by noise if a seed is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    if seed is not None:
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return model


def logprobs(model, ids, temperature=1.0):
    """float32 [n - 1]: of every token after the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def sample(engine, uids, temperature=1.0, max_tokens=24, seed=7):
    engine.add([Request(u, PROMPTS[i % 3], max_tokens, temperature, seed + i, STOP) for i, u in enumerate(uids)])
    found = {}
    while engine.unfinished:
        found |= {c.uid: c for c in engine.step()}
    return [found[u] for u in uids]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_are_those_of_the_tempered_softmax(engine, temperature):
    model = reference() if engine.version == (0, 0) else pytest.fail("another test left its weights behind")
    for number, completion in enumerate(sample(engine, [f"t{temperature}-{i}" for i in range(6)], temperature)):
        prompt = PROMPTS[number % 3]
        expected = logprobs(model, prompt + completion.ids.tolist(), temperature)[len(prompt) - 1 :]
        assert np.abs(expected - completion.logprobs).max() < 1e-4
        assert len(completion.ids) == 24 or completion.ids[-1] in STOP


def test_the_same_seed_samples_the_same_tokens_whatever_else_runs(engine):
    first = sample(engine, ["a0", "a1", "a2"])
    again = sample(engine, ["b0", "b1", "b2"])
    assert [c.ids.tolist() for c in first] == [c.ids.tolist() for c in again]
    other = sample(engine, ["c0", "c1", "c2"], seed=1000)
    assert [c.ids.tolist() for c in first] != [c.ids.tolist() for c in other]


def test_whoever_wants_no_log_probs_is_given_the_same_tokens_without_them(engine):
    wanted = sample(engine, ["w0", "w1"])
    engine.add([Request(f"n{i}", PROMPTS[i], 24, 1.0, 7 + i, STOP, logprobs=False) for i in range(2)])
    found = {}
    while engine.unfinished:
        found |= {c.uid: c for c in engine.step()}
    for number, completion in enumerate(wanted):
        bare = found[f"n{number}"]
        assert bare.ids.tolist() == completion.ids.tolist() and len(bare.logprobs) == 0 < len(completion.logprobs)


def test_a_stop_string_ends_a_sample_with_its_ids_as_they_were_sampled(engine):
    """As far as the token that completes the string, the same tokens and log-probs as without one."""
    from rltk.rollout.tokens import load_tokenizer

    tokenizer = load_tokenizer(str(TINY))
    prompt = tokenizer.encode("<|im_start|>user\nWhat is 31 + 71 - 17?<|im_end|>\n<|im_start|>assistant\n31 + 71")
    found = {}
    for stops in ((), ("=", "never")):
        uids = [f"{len(stops)}-{n}" for n in range(6)]
        engine.add([Request(u, prompt, 16, 1.0, 40 + n, STOP, stops) for n, u in enumerate(uids)])
        while engine.unfinished:
            found |= {c.uid: c for c in engine.step()}
    halted = 0
    for number in range(6):
        free, stopped = found[f"0-{number}"], found[f"2-{number}"]
        size = len(stopped.ids)
        assert free.stop is None and free.ids[:size].tolist() == stopped.ids.tolist()
        assert np.abs(free.logprobs[:size] - stopped.logprobs).max() < 1e-5
        text = tokenizer.decode(stopped.ids)
        if stopped.stop is None:
            assert "=" not in text and size == len(free.ids)
            continue
        halted += 1
        assert (stopped.stop, stopped.finish_reason) == ("=", "stop")
        assert "=" in text and "=" not in tokenizer.decode(stopped.ids[:-1])
    assert halted >= 3


def test_what_does_not_fit_is_refused(engine):
    with pytest.raises(MismatchError, match="do not fit a context of 96"):
        engine.add([Request("long", [5] * 90, 24, 1.0, 0, STOP)])


def test_weights_arrive_and_the_stale_tied_head_does_not_go_unnoticed(engine, tmp_path, monkeypatch):
    model = reference(seed=1)
    tensors = [(n, p) for n, p in model.named_parameters()]
    checksum = weight_file.write(tmp_path / "w1", tensors, (0, 1))

    engine.add([Request("running", PROMPTS[0], 8, 1.0, 0, STOP)])
    with pytest.raises(RltkError, match="while 1 requests run"):
        engine.load_weights(str(tmp_path / "w1"), (0, 1))
    engine.abort(["running"])

    expected = [logprobs(model, ids) for ids in PROMPTS]
    before = engine.score(PROMPTS)
    assert max(np.abs(a - b).max() for a, b in zip(before, expected, strict=True)) > 0.1
    assert engine.load_weights(str(tmp_path / "w1"), (0, 1)) == checksum
    compare(engine.score(PROMPTS), expected, 1e-4, 1e-4, "engine")
    assert sample(engine, ["d0"])[0].weight_version == (0, 1)

    # The trap: the same update without the repacking of the tied head. Bytes and checksum are right, numbers are not.
    model = reference(seed=2)
    checksum = weight_file.write(tmp_path / "w2", [(n, p) for n, p in model.named_parameters()], (0, 2))
    expected = [logprobs(model, ids) for ids in PROMPTS]
    with monkeypatch.context() as without:
        without.setattr(weights, "refresh_vocabulary_layers", lambda model: None)
        assert engine.load_weights(str(tmp_path / "w2"), (0, 2)) == checksum
    with pytest.raises(WeightMismatchError, match="does not run the learner's weights"):
        compare(engine.score(PROMPTS), expected, 1e-4, 1e-4, "engine")
    engine.load_weights(str(tmp_path / "w2"), (0, 2))
    compare(engine.score(PROMPTS), expected, 1e-4, 1e-4, "engine")
