"""One algorithm, two worlds: text collected by sampling and text stepped through as an environment are the same.

`LanguageWorld` and `ControlWorld` share the model, the draw of one token and the learner, and nothing between them: not
batches, caches, padding, masks, ends, rewards, penalties, references or values beyond a truncation. So each is the
other's test: `the_roads_meet` compares what they collect and what is learnt from it, and every mutation of one road
alone has to be noticed by it, in the field where it shows first.

N = responses, T = tokens of the longest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models import (
    EOS,
    VOCABULARY,
    CountingRewards,
    make_model,
    make_prompts,
    make_tokenizer,
    perturbed,
    plain_forward,
)
from tether.control import world as control_module
from tether.control.environments import Environments
from tether.control.policy import StateContext
from tether.control.world import ControlCollectConfig, ControlWorld, load_policy
from tether.errors import UserError
from tether.language import sampler as sampler_module
from tether.language import world as language_module
from tether.language.environment import TokenEnv, score_with_rewards
from tether.language.models import prepare_model
from tether.language.policy import LanguagePolicy
from tether.language.reference import ModelReference
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.pipeline.bridge import LimitEnds, StepwisePolicy
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig, Trajectories
from tether.train import iterate

EXACT = 1e-5
V = len(VOCABULARY)
PROMPTS = make_prompts(6)
"""Of different lengths; some hold the eos id, one begins with it."""


@dataclass(frozen=True)
class Case:
    """What both roads are told."""

    kind: str = "gpt2"
    pad: str | None = "<eos>"
    temperature: float = 1.0
    limit: int = 6
    stop: tuple[str, ...] = ()
    kl: KLConfig = field(default_factory=lambda: KLConfig(beta=0.1))
    missing_eos_penalty: float = 0.0
    bootstrap: bool = True
    separate_value_trunk: bool = False
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)


CASES = {
    "plain": Case(kl=KLConfig(beta=0.0)),
    "penalised": Case(kl=KLConfig(beta=0.3), missing_eos_penalty=2.0, temperature=0.8),
    "no pad token": Case(pad=None, temperature=1.4, missing_eos_penalty=0.5),
    "another pad token": Case(pad="<pad>", temperature=0.7, kind="llama"),
    "the limit is an end": Case(bootstrap=False, missing_eos_penalty=1.0),
    "discounted": Case(advantage=AdvantageConfig(gamma=0.9, lam=0.6, whiten=False), kind="llama"),
    "stop strings": Case(stop=("a", "bc"), temperature=1.2),
    "a critic of its own": Case(separate_value_trunk=True),
    "KL in the loss": Case(kl=KLConfig(beta=0.2, placement="loss", loss_estimator="k2")),
    "adaptive beta": Case(kl=KLConfig(beta=0.3, target=0.05, horizon=40)),
}
RICH = Case(kl=KLConfig(beta=0.3), missing_eos_penalty=2.0, temperature=0.7)
"""In which every mutation has something to act on."""


class Asked(gymnasium.Wrapper):
    """Every episode begins with the prompt that the test names."""

    prompt = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self.env.reset(seed=seed, options={"prompt": self.prompt})


@dataclass(frozen=True)
class Roads:
    """The two worlds, with equal policies of their own, and the learner of each."""

    case: Case
    language: LanguageWorld
    control: ControlWorld
    stepwise: StepwisePolicy
    envs: list[Asked]
    learners: dict[str, Learner]

    @property
    def policies(self) -> tuple[LanguagePolicy, LanguagePolicy]:
        return self.language.policy, self.stepwise.policy


def make_roads(case: Case, seed: int = 0) -> Roads:
    """A policy that has moved from its reference, and whose critic has something to say, on both roads."""
    reference = make_model(case.kind, seed)
    policy = perturbed(LanguagePolicy(copy.deepcopy(reference), case.separate_value_trunk), 0.03, seed + 1)
    tokenizer = make_tokenizer(case.pad)
    config = SamplingConfig(max_new_tokens=case.limit, temperature=case.temperature, stop=case.stop)
    sampler = Sampler(policy, tokenizer, config, seed)
    collect = CollectConfig(
        prompts=len(PROMPTS),
        samples_per_prompt=2,
        missing_eos_penalty=case.missing_eos_penalty,
        bootstrap_truncated=case.bootstrap,
    )
    language = LanguageWorld(
        policy,
        ModelReference(copy.deepcopy(reference)),
        sampler,
        PROMPTS,
        CountingRewards(),
        KLController(case.kl),
        collect,
        seed,
    )
    envs = [
        Asked(
            make_env(
                tokenizer,
                max_new_tokens=case.limit,
                missing_eos_penalty=case.missing_eos_penalty,
                stop=case.stop,
                ends=not case.bootstrap,
            )
        )
        for _ in range(2 * len(PROMPTS))
    ]
    environments = Environments.of(envs, seed)
    stepwise = StepwisePolicy(copy.deepcopy(policy), environments.observation_space, case.temperature)
    control = ControlWorld(
        stepwise,
        environments,
        ControlCollectConfig(steps=case.limit, whole_episodes=True),
        case.advantage.gamma,
        seed,
        StepwisePolicy(LanguagePolicy(reference), environments.observation_space, case.temperature),
        KLController(case.kl),
    )
    # Adam divides by |gradient| + ε: with the usual ε it would lift gradients that are nothing but rounding to whole
    # steps, as those of a key's bias are, which the softmax does not see
    learning = LearnerConfig(
        epochs=3, minibatches=1, learning_rate=0.01, adam_epsilon=0.01, entropy_coefficient=0.01, max_gradient_norm=0.5
    )
    learners = {
        name: Learner(world.policy, learning, case.advantage, world.kl, iterations=2)
        for name, world in (("language", language), ("control", control))
    }
    return Roads(case, language, control, stepwise, envs, learners)


def make_env(tokenizer: PreTrainedTokenizerFast, ends: bool = False, **changes: Any) -> gymnasium.Env:
    arguments: dict[str, Any] = {"vocabulary_size": V, "eos_token_id": EOS, "max_new_tokens": 4, "tokenizer": tokenizer}
    score = score_with_rewards(CountingRewards(), PROMPTS, tokenizer)  # type: ignore[arg-type]
    env = TokenEnv([p.token_ids for p in PROMPTS], score, **arguments | changes)
    return LimitEnds(env) if ends else env


def collect(roads: Roads) -> tuple[Trajectories, Trajectories]:
    """A batch of each road, of the same prompts and with the same random numbers."""
    roads.control.generator.set_state(roads.language.sampler.generator.get_state())
    expected = roads.language.collect()
    context = expected.context
    known = [p.token_ids for p in PROMPTS]
    for env, tokens, start in zip(roads.envs, context.tokens.tolist(), context.starts.tolist(), strict=True):
        env.prompt = known.index(tuple(tokens[:start]))
    return expected, roads.control.collect()


def the_roads_meet(roads: Roads, iterations: int = 1) -> None:
    """Raises AssertionError, which begins with the name of what differs first."""
    for _ in range(iterations):
        expected, found = collect(roads)
        same_trajectories(expected, found, roads.case)
        before = [p.detach().clone() for p in roads.language.policy.parameters()]
        same_update(roads, expected, found)
        moved = max(
            float((p - q.detach()).abs().max()) for p, q in zip(before, roads.language.policy.parameters(), strict=True)
        )
        assert moved > 100 * EXACT


def same_trajectories(expected: Trajectories, found: Trajectories, case: Case) -> None:
    close("mask", found.mask, expected.mask)
    close("actions", found.actions * found.mask, expected.actions * expected.mask)
    if case.bootstrap:
        close("terminated", found.terminated, expected.terminated)
        close("truncated", found.truncated, expected.truncated)
    else:
        close("ends", found.terminated, expected.terminated | expected.truncated)
        assert not found.truncated.any()
    for name in ("log_probs", "values", "reference_log_probs", "rewards"):
        close(name, getattr(found, name) * found.mask, getattr(expected, name) * expected.mask)
    close("bootstrap_values", found.bootstrap_values, expected.bootstrap_values)


def same_update(roads: Roads, expected: Trajectories, found: Trajectories) -> None:
    language, control = roads.learners["language"], roads.learners["control"]
    credits = language.credit(expected), control.credit(found)
    for name, theirs, ours in zip(("advantages", "returns"), *credits, strict=True):
        close(name, ours, theirs)
    metrics = language.update(expected, *credits[0]), control.update(found, *credits[1])
    assert metrics[0].keys() == metrics[1].keys()
    for name, value in metrics[0].items():
        close(name, torch.tensor(metrics[1][name]), torch.tensor(value))
    for (name, theirs), ours in zip(roads.policies[0].named_parameters(), roads.policies[1].parameters(), strict=True):
        close(f"parameter {name}", ours.detach(), theirs.detach())
    close("beta", torch.tensor(roads.control.kl.beta), torch.tensor(roads.language.kl.beta))  # type: ignore[union-attr]


def close(name: str, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=EXACT, rtol=EXACT, msg=lambda text: f"{name}: {text}")


# The roads are one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_both_roads_collect_the_same_trajectories_and_learn_the_same_from_them(case: Case) -> None:
    """Twice in a row, the second time with what was learnt the first time."""
    the_roads_meet(make_roads(case), iterations=2)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_cases_hold_what_they_are_there_for(case: Case) -> None:
    expected, found = collect(make_roads(case))
    lengths = expected.mask.sum(dim=1)
    assert expected.terminated.any()
    assert expected.truncated.any()
    assert lengths.min() < lengths.max() == case.limit
    assert len(expected.context.starts.unique()) > 2
    assert (found.bootstrap_values[found.truncated].abs() > 0.001).all()
    assert bool(found.truncated.any()) is case.bootstrap
    assert found.reference_log_probs is not None
    assert (found.log_probs - found.reference_log_probs).abs().max() > 0.05
    assert found.markov
    assert not expected.markov


def test_actions_of_another_policy_are_evaluated_alike() -> None:
    """Tokens that none of the two has drawn, far from likely, where the roads could not agree by drawing them."""
    roads = make_roads(RICH)
    expected, found = collect(roads)
    generator = torch.Generator().manual_seed(7)
    actions = torch.randint(0, V, expected.actions.shape, generator=generator)
    tokens = expected.context.tokens.clone()
    observations = found.context.observations.clone()
    for row, (start, length) in enumerate(zip(expected.context.starts, expected.mask.sum(dim=1), strict=True)):
        tokens[row, start : start + length] = actions[row, :length]
        for step in range(1, int(length)):
            observations[row, step, start : start + step] = actions[row, :step]
    theirs = roads.policies[0].evaluate(replace(expected.context, tokens=tokens), actions, expected.mask)
    ours = roads.stepwise.evaluate(StateContext(observations), actions, found.mask)
    for name in ("log_probs", "values", "entropy"):
        close(name, getattr(ours, name), getattr(theirs, name))
    assert theirs.log_probs.min() < -5


# Mutations of one road alone --------------------------------------------------------------------------------

Mutation = Callable[[pytest.MonkeyPatch, Roads], None]


def change_samples(change: Callable[[Any], dict[str, Any]]) -> Mutation:
    """Of the language road: fields of what the sampler returns."""

    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        sample = roads.language.sampler.sample

        def changed(*arguments: Any) -> Any:
            samples = sample(*arguments)
            return replace(samples, **change(samples))

        patch.setattr(roads.language.sampler, "sample", changed)

    return mutate


def change_rewards(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Mutation:
    """Of the language road: `change(scores, penalties, mask)` instead of the scores at the end plus the penalties."""

    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        def changed(scores: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
            return change(scores, -beta * (log_probs - reference) * mask, mask)

        patch.setattr(language_module, "penalised_rewards", changed)

    return mutate


def at_last(mask: Tensor) -> Tensor:
    """(N, T), True at each row's last valid step."""
    return mask & (torch.arange(1, mask.shape[1] + 1) == mask.sum(dim=1, keepdim=True))


