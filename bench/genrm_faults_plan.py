"""Who asks what and when, and what befalls which replica: all of it from one seed. Pure.

trickle   single questions, spread evenly by chance over the whole time
bursts    all clients at once, more questions than places and queue hold: a moment before each fault
faults    three kills at least APART_S apart, each of another replica; one replica is stopped between the first two
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rltk.rewards.genrm.types import Question
from rltk.tasks.arithmetic import Arithmetic

APART_S = 60.0  # between two kills
SOUND, HANGING, GARBAGE = (0, 1, 2), 3, 4  # the replicas, by number
COPIES = 20  # every so manieth question is one that was asked already, under another uid


@dataclass(frozen=True)
class Fault:
    at: float  # seconds
    kind: str  # kill | stop
    replica: int


@dataclass(frozen=True)
class Plan:
    """`calls`: for each client, (seconds, the questions of one call), in order."""

    faults: tuple[Fault, ...]
    calls: tuple[tuple[tuple[float, tuple[Question, ...]], ...], ...]
    seconds: float

    @property
    def questions(self) -> list[Question]:
        return [question for client in self.calls for _, batch in client for question in batch]


def make_plan(seed: int, requests: int, clients: int, burst: int, scale: float = 1.0) -> Plan:
    """`burst`: questions of all clients together; `scale` of all times, for a look at the bench itself."""
    rng = random.Random(seed)
    first = rng.uniform(20, 30)
    second = first + APART_S + rng.uniform(0, 10)
    third = second + APART_S + rng.uniform(0, 10)
    killed = rng.sample(SOUND, 3)
    kills = [Fault(at, "kill", replica) for at, replica in zip((first, second, third), killed, strict=True)]
    faults = sorted([*kills, Fault(first + rng.uniform(15, 25), "stop", HANGING)], key=lambda fault: fault.at)
    seconds = third + 60.0
    moments = [(fault.at - rng.uniform(0.2, 1.0), fault.at) for fault in faults]
    if requests < burst * len(moments):
        raise ValueError(f"{requests} requests are fewer than {len(moments)} bursts of {burst}")

    waiting = questions(seed, requests)
    rng.shuffle(waiting)
    calls: list[list[tuple[float, tuple[Question, ...]]]] = [[] for _ in range(clients)]
    for begin, _ in moments:
        for number in range(burst):
            calls[number % clients].append((begin, (waiting.pop(),)))
    while waiting:
        size = rng.choice((1, 1, 1, 4))  # a group's samples that end together
        batch = tuple(waiting.pop() for _ in range(min(size, len(waiting))))
        rng.choice(calls).append((rng.uniform(0, seconds), batch))
    return Plan(
        tuple(Fault(scale * fault.at, fault.kind, fault.replica) for fault in faults),
        tuple(tuple(sorted(((scale * at, b) for at, b in client), key=lambda call: call[0])) for client in calls),
        scale * seconds,
    )


def questions(seed: int, count: int) -> list[Question]:
    """Solutions of arithmetic problems, every other one with a wrong answer; uids differ, some texts are the same."""
    task, rng = Arithmetic(48, 64, levels=(1, 2, 3), seed=seed), random.Random(seed)
    made: list[Question] = []
    for number in range(count):
        if number % COPIES == COPIES - 1:
            other = made[-1 - rng.randrange(COPIES // 2)]
            made.append(Question(f"u{number}", other.problem, other.response, other.reference))
            continue
        record = task.problem(number)
        answer = int(record.answer) + (number % 2) * rng.choice((1, 2, 10))
        response = "\n\n".join([*record.data["steps"], rf"\boxed{{{answer}}}"])
        made.append(Question(f"u{number}", record.messages[-1]["content"], response, record.answer))
    return made
