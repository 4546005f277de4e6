"""The typed, frozen configuration of a run. No torch, no Ray: importing this is cheap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rltk.rewards.genrm.options import GenRMOptions
from rltk.rollout.kv.options import KVOptions
from rltk.rollout.tools.options import AttcOptions, DtsrOptions, ToolOptions


@dataclass(frozen=True)
class Algorithm:
    """An objective: conf/algorithm/<name>.yaml lists its options with their defaults."""

    name: str = "ctpo"
    path: str | None = None  # module:Class of the user's own objective (algorithm=my_module:MyObjective)
    minibatches: int = 4  # optimizer steps a training step
    options: dict[str, Any] = field(default_factory=dict)  # every other key of the group: build_objective's arguments


@dataclass(frozen=True)
class Task:
    name: str = "arithmetic"
    target: str = "rltk.tasks.arithmetic:Arithmetic"  # module:Class (task=my_module:MyTask)
    max_prompt_tokens: int = 64
    max_response_tokens: int = 64
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    name: str = "tiny"
    path: str = ""  # a Hugging Face folder or id; the loader resolves ids to folders
    chat_template: str | None = None  # a file, for models that come without one


@dataclass(frozen=True)
class Rollout:
    engines: int = 1
    workers: int = 1
    temperature: float = 1.0
    top_p: float = 1.0  # anything but 1 is refused, in training and in evaluations
    top_k: int = 0  # anything but 0 is refused, likewise
    dtype: str = "float32"  # float32 | bfloat16
    max_sequences: int = 256  # sequences an engine runs at once
    kv_cache_gib: float = 1.0  # CPU: size of an engine's KV cache
    gpu_memory_share: float = 0.4  # GPU: share of the device's memory that an engine takes
    enforce_eager: bool = True  # CPU needs True; on a GPU False turns CUDA graphs on
    threads: int = 0  # CPU threads an engine uses; 0: all of the node's


@dataclass(frozen=True)
class Reward:
    name: str = "rule"  # rule: the task's own scorer | custom: reward=my_module:score
    path: str | None = None
    workers: int = 1  # reward actors
    processes: int = 2  # killable processes an actor holds
    deadline_s: float = 10.0  # of one sample
    memory_gib: float = 2.0  # address space of one process
    genrm: GenRMOptions = field(default_factory=GenRMOptions)  # a judge besides, or none
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Learner:
    ranks: int = 1
    zero_stage: int = 1
    dtype: str = "float32"
    lr: float = 1.0e-4
    schedule: str = "constant"  # constant | linear | cosine
    warmup_steps: int = 0  # optimizer steps
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1.0e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    tokens_per_micro_batch: int = 8192
    gradient_checkpointing: bool = False
    old: str = "recompute"  # recompute | detach (detach: only with one minibatch)
    threads: int = 0  # CPU threads a rank uses; 0: the node's, shared among its ranks


@dataclass(frozen=True)
class Sync:
    name: str = "shared_memory"
    probe_max: float = 0.0  # largest log-prob difference allowed; 0: by dtype (fp32 1e-4, bf16 .5)
    probe_mean: float = 0.0  # mean difference allowed; 0: by dtype (fp32 1e-4, bf16 .03)


@dataclass(frozen=True)
class Cluster:
    name: str = "local"  # local: this run starts its own Ray | existing: join the one at `address`
    address: str | None = None
    device: str = "auto"  # auto | cpu | gpu


@dataclass(frozen=True)
class Tracker:
    name: str = "wandb"  # wandb | none (JSONL and report are always written)
    project: str = "rltk"
    mode: str = "offline"  # offline | online
    console: bool = True  # live progress view, where standard output is a terminal


@dataclass(frozen=True)
class Batch:
    prompts: int = 32  # prompts a training step
    samples: int = 8  # samples a prompt: the group size
    refills: int = 4  # times that a step samples new prompts in place of groups its objective does not admit


@dataclass(frozen=True)
class Ratio:
    reference: str = "old"  # old | mu


@dataclass(frozen=True)
class Pipeline:
    max_staleness: int = 0  # weight versions; 0: synchronous


@dataclass(frozen=True)
class Evaluation:
    every: int = 20  # training steps; 0: only before and after
    problems: int = 128
    samples: int = 4
    greedy: bool = True


@dataclass(frozen=True)
class Checkpoint:
    every: int = 20  # training steps; 0: only at the end
    keep: int = 2


@dataclass(frozen=True)
class Deadlines:
    """Seconds that the driver waits for a role before it names it, dumps the stacks and stops."""

    start: float = 300.0
    rollout: float = 600.0
    reward: float = 120.0
    learner: float = 600.0
    sync: float = 120.0


@dataclass(frozen=True)
class Debug:
    permute_rewards: bool = False  # control: rewards shuffled across groups; nothing may be learned
    die_at: str = ""  # <step>:<phase>: kill -9 oneself there (chaos tests); phases as the console names them


@dataclass(frozen=True)
class Config:
    algorithm: Algorithm = field(default_factory=Algorithm)
    task: Task = field(default_factory=Task)
    model: Model = field(default_factory=Model)
    rollout: Rollout = field(default_factory=Rollout)
    kv: KVOptions = field(default_factory=KVOptions)
    tools: ToolOptions = field(default_factory=ToolOptions)
    reward: Reward = field(default_factory=Reward)
    learner: Learner = field(default_factory=Learner)
    sync: Sync = field(default_factory=Sync)
    cluster: Cluster = field(default_factory=Cluster)
    tracker: Tracker = field(default_factory=Tracker)
    batch: Batch = field(default_factory=Batch)
    ratio: Ratio = field(default_factory=Ratio)
    attc: AttcOptions = field(default_factory=AttcOptions)
    dtsr: DtsrOptions = field(default_factory=DtsrOptions)
    pipeline: Pipeline = field(default_factory=Pipeline)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    deadlines: Deadlines = field(default_factory=Deadlines)
    debug: Debug = field(default_factory=Debug)
    correction: str = "none"
    correction_options: dict[str, Any] = field(default_factory=dict)
    steps: int = 60
    seed: int = 0
    name: str = ""  # default: <task>-<algorithm>-s<seed>
    output: str = "runs"
    resume: str = "never"  # never | auto
    dry_run: bool = False
