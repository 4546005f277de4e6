import copy
import random

import pytest
import torch
from transformers import GenerationConfig

from rltk.errors import ConfigError
from rltk.models.build import build_model, build_tokenizer, save
from rltk.sft import (
    CONF,
    check_init,
    load_config,
    mixed_batches,
    run,
    start_model,
    start_tokenizer,
    summed_loss,
    task_config,
    train,
)
from rltk.sft_data import check_shares, corpus, draw_examples, pack
from rltk.sft_measure import measure
from rltk.tasks import build_task
from rltk.tasks.demonstrations import STYLES, demonstrate

CONFIGS = [task_config(name) for name in ("arithmetic", "arithmetic_long")]
ARITHMETIC, LONG = map(build_task, CONFIGS)
TINY = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(corpus([ARITHMETIC, LONG], problems=40), 384)


@pytest.fixture(scope="module")
def shipped():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(CONF.parent / "models" / "tiny"))


def examples(tokenizer, task=ARITHMETIC, count=40, seed=0, processes=1):
    level = task.levels[0]
    mixture = {level: {"sound": 0.5, "guess": 0.5, "right": 0.5}}
    return draw_examples(tokenizer, task, mixture, count, seed, processes)


@pytest.mark.parametrize("text", ["47 + 35 = 82\n\n\\boxed{82}", "naïve 数学 🙂 \t\r\n  a_b{}", "<tool>f(1e-9)</tool>"])
def test_any_text_survives_the_tokenizer(shipped, text):
    assert shipped.decode(shipped.encode(text)) == text


