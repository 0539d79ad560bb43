"""F7: synthetic families of arithmetic problems: prompt, answer, worked solution, and which of its steps are hard.

    two-products            a*b + c*d - e, the family and the wordings the embedded pair was trained on
    two-products-reworded   the same in a wording its small model was not taught to split
    one-product             a*b - e
    three-products          a*b + c*d + f*g - e

Factors lie in 21..79, products in 1000..4999, what is taken away in 100..999, sums and answers in 1000..9999: so every
number of a family has a fixed width. The solution copies the numbers, multiplies, then works column by column:

    32*51-143  32*51=1632  1632-143  ones 2-3-0=9 borrow 1  ...  left 1489  </think>  \\boxed{1489}      (a line each)

Copying and columns are easy; the values of products are hard: they are what the large model should write.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice

from splitdecode.errors import RequestError
from splitdecode.split.tokens import CLOSE_TAG, OPEN_TAG

Ranges = tuple[tuple[int, int], ...]

PLACES = ("ones", "tens", "hundreds", "thousands")
PARTS = ("train", "held-out")
_HELD_OUT_ONE_IN = 10
_PRODUCT = re.compile(r"^\d+\*\d+=(\d+)", re.MULTILINE)
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its worked solution.

    trace  the solution as text, from <think> to the box, without tags
    hard   half-open ranges of characters of the trace that a large model should write: the values of its products
    """

    prompt: str
    answer: int
    trace: str
    hard: Ranges


@dataclass(frozen=True, slots=True)
class Family:
    """Problems of one shape: `products` of two factors are added up, one number is taken away.

    wordings: prompts with {0}, {1}, ... for the factors in order and, last, for what is taken away; used in turn.
    """

    name: str
    products: int
    wordings: tuple[str, ...]


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "two-products",
            2,
            (
                "Work out {0}*{1}+{2}*{3}-{4}.\n",
                "A school has {0} boxes of {1} cups and {2} boxes of {3} cups. It uses {4} cups. "
                "How many cups are left?\n",
            ),
        ),
        Family(
            "two-products-reworded",
            2,
            (
                "Mia fills {0} boxes with {1} cups, then {2} boxes with {3} cups. It uses {4} cups. "
                "How many cups are left?\n",
            ),
        ),
        Family(
            "one-product",
            1,
            (
                "Work out {0}*{1}-{2}.\n",
                "A school has {0} boxes of {1} cups. It uses {2} cups. How many cups are left?\n",
            ),
        ),
        Family(
            "three-products",
            3,
            (
                "Work out {0}*{1}+{2}*{3}+{4}*{5}-{6}.\n",
                "A school has {0} boxes of {1} cups and {2} boxes of {3} cups and {4} boxes of {5} cups. "
                "It uses {6} cups. How many cups are left?\n",
            ),
        ),
    )
}


def problems(number: int, seed: int, family: str = "two-products", part: str | None = None) -> list[Problem]:
    """`number` problems of a family; equal arguments give equal problems.

    part: "train" or "held-out", which never share a problem; None: of both. Raises RequestError for an unknown family
    or part.
    """
    return list(islice(stream(seed, family, part), number))


def stream(seed: int, family: str = "two-products", part: str | None = None) -> Iterator[Problem]:
    """The problems of `problems()`, without end."""
    if family not in FAMILIES:
        raise RequestError(f"family: found {family!r}, expected one of {', '.join(FAMILIES)}")
    if part not in (None, *PARTS):
        raise RequestError(f"part: found {part!r}, expected one of {', '.join(PARTS)}")
    shape, rng, count = FAMILIES[family], random.Random(seed), 0
    while True:
        factors = [rng.randint(21, 79) for _ in range(2 * shape.products)]
        products = [a * b for a, b in _pairs(factors)]
        if not all(1000 <= product <= 4999 for product in products):
            continue
        taken = rng.randint(100, 999)
        if sum(products) > 9999 or sum(products) - taken < 1000 or part not in (None, part_of(factors, taken)):
            continue
        prompt = shape.wordings[count % len(shape.wordings)].format(*factors, taken)
        text = _solution(factors, taken)
        yield Problem(prompt, sum(products) - taken, text, hard_ranges(text))
        count += 1


def part_of(factors: Sequence[int], taken: int) -> str:
    """Which part a problem is of: one in ten is "held-out", by a hash of the numbers alone.

    Wordings of the same sum, and sums that differ in the order of factors or products, are of the same part. The
    multiplication facts are not held out: there are 3,045 of them.
    """
    canonical = sorted(tuple(sorted(pair)) for pair in _pairs(factors))
    digest = sha256(repr((canonical, taken)).encode()).digest()
    return "train" if int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN else "held-out"


def hard_ranges(text: str) -> Ranges:
    """The characters of a solution that a large model should write: the value in each line a*b=value.

    Any text in the style of these families has such lines, right or wrong: so an answer can be labelled by itself.
    """
    return tuple(found.span(1) for found in _PRODUCT.finditer(text))


def tagged(problem: Problem) -> str:
    """The solution as a small model should write it: control tags around the hard ranges."""
    out, at = [], 0
    for start, stop in problem.hard:
        out += [problem.trace[at:start], OPEN_TAG, problem.trace[start:stop], CLOSE_TAG]
        at = stop
    return "".join([*out, problem.trace[at:]])


def boxed(text: str) -> int | None:
    """The integer in the last \\boxed{}; None where there is no box, or no integer (of up to 1,000 digits) in it."""
    found = _BOX.findall(text)
    return int(found[-1]) if found and re.fullmatch(r"-?[0-9]{1,1000}", found[-1]) else None


def _pairs(factors: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(factors[::2], factors[1::2], strict=True))


def _solution(factors: Sequence[int], taken: int) -> str:
    terms = [f"{a}*{b}" for a, b in _pairs(factors)]
    products = [a * b for a, b in _pairs(factors)]
    lines = ["<think>", f"{'+'.join(terms)}-{taken}"]
    lines += [f"{term}={product}" for term, product in zip(terms, products, strict=True)]
    total = products[0]
    for product in products[1:]:
        lines += [f"{total}+{product}", *_columns(total, product, 1), f"sum {total + product}"]
        total += product
    lines += [f"{total}-{taken}", *_columns(total, taken, -1), f"left {total - taken}"]
    return "\n".join([*lines, "</think>", f"\\boxed{{{total - taken}}}"])


def _columns(first: int, second: int, sign: int) -> Iterator[str]:
    """Addition (sign 1) or subtraction (-1) from the ones up; the last column hands nothing on."""
    mark, word, moved = ("+", "carry", 0) if sign > 0 else ("-", "borrow", 0)
    for place, name in enumerate(PLACES):
        x, y = (number // 10**place % 10 for number in (first, second))
        value = x + sign * (y + moved)
        line = f"{name} {x}{mark}{y}{mark}{moved}={value % 10}"
        moved = int(not 0 <= value <= 9)
        yield line if name == PLACES[-1] else f"{line} {word} {moved}"
