"""The token MDP: its transitions, its end and its reward, and gymnasium's own checkers with warnings as errors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tether.errors import RewardError, UserError
from tether.language.environment import TokenEnv, score_with_rewards
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt
from tether.language.sampler import Sampler, SamplingConfig
from tether.rewards import Rewards, RewardsConfig

WORDS = ["<eos>", "2", "+", "=", "4", "5", "\n", "Q", ":"]
EOS = 0
V = len(WORDS)
PROMPTS = [(1, 2, 1, 3), (4, 3)]
"""`2+2=` and `4=`."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; pad and eos share an id, as in many published tokenizers."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<eos>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def count_fours(prompt: int, response_ids: Sequence[int]) -> float:
    return 10.0 * prompt + list(response_ids).count(4)


def make_env(**changes: Any) -> TokenEnv:
    arguments: dict[str, Any] = {
        "prompts": PROMPTS,
        "score": count_fours,
        "vocabulary_size": V,
        "eos_token_id": EOS,
        "max_new_tokens": 3,
    }
    return TokenEnv(**{**arguments, **changes})


@pytest.fixture
def registered() -> Iterator[str]:
    name = "TokenEnvUnderTest-v0"
    gymnasium.register(name, entry_point="tether.language.environment:TokenEnv")
    yield name
    gymnasium.registry.pop(name)


def test_observation_is_the_tokens_so_far_then_padding_that_is_no_token() -> None:
    env = make_env()
    observation, info = env.reset(options={"prompt": 1})
    assert observation.tolist() == [4, 3, V, V, V, V, V]
    assert info == {"prompt": 1, "length": 2}
    observation, reward, terminated, truncated, info = env.step(5)
    assert observation.tolist() == [4, 3, 5, V, V, V, V]
    assert (reward, terminated, truncated, info) == (0.0, False, False, {"prompt": 1, "length": 3})
    observation, *_ = env.step(EOS)
    assert observation.tolist() == [4, 3, 5, EOS, V, V, V]
    assert env.pad_id == V
    assert not env.action_space.contains(env.pad_id)


def test_eos_terminates_and_brings_the_score() -> None:
    env = make_env(missing_eos_penalty=7.0)
    env.reset(options={"prompt": 1})
    assert env.step(4)[1:4] == (0.0, False, False)
    _, reward, terminated, truncated, info = env.step(EOS)
    assert (reward, terminated, truncated, info["score"]) == (11.0, True, False, 11.0)


def test_the_length_limit_truncates_and_costs_the_missing_eos_penalty() -> None:
    env = make_env(missing_eos_penalty=7.0)
    env.reset(options={"prompt": 0})
    assert [env.step(4)[1:4] for _ in range(2)] == [(0.0, False, False)] * 2
    _, reward, terminated, truncated, info = env.step(4)
    assert (reward, terminated, truncated, info["score"]) == (3.0 - 7.0, False, True, 3.0)


def test_terminated_wins_when_eos_comes_at_the_length_limit() -> None:
    env = make_env(missing_eos_penalty=7.0)
    env.reset(options={"prompt": 0})
    env.step(4)
    env.step(4)
    assert env.step(EOS)[1:4] == (2.0, True, False)


def test_any_of_several_eos_tokens_terminates() -> None:
    env = make_env(eos_token_id=[EOS, 6])
    for eos in (EOS, 6):
        env.reset()
        assert env.step(eos)[2:4] == (True, False)


def test_a_stop_string_over_several_tokens_terminates_and_one_in_the_prompt_does_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    env = make_env(prompts=[(6, 7, 8)], max_new_tokens=5, tokenizer=tokenizer, stop=("\nQ:", "55"))
    env.reset()
    ends = [env.step(token)[2:4] for token in (4, 6, 7, 8)]
    assert ends == [(False, False)] * 3 + [(True, False)]
    env.reset()
    assert [env.step(token)[2] for token in (5, 5)] == [False, True]


def test_text_and_rendering(tokenizer: PreTrainedTokenizerFast) -> None:
    env = make_env(tokenizer=tokenizer, render_mode="ansi")
    _, info = env.reset(options={"prompt": 0})
    assert (info["text"], env.render()) == ("", "2+2=")
    info = env.step(4)[4]
    assert (info["text"], env.render()) == ("4", "2+2=4")
    info = env.step(EOS)[4]
    assert (info["text"], env.render()) == ("4", "2+2=4<eos>")
    plain = make_env(render_mode="ansi")
    plain.reset(options={"prompt": 1})
    assert plain.render() == "4 3"
    assert make_env().render() is None


def test_seed_decides_the_prompts_and_draws_all_of_them() -> None:
    env = make_env()
    drawn = []
    for _ in range(2):
        first = env.reset(seed=3)[1]["prompt"]
        drawn.append([first] + [env.reset()[1]["prompt"] for _ in range(30)])
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {0, 1}


def test_steps_outside_an_episode_and_actions_outside_the_vocabulary_are_refused() -> None:
    env = make_env()
    with pytest.raises(ResetNeeded):
        env.step(1)
    env.reset()
    for action in (V, -1, 1.5):
        with pytest.raises(InvalidAction, match=f"expected a token id from 0 to {V - 1}"):
            env.step(action)  # type: ignore[arg-type]
    env.step(EOS)
    with pytest.raises(ResetNeeded):
        env.step(1)


