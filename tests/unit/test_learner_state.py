"""What a learner leaves as a Hugging Face folder."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rltk.learner import state
from tests.integration.places import TINY


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_folder_whose_generation_config_transformers_does_not_save_is_saved_with_it(alone, tmp_path):
    """As Vicuna's: a temperature without sampling. To fail here would be to lose the training."""
    source, written = tmp_path / "source", tmp_path / "written"
    shutil.copytree(TINY, source)
    own = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "pad_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(own))
    (source / "spiece.model").write_bytes(b"a tokenizer's")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    learner = SimpleNamespace(
        rank=0, policy=SimpleNamespace(model=model), settings=SimpleNamespace(model=str(source))
    )  # fmt: skip
    state.save_hugging_face(learner, str(written))
    assert json.loads((written / "generation_config.json").read_text()) == own
    assert (written / "spiece.model").read_bytes() == b"a tokenizer's"
    again = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