def later(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, :-1]], dim=1)


def change_successor(change: Callable[[Callable[..., Tensor], Any, Tensor], Tensor]) -> Mutation:
    """Of the language road: the value beyond the last token."""

    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        policy = roads.language.policy
        real = policy.successor_values
        patch.setattr(policy, "successor_values", lambda context, lengths: change(real, context, lengths))

    return mutate


def sampled_log_probs_at_temperature_one(patch: pytest.MonkeyPatch, roads: Roads) -> None:
    real = sampler_module.draw

    def changed(logits: Tensor, *arguments: Any) -> Any:
        token, _, kept = real(logits, *arguments)
        return token, logits.log_softmax(dim=-1).gather(-1, token[:, None]).squeeze(-1), kept

    patch.setattr(sampler_module, "draw", changed)


def reference_at_another_temperature(patch: pytest.MonkeyPatch, roads: Roads) -> None:
    real = language_module.compare

    def changed(policy: Any, reference: Any, context: Any, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return real(policy, reference, replace(context, temperature=1.0), *rest)

    patch.setattr(language_module, "compare", changed)


def penalise_every_response(patch: pytest.MonkeyPatch, roads: Roads) -> None:
    real = language_module.scale_and_clip
    penalty = roads.case.missing_eos_penalty
    patch.setattr(language_module, "scale_and_clip", lambda scores, *options: real(scores, *options) - penalty)


def learn_one_state_early(patch: pytest.MonkeyPatch, roads: Roads) -> None:
    policy = roads.language.policy
    real = policy.evaluate

    def changed(context: Any, actions: Tensor, mask: Tensor) -> Any:
        return real(replace(context, starts=(context.starts - 1).clamp(min=1)), actions, mask)

    patch.setattr(policy, "evaluate", changed)


LANGUAGE: dict[str, tuple[str, Mutation]] = {
    "the mask ends before the last token": (
        "mask",
        change_samples(lambda s: {"mask": s.mask & (~at_last(s.mask) | (s.mask.sum(dim=1, keepdim=True) == 1))}),
    ),
    "the mask goes on for one token": ("mask", change_samples(lambda s: {"mask": s.mask | later(s.mask)})),
    "eos counts as cut off": ("terminated", change_samples(lambda s: {"terminated": torch.zeros_like(s.terminated)})),
    "cut off counts as eos": ("terminated", change_samples(lambda s: {"terminated": torch.ones_like(s.terminated)})),
    "log-probs of the next token": ("log_probs", change_samples(lambda s: {"log_probs": later(s.log_probs)})),
    "log-probs at temperature 1": ("log_probs", sampled_log_probs_at_temperature_one),
    "values one state late": ("values", change_samples(lambda s: {"values": later(s.values)})),
    "reference at temperature 1": ("reference_log_probs", reference_at_another_temperature),
    "KL charged at the next token": (
        "rewards",
        change_rewards(lambda scores, penalties, mask: at_last(mask) * scores[:, None] + later(penalties) * mask),
    ),
    "no KL at eos": (
        "rewards",
        change_rewards(lambda scores, penalties, mask: at_last(mask) * scores[:, None] + penalties * ~at_last(mask)),
    ),
    "KL charged twice": (
        "rewards",
        change_rewards(lambda scores, penalties, mask: at_last(mask) * scores[:, None] + 2 * penalties),
    ),
    "KL of the whole response at its end": (
        "rewards",
        change_rewards(lambda scores, penalties, mask: at_last(mask) * (scores + penalties.sum(dim=1))[:, None]),
    ),
    "score at the first token": (
        "rewards",
        change_rewards(
            lambda scores, penalties, mask: (torch.arange(mask.shape[1]) == 0) * scores[:, None] + penalties
        ),
    ),
    "the penalty falls on every response": ("rewards", penalise_every_response),
    "no bootstrap": ("bootstrap_values", change_successor(lambda real, c, n: torch.zeros(len(n)))),
    "twice the bootstrap": ("bootstrap_values", change_successor(lambda real, c, n: 2 * real(c, n))),
    "bootstrap from one state early": ("bootstrap_values", change_successor(lambda real, c, n: real(c, n - 1))),
    "learnt one state early": ("loss", learn_one_state_early),
}


def change_moments(change: Callable[[list[Any]], list[Any]]) -> Mutation:
    """Of the control road: what is kept of its steps."""

    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        real = roads.control._act

        def changed() -> Iterator[Any]:
            return iter(change(list(real())))

        patch.setattr(roads.control, "_act", changed)

    return mutate


def change_steps(change: Callable[[Any], dict[str, Any]]) -> Mutation:
    """Of the control road: fields of every step of the environments."""
    return change_moments(lambda moments: [replace(m, step=replace(m.step, **change(m.step))) for m in moments])


def without_ends(moments: list[Any]) -> list[Any]:
    longer_than_one = ~(moments[0].step.terminated | moments[0].step.truncated)
    return [replace(m, valid=m.valid & ~((m.step.terminated | m.step.truncated) & longer_than_one)) for m in moments]


def with_the_next_episodes_first_step(moments: list[Any]) -> list[Any]:
    before = [np.ones_like(moments[0].valid), *(m.valid for m in moments[:-1])]
    return [replace(m, valid=m.valid | valid) for m, valid in zip(moments, before, strict=True)]


def rewards_one_step_early(moments: list[Any]) -> list[Any]:
    following = [*(m.reward for m in moments[1:]), np.zeros_like(moments[0].reward)]
    return [replace(m, reward=reward) for m, reward in zip(moments, following, strict=True)]


def seen_after_the_action(moments: list[Any]) -> list[Any]:
    return [replace(m, seen=torch.from_numpy(m.step.successors)) for m in moments]


def change_penalty(change: Callable[[Tensor], Tensor]) -> Mutation:
    """Of the control road: k1 (N, T) as it goes into the reward."""

    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        real = control_module.estimate_kl
        patch.setattr(control_module, "estimate_kl", lambda *arguments: change(real(*arguments)))

    return mutate


def change_bootstrap(factor: float) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        real = roads.control._bootstrap_values
        patch.setattr(roads.control, "_bootstrap_values", lambda *arguments: np.float32(factor) * real(*arguments))

    return mutate


def set_temperature(of_reference: bool) -> Mutation:
    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        patch.setattr(roads.control.reference if of_reference else roads.stepwise, "temperature", 1.0)

    return mutate


def evaluate_at_temperature_one(patch: pytest.MonkeyPatch, roads: Roads) -> None:
    real = roads.stepwise.evaluate

    def changed(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(roads.stepwise, "temperature", 1.0)
            return real(*arguments)

    patch.setattr(roads.stepwise, "evaluate", changed)


def change_prefixes(change: Callable[[Any], Any]) -> Mutation:
    """Of the control road: the sequences that observations are read as."""

    def mutate(patch: pytest.MonkeyPatch, roads: Roads) -> None:
        real = roads.stepwise._prefixes
        patch.setattr(roads.stepwise, "_prefixes", lambda observations: change(real(observations)))

    return mutate


def eos_is_padding(context: Any) -> Any:
    return replace(context, starts=(context.attention_mask & (context.tokens != EOS)).sum(dim=1).clamp(min=1))


def draw_with_the_numbers_of_the_row_above(patch: pytest.MonkeyPatch, roads: Roads) -> None:
    real = roads.stepwise.noise
    patch.setattr(roads.stepwise, "noise", lambda *arguments: real(*arguments).roll(1, dims=1))


def steps_in_another_order(patch: pytest.MonkeyPatch, roads: Roads) -> None:
    def changed(self: StateContext, mask: Tensor) -> StateContext:
        return StateContext(self.observations.transpose(0, 1)[mask.T].unsqueeze(1))

    patch.setattr(StateContext, "steps", changed)


CONTROL: dict[str, tuple[str, Mutation]] = {
    "the mask ends before the last step": ("mask", change_moments(without_ends)),
    "the mask goes on into the next episode": ("mask", change_moments(with_the_next_episodes_first_step)),
    "terminated counts as truncated": (
        "terminated",
        change_steps(lambda s: {"terminated": s.terminated & False, "truncated": s.truncated | s.terminated}),
    ),
    "truncated counts as terminated": (
        "terminated",
        change_steps(lambda s: {"terminated": s.terminated | s.truncated, "truncated": s.truncated & False}),
    ),
    "bootstrap from the next episode's first observation": (
        "bootstrap_values",
        change_steps(lambda s: {"successors": s.observations}),
    ),
    "no bootstrap": ("bootstrap_values", change_bootstrap(0.0)),
    "twice the bootstrap": ("bootstrap_values", change_bootstrap(2.0)),
    "KL one step early": ("rewards", change_penalty(lambda k1: k1.roll(-1, dims=1))),
    "KL one step late": ("rewards", change_penalty(later)),
    "KL of the wrong sign": ("rewards", change_penalty(lambda k1: -k1)),
    "rewards one step early": ("rewards", change_moments(rewards_one_step_early)),
    "states seen after the action": ("log_probs", change_moments(seen_after_the_action)),
    "drawn and evaluated at temperature 1": ("mask|actions", set_temperature(of_reference=False)),
    "evaluated at temperature 1": ("log_probs", evaluate_at_temperature_one),
    "reference at temperature 1": ("reference_log_probs", set_temperature(of_reference=True)),
    "drawn with another row's numbers": ("mask|actions", draw_with_the_numbers_of_the_row_above),
    "the last token is not read": (
        "mask|actions",
        change_prefixes(lambda c: replace(c, starts=(c.starts - 1).clamp(min=1))),
    ),
    "eos in a prompt is padding": ("mask|actions", change_prefixes(eos_is_padding)),
    "states of other steps are learnt from": ("loss", steps_in_another_order),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_change_of_the_language_road_alone_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    noticed(monkeypatch, *LANGUAGE[name])


@pytest.mark.parametrize("name", CONTROL)
def test_a_change_of_the_control_road_alone_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    noticed(monkeypatch, *CONTROL[name])


def noticed(patch: pytest.MonkeyPatch, where: str, mutate: Mutation) -> None:
    roads = make_roads(RICH)
    patch.setattr(LanguageWorld, "_check_first_ratio", lambda *_: None)  # which notices some of them by itself
    mutate(patch, roads)
    with pytest.raises(AssertionError, match=rf"^({where}): "):
        the_roads_meet(roads)


# The policy by itself ---------------------------------------------------------------------------------------


def make_stepwise(temperature: float = 1.0, seed: int = 0) -> tuple[StepwisePolicy, Tensor]:
    """A policy, and observations (6, L) of the prompts."""
    env = make_env(make_tokenizer())
    policy = perturbed(LanguagePolicy(make_model("gpt2", seed)), 0.03, seed + 1)
    observations = [env.reset(options={"prompt": index})[0] for index in range(len(PROMPTS))]
    return StepwisePolicy(policy, env.observation_space, temperature), torch.from_numpy(np.stack(observations))


def test_values_and_greedy_actions_are_those_of_each_prefix_alone() -> None:
    stepwise, observations = make_stepwise()
    values, actions = stepwise.values(observations), stepwise.act(observations, None)
    for row, prompt in enumerate(PROMPTS):
        logits, hidden = plain_forward(stepwise.policy.model, prompt.token_ids)
        assert int(actions[row]) == int(logits[-1].argmax())
        close("value", values[row], stepwise.policy.values_of(hidden[-1]).detach())


def test_actions_are_drawn_from_the_softmax_at_the_temperature() -> None:
    stepwise, observations = make_stepwise(temperature=0.6)
    draws = 4000
    state = observations[1].expand(draws, -1)
    drawn = stepwise.act(state, stepwise.noise(1, draws, torch.Generator().manual_seed(3))[0])
    logits, _ = plain_forward(stepwise.policy.model, PROMPTS[1].token_ids)
    found = torch.bincount(drawn, minlength=V) / draws
    assert float((found - (logits[-1] / 0.6).softmax(dim=-1)).abs().max()) < 0.03


def test_steps_that_the_mask_leaves_out_are_never_read() -> None:
    stepwise, observations = make_stepwise()
    mask = torch.tensor([[True, True], [True, False], [False, True]] * 2)
    states = torch.stack([observations, observations], dim=1)
    actions = torch.arange(12).reshape(6, 2)
    expected = stepwise.evaluate(StateContext(states), actions, mask)
    spoilt = stepwise.evaluate(
        StateContext(states.masked_fill(~mask[..., None], -7)), actions.masked_fill(~mask, 10**6), mask
    )
    for name in ("log_probs", "values", "entropy"):
        assert torch.equal(getattr(spoilt, name), getattr(expected, name))
        assert bool((getattr(expected, name)[~mask] == 0).all())


def test_parameters_are_the_language_policys_and_saved_ones_come_back(tmp_path: Path) -> None:
    """GPT-2's embeddings are tied: the same tensor is saved once."""
    roads = make_roads(RICH)
    roads.control.save_policy(tmp_path)
    other = StepwisePolicy(LanguagePolicy(make_model("gpt2", seed=5)), roads.control.environments.observation_space)
    load_policy(tmp_path, other, None)
    for (name, found), expected in zip(other.policy.named_parameters(), roads.policies[1].parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert other.policy_parameters() == other.policy.policy_parameters()
    assert other.value_parameters() == other.policy.value_parameters()
    llama = StepwisePolicy(LanguagePolicy(make_model("llama")), roads.control.environments.observation_space)
    with pytest.raises(UserError, match="holds another policy than the configuration describes"):
        load_policy(tmp_path, llama, None)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, V - 1, (8,), np.int64),
        spaces.Box(0, V + 1, (8,), np.int64),
        spaces.Box(0, V, (8,), np.float32),
        spaces.Box(0, V, (8, 2), np.int64),
    ],
    ids=str,
)
def test_observations_that_are_not_this_models_tokens_are_refused(space: spaces.Box) -> None:
    with pytest.raises(UserError, match=f"expected token ids .* make the TokenEnv with vocabulary_size={V}"):
        StepwisePolicy(LanguagePolicy(make_model("gpt2")), space)


def test_other_mistakes_are_said_in_one_line() -> None:
    stepwise, observations = make_stepwise()
    for temperature in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"temperature is .*, expected above 0"):
            make_stepwise(temperature)
    with pytest.raises(UserError, match="an observation is padding alone"):
        stepwise.act(torch.full_like(observations, V), None)


