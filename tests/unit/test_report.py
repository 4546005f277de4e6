"""report.html holds what the files hold, needs nothing from outside, and survives unfinished and hostile runs."""

import json
import re
from html.parser import HTMLParser

import pytest

from rltk.errors import ConfigError
from rltk.report import build
from rltk.report.__main__ import main
from rltk.report.data import load
from rltk.report.figures import sections
from rltk.report.samples import verdict

VOID = {"meta", "path", "use", "rect", "br", "link", "img"}


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "arithmetic-ctpo-s0"
    folder.mkdir()
    metrics = [
        {"step": s, "wall_time": float(s), "accuracy": 0.4 + s / 10, "reward/mean": 0.5, "reward/std": 0.2}
        | {"ratio/q05/1-16": -0.1, "ratio/q50/1-16": 0.0, "ratio/q95/1-16": 0.1, "clip/share": 0.01, "grad_norm": 0.5}
        | {"time/step": 4.0, "time/generate": 3.0, "time/train": 1.0, "mismatch/kl": 2e-6}
        for s in (1, 2, 3)
    ]
    levels = {"1 step": {"avg@4": 0.9, "greedy": 1.0}, "4 steps": {"avg@4": 0.1, "greedy": 0.0}}
    evaluations = [
        {"step": s, "wall_time": 0.0, "avg@4": a, "avg@4_ci": [a - 0.1, a + 0.05], "greedy": a, "levels": levels}
        for s, a in ((0, 0.421), (3, 0.873))
    ]
    write(folder, "metrics.jsonl", metrics)
    write(folder, "evaluations.jsonl", evaluations)
    return folder


class Page(HTMLParser):
    """Checks nesting and collects ids, texts and whatever would be fetched."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.fetched, self.text, self.tags = [], [], [], [], set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        links = [value for name, value in attrs if name in ("src", "href", "xlink:href") and not value.startswith("#")]
        self.fetched += links
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing(run):
    html = build(run).read_text()
    page = Page(html)
    assert page.fetched == [] and "script" not in page.tags and "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids)) > 0
    assert "#0001" not in html and "#0002" not in html  # every placeholder colour became a variable


def test_headline_and_ledger_hold_the_numbers_of_the_files(run):
    (run / "summary.json").write_text(json.dumps({"status": "finished", "tokens_sampled": 1_250_000, "steps": 3}))
    text = " ".join(Page(build(run).read_text()).text)
    for expected in ("87.3%", "from 42.1%", "2.0e-06", "finished", "1.25 M", "75.0%", "25.0%"):
        assert expected in text, expected


def test_charts_are_those_that_have_data(run):
    titles = {chart.title for _, charts in sections(load(run)) for chart in charts}
    assert {"Accuracy", "Held-out accuracy by level", "Reward", "Ratios by position", "Time ledger"} <= titles
    assert titles.isdisjoint({"Entropy", "Throughput", "Length", "Tail"})
    legend = next(c.legend for _, charts in sections(load(run)) for c in charts if "by level" in c.title)
    assert [label for label, _ in legend] == ["1 step", "4 steps"]


def test_a_run_that_is_still_writing_is_reported_up_to_its_last_whole_row(run):
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 4, "accu')
    assert [row["step"] for row in load(run).metrics] == [1, 2, 3]
    assert "no summary yet" in build(run).read_text()


def test_a_run_that_failed_before_its_first_row_shows_why(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"status": "failed", "error": "DeadlineError: engine 0"}))
    page = Page(build(tmp_path).read_text())
    assert "failed" in page.text and "DeadlineError: engine 0" in page.text


def test_null_values_leave_a_gap_and_do_not_fail(run):
    write(run, "metrics.jsonl", [{"step": 1, "grad_norm": None, "lr": 0.1}, {"step": 2, "grad_norm": 0.5, "lr": 0.1}])
    assert load(run).series("grad_norm") == ([2], [0.5])
    Page(build(run).read_text())


def test_sampled_text_is_shown_as_text_and_its_wrong_step_marked(run):
    row = {"step": 1, "prompt": "<b>1 + 1</b>", "response": "1 + 1 = 3\n\n<script>x</script>", "reward": 1.0}
    write(run, "samples.jsonl", [row | {"correct": True, "flawed": True, "first_flawed": 0, "answer": "2"}])
    html = build(run).read_text()
    page = Page(html)
    assert "script" not in page.tags and "<script>x</script>" in page.text
    assert "<p class='step flaw'>1 + 1 = 3</p>" in html
    assert "≈ right answer, wrong step" in page.text


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"reward": None}, "masked"),
        ({"reward": 0.5, "correct": None}, "reward 0.5"),
        ({"reward": 0.0, "correct": False}, "✗ wrong"),
        ({"reward": 1.0, "correct": True, "flawed": None}, "✓ right"),
        ({"reward": 1.0, "correct": True, "flawed": True}, "wrong step"),
    ],
)
def test_verdicts(row, word):
    assert word in verdict(row)[0]


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(ConfigError, match="metrics.jsonl"):
        build(tmp_path / "nothing")
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
