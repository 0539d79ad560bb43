"""GRPO with true offloading on the embedded pair: does a small model learn to hand over less where it hands over too
much, and more where it hands over too little?

    PYTHONPATH=src python benchmarks/grpo.py --starts most-tagging,selective --seeds 1,2

Two stages, both from the embedded small-base, both in this process and on one thread:

    over-tagging   supervised: tags around every product, and around sums, results and boxes with probability 0.6
    most-tagging   supervised: tags around every product, and around the whole addition and the whole subtraction with
                   probability 0.8: more than half of the text
    selective      supervised: tags around the products that small-base gets wrong in that very solution, no others
    GRPO           accuracy + --weight times a latency term; the large model writes in the rollouts

The latency terms are those of splitdecode/train/rewards.py: modelled = the transcript at costs fitted once, in this
process; measured = the models' milliseconds as they were; coverage = the published shaping, of the share of
characters inside tags, which likes 40 %: of the text of `over-tagging` it would have more inside tags, of that of
`most-tagging` less.

Before and after: --n held-out problems, greedy. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, compress, islice, product
from pathlib import Path
from typing import Any

import torch
from harness import finish, machine, show_table, use_threads
from tiny_base import teach
from torch import Tensor

import splitdecode
from splitdecode import ControlTags, LargeOnly, RequestOutput, SamplingParams, SplitDecoder
from splitdecode.families import Problem, boxed, problems, stream, tagged
from splitdecode.models.tokenizer import Tokenizer
from splitdecode.split.roles import Role
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG
from splitdecode.train.cost import Answer, CostModel
from splitdecode.train.grpo import Rollouts, make_trainer
from splitdecode.train.rewards import Latency, latency

PAIR = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
_MORE = {
    "over-tagging": (re.compile(r"((?:^sum |^left |\\boxed\{))(\d+)", re.MULTILINE), 0.6),
    "most-tagging": (re.compile(r"()(^\d+[+-]\d+\nones [^<]*?\n(?:sum|left) \d+$)", re.MULTILINE), 0.8),
}


def overtagged(problem: Problem, rng: random.Random, start: str) -> str:
    """The tagged trace, with more inside tags."""
    places, share = _MORE[start]

    def put(found: re.Match[str]) -> str:
        return f"{found[1]}{OPEN_TAG}{found[2]}{CLOSE_TAG}" if rng.random() < share else found[0]

    return places.sub(put, tagged(problem))


def missed(model: Any, words: Tokenizer, tasks: Sequence[Problem]) -> list[list[bool]]:
    """Which products of each solution a model gets wrong, greedy, behind what is right."""
    ids, labels = batch(words, [(task.prompt, task.trace) for task in tasks])
    with torch.no_grad():
        wrong = (model(input_ids=ids[:, :-1]).logits.argmax(-1) != labels[:, 1:]).tolist()
    found = []
    for task, row in zip(tasks, wrong, strict=True):
        ends = list(accumulate(len(words.token_bytes[i]) for i in words.encode_inserted(task.trace)))
        first = len(words.encode(task.prompt)) - 1  # the logits of the position before a token are the token's
        at = [bisect_right(ends, start) for start, _ in task.hard], [bisect_left(ends, stop) for _, stop in task.hard]
        found.append([any(row[first + low : first + high + 1]) for low, high in zip(*at, strict=True)])
    return found


def selected(problem: Problem, wrong: Sequence[bool]) -> str:
    """The trace with tags around the hard ranges that are marked."""
    return tagged(replace(problem, hard=tuple(compress(problem.hard, wrong))))


def taught(words: Tokenizer, start: str, steps: int, rows: int, seed: int) -> Any:
    """A transformers model: small-base, taught for `steps` steps of `rows` traces to tag too much or too little."""
    from transformers import Qwen2ForCausalLM

    base, model = (Qwen2ForCausalLM.from_pretrained(PAIR / "small-base", dtype=torch.float32) for _ in range(2))
    rng, source = random.Random(seed), stream(seed, part="train")

    def batches() -> list[tuple[Tensor, Tensor]]:
        tasks = list(islice(source, rows))
        if start == "selective":
            texts = [selected(task, wrong) for task, wrong in zip(tasks, missed(base, words, tasks), strict=True)]
        else:
            texts = [overtagged(task, rng, start) for task in tasks]
        return [batch(words, [(task.prompt, text) for task, text in zip(tasks, texts, strict=True)])]

    teach(model, batches, steps, matrix_rate=0.01, rate=1.5e-3)
    return model


def batch(words: Tokenizer, texts: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """ids and labels [B, T] of (prompt, completion); labels of prompts and padding are -100."""
    rows = [(words.encode(prompt), [*words.encode_inserted(text), words.eos_id or 0]) for prompt, text in texts]
    longest = max(len(a) + len(b) for a, b in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (prompt, text) in enumerate(rows):
        ids[row, : len(prompt) + len(text)] = torch.tensor(prompt + text)
        labels[row, len(prompt) : len(prompt) + len(text)] = torch.tensor(text)
    return ids, labels


def evaluate(decoder: SplitDecoder, tasks: Sequence[Problem]) -> dict[str, float]:
    """Greedy: share of right answers, of tokens by the large model, spans an answer."""
    params = SamplingParams(temperature=0.0, max_tokens=320)
    outputs = decoder.generate([task.prompt for task in tasks], params)
    count = len(tasks)
    tokens = sum(o.metrics.tokens for o in outputs)
    return {
        "accuracy": sum(map(right, outputs, tasks)) / count,
        "offload_fraction": sum(o.metrics.large.tokens for o in outputs) / tokens,
        "spans": sum(o.metrics.handoffs for o in outputs) / count,
    }


def right(output: RequestOutput, problem: Problem) -> float:
    """1 for the right number in the last box."""
    return float(boxed(output.outputs[0].text) == problem.answer)


def latency_terms(decoder: SplitDecoder) -> dict[str, Callable[[RequestOutput, Problem], float]]:
    """The three of train/rewards.py, over what the large model alone would cost for as many tokens."""
    params, asked = SamplingParams(temperature=0.0, max_tokens=320), [task.prompt for task in problems(32, 99)]
    runs = [
        output for policy in (ControlTags(), LargeOnly()) for output in decoder.generate(asked, params, handoff=policy)
    ]
    cost = CostModel.calibrate([Answer.of(output) for output in runs], decoder.config.read_interval)

    def term(kind: Latency) -> Callable[[RequestOutput, Problem], float]:
        return lambda output, _: latency(Answer.of(output), kind, cost)

    return {str(kind): term(kind) for kind in Latency}


def reinforce(decoder: SplitDecoder, state: dict[str, Tensor], name: str, seed: int, args: argparse.Namespace) -> Any:
    """Runs GRPO from `state`; returns the rollouts' figures, step by step."""
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    policy = Qwen2ForCausalLM.from_pretrained(PAIR / "small-base", dtype=torch.float32)
    policy.load_state_dict(state)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(PAIR / "small" / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    decoder.update_weights(state)
    terms = latency_terms(decoder)
    rollouts = Rollouts(
        decoder,
        {problem.prompt: problem for problem in problems(args.steps * args.prompts, 1000 + seed, part="train")},
        {"accuracy": right, "latency": terms[name]},
        SamplingParams(temperature=1.0, max_tokens=320, seed=100_000 * seed),
        weights={"latency": args.weight},
    )
    size = args.prompts * args.generations
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            policy, tokenizer, rollouts, num_generations=args.generations, per_device_train_batch_size=size,
            max_steps=args.steps, learning_rate=args.lr, lr_scheduler_type="constant", use_cpu=True, bf16=False,
            output_dir=folder, disable_tqdm=True, logging_steps=10**6, seed=seed, scale_rewards="none",
        )  # fmt: skip
        trainer.train()
    decoder.update_weights(policy.state_dict())
    return rollouts.steps


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; `argv` without the program's name."""
    args = arguments().parse_args(argv)
    use_threads(1)
    warnings.simplefilter("ignore")  # transformers warns of names that TRL still uses
    torch.manual_seed(0)
    decoder = SplitDecoder.demo(max_num_seqs=128)
    tasks = problems(args.n, 4242, part="held-out")
    runs = []
    for start, seed in product(args.starts.split(","), map(int, args.seeds.split(","))):
        torch.manual_seed(seed)
        model = taught(decoder.tokenizers[Role.SMALL], start, args.sft_steps, 24, seed)
        state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        decoder.update_weights(state)
        before = evaluate(decoder, tasks)
        for name in args.rewards.split(","):
            began = time.process_time()
            steps = reinforce(decoder, state, name, seed, args)
            after = evaluate(decoder, tasks)
            took = time.process_time() - began
            figures = {"before": before, "after": after, "steps": steps, "cpu_s": took}
            runs.append({"start": start, "seed": seed, "reward": name, **figures})
            print(f"{start}, seed {seed}, {name}: {before} -> {after}, {took:.0f} s", flush=True)
    show(runs)
    finish({"benchmark": "grpo", "machine": machine(), "settings": vars_of(args), "runs": runs}, args.output_json)
    return 0


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings, for the document."""
    return {name: value for name, value in vars(args).items() if name != "output_json"}


def show(runs: Sequence[dict[str, Any]]) -> None:
    """A table for people."""

    def rows() -> Iterator[list[str]]:
        for run in runs:
            one, other = run["before"], run["after"]
            yield [
                run["start"],
                f"{run['seed']}",
                run["reward"],
                f"{100 * one['accuracy']:.1f} -> {100 * other['accuracy']:.1f}",
                f"{100 * one['offload_fraction']:.2f} -> {100 * other['offload_fraction']:.2f}",
                f"{one['spans']:.2f} -> {other['spans']:.2f}",
                f"{run['cpu_s']:.0f}",
            ]

    head = ["start", "seed", "latency term", "right %", "offloaded %", "spans", "CPU s"]
    show_table("GRPO from small models that tag too much or too little", head, list(rows()))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--starts", default="most-tagging,selective", help="default %(default)s")
    add("--seeds", default="1,2", help="default %(default)s")
    add("--rewards", default="modelled,measured,coverage", help="default %(default)s")
    add("--steps", type=int, default=40, help="optimiser steps of GRPO (40)")
    add("--prompts", type=int, default=12, help="prompts of a step (12)")
    add("--generations", type=int, default=8, help="answers to a prompt (8)")
    add("--lr", type=float, default=3e-4, help="of AdamW (3e-4)")
    add("--weight", type=float, default=1.0, help="of the latency term (1)")
    add("--sft-steps", type=int, default=1500, help="optimiser steps of the supervised stage (1500)")
    add("--n", type=int, default=200, help="held-out problems (200)")
    add("--output-json", type=Path, help="also write the document here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
