"""PPO from Python: one call, or the pieces; what each option of the configuration does; and runs that fail."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import make_model, make_tokenizer
from tests.run_folders import assert_same_run, metric_lines, newest_checkpoint
from torch import Tensor, nn
from torch._inductor import config as inductor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tether.config import config_from_dict
from tether.errors import RewardError, UserError
from tether.language import products
from tether.language.prompts import PromptsConfig
from tether.language.reference import ReferenceConfig
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import Parts, PPOConfig, Trained, build_ppo, train_ppo
from tether.ppo import AdvantageConfig, KLConfig, LearnerConfig
from tether.ppo.objective import clipped_surrogate
from tether.runs import Run, read_config, read_episodes, read_metrics
from tether.train import Iteration, iterate

TEXTS = ["ab", "c", "deab", "fa"]


def letters_a(completions: Sequence[str], **_: Any) -> list[float]:
    return [text.count("a") - 0.25 * len(text) for text in completions]


def settings(folder: Path, **options: Any) -> PPOConfig:
    small: dict[str, Any] = {
        "output": str(folder / "run"),
        "iterations": 3,
        "checkpoint_every": 2,
        "sampling": SamplingConfig(max_new_tokens=4),
        "collect": CollectConfig(prompts=4),
        "learner": LearnerConfig(epochs=1, minibatches=2, learning_rate=3e-3),
    }
    return PPOConfig(**small | options)


def parts(seed: int = 0, reward: Callable[..., Any] = letters_a) -> Parts:
    """A model of its own each time, since it is trained in place."""
    return Parts(make_model(seed=seed), make_tokenizer(), TEXTS, reward)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    others = second.state_dict()
    return all(torch.equal(weight, others[name]) for name, weight in first.state_dict().items())


def test_one_call_trains_the_model_in_memory_and_leaves_a_folder(tmp_path: Path) -> None:
    given, start, seen = parts(), make_model(), []
    trained = train_ppo(settings(tmp_path), given, report=seen.append)
    assert [step.number for step in seen] == [1, 2, 3]
    assert trained.world.policy.model is given.model
    assert not same_weights(trained.world.policy.model, start)
    assert same_weights(trained.world.reference.model, start)
    assert trained.policy == tmp_path / "run" / "checkpoints" / "iteration-000003" / "policy"
    assert same_weights(AutoModelForCausalLM.from_pretrained(trained.policy), trained.world.policy.model)
    lines = read_metrics(trained.folder)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert all(line["score"] == step.metrics["score"] for line, step in zip(lines, seen, strict=True))
    episodes = read_episodes(trained.folder, iteration=2)
    assert sorted(episode.prompt for episode in episodes) == sorted(TEXTS)
    assert all(e.score == e.response.count("a") - 0.25 * len(e.response) for e in episodes)


def test_ppo_raises_the_score(tmp_path: Path) -> None:
    learner = LearnerConfig(learning_rate=3e-3, epochs=2, minibatches=2)
    config = settings(tmp_path, iterations=30, collect=CollectConfig(prompts=32), learner=learner)
    trained = train_ppo(config, parts())
    scores = [line["score"] for line in read_metrics(trained.folder)]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.5


def test_who_owns_the_loop_gets_the_same_numbers(tmp_path: Path) -> None:
    config = settings(tmp_path, kl=KLConfig(beta=0.2, target=0.01))
    trained = train_ppo(config, parts())
    world, learner = build_ppo(config, parts())
    mine = []
    for step in iterate(world, learner):
        assert isinstance(step, Iteration)
        assert step.advantages.shape == step.returns.shape == step.trajectories.mask.shape
        mine.append({n: v for n, v in step.metrics.items() if not n.startswith(("time/", "memory/"))})
    theirs = [
        {n: v for n, v in line.items() if n != "iteration" and not n.startswith(("time/", "memory/"))}
        for line in read_metrics(trained.folder)
    ]
    assert mine == theirs
    assert same_weights(world.policy, trained.world.policy)


def test_who_owns_the_loop_may_change_things_on_the_way(tmp_path: Path) -> None:
    world, learner = build_ppo(settings(tmp_path), parts())
    betas = []
    for step in iterate(world, learner):
        betas.append(step.metrics["beta"])
        learner.kl.beta = step.number / 10
    assert betas == [0.05, 0.1, 0.2]
    assert not (tmp_path / "run").exists()  # no folder unless train_ppo is asked for one


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_group_baselines_train_no_critic(estimator: Any, tmp_path: Path) -> None:
    config = settings(
        tmp_path, advantage=AdvantageConfig(estimator=estimator), collect=CollectConfig(prompts=3, samples_per_prompt=4)
    )
    trained = train_ppo(config, parts())
    assert all(float(p.detach().abs().max()) == 0 for p in trained.world.policy.value_head.parameters())
    assert not same_weights(trained.world.policy.model, make_model())
    line = read_metrics(trained.folder)[-1]
    assert "explained_variance" not in line
    assert "value_loss" not in line
    groups: dict[int, set[str]] = {}
    for episode in read_episodes(trained.folder, iteration=1):
        groups.setdefault(episode.details["group"], set()).add(episode.prompt)
    assert [len(prompts) for prompts in groups.values()] == [1, 1, 1]


def test_kl_as_loss_leaves_the_score_alone_in_the_reward(tmp_path: Path) -> None:
    trained = train_ppo(settings(tmp_path, kl=KLConfig(beta=0.5, placement="loss")), parts())
    for line in read_metrics(trained.folder):
        assert line["reward"] == pytest.approx(line["score"], abs=1e-6)
        assert line["kl_loss"] >= 0
    penalised = train_ppo(settings(tmp_path / "reward", kl=KLConfig(beta=0.5)), parts())
    last = read_metrics(penalised.folder)[-1]
    assert last["reward"] == pytest.approx(last["score"] - 0.5 * last["kl_k1"], abs=1e-5)


def test_beta_follows_the_kl_and_is_resumed(tmp_path: Path) -> None:
    """Equation 2 of Ziegler et al. 2019: 4 responses of a horizon of 40 change β by at most 2 %."""
    config = settings(tmp_path, kl=KLConfig(beta=0.1, target=0.01, horizon=40), iterations=4)
    whole = train_ppo(config, parts())
    lines = read_metrics(whole.folder)
    beta = 0.1
    for line in lines:
        assert line["beta"] == pytest.approx(beta)
        beta *= 1 + min(max(line["kl_k1"] / 0.01 - 1, -0.2), 0.2) * 4 / 40
    assert len({line["beta"] for line in lines}) == 4
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), parts())
    train_ppo(stopped, parts(), resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)


def test_a_critic_with_a_trunk_of_its_own(tmp_path: Path) -> None:
    config = settings(tmp_path, separate_value_trunk=True, iterations=4)
    whole = train_ppo(config, parts())
    assert whole.world.policy.value_trunk is not None
    assert not same_weights(whole.world.policy.value_trunk, whole.world.policy.model.base_model)
    loaded = AutoModelForCausalLM.from_pretrained(whole.policy)
    assert same_weights(loaded, whole.world.policy.model)  # the critic is not in the policy's folder
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), parts())
    train_ppo(stopped, parts(), resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)
    with pytest.raises(UserError, match="separate_value_trunk changed"):
        train_ppo(replace(stopped, separate_value_trunk=False, iterations=5), parts(), resume=True)


def save_model(folder: Path) -> str:
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


def test_bfloat16_weights_from_a_folder(tmp_path: Path) -> None:
    config = settings(tmp_path, model=save_model(tmp_path), dtype="bfloat16", iterations=4)
    rest = Parts(prompts=TEXTS, reward=letters_a)
    whole = train_ppo(config, rest)
    policy = whole.world.policy
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.value_head.parameters()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(whole.policy, dtype="auto").dtype == torch.bfloat16
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), rest)
    train_ppo(stopped, rest, resume=True)
    assert_same_run(tmp_path / "stopped", whole.folder)


def test_a_model_in_memory_keeps_its_precision_when_resumed(tmp_path: Path) -> None:
    def half() -> Parts:
        return replace(parts(), model=make_model().to(torch.bfloat16))

    config = settings(tmp_path, iterations=4)
    whole = train_ppo(config, half())
    stopped = replace(config, output=str(tmp_path / "stopped"))
    train_ppo(replace(stopped, iterations=2), half())
    given = half()
    resumed = train_ppo(stopped, given, resume=True)
    assert resumed.world.policy.model is given.model  # in place, as at the start
    assert {p.dtype for p in resumed.world.policy.model.parameters()} == {torch.bfloat16}
    assert_same_run(tmp_path / "stopped", whole.folder)


def test_resuming_with_another_reference_is_refused(tmp_path: Path) -> None:
    config, given = settings(tmp_path, iterations=3), parts()
    train_ppo(replace(config, iterations=2), given)
    with pytest.raises(UserError, match="begun with another reference"):  # `given.model` was trained in place
        train_ppo(config, given, resume=True)
    train_ppo(config, parts(), resume=True)


def test_the_kl_is_measured_against_another_model_where_one_is_named(tmp_path: Path) -> None:
    make_model(seed=7).save_pretrained(tmp_path / "reference")
    world, learner = build_ppo(settings(tmp_path, reference=ReferenceConfig(str(tmp_path / "reference"))), parts())
    assert same_weights(world.reference.model, make_model(seed=7))
    first = next(iterate(world, learner))
    assert first.metrics["kl"] > 0.1
    own, learner = build_ppo(settings(tmp_path), parts())
    assert next(iterate(own, learner)).metrics["kl"] < 1e-6


def test_a_reference_that_does_not_know_all_tokens_is_refused(tmp_path: Path) -> None:
    other = make_model(seed=7)
    other.resize_token_embeddings(other.get_input_embeddings().weight.shape[0] - 2)
    other.save_pretrained(tmp_path / "reference")
    config = settings(tmp_path, reference=ReferenceConfig(str(tmp_path / "reference")))
    with pytest.raises(UserError, match=r"reference\.model: .* embeds \d+ tokens and the policy \d+"):
        build_ppo(config, parts())


def test_nothing_is_printed_where_no_progress_is_wanted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        given = Parts(prompts=TEXTS, reward=letters_a)
        capfd.readouterr()
        train_ppo(settings(tmp_path, model=str(tmp_path / "model"), iterations=1), given, progress=False)
        assert transformers_logging.is_progress_bar_enabled()  # as the user has it
    finally:
        if not shown:
            transformers_logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


def test_prompts_may_be_rows_whose_columns_reach_the_reward(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def reward(completions: list[str], answer: list[str]) -> list[float]:
        seen.append(answer)
        return [float(text == expected) for text, expected in zip(completions, answer, strict=True)]

    rows = [{"text": "ab", "answer": "x"}, {"text": "c", "answer": "y"}]
    given = replace(parts(reward=reward), prompts=rows)
    train_ppo(settings(tmp_path, iterations=1, prompts=PromptsConfig(column="text")), given)
    assert sorted(seen[0]) == ["x", "x", "y", "y"]


# ---- runs that fail ------------------------------------------------------------------------------------------------


def failing_at(call: int) -> Callable[..., list[float]]:
    """A reward that raises in its `call`-th call, and draws from Python's global generator."""
    calls = itertools.count(1)

    def reward(completions: list[str], **_: Any) -> list[float]:
        noise = [random.random() for _ in completions]
        if next(calls) == call:
            raise ConnectionError("the judge is away")
        return noise

    return reward


