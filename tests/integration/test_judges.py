"""Judges other than fapo in whole runs: several as one, and one that is asked where the rule says no."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.integration.test_road import allow, rows, run

pytestmark = pytest.mark.full
SMALL = ["algorithm=grpo", "tracker=none", "steps=2", "batch.prompts=4", "evaluation.every=0", "evaluation.problems=4",
         "evaluation.samples=1", "evaluation.greedy=false", "task.levels=[1]", "rollout.kv_cache_gib=0.25",
         "reward.genrm.cache=0"]  # fmt: skip
FLAW = "{name: fapo, template: fapo_short.v1, max_tokens: 128"


@allow(1)
def test_an_ensemble_asks_each_of_its_members(tmp_path):
    members = f"[{FLAW}}}, {FLAW}, temperature: 0.6, seed: 1}}]"
    judge = ["reward.genrm=tiny", "reward.genrm.judge=ensemble",
             f"reward.genrm.judge_options={{judges: {members}, combine: worst}}"]  # fmt: skip
    code, out = run(*SMALL, *judge, f"output={tmp_path}", "name=run")
    assert code == 0, out
    *_, last = rows(tmp_path / "run")
    asked = last["genrm/total/asked"] - last["genrm/total/joined"]
    assert last["genrm/asked"] == last["accuracy"] and last["genrm/unknown"] == 0
    assert asked > 0 and last["genrm/total/replies"] >= 2 * asked  # the canaries', too
    assert last["genrm/recall"] == 1.0  # the worst case of two who know this task


@contextmanager
def yes_man():
    """A server's address that says yes to all, and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][-1]["content"])
            choice = {"message": {"role": "assistant", "content": "\\boxed{yes}"}, "finish_reason": "stop"}
            answer = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


@allow(1)
def test_a_server_that_finds_all_answers_equal_makes_all_right_that_the_rule_found_wrong(tmp_path):
    with yes_man() as (url, asked):
        judge = [f"reward.genrm={url}", "reward.genrm.model=yes", "reward.genrm.judge=answer_equivalence",
                 "rollout.temperature=1.5", f"output={tmp_path}", "name=run"]  # fmt: skip
        code, out = run(*SMALL, *judge)
    assert code == 0, out
    found = rows(tmp_path / "run")
    assert all(row["accuracy"] == 1.0 and row["genrm/replies"] == 2.0 for row in found)
    assert all(0 < row["genrm/asked"] < 0.5 for row in found)  # the warm start is right more often than not
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    judged = [sample for sample in samples if sample["reason"] == "judged right"]
    assert judged and {sample["reason"] for sample in samples} == {"right answer", "judged right"}
    assert all(str(sample["answer"]) not in sample["response"].split("boxed")[1] for sample in judged)

    pattern = re.compile("<first_answer>\n(.*)\n</first_answer>\n\n<second_answer>\n(.*)\n</second_answer>", re.DOTALL)
    hello, *questions = asked
    orders = [pair.groups() for text in questions if (pair := pattern.search(text))]
    assert "Say yes" in hello and len(orders) == len(questions)
    assert set(orders) == {(second, first) for first, second in orders}
