"""F7: the numbers of a GRPO run: presets in presets/grpo-*.toml or a file of one's own, flags over them, each checked.

what is drawn        prompts x generations answers a step, temperature, max_tokens, max_prompt
what it is worth     rewards, latency, scoring, cost
what is made of it   learning_rate, scale_rewards, steps, stop_after
where it fits        device; dtype, kv_cache_memory of the pair; micro_batch, gradient_checkpointing, bf16
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitdecode.config import GREEDY_BELOW, parse_bytes
from splitdecode.errors import RequestError
from splitdecode.train.cost import CostModel
from splitdecode.train.rewards import Latency, combine
from splitdecode.train.settings import COUNT, FLAG, POSITIVE, Checks, check, known_fields, number, read_preset, whole

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
SCALES = ("none", "group", "batch")


@dataclass(frozen=True, slots=True)
class GrpoSettings:
    """One run. Raises RequestError naming the field that cannot be used, MissingExtraError for a scorer's package.

    learning_rate             constant            temperature, max_tokens   of the rollouts
    max_prompt                tokens; questions with longer prompts are left out
    prompts, generations      of a step: so many prompts, so many answers to each
    steps, stop_after         optimiser steps; fewer where the mean reward of the last stop_after steps is no more than
                              that of those before (0: never)
    rewards, latency, scoring term=weight,... of rewards.py; where latency comes from; how answers are scored
    cost                      a file with the cost model; none: it is fitted to answers of this pair
    scale_rewards             what a reward's distance from its group's mean is divided by: none, the spread of the
                              group or that of the batch
    device                    of policy and pair: cpu, cuda, or auto: cuda where there is one
    dtype, kv_cache_memory    of the pair, see SplitDecoder.from_pretrained
    micro_batch               answers a forward of the loss (0: all of a step); the gradient is that of the whole step
    gradient_checkpointing    spends time to save memory; bf16: autocast. The policy's weights are float32
    save_steps                steps between checkpoints
    """

    learning_rate: float = 1e-6
    temperature: float = 0.7
    max_tokens: int = 4096
    max_prompt: int = 512
    generations: int = 14
    prompts: int = 6
    steps: int = 833
    stop_after: int = 0
    rewards: str = "accuracy=1,format=1,tag_count=1"
    latency: str = "modelled"
    scoring: str = "integer"
    cost: str = ""
    scale_rewards: str = "group"
    device: str = "auto"
    dtype: str = "float32"
    kv_cache_memory: str = "256MiB"
    micro_batch: int = 0
    gradient_checkpointing: bool = False
    bf16: bool = False
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, _CHECKS)
        parse_bytes(self.kv_cache_memory, "kv_cache_memory")
        combine(weights_of(self.rewards), scoring=self.scoring, kind=self.latency)
        if self.cost and not self.timed:
            raise RequestError(f"cost: found {self.cost} for rewards {self.rewards} with latency {self.latency}, "
                               "expected rewards with latency, measured or modelled")  # fmt: skip
        if self.micro_batch and self.answers % self.micro_batch:
            raise RequestError(f"micro_batch: found {self.micro_batch}, expected a number that divides prompts x "
                               f"generations, {self.answers}")  # fmt: skip

    @property
    def answers(self) -> int:
        """Answers of a step."""
        return self.prompts * self.generations

    @property
    def timed(self) -> bool:
        """Whether the rewards ask for a cost model."""
        return "latency" in weights_of(self.rewards) and self.latency != Latency.COVERAGE

    def given_cost(self) -> CostModel | None:
        """The cost model of the file, None where it is to be fitted. Raises RequestError for a file that is none."""
        return CostModel.read(Path(self.cost)) if self.cost else None


def weights_of(text: str) -> dict[str, float]:
    """{term: weight} of "accuracy=1,latency=0.5"."""
    try:
        return {name.strip(): float(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise RequestError(f"rewards: found {text!r}, expected term=weight,... as in accuracy=1,latency=1") from None


def preset(name: str, **changes: Any) -> GrpoSettings:
    """The settings of a preset, or of a .toml file with the same keys, with `changes` over them. Raises RequestError
    for an unknown preset, a file that cannot be read, an unknown field."""
    values = read_preset(name, GrpoSettings, "grpo-")
    return GrpoSettings(**{**values, **known_fields(changes, GrpoSettings, "settings")})


def _one_of(*names: str) -> tuple[Any, str]:
    return (lambda value: isinstance(value, str) and value in names), f"one of {', '.join(names)}"


_TEXT = ((lambda value: isinstance(value, str)), "a text")
_CHECKS: Checks = {
    "learning_rate": POSITIVE,
    "temperature": (number(GREEDY_BELOW), f"a finite number from {GREEDY_BELOW:g}"),
    "max_tokens": COUNT,
    "max_prompt": COUNT,
    "generations": (whole(2), "a whole number from 2"),
    "prompts": COUNT,
    "steps": COUNT,
    "stop_after": (whole(0), "a whole number from 0"),
    "rewards": _TEXT,
    "latency": _one_of(*Latency),
    "scoring": _TEXT,
    "cost": _TEXT,
    "scale_rewards": _one_of(*SCALES),
    "device": _one_of(*DEVICES),
    "dtype": _one_of(*DTYPES),
    "kv_cache_memory": _TEXT,
    "micro_batch": (whole(0), "a whole number from 0"),
    "gradient_checkpointing": FLAG,
    "bf16": FLAG,
    "save_steps": COUNT,
    "seed": (whole(0), "a whole number from 0"),
}
