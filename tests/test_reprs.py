"""What people meet when they print what training gives them: one short line, whatever the tensors hold."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import tether
from tests.models import make_model, make_tokenizer, make_world
from tether.control.environments import EnvironmentsConfig
from tether.control.world import ControlCollectConfig
from tether.pipeline.control import ControlConfig, ControlEvaluation, build_control
from tether.pipeline.generate import Response
from tether.rewards import Scores
from tether.train import iterate


def letters(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def test_what_training_gives_is_shown_in_a_line(tmp_path: Path) -> None:
    parts = tether.Parts(make_model(), make_tokenizer(), ["ab" * 10, "c"], {letters: 0.5})
    assert repr(tether.Parts()) == "Parts()"
    shown = "Parts(model=LlamaForCausalLM, tokenizer=TokenizersBackend, prompts=<2>, reward={letters: 0.5})"
    assert repr(parts) == shown
    assert repr(tether.Parts(reward=[letters, "length?per_token=1"])) == "Parts(reward=[letters, 'length?per_token=1'])"
    config = tether.PPOConfig(
        output=str(tmp_path / "run"),
        iterations=1,
        sampling=tether.SamplingConfig(max_new_tokens=4),
        collect=tether.CollectConfig(prompts=4),
    )
    seen: list[tether.Iteration] = []
    trained = tether.train_ppo(config, parts, report=seen.append)
    place = str(tmp_path / "run" / "checkpoints" / "iteration-000001" / "policy")
    assert repr(trained) == f"Trained(1 of 1 iterations, policy={place!r})"
    batch = seen[0].trajectories
    steps, ended = int(batch.mask.sum()), int(batch.terminated.sum())
    assert repr(batch) == (
        f"Trajectories(4 episodes, up to {batch.mask.shape[1]} steps, {steps} in all, {ended} terminated, "
        f"{4 - ended} truncated)"
    )
    assert repr(seen[0]).startswith("Iteration(1, score ")
    assert repr(batch.context) == f"TokenContext(4 sequences, up to {batch.context.tokens.shape[1]} tokens)"
    assert repr(seen[0].last_seen) == f"LastSeen(4 × {batch.mask.shape[1]} steps)"
    episode = tether.read_episodes(trained.folder)[0]
    assert repr(episode).startswith("StoredEpisode('")
    assert "score" in repr(episode)
    assert all(len(repr(thing)) < 250 and "\n" not in repr(thing) for thing in (trained, batch, *seen, episode))


def test_long_texts_are_cut_and_stay_in_their_line() -> None:
    world = make_world()
    prompt = replace(world.prompts[0], text="ab\n" * 100)
    assert repr(prompt) == f"Prompt('{('ab' + chr(92) + 'n') * 14}a…', {len(prompt.token_ids)} tokens, row 1)"
    samples = world.sampler.sample([prompt.token_ids] * 3)
    assert repr(samples).startswith(f"Samples(3 responses, {int(samples.mask.sum())} tokens, ")
    assert len(repr(samples)) < 200
    assert len(repr(Response(prompt, "x" * 1000, [1, 2], False, -1.5))) < 250
    assert repr(Scores([0.5, 1.0], {"letters": [0.5, 1.0]})) == "Scores(2 of letters, mean 0.75)"


def test_control_too() -> None:
    config = ControlConfig(
        env="CartPole-v1", environments=EnvironmentsConfig(count=2), collect=ControlCollectConfig(steps=8)
    )
    world, learner = build_control(replace(config, total_steps=16))
    with closing(world.environments):
        (turn,) = iterate(world, learner)
    assert repr(turn.trajectories.context) == "StateContext(2 × 8 × 4 numbers)"
    assert repr(ControlEvaluation([1.0, 3.0], [1, 2], None)) == "ControlEvaluation(2 episodes, mean return 2.0 ± 1.0)"
