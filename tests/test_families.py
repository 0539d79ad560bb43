"""Synthetic families: worked examples by hand, arithmetic that holds, labels, wordings, parts that never meet."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitdecode import RequestError, SamplingParams, SplitDecoder
from splitdecode.families import FAMILIES, Problem, boxed, hard_ranges, part_of, problems, stream, tagged


def test_a_solution_by_hand() -> None:
    """Numbers that carry and borrow; what a reader would write."""
    found = next(p for p in stream(7) if p.prompt == "Work out 41*30+46*62-149.\n")
    assert found.answer == 3933
    assert found.trace.splitlines()[4:] == [
        "1230+2852",
        "ones 0+2+0=2 carry 0",
        "tens 3+5+0=8 carry 0",
        "hundreds 2+8+0=0 carry 1",
        "thousands 1+2+1=4",
        "sum 4082",
        "4082-149",
        "ones 2-9-0=3 borrow 1",
        "tens 8-4-1=3 borrow 0",
        "hundreds 0-1-0=9 borrow 1",
        "thousands 4-0-1=3",
        "left 3933",
        "</think>",
        "\\boxed{3933}",
    ]


def test_the_prompts_the_demo_always_had() -> None:
    """An independent copy of the first generator: equal seeds must keep giving equal prompts."""
    words = (
        "Work out {}*{}+{}*{}-{}.\n",
        "A school has {} boxes of {} cups and {} boxes of {} cups. It uses {} cups. How many cups are left?\n",
    )
    for seed in (3, 7, 11):
        rng, wanted = random.Random(seed), []
        while len(wanted) < 40:
            a, b, c, d = (rng.randint(21, 79) for _ in range(4))
            if 1000 <= a * b <= 4999 and 1000 <= c * d <= 4999:
                e = rng.randint(100, 999)
                wanted.append((words[len(wanted) % 2].format(a, b, c, d, e), a * b + c * d - e))
        assert [(p.prompt, p.answer) for p in problems(40, seed)] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_every_line_of_arithmetic_holds(family: str) -> None:
    for problem in problems(60, 5, family):
        numbers = [int(n) for n in re.findall(r"\d+", problem.prompt)]
        *factors, taken = numbers
        products = [a * b for a, b in zip(factors[::2], factors[1::2], strict=True)]
        assert len(products) == FAMILIES[family].products
        assert all(21 <= n <= 79 for n in factors)
        assert all(1000 <= n <= 4999 for n in products)
        assert problem.answer == sum(products) - taken == boxed(problem.trace)
        assert 1000 <= problem.answer <= 9999
        assert [problem.trace[start:stop] for start, stop in problem.hard] == [str(n) for n in products]
        for line in problem.trace.splitlines():
            if column := re.fullmatch(r"\w+ (\d)([+-])(\d)[+-](\d)=(\d)(?: (?:carry|borrow) (\d))?", line):
                x, sign, y, moved, digit, out = column.groups()
                value = int(x) + int(sign + y) + int(sign + moved)
                assert int(digit) == value % 10
                assert int(out or 0) == (not 0 <= value <= 9)
        totals = [int(n) for n in re.findall(r"^(?:sum|left) (\d+)$", problem.trace, re.MULTILINE)]
        assert totals == [sum(products[:n]) for n in range(2, len(products) + 1)] + [problem.answer]


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_stand_around_the_products(family: str) -> None:
    for problem in problems(10, 1, family):
        text = tagged(problem)
        assert re.sub(r"</?bigmodel>", "", text) == problem.trace
        inside = re.findall(r"=<bigmodel>(\d{4})</bigmodel>\n", text)
        assert len(inside) == FAMILIES[family].products == text.count("<bigmodel>")


def test_labels_of_any_text() -> None:
    text = "<think>\n1*2+3*4-5\n1*2=99\n3*4=\nx 5*6=30\n7*8=5 6\n"
    assert [text[start:stop] for start, stop in hard_ranges(text)] == ["99", "5"]
    assert hard_ranges("") == ()
    assert tagged(Problem("", 0, "none", ())) == "none"


def test_wordings_take_turns() -> None:
    starts = [p.prompt.split()[0] for p in problems(4, 0)]
    assert starts == ["Work", "A", "Work", "A"]
    assert {p.prompt.split()[0] for p in problems(4, 0, "two-products-reworded")} == {"Mia"}


def test_parts_never_meet() -> None:
    parts = {part: problems(300, 0, "one-product", part) for part in ("train", "held-out")}
    traces = {part: {p.trace for p in found} for part, found in parts.items()}
    assert not traces["train"] & traces["held-out"]
    both = problems(2000, 1)
    held = sum(part_of([int(n) for n in re.findall(r"\d+", p.trace)][:4], _taken(p)) == "held-out" for p in both)
    assert 140 <= held <= 260  # one in ten, six standard deviations


def _taken(problem: Problem) -> int:
    return int(problem.trace.splitlines()[1].rpartition("-")[2])


@given(st.lists(st.integers(21, 79), min_size=6, max_size=6), st.integers(100, 999))
@settings(max_examples=50, deadline=None)
def test_a_part_knows_no_order(factors: list[int], taken: int) -> None:
    a, b, c, d, e, f = factors
    assert part_of([a, b, c, d, e, f], taken) == part_of([d, c, e, f, b, a], taken)


def test_longer_runs_begin_as_shorter_ones() -> None:
    assert problems(3, 9, "three-products") == problems(10, 9, "three-products")[:3]
    assert list(islice(stream(9, "three-products"), 3)) == problems(3, 9, "three-products")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\\boxed{7}", 7),
        ("\\boxed{1} then \\boxed{-20}", -20),
        ("\\boxed{1} then \\boxed{}", None),
        ("\\boxed{1} then \\boxed{x}", None),
        ("\\boxed{5", None),
        ("5", None),
        ("\\boxed{٣}", None),
        ("\\boxed{" + "1" * 5000 + "}", None),
    ],
)
def test_boxed(text: str, number: int | None) -> None:
    assert boxed(text) == number


def test_what_is_refused() -> None:
    with pytest.raises(RequestError, match="family: found 'four-products', expected one of two-products, "):
        problems(1, 0, "four-products")
    with pytest.raises(RequestError, match="part: found 'test', expected one of train, held-out"):
        problems(1, 0, part="test")


def test_the_embedded_pair_writes_these_solutions() -> None:
    """Character for character: what training and labels assume is what the small model does."""
    tasks = problems(4, 2, "two-products", "held-out")
    params = SamplingParams(temperature=0.0, max_tokens=400, skip_special_tokens=False)
    with SplitDecoder.demo() as decoder:
        outputs = decoder.generate([task.prompt for task in tasks], params)
    assert [output.outputs[0].raw_text for output in outputs] == [tagged(task) for task in tasks]
