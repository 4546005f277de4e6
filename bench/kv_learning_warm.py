"""`python -m bench.kv_learning_warm [--out runs/smollm2_warm]`: a start for SmolLM2-135M on a reasoning-gym task.

On its own it answers hardly any reasoning-gym question right at T = 1 (0 of 12 on each of seven easy data sets): RL has
nothing to begin from. A few hundred steps on a data set's own answers, of problems that neither training nor the
held-out set has, give it a start. In half of these (`--tagged 0.5`) the answer stands without the answer tags that the
task asks for, and is worth nothing: the start knows more than it earns, and the form is what RL can teach it. From one
that always uses the tags (`--tagged 1`) 24 training steps changed nothing, from this one 20 steps go from 19 to 46 %:
docs/results/kv_learning_smollm2.log. The last line printed is what a run needs to go on from there; so

    python -m bench.kv_learning road --label smollm2 cluster.device=gpu learner.lr=1e-5 <the last line>

Training is rltk.sft's. `--steps 2 --batch 2 --threads 1` shows on a CPU that it works.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from rltk.compose import load
from rltk.model_folder import resolve_model
from rltk.models.build import save
from rltk.rollout.tokens import render_prompt
from rltk.sft import mixed_batches, start_model, start_tokenizer, train
from rltk.sft_data import Examples
from rltk.tasks.reasoning_gym import ReasoningGym

STREAM = 1  # of training problems; runs draw from 0
WORD_SORTING = {"min_words": 3, "max_words": 5}
PROMPT, RESPONSE = 160, 48  # tokens; the longest of either under these options: 144 and 37


def examples(tokenizer: Any, task: ReasoningGym, count: int, tagged: float = 1.0) -> Examples:
    """Prompts of the task, each with its own answer, in a share of `tagged` between answer tags, and the end of the
    turn, which are learnt."""
    ids: list[int] = []
    learnt: list[bool] = []
    lengths: list[int] = []
    for index in range(count):
        record = task.problem(index)
        prompt = render_prompt(tokenizer, record.messages)
        with_tags = int((index + 1) * tagged) > int(index * tagged)  # evenly: of two, the second
        text = f"<answer>{record.answer}</answer>" if with_tags else record.answer
        answer = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if len(prompt) > task.max_prompt_tokens or len(answer) > task.max_response_tokens:
            raise ValueError(
                f"{record.id} has {len(prompt)} + {len(answer)} tokens, over {task.max_prompt_tokens} + "
                f"{task.max_response_tokens}; raise --prompt or --response"
            )
        ids += [*prompt, *answer]
        learnt += [False] * len(prompt) + [True] * len(answer)
        lengths.append(len(prompt) + len(answer))
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    return Examples(torch.tensor(ids, dtype=torch.int32), torch.tensor(learnt), starts, sizes, tokenizer.pad_token_id)


def keys_of(arguments: argparse.Namespace) -> str:
    """What a run of rltk.train needs to go on from here."""
    options = " ".join(f"task.options.{key}={value}" for key, value in arguments.options.items())
    return (
        f"model={arguments.out} task=reasoning_gym task.dataset={arguments.dataset} {options} "
        f"task.max_prompt_tokens={arguments.prompt} task.max_response_tokens={arguments.response}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kv_learning_warm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="as in model=<name or folder>")
    parser.add_argument("--dataset", default="word_sorting")
    parser.add_argument("--options", type=yaml.safe_load, default=WORD_SORTING, help="of the data set, as YAML")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--response", type=int, default=RESPONSE)
    parser.add_argument("--tagged", type=float, default=0.5, help="share of the answers that stand in answer tags")
    parser.add_argument("--examples", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="examples a step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, help="CPU threads; 1 on a busy machine")
    parser.add_argument("--out", default="runs/smollm2_warm")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = {"init": resolve_model(load([f"model={arguments.model}"])).model.path}
    task = ReasoningGym(arguments.prompt, arguments.response, arguments.dataset, seed=STREAM, **arguments.options)
    tokenizer = start_tokenizer(start, [])
    drawn = examples(tokenizer, task, min(arguments.examples, arguments.steps * arguments.batch), arguments.tagged)
    print(f"{len(drawn)} examples of {drawn.lengths.min()} to {drawn.lengths.max()} tokens", flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = start_model(start, tokenizer).to(device)
    batches = mixed_batches([drawn], [arguments.batch], 2 * (arguments.prompt + arguments.response), 0, device)
    train(model, batches, arguments.steps, arguments.lr, warmup=min(20, arguments.steps))
    save(model, tokenizer, Path(arguments.out))
    print(keys_of(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
