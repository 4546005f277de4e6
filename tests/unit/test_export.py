"""Export copies a whole model or nothing, and never over something else."""

import pytest

from rltk.errors import ConfigError
from rltk.export import export, main


@pytest.fixture
def run(tmp_path):
    for folder, weights in (("model", b"final"), ("best", b"best")):
        (tmp_path / "run" / folder).mkdir(parents=True)
        (tmp_path / "run" / folder / "config.json").write_text("{}")
        (tmp_path / "run" / folder / "model.safetensors").write_bytes(weights)
    return tmp_path / "run"


@pytest.mark.parametrize("which", ["final", "best"])
def test_the_chosen_model_is_copied_whole(run, tmp_path, which):
    assert main([str(run), f"out={tmp_path / 'deep' / 'out'}", f"which={which}"]) == 0
    assert (tmp_path / "deep" / "out" / "model.safetensors").read_bytes() == which.encode()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_refusals_name_the_thing_and_leave_everything_as_it_was(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="full exists and is not empty"):
        export(run, tmp_path / "full")
    with pytest.raises(ConfigError, match="holds no model"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean out"):
        main([str(run), "ou=x"])
    with pytest.raises(ConfigError, match="out=<folder> is missing"):
        main([str(run)])
    assert not (tmp_path / "out").exists() and [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]