def test_a_limit_that_is_an_end_terminates_with_the_penalty_that_the_truncation_brought() -> None:
    env = make_env(make_tokenizer(), ends=True, max_new_tokens=2, missing_eos_penalty=7.0)
    for tokens, penalty in (((5, 5), 7.0), ((5, EOS), 0.0), ((EOS,), 0.0)):
        env.reset(options={"prompt": 0})
        results = [env.step(token) for token in tokens]
        assert [result[2:4] for result in results] == [(False, False)] * (len(tokens) - 1) + [(True, False)]
        assert results[-1][1] == results[-1][4]["score"] - penalty


def test_a_run_goes_on_bitwise_where_it_was_stopped() -> None:
    straight, stopped, resumed = (make_roads(RICH) for _ in range(3))
    for _ in range(2):
        expected = straight.control.collect()
    stopped.control.collect()
    resumed.control.load_state_dict(stopped.control.state_dict())
    found = resumed.control.collect()
    for name in ("actions", "log_probs", "values", "rewards", "mask", "terminated", "bootstrap_values"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# Environments that are made already -------------------------------------------------------------------------


def test_environments_made_in_python_are_checked_together() -> None:
    tokenizer = make_tokenizer()
    env = make_env(tokenizer)
    wrong: list[tuple[list[Any], str]] = [
        ([], "found none"),
        ([env, TokenEnv], "environment 1 is a type, expected a gymnasium.Env"),
        ([env, env], "environment `TokenEnv`: returned the same environment twice"),
        ([env, make_env(tokenizer, max_new_tokens=5)], "environments 0 and 1 have different spaces"),
    ]
    for envs, message in wrong:
        with pytest.raises(UserError, match=message):
            Environments.of(envs, seed=0)


def test_what_goes_wrong_in_one_made_in_python_names_it_and_its_step() -> None:
    score = {"of": lambda prompt, response_ids: 0.0}
    envs = [
        TokenEnv(
            [(1, 2)], lambda *arguments: score["of"](*arguments), vocabulary_size=V, eos_token_id=EOS, max_new_tokens=9
        )
        for _ in range(2)
    ]
    with Environments.of(envs, seed=0) as environments:
        environments.reset()
        assert (environments.kind, environments.count) == ("sync", 2)
        assert environments.step(np.array([5, EOS])).terminated.tolist() == [False, True]
        del score["of"]
        with pytest.raises(UserError, match=r"environment `TokenEnv`, index 0, step 2 of its episode: .*KeyError"):
            environments.step(np.array([EOS, 5]))


# PPO by the stepwise road alone -----------------------------------------------------------------------------

SIGNS = ["<eos>", *"0123456789", "+", "="]


@dataclass(frozen=True)
class Sums:
    """Sums of two digits below `below` that have one digit, as prompts `a+b=`."""

    below: int

    @property
    def questions(self) -> list[tuple[int, int]]:
        return [(a, b) for a in range(self.below) for b in range(self.below) if a + b < 10]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [tuple(SIGNS.index(sign) for sign in f"{a}+{b}=") for a, b in self.questions]

    def right(self, prompt: int, response_ids: Sequence[int]) -> list[bool]:
        """Whether the digit is right, and whether eos follows it."""
        digit = SIGNS.index(str(sum(self.questions[prompt])))
        return [response_ids[0] == digit, list(response_ids) == [digit, EOS]]


def sums_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({sign: i for i, sign in enumerate(SIGNS)}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def sampled_accuracy(policy: LanguagePolicy, sums: Sums, samples: int = 40) -> float:
    """By the batched sampler, which had no part in the training."""
    asked = list(enumerate(sums.prompts)) * samples
    sampler = Sampler(policy, sums_tokenizer(), SamplingConfig(max_new_tokens=2), seed=99)
    responses = sampler.sample([prompt for _, prompt in asked]).response_ids
    return sum(sums.right(i, ids)[1] for (i, _), ids in zip(asked, responses, strict=True)) / len(asked)


def learned_sums(
    below: int, count: int, iterations: int, hidden: int, rate: float, entropy: float, seed: int
) -> tuple[float, float]:
    """Accuracy before and after PPO by the stepwise road alone."""
    sums = Sums(below)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(SIGNS),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.1,
            eos_token_id=EOS,
            pad_token_id=EOS,
            bos_token_id=None,
        )
        policy = LanguagePolicy(prepare_model(LlamaForCausalLM(config)))

    def score(prompt: int, response_ids: Sequence[int]) -> float:
        return sum(sums.right(prompt, response_ids)) / 2

    envs = [
        LimitEnds(TokenEnv(sums.prompts, score, vocabulary_size=len(SIGNS), eos_token_id=EOS, max_new_tokens=2))
        for _ in range(count)
    ]
    environments = Environments.of(envs, seed=seed)
    stepwise = StepwisePolicy(policy, environments.observation_space)
    collect = ControlCollectConfig(steps=2, whole_episodes=True)
    world = ControlWorld(stepwise, environments, collect, gamma=1.0, seed=seed)
    learning = LearnerConfig(
        learning_rate=rate, value_learning_rate=3 * rate, schedule="linear", entropy_coefficient=entropy
    )
    learner = Learner(stepwise, learning, AdvantageConfig(lam=1.0), iterations=iterations, seed=seed)
    before = sampled_accuracy(policy, sums)
    for _ in iterate(world, learner):
        pass
    return before, sampled_accuracy(policy, sums)


@pytest.mark.parametrize(
    ("below", "count", "iterations", "hidden", "rate", "entropy"),
    [(3, 128, 60, 32, 2e-3, 0.03), (10, 256, 200, 64, 1e-3, 0.02)],
)
@pytest.mark.slow
def test_ppo_learns_sums_from_nothing_by_the_stepwise_road_alone(
    below: int, count: int, iterations: int, hidden: int, rate: float, entropy: float
) -> None:
    before, after = learned_sums(below, count, iterations, hidden, rate, entropy, seed=0)
    assert before < 0.1
    assert after >= 0.95, f"{before:.3f} -> {after:.3f}"
