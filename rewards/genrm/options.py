"""The options of the generative reward model, as `reward.genrm.*` on the command line. A leaf: no torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ON_FAILURE = ("mask", "not_flawed", "flawed")


@dataclass(frozen=True)
class GenRMOptions:
    name: str = "none"  # none | the group's choice
    judge: str = "fapo"  # of rewards/genrm/judges, or module:Class
    judge_options: dict[str, Any] = field(default_factory=dict)  # its max_tokens, temperature, template, ...
    on_failure: str = "mask"  # a verdict that nobody could give: mask (the sample) | not_flawed | flawed
    evaluate: bool = True  # ask in evaluations too

    # Who answers: engines of our own, or a server that stands already.
    model: str = ""  # a Hugging Face folder or id
    revision: str = ""  # of its weights: part of the cache's keys and of every report
    chat_template: str | None = None  # a file, for models that come without one
    url: str | None = None  # an OpenAI-compatible server in place of engines, as http://host:8000/v1
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the server's key, if it wants one

    # Engines: as `rollout.*`.
    replicas: int = 1
    dtype: str = "float32"
    context: int = 4096  # prompt and reply tokens
    max_sequences: int = 128  # generations a replica (or the server) is given at once
    kv_cache_gib: float = 1.0
    gpu_memory_share: float = 0.3
    enforce_eager: bool = True
    threads: int = 0

    # Time and failure.
    deadline_s: float = 120.0  # of one question: waiting, retries and every turn included
    attempt_s: float = 60.0  # of one generation on one replica; then another is asked
    start_s: float = 300.0  # for a replica to come (back) up
    retries: int = 2  # of a generation, each on another replica where there is one
    queue: int = 4096  # questions that may wait for a replica; one more is refused with queue_full
    breaker_failures: int = 3  # in a row, after which a replica gets no questions
    breaker_pause_s: float = 5.0  # until it is tried again; doubled with each failed trial
    cache: int = 65536  # verdicts kept; 0: none
    canary_every: int = 0  # training steps between two looks at the judge's drift; 0: only at the start and the end
    canary_file: str | None = None  # JSON lines {"problem", "response", "reference", "flawed"}; null: those that ship

    @property
    def enabled(self) -> bool:
        return self.name != "none"
