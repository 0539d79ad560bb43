"""Rows on the embedded pair: who wins, who equals whom, at what rate a random switch runs, what each model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracles.embedded import OFFLOAD

import splitdecode
from splitdecode import RequestError, SplitDecoder
from splitdecode.evaluate.pair import PairSource
from splitdecode.evaluate.policies import Rate, Row, parse_rows
from splitdecode.evaluate.runs import Outcome, Settings, prompts_of, run_row, run_task
from splitdecode.evaluate.scorers import score_integer
from splitdecode.evaluate.tasks import Item, Task, family_task
from splitdecode.models.chat import ChatTemplate
from splitdecode.split import health
from splitdecode.split.roles import Pair

HINT = "You always use <bigmodel>...</bigmodel> to mark parts of the reasoning process that are important."


@pytest.fixture(scope="module")
def source() -> PairSource:
    return PairSource(options={"max_num_seqs": 16})


@pytest.fixture(scope="module")
def outcomes(source: PairSource) -> dict[str, Outcome]:
    rows = parse_rows("random,small-base,small,large,split,accept,reject,forced-base")
    task = family_task("two-products", 24, 1)
    return {outcome.row.name: outcome for outcome in run_task(task, rows, source.decoder, Settings(seed=5))}


def accuracy_of(outcome: Outcome) -> float:
    return sum(answer.right for answer in outcome.answers) / len(outcome.answers)


def test_who_wins(outcomes: dict[str, Outcome]) -> None:
    assert {name: accuracy_of(outcomes[name]) for name in ("large", "split", "forced-base")} == dict.fromkeys(
        ("large", "split", "forced-base"), 1
    )
    assert 0 < accuracy_of(outcomes["small-base"]) < 0.8
    assert accuracy_of(outcomes["small"]) < accuracy_of(outcomes["small-base"])


def test_health_is_of_rows_whose_hand_offs_the_tags_decide(outcomes: dict[str, Outcome]) -> None:
    assert {name for name, outcome in outcomes.items() if outcome.health is not None} == {"split", "accept"}
    split = outcomes["split"]
    assert split.health is not None
    assert split.health["offload"] == pytest.approx(OFFLOAD)
    assert split.health["tags"] == split.health["no_return"] == 0
    assert {alarm.partition(":")[0] for outcome in outcomes.values() for alarm in outcome.alarms} <= {"slow", "no_gain"}


def test_health_is_of_all_answers_of_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beyond what an engine remembers, and without those of the warm-up; seams are scored once it is timed."""
    monkeypatch.setattr(health, "MEMORY", 2)
    decoder = SplitDecoder.demo(watch_seams=3, max_num_seqs=4)
    order: list[str] = []
    seen: list[tuple[int, int]] = []
    generate, score_seams = decoder.generate, decoder.engine.score_seams

    def generated(*args: Any, **options: Any) -> Any:
        found = generate(*args, **options)
        order.append("generate")
        return found

    def scored() -> None:
        score_seams()
        order.append("score_seams")
        if decoder.engine.seams_wait:
            seen.append((len(decoder.health.answers), len(decoder.health.seams.large)))

    monkeypatch.setattr(decoder, "generate", generated)
    monkeypatch.setattr(decoder.engine, "score_seams", scored)
    outcome = run_row(family_task("two-products", 9, 1), Row("split"), decoder, Settings(), None)
    assert seen == [(9, 3)]
    assert order[-2:] == ["generate", "score_seams"]
    assert "score_seams" not in order[order.index("generate") + 1 : -1]
    assert outcome.health is not None
    assert outcome.health["seam"] is not None
    assert (len(decoder.health.answers), decoder.engine.seams_wait) == (0, False)


