"""Compressed KV caches in real vLLM engines: tests/integration/kv_cases.py, in processes of their own."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from rltk.rollout.kv.__main__ import main as arguments_of
from tests.integration import kv_cases
from tests.integration.kv_cases import ALONE, Place
from tests.integration.places import ROOT, TINY

CASES = sorted(kv_cases.cases(Place(), ""))
QUICK = [name for name in CASES if not name.endswith(" full")]


def run(*names: str) -> dict[str, str | None]:
    """The cases in one process: {name: None or what went wrong}."""
    command = [sys.executable, "-m", "tests.integration.kv_cases", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=840, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    if any(results.values()):
        print(done.stderr[-8000:])
    return results


@pytest.fixture(scope="module")
def results():
    return run(*QUICK)


@pytest.mark.timeout(900)  # the first waits for all of them
@pytest.mark.parametrize("name", QUICK)
def test_cases(results, name):
    assert results[name] is None


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK] + ["child process"])
def test_more_cases(name):
    assert run(name) == {name: None}


@pytest.mark.full
def test_a_server_with_dapq_takes_prompts_as_they_are(tmp_path):
    """The line that `python -m rltk.rollout.kv` prints; greedy, at a budget over the prompt and under it."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    words = shlex.split(arguments_of(["dapq", "budget=41", "context=160"]))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TINY), "--port", str(port)]
    command += ["--enforce-eager", "--dtype", "float32", "--block-size", "32", "--generation-config", "vllm", *words]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

    def ask(path, **body):
        request = urllib.request.Request(f"http://localhost:{port}{path}", headers={"content-type": "application/json"})
        data = json.dumps({"model": str(TINY), **body}).encode() if body else None
        try:
            with urllib.request.urlopen(request, data, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                if ask("/health")[0] == 200:
                    break
            time.sleep(1)
        prompts = kv_cases.some_prompts((17, 100))
        for prompt in prompts.values():
            status, text = ask("/v1/completions", prompt=prompt, max_tokens=30, temperature=0, ignore_eos=True)
            assert status == 200 and json.loads(text)["usage"]["prompt_tokens"] == len(prompt), text
            assert len(json.loads(text)["choices"][0]["text"]) > 5
        status, text = ask("/v1/completions", prompt=[5, 6], max_tokens=30, min_tokens=3)
        assert status == 400 and "min_tokens" in text
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.timeout(300)
def test_an_engine_without_the_plugin_never_samples_a_token():
    assert "without the plugin" in ALONE
    assert run("without the plugin") == {"without the plugin": None}
