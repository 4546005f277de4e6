"""A run submitted to a Ray head that asks for a token: two steps, its status, its summary."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD_DEADLINE_S = 120
JOB_DEADLINE_S = 600
STOP_DEADLINE_S = 30


def free_ports(count):
    """Ports that are free now. All sockets are open at once, so that no port comes twice."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """(dashboard URL, environment of a client) of a head of our own, in a process group of its own."""
    # Ray's sockets lie below its folder, and a socket's path may have 107 characters: pytest's folders are too deep.
    folder = Path(f"/tmp/rltk-{secrets.token_hex(3)}")
    folder.mkdir()
    gcs, dashboard, client, agent = free_ports(4)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", f"--port={gcs}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={200 * 2**20}"]
    log = tmp_path_factory.mktemp("head") / "head.log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + HEAD_DEADLINE_S
        while status_of(f"{url}/api/version") is None:
            assert process.poll() is None, f"the head ended: {log.read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"no head after {HEAD_DEADLINE_S} s: {log.read_text()[-2000:]}"
            time.sleep(0.5)
        yield url, environment
    finally:
        end(process)
        subprocess.run(["rm", "-rf", str(folder)], check=False)


def end(process):
    """The head ends its node; what is left of its group after the deadline is killed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_DEADLINE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_DEADLINE_S)


def status_of(url):
    """The HTTP status of a GET without a token; None where nothing listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def submit(head, *command):
    """(exit code, output) of `ray job submit --working-dir . -- <command>`, waited for."""
    url, environment = head
    done = subprocess.run(
        ["ray", "job", "submit", f"--address={url}", "--working-dir=.", "--", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=JOB_DEADLINE_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_head_asks_for_a_token(head):
    assert status_of(f"{head[0]}/api/jobs/") == 401


@pytest.mark.timeout(JOB_DEADLINE_S + 60)
def test_a_submitted_run_succeeds_and_leaves_its_summary(head, tmp_path):
    arguments = ["algorithm=ctpo", "experiment=smoke", "name=job", f"output={tmp_path}", "tracker=none"]
    code, output = submit(head, "python", "-m", "rltk.train", *arguments)
    assert code == 0, output[-4000:]
    assert "succeeded" in output
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert (summary["status"], summary["algorithm"], summary["steps"]) == ("finished", "ctpo", 2)
    rows = [json.loads(line) for line in (tmp_path / "job" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert (tmp_path / "job" / "model" / "config.json").is_file() and (tmp_path / "job" / "report.html").is_file()


def test_a_job_with_bad_input_fails_with_its_message(head, tmp_path):
    code, output = submit(head, "python", "-m", "rltk.train", "algorithm=ctpoo", f"output={tmp_path}")
    assert code != 0 and "ctpoo" in output and "failed" in output