@pytest.mark.parametrize("call", [1, 4])
def test_a_reward_that_fails_loses_nothing(call: int, tmp_path: Path) -> None:
    """The responses that it was to score are kept, and the run goes on from just before them, checkpoint due or not."""
    config = settings(tmp_path, iterations=5, checkpoint_every=10)
    whole = train_ppo(replace(config, output=str(tmp_path / "whole")), parts(reward=failing_at(99)))
    with pytest.raises(RewardError, match="the judge is away"):
        train_ppo(config, parts(reward=failing_at(call)))
    run = tmp_path / "run"
    unscored = [json.loads(line) for line in (run / "unscored.jsonl").read_text().splitlines()]
    assert {line["iteration"] for line in unscored} == {call}
    expected = read_episodes(whole.folder, iteration=call)
    assert [(u["prompt"], u["response"]) for u in unscored] == [(e.prompt, e.response) for e in expected]
    assert len(metric_lines(run)) == call - 1 if call > 1 else not (run / "metrics.jsonl").exists()
    if call > 1:
        assert newest_checkpoint(run)[0] == call - 1
    train_ppo(config, parts(reward=failing_at(99)), resume=True)
    assert_same_run(run, whole.folder)


def test_an_update_that_diverges_leaves_the_last_checkpoint_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, iterations=6)
    whole = train_ppo(replace(config, output=str(tmp_path / "whole")), parts())
    calls = itertools.count(1)

    def poisoned(*arguments: Any) -> Any:
        loss, clipped = clipped_surrogate(*arguments)
        return (loss * torch.nan if next(calls) == 10 else loss), clipped  # the second minibatch of iteration 5

    with monkeypatch.context() as patched:
        patched.setattr("tether.ppo.learner.clipped_surrogate", poisoned)
        with pytest.raises(FloatingPointError, match="iteration 5"):
            train_ppo(config, parts())
    run = tmp_path / "run"
    assert newest_checkpoint(run)[0] == 4
    assert len(metric_lines(run)) == 4
    loaded = AutoModelForCausalLM.from_pretrained(newest_checkpoint(run)[1] / "policy")
    assert all(bool(p.isfinite().all()) for p in loaded.parameters())
    train_ppo(config, parts(), resume=True)
    assert_same_run(run, whole.folder)


