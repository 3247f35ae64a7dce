"""Tasks of reasoning-gym as prompts and verifier in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tests.models import make_model, make_tokenizer

from tether.cli import main
from tether.errors import RewardError, UserError
from tether.rewards import Rewards, RewardsConfig
from tether.rewards.scoring import scoring_process
from tether.rewards.scoring_main import stand_in_for_pycosat
from tether.rewards.tasks import ProblemsConfig, Task, stated_answer
from tether.runs import read_metrics

pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")

TEN = (
    *("chain_sum", "basic_arithmetic", "gcd", "count_bits", "letter_counting"),
    *("number_sorting", "spell_backward", "base_conversion", "countdown", "simple_equations"),
)


@pytest.fixture(scope="module")
def chain_sum() -> Task:
    return Task("reasoning_gym:chain_sum", ProblemsConfig(size=40, options={"max_terms": 3, "max_digits": 2}))


def test_problems_are_rows_and_right_answers_score(chain_sum: Task) -> None:
    assert len(chain_sum.rows) == 40
    assert chain_sum.rows[0].keys() == {"prompt", "answer", "problem"}
    answers, problems = [row["answer"] for row in chain_sum.rows], [row["problem"] for row in chain_sum.rows]
    assert all(-200 < int(answer) < 300 for answer in answers)  # the options reached the task
    assert chain_sum(answers, problems) == [1.0] * 40
    assert chain_sum([f"<think>?</think><answer> {answer}</answer>" for answer in answers], problems) == [1.0] * 40
    assert chain_sum([str(int(answer) + 1) for answer in answers], problems) == [0.0] * 40
    assert chain_sum([[{"role": "assistant", "content": answers[3]}]], problems[3:4]) == [1.0]


def test_the_same_seed_gives_the_same_problems_and_another_seed_none_of_them(chain_sum: Task) -> None:
    options = {"max_terms": 3, "max_digits": 2}
    prompts = [row["prompt"] for row in chain_sum.rows]
    again = Task("reasoning_gym:chain_sum", ProblemsConfig(size=40, options=options))
    assert [row["prompt"] for row in again.rows] == prompts
    other = Task("reasoning_gym:chain_sum", ProblemsConfig(size=40, seed=1, options=options))
    assert len(set(prompts) & {row["prompt"] for row in other.rows}) < 4  # by chance, not problem by problem
    # reasoning-gym itself would give problem i + 1 of seed 0 as problem i of seed 1
    assert sum(a == b["prompt"] for a, b in zip(prompts[1:], other.rows, strict=False)) == 0


def test_partial_credit_is_given_when_asked_for() -> None:
    task = Task("reasoning_gym:chain_sum", ProblemsConfig(size=1, partial=True))
    answer = task.rows[0]["answer"]
    verbose = f"{answer} is what I get"
    assert task([answer], [0]) == [1.0]
    assert 0 < task([verbose], [0])[0] < 1


def test_what_an_answer_states() -> None:
    assert stated_answer(" 7\n") == "7"
    assert stated_answer("<answer>1</answer> no, <answer>\n2 </answer>.") == "2"
    assert stated_answer("<answer>1") == "<answer>1"
    assert stated_answer("1</answer>") == "1</answer>"


@pytest.mark.parametrize("name", ["n_queens", "simple_integration", "polynomial_multiplication", "countdown"])
def test_code_in_an_answer_is_not_run(name: str, tmp_path: Path) -> None:
    """These tasks hand what the model wrote to `eval`."""
    task = Task(f"reasoning_gym:{name}", ProblemsConfig(size=1))
    made = tmp_path / "made"
    codes = [f"__import__('pathlib').Path('{made}').touch()", f"open('{made}', 'w').close()", f"open('{made}','w')"]
    if name == "countdown":  # the scorer wants the numbers of the problem, so only then it evaluates
        numbers = "+".join(n for n in task.rows[0]["answer"].replace("(", " ").replace(")", " ").split() if n.isdigit())
        codes += [f"{code} or {numbers}" for code in codes]
    assert task(codes, [0] * len(codes)) == [0.0] * len(codes)
    assert not made.exists()
    if task.rows[0]["answer"] is not None:
        assert task([task.rows[0]["answer"]], [0]) == [1.0]  # what is only arithmetic is still evaluated


def test_another_solver_stands_in_for_the_one_without_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pysat.solvers")
    monkeypatch.setitem(sys.modules, "pycosat", None)  # as where it is not installed
    stand_in_for_pycosat()
    clauses = [(1, 2), (-1, -2), (2, 3), (-3, 4, -1)]

    def satisfied(model: tuple[int, ...]) -> bool:
        return all(any(literal in model for literal in clause) for clause in clauses)

    expected = {model for model in product(*((-n, n) for n in range(1, 5))) if satisfied(model)}
    found = [tuple(model) for model in import_module("pycosat").itersolve(clauses)]
    assert len(found) == len(expected) > 1
    assert set(found) == expected
    assert list(import_module("pycosat").itersolve([(1,), (-1,)])) == []


def test_the_task_that_needs_a_solver_has_problems() -> None:
    task = Task("reasoning_gym:zebra_puzzles", ProblemsConfig(size=2, options={"num_people": 3}))
    assert task([row["answer"] for row in task.rows], [0, 1]) == [1.0, 1.0]


UNGUARDED = """
import json
from tether.rewards.scoring_main import stand_in_for_pycosat
stand_in_for_pycosat()
from reasoning_gym import create_dataset
from reasoning_gym.factory import DATASETS
scores = {}
for name in sorted(DATASETS.keys() - {"composite"}):
    data = create_dataset(name, size=3, seed=0)
    entries = [data[index] for index in range(3)]
    scores[name] = [data.score_answer(str(entry["answer"]).strip(), entry) for entry in entries]
