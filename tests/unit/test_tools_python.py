"""tools=python: sessions by replay in the real jail, and a sandbox server with faults."""

import asyncio

import pytest
from aiohttp import web

from rltk.errors import ConfigError, InfrastructureError
from rltk.rollout.jail import Jail
from rltk.rollout.tools.options import JailOptions, ToolOptions
from rltk.rollout.tools.python import PythonTool, cut_short
from rltk.rollout.tools.remote import RemoteSandbox
from rltk.rollout.tools.session import compose
from rltk.rollout.tools.types import ToolRequest, ToolResult

LOCAL = JailOptions(isolation="best_effort", cpu_s=10.0)


def run(code, history=(), session="replay", deadline_s=60.0):
    tool = PythonTool(ToolOptions(use=["python"], session=session, jail=LOCAL))
    earlier = tuple({"code": block} for block in history)
    return asyncio.run(tool.run(ToolRequest("t", 0, "python", {"code": code}, earlier, deadline_s=deadline_s)))


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_a_session_sees_what_was_defined_and_not_what_was_printed():
    history = [
        "import os, sys, random\nx = random.random()\nprint('unseen')\nsys.stderr.write('unseen')",
        "os.write(1, b'unseen')\ndef double(v):\n    return 2 * v\nsys.stdout = None",
        "raise SystemExit",
    ]
    results = [run("print(double(x) == 2 * x, x)\nprint(sorted(globals()))", history) for _ in range(2)]
    lines = results[0].text.splitlines()
    assert results[0].status == "ok" and results[0].text == results[1].text, "a repeated draw is the same draw"
    assert lines[0].startswith("True 0.") and "__session__" not in lines[1] and "problem" not in lines[1]


def test_a_stateless_tool_repeats_nothing():
    result = run("print(x)", ["x = 1"], session="stateless")
    assert result.status == "error" and result.text.endswith("NameError: name 'x' is not defined")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("y = 1\nx / 0", "Traceback (most recent call last):\n  line 2: x / 0\nZeroDivisionError: division by zero"),
        ("y = (", "SyntaxError: '(' was never closed (<tool>, line 1)"),
    ],
)
def test_errors_of_a_session_have_the_blocks_own_lines(code, text):
    assert (run(code, ["x = 1"]).status, run(code, ["x = 1"]).text) == ("error", text)


def test_a_block_that_fails_when_repeated_says_which():
    result = run("print(1)", ["a = 1", "assert a == 2"])
    assert result.status == "error"
    assert result.text.endswith("RuntimeError: block 2 of this session failed when it was repeated: AssertionError()")


def test_the_repeated_blocks_count_against_the_calls_own_limit():
    options = ToolOptions(session="replay", jail=JailOptions(isolation="best_effort", cpu_s=0.5, wall_factor=100.0))
    request = ToolRequest("t", 0, "python", {"code": "1"}, ({"code": "while True: pass"},), deadline_s=60.0)
    result = asyncio.run(PythonTool(options).run(request))
    assert (result.status, result.limit) == ("timeout", "cpu 0.5 s")


def test_a_first_block_without_draws_is_run_as_it_is():
    assert compose([], "print(1)") == "\nprint(1)"
    assert "random" in compose([], "import random").partition("\n")[0]


def test_a_call_that_is_none():
    tool = PythonTool(ToolOptions(jail=LOCAL))
    for arguments in ({}, {"code": 3}, {"code": "1", "timeout": 5}):
        result = asyncio.run(tool.run(ToolRequest("t", 0, "python", arguments)))
        assert (result.status, result.text) == ("parse_error", "python takes one argument, code, a text")


def test_a_program_stopped_early_by_its_calls_deadline_did_not_time_out():
    result = run("import time\ntime.sleep(60)", deadline_s=0.5)
    assert result.status == "infra_error"
    cut = cut_short(ToolResult("timeout", "", "wall 16 s"), 0.5, 16.0)
    assert cut.status == "infra_error" and "0.5 s of 16 s of wall time: its call's deadline came first" in cut.text
    for limit, allowed in (("cpu 4 s", 1.0), ("wall 16 s", 16.0)):
        kept = ToolResult("timeout", "", limit)
        assert cut_short(kept, allowed, 16.0) is kept


# -- a sandbox server --------------------------------------------------------------------------------------------------


def answer(status="Success", ended="Finished", code=0, stdout="", stderr="", message=""):
    run_result = {"status": ended, "return_code": code, "stdout": stdout, "stderr": stderr, "execution_time": 0.25}
    return {"status": status, "message": message, "compile_result": None, "run_result": run_result, "files": {}}