def test_an_iteration_whose_metrics_are_not_logged_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its update is done, but a checkpoint of it would know more than the logs: the run goes on from the one before."""
    config = settings(tmp_path, iterations=5)
    whole = train_ppo(replace(config, output=str(tmp_path / "whole")), parts(reward=failing_at(99)))
    original = Run.log

    def full_disk(run: Run, iteration: int, numbers: Any) -> None:
        if iteration == 4:
            raise UserError("no space left")
        original(run, iteration, numbers)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", full_disk)
        with pytest.raises(UserError, match="no space left"):
            train_ppo(config, parts(reward=failing_at(99)))
    assert newest_checkpoint(tmp_path / "run")[0] == 2
    train_ppo(config, parts(reward=failing_at(99)), resume=True)
    assert_same_run(tmp_path / "run", whole.folder)


def test_an_error_of_the_report_comes_after_the_iteration_is_safe(tmp_path: Path) -> None:
    def report(step: Iteration) -> None:
        if step.number == 3:
            raise RuntimeError("the plot failed")

    config = settings(tmp_path, iterations=5, checkpoint_every=10)
    with pytest.raises(RuntimeError, match="the plot failed"):
        train_ppo(config, parts(), report=report)
    assert newest_checkpoint(tmp_path / "run")[0] == 3
    train_ppo(config, parts(), resume=True)
    whole = train_ppo(replace(config, output=str(tmp_path / "whole")), parts())
    assert_same_run(tmp_path / "run", whole.folder)


def test_a_run_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    def train(**options: Any) -> Trained:
        return train_ppo(settings(tmp_path, iterations=1, **options), parts())

    first = train()
    before = metric_lines(first.folder)
    with pytest.raises(UserError, match="holds a run already"):
        train(seed=1)
    assert metric_lines(first.folder) == before
    assert metric_lines(train(seed=1, overwrite=True).folder) != before


def test_a_run_that_failed_before_it_had_anything_to_keep_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("could not create a primitive descriptor")

    with monkeypatch.context() as broken:
        broken.setattr(Sampler, "sample", fail)
        with pytest.raises(RuntimeError, match="primitive descriptor"):
            train_ppo(settings(tmp_path), parts())
    assert read_config(tmp_path / "run")["seed"] == 0
    train_ppo(settings(tmp_path, seed=1), parts())
    assert read_config(tmp_path / "run")["seed"] == 1


def test_what_was_left_open_is_decided_once_and_kept_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, too, whose products may be faster in the other precision."""
    asked: list[bool] = []

    def decide(answer: bool) -> None:
        monkeypatch.setattr("tether.pipeline.ppo.bfloat16_pays", lambda model: asked.append(answer) or answer)

    monkeypatch.setattr("tether.pipeline.ppo.AUTOCAST_FROM", 0)
    config = settings(tmp_path, model=save_model(tmp_path))
    assert (config.device, config.autocast) == ("auto", None)
    rest = Parts(prompts=TEXTS, reward=letters_a)
    decide(True)
    whole = train_ppo(replace(config, output=str(tmp_path / "whole")), rest)
    assert whole.world.policy.autocast
    first = train_ppo(replace(config, iterations=2), rest)
    written = read_config(first.folder)
    assert (written["device"], written["autocast"]) == (str(first.world.policy.device), True)
    decide(False)
    again = config_from_dict(PPOConfig, written | {"iterations": 3}, "config.yaml")
    assert train_ppo(again, rest, resume=True).world.policy.autocast
    assert asked == [True, True]
    assert_same_run(tmp_path / "run", whole.folder)