print("scores:" + json.dumps(scores))
"""


@pytest.mark.slow
def test_every_task_scores_its_own_answers_and_runs_no_code(tmp_path: Path) -> None:
    """As reasoning-gym itself scores them, where `eval` takes anything."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
    said = subprocess.run(
        [sys.executable, "-c", UNGUARDED], env=environment, capture_output=True, text=True, check=True
    )
    expected = json.loads(said.stdout.rpartition("scores:")[2])
    made = tmp_path / "made"
    codes = [f"__import__('pathlib').Path('{made}').touch()", f"[open('{made}', 'w')]", f"open('{made}','w')"]
    assert len(expected) > 100
    for name, scores in expected.items():
        task = Task(f"reasoning_gym:{name}", ProblemsConfig(size=3, partial=True))
        answers = [str(row["answer"]) for row in task.rows]
        assert task(answers, [0, 1, 2]) == scores, name
        task([code for code in codes for _ in range(3)], [0, 1, 2] * 3)
        assert not made.exists(), name


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sum", {}, "expected `reasoning_gym:NAME`"),
        ("other:chain_sum", {}, "expected `reasoning_gym:NAME`"),
        ("reasoning_gym:chainsum", {}, "no such task; perhaps: .*chain_sum"),
        ("reasoning_gym:chain_sum", {"terms": 3}, "unexpected keyword argument 'terms': see problems.options"),
        ("reasoning_gym:chain_sum", {"min_terms": 9}, "see problems.options"),
    ],
)
def test_what_is_no_task_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Task(name, ProblemsConfig(size=1, options=options))
    assert "\n" not in str(caught.value)