@pytest.mark.parametrize("max_new_tokens", [2, 6])
def test_gymnasium_check_env_passes_without_warnings(
    registered: str, tokenizer: PreTrainedTokenizerFast, max_new_tokens: int
) -> None:
    arguments: dict[str, Any] = {
        "prompts": PROMPTS,
        "score": count_fours,
        "vocabulary_size": V,
        "eos_token_id": EOS,
        "max_new_tokens": max_new_tokens,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(TokenEnv(**arguments), skip_render_check=True)
        check_env(gymnasium.make(registered, **arguments).unwrapped)
        check_env(gymnasium.make(registered, **arguments, tokenizer=tokenizer, stop=("55",)).unwrapped)


def test_made_environments_play_episodes_without_warnings(registered: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make(
            registered,
            prompts=PROMPTS,
            score=count_fours,
            vocabulary_size=V,
            eos_token_id=EOS,
            max_new_tokens=4,
            missing_eos_penalty=0.5,
        )
        env.action_space.seed(0)
        ends = []
        for seed in range(30):
            env.reset(seed=seed)
            terminated = truncated = False
            while not (terminated or truncated):
                observation, _, terminated, truncated, info = env.step(env.action_space.sample())
                assert (observation < V).sum() == info["length"]
            ends.append(terminated)
        assert set(ends) == {True, False}
        env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_environments_batch_and_restart_it(mode: AutoresetMode, tokenizer: PreTrainedTokenizerFast) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = SyncVectorEnv([lambda: make_env(tokenizer=tokenizer) for _ in range(2)], autoreset_mode=mode)
        observations, infos = envs.reset(seed=0, options={"prompt": 1})
        assert observations.tolist() == [[4, 3, V, V, V, V, V]] * 2
        assert infos["text"].tolist() == ["", ""]
        observations, rewards, terminated, truncated, infos = envs.step(np.array([EOS, 4]))
        assert (rewards.tolist(), terminated.tolist(), truncated.tolist()) == ([10.0, 0.0], [True, False], [False] * 2)
        if mode is AutoresetMode.NEXT_STEP:
            assert infos["score"].tolist() == [10.0, 0.0]
            observations, *_ = envs.step(np.array([1, 4]))
        else:
            assert infos["final_info"]["score"].tolist() == [10.0, 0.0]
        assert observations[0].tolist() in ([4, 3, V, V, V, V, V], [1, 2, 1, 3, V, V, V])
        assert observations[1].tolist()[:3] == [4, 3, 4]
        envs.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: found none"),
        ({"prompts": [(1,), ()]}, r"prompts\[1\]: found no tokens"),
        ({"prompts": [(1, V)]}, rf"prompts\[0\]: found token id {V}, expected 0 to {V - 1}"),
        ({"eos_token_id": V}, rf"eos_token_id: found \[{V}\]"),
        ({"eos_token_id": ()}, r"eos_token_id: found \[\]"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"missing_eos_penalty": math.inf}, "missing_eos_penalty: found inf"),
        ({"stop": ("x",)}, "stop: .* pass `tokenizer`"),
        ({"render_mode": "human"}, "render_mode: found 'human', expected None or 'ansi'"),
    ],
)
def test_arguments_that_cannot_work_are_said_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_env(**change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [2, -1, "first"])
def test_a_prompt_option_that_is_no_index_is_refused(prompt: Any) -> None:
    with pytest.raises(UserError, match=r'options\["prompt"\]: found .*, expected 0 to 1'):
        make_env().reset(options={"prompt": prompt})


@pytest.mark.parametrize("score", [math.nan, math.inf, None, "1"])
def test_a_score_that_is_no_finite_number_is_refused(score: Any) -> None:
    env = make_env(score=lambda prompt, response_ids: score)
    env.reset(options={"prompt": 1})
    with pytest.raises(RewardError, match=r"score of prompt 1: found .*, expected one finite number"):
        env.step(EOS)


def test_rewards_get_what_they_get_in_training(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[dict[str, Any]] = []

    def reward(**given: Any) -> list[float]:
        seen.append(given)
        return [0.5]

    messages = [{"role": "user", "content": "4="}]
    prompts = [
        Prompt("2+2=", PROMPTS[0], "2+2=", {"answer": "4"}, row=1),
        Prompt("4=", PROMPTS[1], messages, {"answer": "4"}, row=2),
    ]
    rewards = Rewards(RewardsConfig(), functions=[reward])
    env = make_env(score=score_with_rewards(rewards, prompts, tokenizer))
    for index in (0, 1):
        env.reset(options={"prompt": index})
        env.step(4)
        assert env.step(EOS)[1] == 0.5
    assert [given["prompts"] for given in seen] == [["2+2="], [messages]]
    assert [given["completions"] for given in seen] == [["4"], [[{"role": "assistant", "content": "4"}]]]
    assert [given["completion_ids"] for given in seen] == [[[4, EOS]]] * 2
    assert [given["answer"] for given in seen] == [["4"]] * 2


def test_what_the_sampler_draws_is_an_episode_here(tokenizer: PreTrainedTokenizerFast) -> None:
    """Same ends, same texts: the batched sampler and the environment are the same token MDP."""
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
        eos_token_id=EOS,
        pad_token_id=EOS,
        bos_token_id=None,
    )
    policy = LanguagePolicy(LlamaForCausalLM(config).eval())
    prompts = PROMPTS * 40
    samples = Sampler(policy, tokenizer, SamplingConfig(max_new_tokens=4, stop=("55", "+")), seed=0).sample(prompts)
    env = make_env(max_new_tokens=4, tokenizer=tokenizer, stop=("55", "+"))
    for number, response_ids in enumerate(samples.response_ids):
        env.reset(options={"prompt": number % 2})
        steps = [env.step(token) for token in response_ids]
        assert [step[2] or step[3] for step in steps] == [False] * (len(response_ids) - 1) + [True]
        assert steps[-1][2] == bool(samples.terminated[number])
        assert steps[-1][4]["text"] == samples.texts[number]
    assert {bool(end) for end in samples.terminated} == {True, False}
