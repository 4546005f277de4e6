"""`python -m rltk.serve` as its users meet it: a process, HTTP, a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from tests.integration.places import ROOT

pytestmark = pytest.mark.timeout(300)
RIGHT = "47 + 35 = 82\n\n82 - 18 = 64\n\n\\boxed{64}"
FLAWED = "47 + 35 = 81\n\n81 - 17 = 64\n\n\\boxed{64}"


def test_a_judge_answers_over_http_until_it_is_told_to_end(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rltk.serve", "reward.genrm=tiny", f"port={port}"]
    log = tmp_path / "stderr"  # a file: a pipe that nobody reads would fill, and stop it
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stream, text=True, start_new_session=True
        )
    try:
        told = [process.stdout.readline() for _ in range(2)]  # the version, then where; "" if it ended
        assert f"POST http://127.0.0.1:{port}/judge" in told[1], log.read_text()[-2000:]
        problem = "What is 47 + 35 - 18?"
        questions = [
            {"uid": name, "problem": problem, "response": response, "reference": "64"}
            for name, response in (("right", RIGHT), ("flawed", FLAWED))
        ]
        body = json.dumps({"questions": questions, "deadline_s": 60}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/judge", body, timeout=90) as answer:
            verdicts = json.load(answer)["verdicts"]
        assert [verdict["flawed"] for verdict in verdicts] == [False, True]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
            assert json.load(answer)["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