def test_an_answer_that_takes_too_long_is_0_and_counted(
    chain_sum: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [row["answer"] for row in chain_sum.rows[:3]]
    assert chain_sum(answers, [0, 1, 2]) == [1.0] * 3
    process = scoring_process("gym")._process
    assert process is not None
    with monkeypatch.context() as patch:
        patch.setattr("tether.rewards.tasks.SCORING", 0.2)
        os.kill(process.pid, signal.SIGSTOP)
        assert chain_sum(answers[:1], [0]) == [0.0]
    assert "1 of 1 answers took too long to score and get 0" in caplog.text
    assert chain_sum(answers, [0, 1, 2]) == [1.0] * 3  # by another process, which makes the problems again


def test_a_problem_that_cannot_be_made_again_is_one_line(chain_sum: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_sum, "_of", {**chain_sum._of, "options": {"terms": 3}})
    with pytest.raises(RewardError, match=r"task `reasoning_gym:chain_sum`: problem 4 cannot be scored: TypeError"):
        chain_sum(["1"], [4])


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"seed": -1}, {"seed": 4001}, {"options": {"seed": 3}}, {"options": {"size": 3}}]
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"size|seed"):
        ProblemsConfig(**settings)


def test_the_verifier_comes_first_among_rewards(chain_sum: Task) -> None:
    rewards = Rewards(RewardsConfig(("length?per_token=-1",), (1.0, 0.5)), first=chain_sum)
    row = chain_sum.rows[0]
    scores = rewards([row["prompt"]], [row["answer"]], [[5, 6]], {"answer": [row["answer"]], "problem": [0]})
    assert scores.parts == {"chain_sum": [1.0], "length": [-2.0]}
    assert scores.total == [0.0]


# ---- by flag ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model(max_position_embeddings=1024).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", TEN)
def test_ten_tasks_run_as_problems_and_verifier_by_flag(name: str, model: str, tmp_path: Path) -> None:
    flags = ["--model", model, "--task", f"reasoning_gym:{name}", "--problems.size", "4"]
    flags += ["--sampling.max-new-tokens", "3"]
    result = tmp_path / "result.json"
    assert main(["eval", *flags, "--problems.seed", "1", "--output", str(result)]) == 0
    measured = json.loads(result.read_text())["result"]
    assert measured["prompts"] == 4
    assert 0 <= measured["score"]["mean"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TEN)
def test_ten_tasks_train_by_flag(name: str, model: str, tmp_path: Path) -> None:
    flags = ["--task", f"reasoning_gym:{name}", "--problems.size", "4", "--sampling.max-new-tokens", "3"]
    run = ["--iterations", "1", "--collect.prompts", "4", "--learner.minibatches", "1", "--learner.epochs", "1"]
    assert main(["ppo", "--model", model, *flags, *run, "--output", str(tmp_path / "run")]) == 0
    policy = tmp_path / "run" / "checkpoints" / "iteration-000001" / "policy"
    assert main(["eval", "--model", str(policy), *flags, "--problems.seed", "1"]) == 0
    assert read_metrics(tmp_path / "run")[0]["score"] >= 0


def test_ppo_on_a_task_with_its_configuration(model: str, tmp_path: Path) -> None:
    flags = ["--model", model, "--task", "reasoning_gym:letter_counting", "--problems.size", "6"]
    flags += ["--problems.options", "{min_words: 2, max_words: 3}", "--sampling.max-new-tokens", "3"]
    flags += ["--reward.functions", "length?per_token=-0.01", "--iterations", "1", "--output", str(tmp_path / "run")]
    flags += ["--collect.prompts", "4", "--learner.minibatches", "1", "--learner.epochs", "1"]
    assert main(["ppo", *flags]) == 0
    metrics = read_metrics(tmp_path / "run")[0]
    assert {"score/letter_counting", "score/length"} <= metrics.keys()
    assert main(["ppo", "--resume", str(tmp_path / "run"), "--iterations", "2"]) == 0


def test_a_task_and_a_file_of_prompts_are_one_too_many(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ppo", "eval"):
        words = [command, "--model", model, "--task", "reasoning_gym:gcd", "--prompts.path", "x.jsonl"]
        assert main(words) == 2
        assert "task and prompts.path are both set" in capsys.readouterr().err
