from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rltk.errors import ConfigError
from rltk.rewards.genrm import benchmarks, harness
from rltk.rewards.genrm.attacks import ATTACKS
from rltk.rewards.genrm.benchmarks import BENCHMARKS, Contest, Solution, load
from rltk.rewards.genrm.judges import build_judge
from rltk.rewards.genrm.types import Comparison, Question, Verdict
from tests.unit.genrm_readers import first_wrong, model


def solution(label: int, attack: str = "", uid: str = "u") -> Solution:
    return Solution(Question(uid, "p", "r", None), label >= 0, label, attack)


def said(index: int | None, cause: str = "parse_fail") -> Verdict:
    if index is None:
        return Verdict(None, cause=cause)
    return Verdict(float(index < 0), index >= 0, detail={"index": index})


LABELS = [0, 1, 2, 2, -1, -1, -1, 1]
SAID = [said(i) for i in (0, 2, None, -1, -1, -1, 0)] + [said(None, "timeout")]


def test_processbench_figures():
    found = benchmarks.process_figures([solution(label) for label in LABELS], SAID)
    wrong, right = 1 / 4, 2 / 3  # the timeout left out, the parse_fail wrong
    assert found["accuracy_wrong"] == pytest.approx(wrong) and found["accuracy_right"] == pytest.approx(right)
    assert found["f1"] == pytest.approx(2 * wrong * right / (wrong + right))
    assert (found["asked"], found["parse_fail"], found["unanswered"]) == (8, 1, 1)


def test_flaw_figures():
    found = benchmarks.flaw_figures([solution(label) for label in LABELS], SAID)
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == pytest.approx(2 / 4)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2)) and found["index_right"] == pytest.approx(1 / 4)


def test_figures_of_nothing_are_none_and_of_no_hit_zero():
    assert benchmarks.flaw_figures([solution(-1)], [said(-1)])["f1"] is None
    assert benchmarks.process_figures([solution(0), solution(-1)], [said(1), said(0)])["f1"] == 0.0


def test_contest_figures():
    contests = [Contest("p", ("a", "b"), chosen, subset) for chosen, subset in [(0, "x"), (1, "x"), (0, "y"), (1, "y")]]
    results = [
        Comparison(0, (1.0, 0.0), 1.0),
        Comparison(None, (0.5, 0.5), 0.0, cause="tie"),
        Comparison(None, cause="parse_fail"),
        Comparison(None, cause="timeout"),
    ]
    found = benchmarks.contest_figures(contests, results)
    assert found["subsets"] == {"x": 0.75, "y": 0.0} and found["accuracy"] == 0.5 and found["subset_mean"] == 0.375
    assert found["consistency"] == 0.5
    assert (found["asked"], found["ties"], found["parse_fail"], found["unanswered"]) == (4, 1, 1, 1)


def test_attack_figures():
    rows = [solution(0, attack, uid) for uid in "ab" for attack in ("", "order", "padding")]
    found = benchmarks.attack_figures(rows, [said(i) for i in (0, -1, 0, -1, -1, -1)])
    assert found["caught"] == 0.5  # b passes undressed: nothing to be gained
    assert (found["gained"], found["escaped"]) == (0.5, 0.0)
    assert found["by_attack"]["order"]["gained"] == 1.0 and found["by_attack"]["padding"]["gained"] == 0.0
    assert found["by_attack"]["authority"]["gained"] is None


def test_our_examples():
    assert {s.label for s in load("processbench")} == {-1, 0, 1}
    flawed = load("flawed_positive")
    assert 0 < sum(s.flawed for s in flawed) < len(flawed)
    contests = load("rewardbench")
    assert any(len(c.responses) > 2 for c in contests) and {c.chosen for c in contests} > {0, 1}
    attacked = load("attacks")
    assert len(attacked) == sum(s.flawed for s in flawed) * (1 + len(ATTACKS))
    assert load("rewardbench") == contests  # the draw of places is fixed