class Server:
    """`POST /run_code` on this machine: runs programs in the jail, or does what is wrong with it today."""

    def __init__(self, fault=None):
        self.fault, self.asked = fault, []

    async def __aenter__(self):
        application = web.Application()
        application.router.add_post("/run_code", self._run_code)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _run_code(self, request):
        asked = await request.json()
        self.asked.append(asked)
        if self.fault == "slow":
            await asyncio.sleep(30)
        if self.fault == "drip":
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(300):
                await response.write(b" ")
                await asyncio.sleep(0.1)
        if self.fault == "500":
            return web.Response(status=500, text="Internal Server Error")
        if self.fault == "reset":
            request.transport.abort()
            return web.Response()
        if isinstance(self.fault, bytes):
            return web.Response(body=self.fault, content_type="application/json")
        if self.fault is not None:
            return web.json_response(self.fault)
        result = await asyncio.to_thread(Jail(LOCAL).run, asked["code"], asked["stdin"], asked["run_timeout"])
        return web.json_response(answer(stdout=result.text, code=0 if result.status == "ok" else 1))


def ask(fault=None, code="print(1)", deadline_s=20.0, ready=False, **options):
    async def scene():
        async with Server(fault) as server:
            jail = JailOptions(isolation="remote", url=server.url, cpu_s=2.0, wall_factor=3.0, output_kib=1, **options)
            sandbox = RemoteSandbox(jail, 2)
            try:
                return (await sandbox.ready() if ready else await sandbox.run(code, deadline_s)), server
            finally:
                await sandbox.close()

    return asyncio.run(scene())


def test_a_program_runs_over_there():
    level, server = ask(ready=True)
    assert level == f"remote: {server.url}"
    asked = server.asked[0]
    assert asked["language"] == "python" and asked["run_timeout"] == 6.0 and asked["memory_limit_MB"] == 512


@pytest.mark.parametrize(
    ("said", "status", "text", "limit"),
    [
        (answer(stdout="3\n"), "ok", "3\n", ""),
        (
            answer("Failed", code=1, stdout="a", stderr='File "/x/y.py"\nValueError: b\n'),
            "error",
            "a\nValueError: b",
            "",
        ),
        (answer("Failed", code=3), "error", "exit code 3", ""),
        (answer("Failed", "TimeLimitExceeded", None, "part"), "timeout", "part", "wall 6 s"),
        (answer("Failed", code=1, stderr="Traceback\nMemoryError\n"), "oom", "", "memory 512 MiB"),
        (answer("Failed", code=-9), "killed", "", "signal 9"),
        (answer(stdout="x" * 1025), "output_limit", "x" * 1024, "output 1 KiB"),
        (answer(stdout="x" * 200_000), "output_limit", "", "output 1 KiB"),
    ],
)
def test_answers_become_results(said, status, text, limit):
    result, _ = ask(said)
    assert (result.status, result.text, result.limit) == (status, text, limit)
    assert result.run_s == 0.25 or len(said["run_result"]["stdout"]) > 100_000


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "HTTP status 500"),
        ("reset", "failed: "),
        (b"<html>busy</html>", "no answer of /run_code"),
        (b'{"status": "Success"', "no answer of /run_code"),
        (b"[" * 100_000, "no answer of /run_code"),
        (b"[1, 2]", "no answer of /run_code"),
        ({"status": "Success"}, "no answer of /run_code"),
        ({"status": "Success", "run_result": None}, "answered with status 'Success', run status None"),
        (answer(stdout=5), "no answer of /run_code"),
        (answer(code="0"), "return code '0'"),
        (answer("SandboxError", "Error", None, message="no disk"), "reports an error of its own: no disk"),
    ],
)
def test_what_is_no_answer_is_the_servers_failure(fault, words):
    result, _ = ask(fault)
    assert result.status == "infra_error" and words in result.text, result


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_slow_server_is_left_at_the_calls_deadline(fault):
    result, _ = ask(fault, deadline_s=0.3)
    assert result.status == "infra_error" and "did not answer within 0.3 s" in result.text


def test_no_server_at_all_and_none_named():
    tool = PythonTool(ToolOptions(jail=JailOptions(isolation="remote", url="http://127.0.0.1:9")))
    with pytest.raises(InfrastructureError, match=r"http://127.0.0.1:9 \(tools.jail.url\) did not run a test program"):
        asyncio.run(tool.ready())
    for url in (None, "localhost:8080", "http://", "http://host:port"):
        with pytest.raises(ConfigError, match="needs tools.jail.url"):
            RemoteSandbox(JailOptions(isolation="remote", url=url), 2)


def test_credentials_in_the_address_are_not_shown():
    sandbox = RemoteSandbox(JailOptions(isolation="remote", url="http://user:secret@127.0.0.1:9/base/"), 2)
    with pytest.raises(InfrastructureError, match="http://127.0.0.1:9 ") as error:
        asyncio.run(sandbox.ready())
    assert "secret" not in str(error.value)


def test_a_deadline_before_the_programs_own_limit_is_not_its_fault():
    result, server = ask(answer("Failed", "TimeLimitExceeded", None), deadline_s=2.0)
    assert result.status == "infra_error" and "was given 2.0 s of 6 s" in result.text
    assert server.asked[0]["run_timeout"] == 2.0
