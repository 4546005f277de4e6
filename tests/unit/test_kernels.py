"""The Triton kernels, interpreted, against their float64 references; tests/gpu/kernels.py runs the same on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

from rltk.kernels.state import DecodeSettings
from tests.gpu.kernels import MODES, Shape, check_decode, check_prompt_scores, decode_case, tied_case

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # numpy's, where a share of the slots is empty


@pytest.fixture(scope="module")
def decode(interpreted):
    return interpreted("decode").decode


@pytest.mark.parametrize(("mode", "heads"), MODES)
def test_a_decode_step_equals_the_reference(decode, mode, heads):
    # Rows of 0, 1, cap - 1, cap and cap + 9 tokens; evictions recorded.
    shape = Shape(mode, heads)
    assert check_decode(decode, decode_case(shape), shape.dtype) < 1e-5


@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_every_number_of_query_heads_a_kv_head(decode, group):
    shape = Shape(group=group, kv_heads=3 if group == 3 else 1, record=False)
    assert check_decode(decode, decode_case(shape), shape.dtype) < 1e-5


def test_pages_longer_than_a_tile_and_chunks_that_share_a_victim(decode):
    shape = Shape(page=32, cap=70, kv_heads=1, group=1, sinks=0)
    assert check_decode(decode, decode_case(shape), shape.dtype) < 1e-5


@pytest.mark.parametrize("heads", ["shared", "per_kv_head"])
def test_of_equal_scores_the_lowest_slot_goes(decode, heads):
    shape = Shape(heads=heads)
    arguments = tied_case(shape)
    check_decode(decode, arguments, shape.dtype)
    table, state = arguments[4], arguments[6]
    full = table[-2:, 0].long()  # the rows of cap and cap + 9 tokens
    assert (state.evict[full] == shape.sinks).all()


def test_a_padded_row_touches_nothing_but_its_output(decode):
    arguments = decode_case(Shape())
    arguments[4][0] = -1  # what a padded row of a block table may hold
    check_decode(decode, arguments, Shape().dtype)
    assert (arguments[8][0] == 0).all()


def test_a_head_size_that_no_kernel_takes_is_refused(decode):
    with pytest.raises(ValueError, match="head size 24"):
        decode(*decode_case(Shape(dim=24)))
    with pytest.raises(ValueError, match="pages of 8"):
        decode(*decode_case(Shape(page=8)))


@pytest.mark.parametrize(("window", "length", "group"), [(1, 129, 4), (9, 9, 1), (32, 150, 2), (70, 70, 3)])
def test_prompt_scores_equal_the_reference(interpreted, window, length, group):
    prompt_scores = interpreted("prompt_scores").prompt_scores
    assert check_prompt_scores(prompt_scores, window, length, group) < 1e-4


def test_settings_that_leave_nothing_to_give_up_are_refused():
    with pytest.raises(ValueError, match="cap 4 leaves no slot"):
        DecodeSettings("longflow", 1.0, cap=4, sinks=4)
    with pytest.raises(ValueError, match="recent >= 1"):
        DecodeSettings("h2o", 1.0, cap=40)
    with pytest.raises(ValueError, match="mode is 'fifo'"):
        DecodeSettings("fifo", 1.0)


def test_the_wheel_holds_rltk_kernels_and_no_top_level_kernels():
    found = setuptools.find_namespace_packages(str(ROOT), include=["rltk", "rltk.*"])
    assert "rltk.kernels" in found
    assert not [name for name in found if name.split(".")[0] == "kernels"]


@pytest.mark.parametrize("installed", [True, False])
def test_our_folder_never_passes_for_hugging_faces_kernels(tmp_path, installed):
    # transformers and vLLM import a package of that name where it is installed; a checkout is on the path before it.
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("theirs = True\n")
    code = "import kernels; print(getattr(kernels, 'theirs', kernels.__file__))"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    run = [sys.executable, "-S", "-c", code]  # -S: whatever this environment has installed stays out
    done = subprocess.run(run, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    # Without theirs, a bare folder is a namespace without a file: nobody's code.
    assert done.stdout.strip() == ("True" if installed else "None"), done.stderr