def test_the_tokenizer_keeps_sequences_short(shipped):
    for text in ("\n\n", r"\boxed{", " + ", " - ", " = ", "user", "assistant", "system", "What", " steps"):
        assert len(shipped.encode(text)) == 1, text
    assert len(shipped.encode("2048")) == 4
    rng = random.Random(0)
    for config, task, shortest in zip(CONFIGS, (ARITHMETIC, LONG), (1, 320), strict=True):
        for level in task.levels:
            record = task.sample(rng, level)
            prompt = shipped.apply_chat_template(
                list(record.messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
            answer = shipped.encode(demonstrate(record, "sound", rng) + shipped.eos_token)
            assert len(prompt) <= config.max_prompt_tokens and shortest <= len(answer) <= config.max_response_tokens


def test_the_chat_template_marks_roles_and_opens_the_answer(shipped):
    messages = [{"role": "user", "content": "hi"}]
    text = shipped.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_warm_start_never_sees_the_hardest_level():
    mixture = load_config(CONF / "sft.yaml", [])["tasks"]
    assert set(ARITHMETIC.levels) - set(mixture["arithmetic"]["levels"]) == {5}
    assert set(LONG.levels) == set(mixture["arithmetic_long"]["levels"])


def test_the_warm_start_with_a_tool_has_every_level_and_known_styles():
    config = load_config(CONF / "sft_tool.yaml", [])
    task = build_task(task_config("arithmetic_tool"))
    part = config["tasks"]["arithmetic_tool"]
    assert set(part["levels"]) == set(task.levels)
    for level, shares in part["levels"].items():
        check_shares(level, shares, task)


def test_examples_are_the_same_from_any_number_of_processes(tokenizer):
    one, two = examples(tokenizer, count=6000), examples(tokenizer, count=6000, processes=2)
    assert torch.equal(one.ids, two.ids) and torch.equal(one.lengths, two.lengths)
    assert not torch.equal(one.ids[:2000], examples(tokenizer, count=6000, seed=1).ids[:2000])


def test_a_demonstration_ends_as_the_template_ends_a_turn(shipped):
    from tests.unit.some_tokenizers import tokenizer as some

    gemma = copy.deepcopy(some("gemma"))
    gemma.pad_token = gemma.eos_token
    for chosen, end in ((gemma, "<end_of_turn>"), (shipped, shipped.eos_token)):
        drawn = examples(chosen, count=4)
        last = drawn.ids[drawn.starts + drawn.lengths - 1].tolist()
        assert chosen.convert_ids_to_tokens(last) == [end] * 4
        assert drawn.learnt[drawn.starts + drawn.lengths - 1].all()
        assert (drawn.ids[drawn.learnt] == chosen.convert_tokens_to_ids(end)).sum() == 4


def test_packed_rows_give_the_loss_of_the_examples_alone(tokenizer):
    torch.manual_seed(0)
    model = build_model(tokenizer, **TINY)
    short, long = examples(tokenizer), examples(tokenizer, LONG)
    chosen = torch.arange(8)
    alone = 0.0
    for source in (short, long):
        for i in chosen.tolist():
            ids = source.ids[source.starts[i] : source.starts[i] + source.lengths[i]].long()[None]
            learnt = source.learnt[source.starts[i] : source.starts[i] + source.lengths[i]]
            labels = ids.masked_fill(~learnt, -100)
            alone += summed_loss(model, {"input_ids": ids, "labels": labels}).item()
    packed = pack([(short, chosen), (long, chosen)], 544)
    assert packed["input_ids"].shape[0] < 12
    assert summed_loss(model, packed).item() == pytest.approx(alone, rel=1e-5)


def test_an_example_longer_than_a_row_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="tokens_per_row=16"):
        pack([(examples(tokenizer), torch.arange(3))], 16)


def test_training_learns_and_the_same_seed_gives_the_same_weights(tokenizer):
    weights, losses = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = build_model(tokenizer, **TINY)
        lines = []
        train(model, mixed_batches([examples(tokenizer)], [16], 128, 0, "cpu"), 40, lr=1e-2, warmup=4, log=lines.append)
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
        losses.append([float(line.split("loss ")[1].split()[0]) for line in lines])
    assert torch.equal(*weights)
    assert losses[0][-1] < 0.6 * losses[0][0]


def test_a_saved_model_loads_with_tied_bfloat16_weights_and_can_be_measured(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    save(build_model(tokenizer, **TINY), tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    result = measure(model.float(), tokenizer, ARITHMETIC, problems=5, samples=0, max_tokens=16)
    assert set(result["levels"]) == {"1", "2", "3", "4", "5"} and 0 <= result["accuracy"] <= 1


def test_a_model_that_came_with_what_transformers_does_not_save_is_saved(tokenizer, tmp_path):
    """As Vicuna's folder: a temperature, and no sampling."""
    model = build_model(tokenizer, **TINY)
    own = model.generation_config
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6, eos_token_id=[2, 1], pad_token_id=0)
    save(model, tokenizer, tmp_path / "odd")
    saved = GenerationConfig.from_pretrained(tmp_path / "odd")
    assert (saved.temperature, saved.top_p, saved.eos_token_id, saved.pad_token_id) == (None, None, [2, 1], 0)
    model.generation_config = own
    save(model, tokenizer, tmp_path / "sound")
    assert GenerationConfig.from_pretrained(tmp_path / "sound").to_dict() == own.to_dict()


def test_overrides_set_known_keys_only():
    config = load_config(CONF / "sft.yaml", ["steps=7", "tasks.arithmetic.levels.1.sound=0.5", "model.hidden=64"])
    assert config["steps"] == 7 and config["model"]["hidden"] == 64
    assert config["tasks"]["arithmetic"]["levels"][1]["sound"] == 0.5
    with pytest.raises(ConfigError, match="'step'"):
        load_config(CONF / "sft.yaml", ["step=7"])


def test_a_number_without_a_point_is_a_number_and_a_word_in_its_place_is_refused():
    assert load_config(CONF / "sft.yaml", ["lr=1e-4"])["lr"] == 1e-4
    with pytest.raises(ConfigError, match="lr = 'fast' must be a number"):
        load_config(CONF / "sft.yaml", ["lr=fast"])


def test_shares_must_be_known_and_sum_to_one():
    check_shares(1, dict.fromkeys(STYLES, 0.2), ARITHMETIC)
    with pytest.raises(ConfigError, match="sum to"):
        check_shares(1, {"sound": 0.9}, ARITHMETIC)
    with pytest.raises(ConfigError, match="'luck'"):
        check_shares(1, {"sound": 0.9, "luck": 0.1}, ARITHMETIC)


def test_a_start_from_a_folder_takes_its_weights_and_its_tokenizer(tokenizer, tmp_path):
    first = build_model(tokenizer, **TINY)
    save(first, tokenizer, tmp_path)
    config = {"init": str(tmp_path), "model": None}
    taken = start_tokenizer(config, [])
    model = start_model(config, taken)
    assert taken.get_vocab() == tokenizer.get_vocab() and model.dtype == torch.float32
    assert torch.equal(model.model.embed_tokens.weight, first.model.embed_tokens.weight.float())


def test_a_start_without_a_padding_token_fills_rows_with_its_end(tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    save(build_model(tokenizer, **TINY), bare, tmp_path)
    taken = start_tokenizer({"init": str(tmp_path), "model": None}, [])
    assert taken.pad_token_id == taken.eos_token_id == tokenizer.eos_token_id


def test_a_start_from_a_model_with_capped_attention_is_refused_before_anything_is_drawn(tokenizer, tmp_path):
    from transformers import Gemma2Config

    Gemma2Config(attn_logit_softcapping=50.0).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"init = .*attn_logit_softcapping = 50.*without it"):
        run(load_config(CONF / "sft.yaml", [f"init={tmp_path}", "device=cpu"]))
    Gemma2Config(attn_logit_softcapping=None).save_pretrained(tmp_path)
    check_init(str(tmp_path))
    check_init(None)


class Scripted:
    """Stands where a model would: row r of turn t gives the text `script[r][t]`, token by token."""

    def __init__(self, tokenizer, script, also=()):
        self.tokenizer, self.script, self.prompts = tokenizer, script, []
        self.weights = torch.nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, *also])

    def eval(self):
        return self

    def parameters(self):
        return iter([self.weights])

    def generate(self, input_ids, attention_mask, max_new_tokens, stopping_criteria):
        rows = [self.tokenizer.encode(self.script[row].pop(0)) for row in range(len(input_ids))]
        self.prompts.append(input_ids)
        out = torch.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        whole = torch.cat([input_ids, out], dim=1)
        stopped = torch.zeros(len(rows), dtype=torch.bool)
        for length in range(input_ids.shape[1] + 1, whole.shape[1] + 1):
            stopped |= stopping_criteria(whole[:, :length], None)
        assert stopped.tolist() == ["```output" in self.tokenizer.decode(ids) for ids in rows]
        return whole


