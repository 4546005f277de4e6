"""The faults arm of bench.genrm_service: real replicas are killed, stopped, write garbage, while eight clients ask."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import ray

from bench.genrm_accounts import Outcome, service_faults, tally, violations, wrong_values
from bench.genrm_faults_plan import APART_S, GARBAGE, SOUND, Fault, Plan, make_plan, questions
from bench.genrm_parts import Client, GarbageEngine, Solver, model_folder, start_ray, start_replica, start_service
from rltk.rewards.genrm.backends import Chat, EngineBackend
from rltk.rewards.genrm.engine import JudgeEngine
from rltk.rewards.genrm.options import GenRMOptions
from rltk.rewards.genrm.types import Prompt, Question, Reply

START_S, BACK_S = 900.0, 600.0  # for five engines to come up; for all of them to be back after the load
SETTLED_S = 1.0  # after a fault, until what is answered was not on its way before it
Say = Callable[[str], None]


def options_of(canaries: str) -> GenRMOptions:
    """Short times, as a fault has to show within the run, and a queue that bursts overflow."""
    return GenRMOptions(
        name="bench", judge="bench.genrm_parts:Solver", model=model_folder("tiny"), replicas=GARBAGE + 1, context=256,
        max_sequences=8, kv_cache_gib=0.1, threads=1, deadline_s=120.0, attempt_s=20.0, queue=64, breaker_pause_s=2.0,
        canary_file=canaries,
    )  # fmt: skip


def run(seed: int, requests: int, clients: int, burst: int, scale: float, say: Say) -> tuple[dict[str, Any], list[str]]:
    """The figures, and what must not be."""
    plan = make_plan(seed, requests, clients, burst, scale)
    with tempfile.TemporaryDirectory() as folder:
        canaries = Path(folder) / "canaries.jsonl"
        rows = [{"problem": q.problem, "response": q.response, "reference": q.reference, "flawed": bool(number % 2)}
                for number, q in enumerate(questions(seed + 1, 4))]  # fmt: skip
        canaries.write_text("\n".join(json.dumps(row) for row in rows))
        options = options_of(str(canaries))
        start_ray(len(os.sched_getaffinity(0)))
        processes: list[psutil.Process] = []
        try:
            return asyncio.run(_run(plan, options, processes, say))
        finally:
            for process in processes:  # a stopped one does not end when it is asked to
                if process.is_running():
                    process.kill()
            ray.shutdown()


async def _run(plan: Plan, options: GenRMOptions, processes: list[Any], say: Say) -> tuple[dict[str, Any], list[str]]:
    kinds = [GarbageEngine if number == GARBAGE else JudgeEngine for number in range(options.replicas)]
    replicas = [start_replica(kind, options, "cpu") for kind in kinds]
    service = start_service(options, replicas)
    clients = [ray.remote(Client).options(num_cpus=0).remote(service, options) for _ in plan.calls]
    async with asyncio.timeout(START_S):
        say(f"judge: {await service.ready.remote()}; {options.replicas} replicas, the last writes garbage")
        processes += [psutil.Process(await _pid(replica)) for replica in replicas]
        await asyncio.gather(*(client.ready.remote() for client in clients))
    before, _ = await _all_back(service)
    begin = time.time() + 1.0
    work = asyncio.gather(
        *(client.run.remote(calls, begin) for client, calls in zip(clients, plan.calls, strict=True))
    )  # fmt: skip
    harm = asyncio.ensure_future(_harm(plan, replicas, service, processes, begin, say))
    found: list[list[Outcome]] = await work
    took = time.time() - begin
    outcomes = [outcome for of_client in found for outcome in of_client]
    asked = [question.uid for question in plan.questions]
    stats = await service.stats.remote()
    say(f"{took:7.1f}  every question has ended; {_short(stats)}")
    after, back_s = await _all_back(service)
    faults = await harm  # what asks no more is seen to answer by the canaries
    say(f"{time.time() - begin:7.1f}  every replica has answered; canaries {asdict(after)}")

    figures = tally(asked, outcomes)
    sound = await _sound(plan, outcomes, replicas[SOUND[0]], options)
    places = options.replicas * options.max_sequences
    service_wrong = service_faults(figures, stats, places, options.queue)
    names = [f"replica {number}" for number in range(options.replicas)]
    drifted = [name for name in names if after.replicas[name]]
    if drifted != names[GARBAGE:]:
        service_wrong.append(
            f"the canaries name {drifted} in place of {names[GARBAGE:]}: {asdict(before)}, {asdict(after)}"
        )
    kills = [fault["at"] for fault in faults if fault["kind"] == "kill"]
    figures |= {
        "clients": len(plan.calls), "seconds": took, "wrong_values": len(wrong := wrong_values(outcomes, sound)),
        "queue": options.queue, "places": places, "most_waiting": stats["router"]["most_waiting"],
        "retries": stats["router"]["retries"], "joined_or_cached": stats["joined"] + stats["cached"],
        "garbage_replies": stats["router"]["replicas"][GARBAGE]["answered"], "faults": faults,
        "kills_apart_s": min((b - a for a, b in zip(kills, kills[1:], strict=False)), default=None),
        "all_back_after_load_s": back_s, "load_average": os.getloadavg()[0], "service": stats,
    }  # fmt: skip
    return figures, violations(figures, wrong, service_wrong)


# -- faults ------------------------------------------------------------------------------------------------------------


async def _harm(
    plan: Plan, replicas: Sequence[Any], service: Any, processes: list[Any], begin: float, say: Say
) -> list[dict[str, Any]]:
    """Each fault in its time, and how long until that replica answered again."""
    done, watching, last_kill = [], [], 0.0
    for fault in plan.faults:
        at = begin + fault.at
        if fault.kind == "kill":
            at = max(at, last_kill + min(APART_S, APART_S * plan.seconds / 200))
        await asyncio.sleep(max(0.0, at - time.time()))
        process = processes[fault.replica]
        if not process.is_running():  # it was restarted meanwhile
            processes[fault.replica] = process = psutil.Process(await _pid(replicas[fault.replica]))
        stats = await service.stats.remote()
        process.send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        now = time.time()
        last_kill = now if fault.kind == "kill" else last_kill
        under_way, waiting = stats["router"]["replicas"][fault.replica]["load"], stats["router"]["waiting"]
        say(f"{now - begin:7.1f}  {fault.kind} replica {fault.replica}: {under_way} under way there, {waiting} wait")
        row = {**asdict(fault), "at": now - begin, "under_way": under_way, "waiting": waiting, "back_s": None}
        done.append(row)
        watching.append(asyncio.ensure_future(_watch_return(fault, row, service, begin, say)))
    _, late = await asyncio.wait(watching, timeout=BACK_S)
    for task in late:
        task.cancel()
    return done


async def _watch_return(fault: Fault, row: dict[str, Any], service: Any, begin: float, say: Say) -> None:
    since, state = time.time(), ""
    await asyncio.sleep(SETTLED_S)
    baseline: int | None = None
    while True:
        replica = (await service.stats.remote())["router"]["replicas"][fault.replica]
        baseline = replica["answered"] if baseline is None else baseline
        if replica["state"] != state:
            state = replica["state"]
            say(f"{time.time() - begin:7.1f}  replica {fault.replica} is {state}, {replica['load']} under way there")
        if replica["answered"] > baseline:
            row["back_s"] = time.time() - since
            say(f"{time.time() - begin:7.1f}  replica {fault.replica} answers again")
            return
        await asyncio.sleep(0.5)


async def _all_back(service: Any) -> tuple[Any, float]:
    """The canaries, when every replica has answered them, and the seconds until then. TimeoutError after BACK_S."""
    start = time.time()
    async with asyncio.timeout(BACK_S):
        while True:
            report = await service.canary.remote()
            if not report.unanswered:
                return report, time.time() - start
            await asyncio.sleep(2.0)


async def _pid(replica: Any) -> int:
    return await replica.__ray_call__.remote(lambda _: os.getpid())


def _short(stats: dict[str, Any]) -> str:
    router = stats["router"]
    states = ", ".join(
        f"{r['name']} {r['state']} ({r['answered']} answered, {r['failed']} failed)" for r in router["replicas"]
    )
    return f"{stats['answered']} answered, {stats['causes']}; retries {router['retries']}; {states}"


# -- what a sound judge says -------------------------------------------------------------------------------------------


async def _sound(
    plan: Plan, outcomes: Sequence[Outcome], replica: Any, options: GenRMOptions
) -> dict[tuple[str, int], float | None]:
    """By uid and replies, from one sound replica and past the service; only what is needed to check the outcomes."""
    backend = EngineBackend("sound", replica, Chat(options), options)
    by_uid = {question.uid: question for question in plan.questions}
    room = asyncio.Semaphore(options.max_sequences)

    async def value(question: Question, replies: int) -> float | None:
        lost = replies - 1  # the first, that were garbage

        async def ask(prompt: Prompt) -> Reply:
            nonlocal lost
            lost -= 1
            if lost >= 0:
                return Reply("", "stop", 0)
            return await backend.generate(prompt, options.deadline_s, f"{question.uid}-{replies}")

        async with room:
            return (await Solver().judge(question, ask)).value

    needed = sorted({(o.uid, o.replies) for o in outcomes if o.value is not None and o.uid in by_uid})
    values = await asyncio.gather(*(value(by_uid[uid], replies) for uid, replies in needed))
    return dict(zip(needed, values, strict=True))