def test_lines_as_published_files_have_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"id": "a", "generator": "g", "problem": "p", "steps": ["s", "t"], "final_answer_correct": False, "label": 1}
    file.write_text(json.dumps(row) + "\n\n")
    (found,) = load("processbench", file)
    assert (found.question.data, found.label, found.question.uid) == ({"paragraphs": ["s", "t"]}, 1, "a")
    file.write_text(json.dumps({"prompt": "p", "chosen": ["c", "d"], "rejected": ["r", "s"], "subset": "x"}))
    assert [c.responses[c.chosen] for c in load("rewardbench", file)] == ["c", "d"]


@pytest.mark.parametrize(
    ("benchmark", "line", "words"),
    [
        ("processbench", '{"problem": "p", "steps": ["s"]}', "line 2: processbench needs the key 'label'"),
        ("processbench", '{"problem": "p", "steps": ["s"], "label": 1}', "label 1 is neither"),
        ("processbench", '{"problem": "p", "steps": ["s"], "label": true}', "label True is neither"),
        ("flawed_positive", '{"problem": "p", "response": 3, "label": 0}', "3 is a int"),
        ("flawed_positive", '{"problem": "p", "response": "r", "flawed": 1}', "flawed is 1"),
        ("rewardbench", '{"prompt": "p", "chosen": [], "rejected": "r"}', "no list of texts"),
        ("rewardbench", "nonsense", "line 2"),
        ("flawed_positive", "[]", "line 2"),
        ("flawed_positive", "", "holds nothing"),
        ("procesbench", "", "unknown benchmark"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(tmp_path, benchmark, line, words):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + line)
    with pytest.raises(ConfigError, match=words):
        load(benchmark, file)


class Asks:
    """A service of one judge and one reader."""

    def __init__(self, judge: str, reader) -> None:
        self.judge_, self.ask = build_judge(judge), model(reader)

    async def judge(self, questions):
        return [await self.judge_.judge(question, self.ask) for question in questions]

    async def compare(self, problem, responses):
        return await self.judge_.compare(problem, responses, self.ask)


def test_measured_by_a_judge_that_only_sees_arithmetic():
    measured = {b: asyncio.run(harness.measure(b, load(b), Asks("fapo", first_wrong))) for b in BENCHMARKS[:2]}
    assert measured["processbench"]["accuracy_right"] == 1.0
    assert measured["flawed_positive"]["precision"] == 1.0 and 0 < measured["flawed_positive"]["recall"] < 1
    attacked = asyncio.run(harness.measure("attacks", load("attacks"), Asks("fapo", first_wrong)))
    assert (attacked["gained"], attacked["escaped"]) == (0.0, 0.0) and 0 < attacked["caught"] < 1
    first = asyncio.run(harness.measure("rewardbench", load("rewardbench"), Asks("best_of_n", lambda _: r"\boxed{A}")))
    assert first["consistency"] == 0.0
    right = Solution(Question("u", "p", r"\boxed{1}", "1"), False, -1)
    with pytest.raises(ConfigError, match="which paragraph"):
        asyncio.run(harness.measure("processbench", [right], Asks("answer_equivalence", first_wrong)))


def test_the_command_against_a_server(capsys):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = first_wrong(asked["messages"][-1]["content"])
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        harness.main(["--benchmark", "flawed_positive", "--url", url, "--model", "m", "--deadline-s", "20"])
    finally:
        server.shutdown()
        server.server_close()
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["figures"]["precision"] == 1.0 and last["figures"]["unanswered"] == 0
    assert last["benchmark"] == "flawed_positive" and last["judge"] == "fapo"


@pytest.mark.parametrize("text", ["{", "[]"])
def test_judge_options_must_be_an_object(text):
    arguments = ["--benchmark", "attacks", "--url", "http://x", "--model", "m", "--judge-options", text]
    with pytest.raises(ConfigError, match="--judge-options"):
        harness.main(arguments)