def test_bfloat16_is_left_alone_by_models_too_small_to_gain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tether.pipeline.ppo.bfloat16_pays", lambda model: True)
    world, _ = build_ppo(settings(tmp_path), parts())
    assert not world.policy.autocast


@pytest.mark.parametrize("options", [{"autocast": True}, {"dtype": "bfloat16"}], ids=["autocast", "dtype"])
def test_bfloat16_runs_on_a_processor_without_instructions_for_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert weight.dtype == torch.float32, "could not create a primitive descriptor"
        return by_onednn(inputs, weight, bias)

    by_onednn = products._by_onednn
    monkeypatch.setattr(products, "ONEDNN", products.ONEDNN - {torch.bfloat16})
    monkeypatch.setattr(products, "_by_onednn", refuse)
    monkeypatch.setattr(products, "SMALLEST", 0)
    monkeypatch.setattr(products, "SMALLEST_PACKED", 0)
    rest = Parts(prompts=TEXTS, reward=letters_a)
    trained = train_ppo(settings(tmp_path, model=save_model(tmp_path), **options), rest)
    assert trained.learner.iteration == 3


def test_compiling_without_a_compiler_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(inductor.cpp, "cxx", (None, str(tmp_path / "g++")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # so that nothing is there ready-made
    with pytest.raises(UserError, match=r"^compile is set, but torch.compile does not work here \(.*\)$"):
        train_ppo(settings(tmp_path, compile=True, model="no-such-folder"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"learner": LearnerConfig(minibatches=5)}, "minibatches is 5, but an iteration has only 4 responses"),
        ({"advantage": AdvantageConfig(estimator="rloo")}, "samples_per_prompt is 1, expected at least 2"),
        ({"sampling": SamplingConfig(temperature=0.0)}, "temperature is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


def test_the_number_of_checkpoints_that_stay(tmp_path: Path) -> None:
    config = settings(tmp_path, iterations=5, checkpoint_every=1, keep_checkpoints=3)
    folders = sorted(p.name for p in train_ppo(config, copy.copy(parts())).folder.glob("checkpoints/*"))
    assert folders == ["iteration-000003", "iteration-000004", "iteration-000005"]
