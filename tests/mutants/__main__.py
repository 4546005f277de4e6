"""python -m tests.mutants [--only ctpo] [--list] [--workers 2]: 1 if a mutant survives, 2 if it cannot be told."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.mutants.check import Verdict, copy_of, judge
from tests.mutants.chosen import chosen, equivalents, table_of
from tests.mutants.mutant import Mutant
from tests.mutants.operators import systematic
from tests.mutants.targets import files, suites_of

ROOT = Path(__file__).parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="files by name, such as ctpo or tis")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side (2)")
    options = parser.parse_args(arguments)
    begin = time.monotonic()
    try:
        with copy_of(ROOT) as root:
            mutants, reasons = gather(root, options.only)
            if options.list:
                print(*(f"{mutant.line:4} {mutant.kind:11} {mutant.name}" for mutant in mutants), sep="\n")
                return 0
            code = report(judge(root, mutants, suites_of, workers=options.workers), reasons)
    except (ValueError, RuntimeError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    print(f"{time.monotonic() - begin:.0f} s")
    return code


def gather(root: Path, only: list[str] | None = None) -> tuple[list[Mutant], dict[str, str]]:
    """The mutants of every file, or of those in `only`; and by name why some of them are equivalent."""
    known = {Path(file).stem: file for file in files(root)}
    if unknown := sorted(set(only or ()) - known.keys()):
        raise ValueError(f"no file {', '.join(unknown)}; known: {', '.join(known)}")
    found: list[Mutant] = []
    reasons: dict[str, str] = {}
    for stem in only or known:
        file = known[stem]
        mutants, of_file = mutants_of(file, (root / file).read_text(), table_of(file))
        found += mutants
        reasons |= of_file
    return found, reasons


def mutants_of(file: str, source: str, table: str) -> tuple[list[Mutant], dict[str, str]]:
    """The mutants of one file, and by name why some are equivalent. ValueError if the table does not fit the file."""
    mutants = systematic(file, source) + chosen(file, source, table)
    names = {mutant.name.partition(":")[2]: mutant.name for mutant in mutants}
    excused = equivalents(file, table)
    if stale := sorted(excused.keys() - names.keys()):
        raise ValueError(f"{file}: its table calls equivalent what is no mutant of it: {'; '.join(stale)}")
    return mutants, {names[name]: reason for name, reason in excused.items()}


def report(verdicts: Iterable[Verdict], reasons: dict[str, str]) -> int:
    """Prints what is to be seen to as it comes, and a table; 1 if there was anything, else 0."""
    seen, problems = [], 0
    for verdict in verdicts:
        seen.append(verdict)
        if problem := problem_of(verdict, reasons):
            problems += 1
            print(problem, flush=True)
        if len(seen) % 100 == 0:
            print(f"... {len(seen)} mutants", flush=True)
    print(table_of_counts(seen, reasons))
    print(f"{len(seen)} mutants, {problems} to see to")
    return int(problems > 0)


def problem_of(verdict: Verdict, reasons: dict[str, str]) -> str:
    """What is wrong with a verdict, '' if nothing is."""
    mutant = verdict.mutant
    place = f"{mutant.file}:{mutant.line}"
    if verdict.outcome == "timeout":
        return f"TIMEOUT {place} {mutant.kind}: {mutant.name}: whether a test sees it is not known"
    if verdict.outcome == "survived" and mutant.name not in reasons:
        return f"SURVIVED {place} {mutant.kind}: {mutant.name}"
    if verdict.outcome != "survived" and mutant.name in reasons:
        return f"NOT EQUIVALENT {place} {mutant.name}: {verdict.test} sees it"
    return ""


def table_of_counts(verdicts: list[Verdict], reasons: dict[str, str]) -> str:
    """By file and by kind: mutants, killed, equivalent, survived (or timed out)."""
    columns = {"mutants": Counter(), "killed": Counter(), "equivalent": Counter(), "survived": Counter()}
    for verdict in verdicts:
        column = "killed" if verdict.outcome == "killed" else "survived"
        if verdict.outcome == "survived" and verdict.mutant.name in reasons:
            column = "equivalent"
        for key in (verdict.mutant.module, f"kind {verdict.mutant.kind}", "all"):
            columns["mutants"][key] += 1
            columns[column][key] += 1
    names = sorted(columns["mutants"], key=lambda name: (name == "all", name.startswith("kind "), name))
    head = " " * 26 + "".join(f"{title:>11}" for title in columns)
    return "\n".join([head, *(f"{name:26}" + "".join(f"{c[name]:11}" for c in columns.values()) for name in names)])


if __name__ == "__main__":
    sys.exit(main())