@pytest.mark.parametrize("samples", [0, 1])
def test_what_is_measured_is_not_sampled_as_the_folder_would_have_it(tokenizer, samples):
    torch.manual_seed(0)
    model = build_model(tokenizer, **TINY)
    others = [i for i in range(model.config.vocab_size) if i != tokenizer.eos_token_id]
    own = model.generation_config = GenerationConfig(eos_token_id=2, suppress_tokens=others, repetition_penalty=1.3)
    figures = measure(model, tokenizer, ARITHMETIC, problems=4, samples=samples, max_tokens=8)
    assert figures["mean_tokens"] > 1  # where nothing but the end may be sampled
    assert model.generation_config is own


def test_measured_responses_end_at_their_first_end_and_padding_is_not_counted(shipped, monkeypatch):
    """Where the end pads too, there is another end, and a row that stops at a call is padded."""
    monkeypatch.setattr("rltk.sft_measure.python_in_jail", lambda: lambda text: ("ok", "42"))
    chosen = copy.deepcopy(shipped)
    chosen.pad_token = chosen.eos_token
    task = build_task(task_config("arithmetic_tool"))
    call, wrong = "```python\n1\n```output", r"\boxed{1} and some words more than a call <|im_start|>"
    right = rf"\boxed{{{task.held_out(2)[0].answer}}}<|im_end|>"
    model = Scripted(chosen, [[call, right], [wrong]], also=[chosen.convert_tokens_to_ids("<|im_start|>")])
    figures = measure(model, chosen, task, problems=2, samples=0, max_tokens=128, tools=True)
    assert figures["accuracy"] == 0.5 and figures["calls"] == 0.5
    assert chosen.decode(model.prompts[1][0]).endswith(call + "\n42\n```\n")
    assert figures["mean_tokens"] == round(sum(len(chosen.encode(text)) for text in (call, right, wrong)) / 2, 1)


def test_measured_responses_run_their_python_and_count_what_was_sampled(shipped, monkeypatch):
    ran = []

    def python_in_jail():
        return lambda text: (ran.append(text), ("ok", "42"))[1]

    monkeypatch.setattr("rltk.sft_measure.python_in_jail", python_in_jail)
    task = build_task(task_config("arithmetic_tool"))
    record, _ = task.held_out(2)
    call, answer = "```python\nprint(6 * 7)\n```output", rf"\boxed{{{record.answer}}}" + shipped.eos_token
    model = Scripted(shipped, [[call, answer], [r"\boxed{1}" + shipped.eos_token]])
    figures = measure(model, shipped, task, problems=2, samples=0, max_tokens=128, tools=True)
    assert ran == [call]
    assert shipped.decode(model.prompts[1][0]).endswith(call + "\n42\n```\n")
    assert figures["accuracy"] == 0.5 and figures["tool_use"] == 0.5 and figures["ended"] == {"ok": 1.0}
    sampled = sum(len(shipped.encode(text)) for text in (call, answer, r"\boxed{1}" + shipped.eos_token))
    assert figures["mean_tokens"] == round(sampled / 2, 1)
