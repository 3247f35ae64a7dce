"""The world of text: what is collected, in which order, what rewards are given, what is reported and kept."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.models import CountingRewards, make_model, make_prompts, make_tokenizer, make_world, perturbed
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.errors import RewardError, UserError
from tether.language.policy import LanguagePolicy
from tether.language.reference import ModelReference
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig
from tether.ppo.advantages import estimate
from tether.rewards import Scores
from tether.train import iterate


def test_shapes_and_groups() -> None:
    world = make_world(collect=CollectConfig(prompts=4, samples_per_prompt=3))
    batch = world.collect()
    assert len(batch) == 12
    assert batch.groups is not None
    assert batch.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    starts = batch.context.starts.tolist()
    for group in range(4):
        prompts = {tuple(batch.context.tokens[row, : starts[row]].tolist()) for row in range(3 * group, 3 * group + 3)}
        assert len(prompts) == 1
    assert int(batch.mask[:, -1].sum()) > 0  # as wide as the longest and no wider


def test_each_prompt_comes_once_in_each_pass_also_across_batches() -> None:
    world = make_world(prompts=make_prompts(5), collect=CollectConfig(prompts=3))
    rows = [prompt.row for _ in range(5) for prompt in world._last_batch(world.collect()).prompts]
    passes = [rows[i : i + 5] for i in range(0, 15, 5)]
    assert all(sorted(one) == [1, 2, 3, 4, 5] for one in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]


def test_more_prompts_than_there_are() -> None:
    world = make_world(prompts=make_prompts(2), collect=CollectConfig(prompts=5))
    batch = world.collect()
    assert len(batch) == 5
    assert len(world._last_batch(batch).prompts) == 5


def test_a_reward_gets_every_column_repeated_for_each_sample() -> None:
    rewards = CountingRewards()
    world = make_world(rewards=rewards, collect=CollectConfig(prompts=3, samples_per_prompt=2))
    batch = world.collect()
    call, kept = rewards.calls[0], world._last_batch(batch)
    assert call["prompts"] == [p.source for p in kept.prompts]
    assert call["columns"]["answer"] == [p.columns["answer"] for p in kept.prompts]
    assert call["columns"]["answer"][0] == call["columns"]["answer"][1] != call["columns"]["answer"][2]
    assert call["completions"] == kept.samples.texts
    assert call["completion_ids"] == kept.samples.response_ids


def test_chat_prompts_get_messages() -> None:
    rewards = CountingRewards()
    world = make_world(rewards=rewards, prompts=make_prompts(4, chat=True), collect=CollectConfig(prompts=4))
    batch = world.collect()
    call = rewards.calls[0]
    assert all(prompt[0]["role"] == "user" for prompt in call["prompts"])
    texts = world._last_batch(batch).samples.texts
    assert call["completions"] == [[{"role": "assistant", "content": text}] for text in texts]


def test_scores_are_scaled_then_clipped_then_penalised() -> None:
    config = CollectConfig(prompts=6, samples_per_prompt=2, score_scale=3.0, score_clip=2.0, missing_eos_penalty=0.5)
    world = make_world(kl=KLConfig(beta=0.0), collect=config)
    batch = world.collect()
    kept = world._last_batch(batch)
    expected = [
        max(-2.0, min(2.0, 3 * score)) - (0.0 if ended else 0.5)
        for score, ended in zip(kept.scores.total, kept.samples.terminated.tolist(), strict=True)
    ]
    assert batch.rewards.sum(1).tolist() == pytest.approx(expected, abs=1e-6)
    assert world.metrics(batch)["score"] == pytest.approx(sum(kept.scores.total) / 12)  # as the reward gave it


def test_the_overlong_penalty_is_that_of_dapo() -> None:
    """Equation 13 with L_max = 8 and L_cache = 4: 0 up to 4 tokens, then a quarter for each, all of it at 8."""
    config = CollectConfig(
        prompts=6,
        samples_per_prompt=40,
        score_clip=1.0,
        overlong_buffer=4,
        overlong_penalty=2.0,
        missing_eos_penalty=0.5,
    )
    world = make_world("gpt2", kl=KLConfig(beta=0.0), collect=config)
    batch = world.collect()
    kept = world._last_batch(batch)
    lengths = [len(ids) for ids in kept.samples.response_ids]
    assert set(range(4, 9)) <= set(lengths)
    by_length = {**dict.fromkeys(range(5), 0.0), 5: 0.5, 6: 1.0, 7: 1.5, 8: 2.0}
    expected = [
        max(-1.0, min(1.0, score)) - by_length[length] - (0.0 if ended else 0.5)
        for score, length, ended in zip(kept.scores.total, lengths, kept.samples.terminated.tolist(), strict=True)
    ]
    assert batch.rewards.sum(1).tolist() == pytest.approx(expected, abs=1e-6)
    assert world.metrics(batch)["score"] == pytest.approx(sum(kept.scores.total) / len(batch))  # as the reward gave it


def test_a_buffer_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="overlong_buffer is 9, expected at most max_new_tokens, 8"):
        make_world(collect=CollectConfig(overlong_buffer=9, overlong_penalty=1.0))


def has_an_a(text: str) -> float:
    return float("a" in text)


FILTERED = CollectConfig(prompts=4, samples_per_prompt=2, filter_prompts=True)


def test_filtering_goes_on_drawing_until_the_batch_has_signal_alone() -> None:
    """As a plain twin does: the same draws by hand, with as many prompts each time as are missing."""
    world = make_world(rewards=CountingRewards(has_an_a), collect=FILTERED)
    twin = make_world(rewards=CountingRewards(has_an_a))
    missing, drawn, chosen, rewards = 4, 0, [], []
    draws, scores, lengths = 0, [], []
    while missing:
        twin.config = CollectConfig(prompts=missing, samples_per_prompt=2)
        batch = twin.collect()
        total = twin._last_batch(batch).scores.total
        draws, drawn, scores = draws + 1, drawn + missing, scores + total
        lengths += batch.mask.sum(1).tolist()
        for row in range(0, len(batch), 2):
            if total[row] != total[row + 1]:
                chosen += twin._last_batch(batch).samples.response_ids[row : row + 2]
                rewards += [batch.rewards[row + i][batch.mask[row + i]] for i in (0, 1)]
                missing -= 1
    assert draws > 2
    batch = world.collect()
    assert [batch.actions[row][batch.mask[row]].tolist() for row in range(8)] == chosen
    for row in range(8):
        torch.testing.assert_close(batch.rewards[row][batch.mask[row]], rewards[row], atol=1e-5, rtol=1e-5)
    assert batch.groups is not None
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    metrics = world.metrics(batch)
    assert metrics["filtered_share"] == pytest.approx(1 - 4 / drawn)
    assert metrics["signal_share"] == 1.0
    assert metrics["draws"] == draws
    speed = sum(lengths) / metrics["time/sampling"]
    assert metrics["time/tokens_per_second_sampled"] == pytest.approx(speed)  # what was left out took time, too
    assert metrics["score"] == 0.5
    assert metrics["score_drawn"] == pytest.approx(sum(scores) / len(scores))
    assert torch.equal(world.generator.get_state(), twin.generator.get_state())
    assert torch.equal(world.sampler.generator.get_state(), twin.sampler.generator.get_state())
    episodes = world.episodes(batch, *estimate(batch, AdvantageConfig()))
    assert [episode.action_ids for episode in episodes] == chosen  # what is stored is what is trained on
    assert [episode.score for episode in episodes[::2]] == [1 - episode.score for episode in episodes[1::2]]


def test_after_max_draws_prompts_without_signal_fill_the_batch() -> None:
    rewards = CountingRewards(lambda text: 0.0)
    world = make_world(rewards=rewards, collect=CollectConfig(4, 3, filter_prompts=True, max_draws=3))
    batch = world.collect()
    assert [len(call["completions"]) for call in rewards.calls] == [12, 12, 12]
    assert world._last_batch(batch).samples.texts == rewards.calls[0]["completions"]  # the first that were drawn
    metrics = world.metrics(batch)
    assert (metrics["filtered_share"], metrics["signal_share"], metrics["draws"]) == (1.0, 0.0, 3.0)
    assert len(batch) == 12


def test_prompts_with_signal_come_before_those_that_fill() -> None:
    config = CollectConfig(prompts=6, samples_per_prompt=2, filter_prompts=True, max_draws=1)
    world = make_world(rewards=CountingRewards(has_an_a), collect=config)
    total = world._last_batch(world.collect()).scores.total
    alike = [total[row] == total[row + 1] for row in range(0, 12, 2)]
    assert 0 < sum(alike) < 6
    assert alike == sorted(alike)


@pytest.mark.parametrize("batch_size", [3, 256])
def test_a_filtered_batch_keeps_what_the_sampler_knew_of_each_token(batch_size: int) -> None:
    """Log-probabilities, values and the support of top-p stay with their tokens: all ratios are 1."""
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.8, top_p=0.7, batch_size=batch_size)
    world = make_world("llama", sampling, collect=FILTERED, rewards=CountingRewards(has_an_a))
    batch = world.collect()
    assert world.metrics(batch)["draws"] > 1
    with torch.no_grad():
        now = world.policy.evaluate(batch.context, batch.actions, batch.mask)
    torch.testing.assert_close(now.log_probs, batch.log_probs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(now.values, batch.values, atol=1e-5, rtol=1e-4)
    assert bool(batch.mask[:, -1].any())  # as wide as the longest and no wider


def test_without_filtering_nothing_is_said_of_it() -> None:
    world = make_world()
    assert not {"filtered_share", "signal_share", "draws", "score_drawn"} & world.metrics(world.collect()).keys()


def test_a_reward_that_fails_in_a_later_draw_loses_nothing() -> None:
    class SecondFails(CountingRewards):
        def __call__(self, prompts: list, completions: list, completion_ids: list, columns: dict) -> Scores:
            if self.calls:
                raise RewardError("reward: said no")
            return super().__call__(prompts, completions, completion_ids, columns)

    rewards = SecondFails(lambda text: 0.25)
    world = make_world(rewards=rewards, collect=FILTERED)
    with pytest.raises(RewardError) as raised:
        world.collect()
    responses = raised.value.responses  # type: ignore[attr-defined]
    assert [r["response"] for r in responses[:8]] == rewards.calls[0]["completions"]
    assert [r.get("score") for r in responses] == [0.25] * 8 + [None] * 8


def test_metrics() -> None:
    world = make_world()
    batch = world.collect()
    metrics, kept = world.metrics(batch), world._last_batch(batch)
    lengths = [len(ids) for ids in kept.samples.response_ids]
    assert metrics["response_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["response_length_max"] == max(lengths)
    assert metrics["tokens"] == sum(lengths)
    assert metrics["episodes"] == len(lengths)
    assert metrics["eos_share"] == pytest.approx(float(kept.samples.terminated.float().mean()))
    assert metrics["reward"] == pytest.approx(float(batch.rewards.sum(1).mean()), rel=1e-5)
    total = torch.tensor(kept.scores.total)
    assert metrics["score_std"] == pytest.approx(float(total.std(correction=0)), rel=1e-5)
    assert all(metrics[f"time/{phase}"] >= 0 for phase in ("sampling", "scoring", "reference"))
    assert metrics["time/tokens_per_second_sampled"] > 0
    assert "score/count" not in metrics  # one part is the score itself


def test_several_rewards_are_reported_by_name() -> None:
    class Two(CountingRewards):
        def __call__(self, prompts: list, completions: list, completion_ids: list, columns: dict) -> Scores:
            lengths = [float(len(ids)) for ids in completion_ids]
            return Scores([2 * x for x in lengths], {"first": lengths, "second": lengths})

    world = make_world(rewards=Two())
    batch = world.collect()
    metrics = world.metrics(batch)
    assert metrics["score/first"] == metrics["score/second"] == pytest.approx(metrics["score"] / 2)


def test_episodes_say_what_the_tensors_say() -> None:
    world = make_world(collect=CollectConfig(prompts=3, samples_per_prompt=2))
    batch = world.collect()
    advantages, returns = estimate(batch, AdvantageConfig())
    episodes = world.episodes(batch, advantages, returns)
    assert len(episodes) == 6
    for row, episode in enumerate(episodes):
        length = int(batch.mask[row].sum())
        assert episode.action_ids == batch.actions[row, :length].tolist()
        for name in ("log_probs", "values", "rewards", "reference_log_probs"):
            assert getattr(episode, name) == getattr(batch, name)[row, :length].tolist()
        assert episode.advantages == advantages[row, :length].tolist()
        assert episode.returns == returns[row, :length].tolist()
        assert len(episode.actions) == length
        assert episode.terminated != episode.truncated
        assert episode.terminated == bool(batch.terminated[row].any())
        assert episode.details["group"] == row // 2
        assert set(episode.details["scores"]) == {"count"}
        visible = "".join(episode.actions[:-1] if episode.terminated else episode.actions)
        assert episode.response in visible or "<" in visible
    assert episodes[0].new_log_probs is episodes[0].entropies is episodes[0].clipped is None  # before an update
    with pytest.raises(ValueError, match="not the batch"):
        world.episodes(batch.select(torch.arange(3)), advantages, returns)


def test_episodes_say_what_the_update_saw_and_what_else_was_likely() -> None:
    world = make_world(sampling=SamplingConfig(max_new_tokens=8, temperature=1.2, top_k=4, alternatives=6))
    batch = world.collect()
    learner = Learner(world.policy, LearnerConfig(epochs=1, minibatches=1))
    advantages, returns = learner.credit(batch)
    learner.update(batch, advantages, returns)
    for episode in world.episodes(batch, advantages, returns, learner.last_seen):
        # one epoch of one minibatch sees the policy that drew
        assert episode.new_log_probs == pytest.approx(episode.log_probs, abs=1e-5)
        assert episode.entropies is not None
        assert episode.clipped == [False] * len(episode.actions)
        assert episode.alternatives is not None
        columns = (episode.actions, episode.log_probs, episode.entropies, episode.alternatives)
        for action, log_prob, entropy, likeliest in zip(*columns, strict=True):
            probabilities = [p for _, p in likeliest]
            assert len(likeliest) == 4  # top-k leaves no more
            assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)
            assert probabilities == sorted(probabilities, reverse=True)
            assert entropy == pytest.approx(-sum(p * math.log(p) for p in probabilities), abs=1e-4)
            assert math.exp(log_prob) in [pytest.approx(p, abs=1e-5) for text, p in likeliest if text == action]


def test_episodes_say_which_steps_were_clipped() -> None:
    world = make_world(sampling=SamplingConfig(max_new_tokens=8))
    batch = world.collect()
    config = LearnerConfig(epochs=3, minibatches=1, learning_rate=0.05, clip_low=0.01, clip_high=0.01, dual_clip=1.1)
    learner = Learner(world.policy, config)
    learner.update(batch, *learner.credit(batch))
    seen = learner.last_seen
    assert seen is not None
    assert bool(seen.clipped.any())
    for row, episode in enumerate(world.episodes(batch, *learner.credit(batch), seen)):
        assert episode.clipped == seen.clipped[row, : len(episode.actions)].tolist()


def test_episodes_of_chat_prompts_keep_their_turns_and_others_none() -> None:
    for chat in (True, False):
        world = make_world(prompts=make_prompts(4, chat=chat), collect=CollectConfig(prompts=4))
        batch = world.collect()
        for episode in world.episodes(batch, *estimate(batch, AdvantageConfig())):
            messages = episode.details.get("messages")
            assert (messages is not None) == chat
            if chat:
                source = world.prompts[episode.details["row"] - 1].source
                assert messages == [{"role": "user", "content": m["content"]} for m in source]  # type: ignore[index]


def test_no_alternatives_are_kept_where_none_are_asked_for() -> None:
    world = make_world(sampling=SamplingConfig(max_new_tokens=4, alternatives=0))
    batch = world.collect()
    assert world.episodes(batch, *estimate(batch, AdvantageConfig()))[0].alternatives is None


def test_a_failing_reward_carries_the_responses_that_were_sampled() -> None:
    def fail(text: str) -> float:
        raise RewardError("reward: said no")

    world = make_world(rewards=CountingRewards(fail), collect=CollectConfig(prompts=3))
    with pytest.raises(RewardError) as raised:
        world.collect()
    responses = raised.value.responses  # type: ignore[attr-defined]
    assert len(responses) == 3
    assert set(responses[0]) == {"prompt", "response"}


@pytest.mark.parametrize("config", [CollectConfig(prompts=4), FILTERED], ids=["plain", "filtered"])
def test_state_goes_round(config: CollectConfig) -> None:
    first, second = make_world(rewards=CountingRewards(has_an_a)), make_world(rewards=CountingRewards(has_an_a))
    first.config = second.config = config
    first.collect()
    state = copy.deepcopy(first.state_dict())
    expected = [first.collect() for _ in range(3)]
    second.generator.manual_seed(99)
    second.load_state_dict(state)
    for batch in expected:
        found = second.collect()
        assert torch.equal(found.actions, batch.actions)
        assert torch.equal(found.rewards, batch.rewards)


@pytest.mark.parametrize("separate", [False, True])
def test_saved_policy_is_a_plain_model_folder_and_the_critic_comes_back(tmp_path: Path, separate: bool) -> None:
    world = make_world("gpt2")
    if separate:
        policy = LanguagePolicy(world.policy.model, separate_value_trunk=True)
        world.policy = world.sampler.policy = perturbed(policy, 0.02, seed=8)
    world.save_policy(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    for name, tensor in world.policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "<eos>"
    critic = copy.deepcopy({n: p for n, p in world.policy.named_parameters() if n.startswith("value_")})
    assert set(load_file(tmp_path / "critic.safetensors")) == set(critic)
    with torch.no_grad():
        for parameter in world.policy.value_parameters():
            parameter.zero_()
    world.load_critic(tmp_path)
    for name, parameter in world.policy.named_parameters():
        assert name not in critic or torch.equal(parameter, critic[name])


def test_a_critic_of_another_shape_is_refused(tmp_path: Path) -> None:
    world = make_world("gpt2")
    world.save_policy(tmp_path)
    world.policy = LanguagePolicy(world.policy.model, separate_value_trunk=True)
    with pytest.raises(UserError, match=r"critic.safetensors: holds another critic .*separate_value_trunk"):
        world.load_critic(tmp_path)


def build(**changes: Any) -> LanguageWorld:
    reference = make_model()
    policy = LanguagePolicy(copy.deepcopy(reference))
    sampler = Sampler(policy, make_tokenizer(), changes.pop("sampling", SamplingConfig(max_new_tokens=4)))
    parts: dict[str, Any] = {"prompts": make_prompts(3), "reference": ModelReference(reference)} | changes
    return LanguageWorld(
        policy,
        parts["reference"],
        sampler,
        parts["prompts"],
        CountingRewards(),
        KLController(KLConfig()),  # type: ignore[arg-type]
    )


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        build(prompts=[])
    with pytest.raises(ValueError, match="temperature is 0"):
        build(sampling=SamplingConfig(temperature=0.0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompts", 0),
        ("samples_per_prompt", 0),
        ("score_clip", 0.0),
        ("max_draws", 0),
        ("overlong_buffer", -1),
        ("overlong_penalty", float("inf")),
    ],
)
def test_bad_numbers_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is"):
        CollectConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [{"overlong_buffer": 3}, {"overlong_penalty": 1.0}])
def test_half_an_overlong_penalty_is_refused(half: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"overlong_buffer is .* and overlong_penalty .*: expected both or neither"):
        CollectConfig(**half)


def test_filtering_needs_something_to_compare() -> None:
    with pytest.raises(ValueError, match="samples_per_prompt is 1, expected at least 2"):
        CollectConfig(filter_prompts=True)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_the_loop_raises_the_score(estimator: Any) -> None:
    """The reward counts one letter: two dozen iterations find it."""
    sampling = SamplingConfig(max_new_tokens=5)
    rewards = CountingRewards(lambda text: float(text.count("d")))
    world = make_world(
        "gpt2", sampling, KLConfig(beta=0.01), CollectConfig(prompts=6, samples_per_prompt=4), rewards=rewards
    )
    config = LearnerConfig(learning_rate=1e-2, epochs=2, minibatches=2)
    learner = Learner(world.policy, config, AdvantageConfig(estimator), world.kl, iterations=14)
    metrics = [iteration.metrics for iteration in iterate(world, learner)]
    assert len(metrics) == 14
    assert learner.iteration == 14
    assert metrics[-1]["score"] > metrics[0]["score"] + 1.0
    assert metrics[-1]["kl"] > metrics[0]["kl"]
