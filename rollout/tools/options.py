"""The options of tools in a run, as `tools.*`, `attc.*` and `dtsr.*` on the command line. A leaf: no torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMATS = ("python_block", "retool", "json")
ISOLATIONS = ("strict", "best_effort", "remote")
SESSIONS = ("stateless", "replay")
VOID_TURNS = ("keep", "mask", "drop")
MODES = ("off", "eval", "rollout")


@dataclass(frozen=True)
class JailOptions:
    """What model-written code may have. The processor time is the limit that is fair on a busy machine; wall time is a
    backstop of `wall_factor` times it."""

    isolation: str = "strict"  # strict: Landlock and seccomp, or refuse | best_effort: what there is | remote: `url`
    cpu_s: float = 4.0
    wall_factor: float = 4.0
    memory_mib: int = 512  # address space
    output_kib: int = 64  # of stdout and stderr together
    files_mib: int = 0  # what it may write to its own folder; 0: nothing
    url: str | None = None  # isolation=remote: a sandbox server, asked at <url>/run_code


@dataclass(frozen=True)
class ToolOptions:
    name: str = "none"  # none | the group's choice
    use: list[str] = field(default_factory=list)  # python | calculator | module:function | module:Environment
    format: str = "python_block"  # python_block | retool | json (the model's own chat template)
    session: str = "stateless"  # python: stateless | replay (a call sees the variables of those before it)
    max_calls: int = 4  # of a trajectory
    turn_tokens: int = 0  # most that the model may sample in one turn; 0: what is left of its response
    output_tokens: int = 128  # of one result; a longer one is cut in the middle, and says so
    total_tokens: int = 512  # of all results and control text of a trajectory
    void_turns: str = "keep"  # turns with neither call nor answer: keep | mask (not learned from) | drop (the sample)
    answer_marks: list[str] = field(default_factory=lambda: ["\\boxed{", "<answer>"])  # a turn with one is no void turn
    call_deadline_s: float = 60.0  # of one call, once it has a place
    deadline_s: float = 300.0  # of one trajectory; a call may wait for a place as long as some of it is left
    executors: int = 1  # actors
    slots: int = 2  # calls of each tool that an executor runs at once
    queue: int = 4096  # calls that may wait at an executor
    jail: JailOptions = field(default_factory=JailOptions)

    @property
    def enabled(self) -> bool:
        return bool(self.use)


@dataclass(frozen=True)
class AttcOptions:
    """Adaptive tool trust calibration (arXiv 2604.08281)."""

    mode: str = "off"  # off | eval | rollout
    threshold: float = 0.97  # of the call's confidence, the geometric mean of its tokens' probabilities
    reconsider_errors: bool = True  # a call that failed is always met with "reconsider"


@dataclass(frozen=True)
class DtsrOptions:
    """Dynamic thought sufficiency (arXiv 2604.06787)."""

    mode: str = "off"  # off | eval | rollout
    signals: list[str] = field(default_factory=lambda: ["Wait", "Alternatively", "But wait", "Let me check"])
    gap_tokens: int = 64  # sampled between two checks, at least
    threshold: int = 100  # sufficiency from which the thought is closed
    max_checks: int = 8  # of a trajectory
    reply_tokens: int = 32  # of the check's answer
    opens: str = "<think>"  # thought stands between these; "": the whole response is thought until an answer mark
    closes: str = "</think>"


def appends(tools: ToolOptions, attc: AttcOptions, dtsr: DtsrOptions) -> bool:
    """Whether trajectories may get text that the model did not write, so that it goes on behind that."""
    return tools.enabled or attc.mode != "off" or dtsr.mode != "off"