def test_random_runs_last_at_the_rate_of_the_split_row(outcomes: dict[str, Outcome]) -> None:
    assert list(outcomes)[-1] == "random"
    split, random = outcomes["split"], outcomes["random"]
    assert split.measured_rate == Rate(OFFLOAD, 4)
    assert random.rate == split.measured_rate
    assert 0 < random.measured_rate.share < 0.15
    assert outcomes["large"].measured_rate.share == 1
    assert outcomes["small"].measured_rate == Rate(0, 32)
    assert all(outcomes[name].rate is None for name in outcomes if name != "random")


def test_what_equals_what(outcomes: dict[str, Outcome]) -> None:
    texts = {name: [a.output.raw_text for a in outcome.answers] for name, outcome in outcomes.items()}
    assert texts["accept"] == texts["split"]
    plain = [text.replace("<bigmodel>", "").replace("</bigmodel>", "") for text in texts["split"]]
    assert texts["forced-base"] == plain
    assert texts["reject"] != texts["small"]


def test_decisions_and_labels(outcomes: dict[str, Outcome]) -> None:
    for answer in outcomes["split"].answers:
        assert answer.decisions is not None
        assert (answer.decisions.f1, answer.decisions.labelled, answer.decisions.hit) == (1, 2, 2)
        assert answer.kept is None
    assert all(answer.kept == (2, 2) for answer in outcomes["forced-base"].answers)
    assert all(a.decisions is None for name in ("small", "large", "reject") for a in outcomes[name].answers)
    assert any(answer.metrics.rejected_openings for answer in outcomes["reject"].answers)


def test_a_seed_is_a_result(source: PairSource) -> None:
    task, row = family_task("two-products", 6, 2), Row("split")
    settings = Settings(seed=3, samples=2, temperature=4.0)
    first, second = (run_row(task, row, source.decoder(row), settings, None) for _ in range(2))
    texts = [[a.output.raw_text for a in outcome.answers] for outcome in (first, second)]
    assert texts[0] == texts[1]
    assert [answer.item for answer in first.answers] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [len(one) for one in first.scores] == [2] * 6
    assert any(a != b for a, b in zip(texts[0][::2], texts[0][1::2], strict=True))  # two samples, two draws
    other = run_row(task, row, source.decoder(row), Settings(seed=4, samples=2, temperature=4.0), None)
    assert [a.output.raw_text for a in other.answers] != texts[0]


def test_a_budget_is_the_split_rows_alone(source: PairSource) -> None:
    task = family_task("two-products", 8, 2)
    rows = parse_rows("split,accept")
    split, accept = run_task(task, rows, source.decoder, Settings(budget=0.0))
    assert sum(answer.metrics.large.tokens for answer in split.answers) == 0
    assert sum(answer.spans for answer in accept.answers) == 16


def test_labels_of_a_solution_count_as_far_as_the_answer_follows(source: PairSource) -> None:
    """No rule: the answer is compared with the item's own solution, which goes another way behind the first product."""
    (item,) = family_task("two-products", 1, 1).items
    assert item.reference is not None
    assert item.hard is not None
    cut = item.hard[0][1] + 1
    made_up = Item(
        "x", item.prompt, item.answer, item.reference[:cut] + "# and so on 1234", ((item.hard[0]), (cut + 12, cut + 16))
    )
    task = Task("mine", [made_up], score_integer, "made up")
    outcome = run_row(task, Row("split"), source.decoder(Row("split")), Settings(), None)
    (answer,) = outcome.answers
    assert answer.decisions is not None
    assert answer.compared == (cut, cut + 16)
    assert (answer.decisions.f1, answer.decisions.labelled) == (1, 1)
    bare = Task("mine", [Item("x", item.prompt, item.answer)], score_integer, "made up")
    (answer,) = run_row(bare, Row("split"), source.decoder(Row("split")), Settings(), None).answers
    assert (answer.decisions, answer.right) == (None, True)


def test_what_cannot_run_is_said_first(source: PairSource) -> None:
    task = family_task("two-products", 1, 0)
    with pytest.raises(RequestError, match="random: no share to switch at"):
        next(run_task(task, parse_rows("random"), source.decoder, Settings()))
    bare = Task("mine", [Item("x", "", "")], score_integer, "made up")
    with pytest.raises(RequestError, match="forced: mine has questions without labels"):
        next(run_task(bare, parse_rows("small,forced"), source.decoder, Settings()))
    with pytest.raises(RequestError, match="--samples: found 0"):
        Settings(samples=0)


def test_pairs() -> None:
    with pytest.raises(RequestError, match="--small and --large: found one, expected both"):
        PairSource(small="a")
    with pytest.raises(RequestError, match="--base: found one without --small and --large"):
        PairSource(base="a")
    source = PairSource("org/a", "org/b")
    with pytest.raises(RequestError, match="random-base: found no base model, expected --base"):
        source.check(Row("random", True))
    assert (source.name, source.trained_on) == ("org/a + org/b", "org/a + org/b")
    assert (PairSource().name, PairSource().trained_on) == ("embedded pair", "two-products")


def test_a_pair_of_folders(tmp_path: Path) -> None:
    demo = PairSource()
    folder = Path(splitdecode.__path__[0]) / "data" / "tiny-pair"
    paths = {name: str(folder / name) for name in ("small", "large", "small-base")}
    source = PairSource(paths["small"], paths["large"], paths["small-base"], {"dtype": "float32"})
    assert source.name == "small + large"
    rows = parse_rows("small-base,split")
    task = family_task("two-products", 3, 0)
    found, wanted = (list(run_task(task, rows, one.decoder, Settings())) for one in (source, demo))
    assert [[a.output.raw_text for a in o.answers] for o in found] == [
        [a.output.raw_text for a in o.answers] for o in wanted
    ]
    assert source.decoder(rows[0]) is source.decoder(rows[0])
    assert source.decoder(rows[0]) is not source.decoder(rows[1])


# ---- what the models read


def question() -> Task:
    return Task("mine", [Item("x", "One and one?", "2")], score_integer, "made up", chat=True)


def test_a_question_without_a_template(source: PairSource) -> None:
    decoder, task = source.decoder(Row("split")), question()
    hinted = prompts_of(decoder, task, task.items[0], hint=True)
    assert hinted.small == f"One and one?\n{HINT}\n\n Put your final answer within \\boxed{{}}.\n"
    assert hinted.large == "One and one?\n\n\n Put your final answer within \\boxed{}.\n"
    plain = prompts_of(decoder, task, task.items[0], hint=False)
    assert plain.small == plain.large == hinted.large
    family = family_task("one-product", 1, 0)
    assert set(prompts_of(decoder, family, family.items[0], hint=True)) == {family.items[0].prompt}


def test_a_question_in_each_checkpoints_template(monkeypatch: pytest.MonkeyPatch, source: PairSource) -> None:
    decoder, task = source.decoder(Row("split")), question()
    written = ["S[{{ messages[0].content }}]", "L[{{ messages[0].content }}]"]
    monkeypatch.setattr(decoder, "templates", Pair(*(ChatTemplate(text, "a file") for text in written)))
    found = prompts_of(decoder, task, task.items[0], hint=True)
    assert found.small == f"S[One and one?\n{HINT}\n\n Put your final answer within \\boxed{{}}.]"
    assert found.large == "L[One and one?\n\n\n Put your final answer within \\boxed{}.]"


def test_an_answer_that_failed_is_wrong(monkeypatch: pytest.MonkeyPatch, source: PairSource) -> None:
    task, row = family_task("two-products", 1, 0), Row("split")
    decoder = source.decoder(row)
    real = decoder.generate

    def broken(*args: Any, **options: Any) -> Any:
        outputs = real(*args, **options)
        for output in outputs:
            output.outputs[0] = type(output.outputs[0])(
                **{**{f: getattr(output.outputs[0], f) for f in output.outputs[0].__slots__}, "finish_reason": "error"}
            )
        return outputs

    monkeypatch.setattr(decoder, "generate", broken)
    assert not run_row(task, row, decoder, Settings(), None).answers[0].right
