"""`tether explain`: one episode of each world in the same table, so that the same words can be seen to mean the same.

Episodes come from the folders of runs, or from two small policies that are trained on the spot. The numbers are what
the worlds and the learner left.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tether.episode import Episode
from tether.errors import UserError
from tether.pipeline import demo
from tether.pipeline.control import ControlConfig, train_control
from tether.pipeline.ppo import Parts, train_ppo
from tether.pipeline.sft import fine_tune
from tether.ppo import LearnerConfig
from tether.runs import read_config, read_episodes
from tether.runs.episode_table import episode_table

SAME_WORDS = (
    ("state sₜ", "the prompt and the tokens so far", "what the simulator shows"),
    ("action aₜ", "the next token", "a control"),
    ("policy π(a|s)", "the model's softmax", "a network's distribution"),
    ("environment", "appends the token", "computes physics"),
    ("reward rₜ", "the score with the last token, −β·KL with each", "from the simulator, with each step"),
    ("end", "eos (terminated), length limit (truncated)", "fallen (terminated), time limit (truncated)"),
    ("value V(s)", "reward still expected", "reward still expected, discounted"),
    ("advantage Aₜ", "how much better than expected the action was", "the same"),
)


@dataclass(frozen=True)
class ExplainConfig:
    """One episode of each world in the same table."""

    language: str | None = None
    """Folder of a run of `tether ppo` or `tether demo`. None: a small model is trained on the spot."""
    control: str | None = None
    """Folder of a run of `tether control`. None: a CartPole policy is trained on the spot."""
    rows: int = 8
    """Steps to show of a longer episode, those of its start and its end."""
    seed: int = 0
    """Of what is trained on the spot."""

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise ValueError(f"rows is {self.rows}, expected at least 2")


@dataclass(frozen=True)
class Explained:
    """The two episodes that were shown."""

    language: Episode
    control: Episode


def explain(config: ExplainConfig) -> Explained:
    """Show an episode of each world.

    Raises:
        UserError: a folder holds no run of the kind, or no whole episode.
    """
    console = Console(highlight=False, soft_wrap=True)
    if config.language is None or config.control is None:
        console.print("training what was not given, for half a minute …", style="dim")
    with tempfile.TemporaryDirectory() as folder:
        text = _stored(config.language, "language") if config.language else fresh_language(config.seed, Path(folder))
        control = _stored(config.control, "control") if config.control else fresh_control(config.seed, Path(folder))
    _show(console, config, text, control)
    return Explained(text, control)


def fresh_language(seed: int, folder: Path) -> Episode:
    """A small model that has read sloppy arithmetic of one digit answers "What is 2 + 2?" after some PPO."""
    config = demo.DemoConfig(seed=seed, output=str(folder / "language"), largest=9, sft_steps=250, iterations=16)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    seen, _ = demo.split_problems(config, rng)
    tokenizer = demo.make_tokenizer()
    model = demo.make_model(tokenizer)
    fine_tune(model, tokenizer, demo.sloppy_rows(config, seen, rng), demo.sft_settings(config))
    parts = Parts(model, tokenizer, [demo.question(problem) for problem in seen])
    return demo.one_episode(train_ppo(demo.ppo_settings(config), parts), demo.FIRST_QUESTION, tokenizer)


def fresh_control(seed: int, folder: Path) -> Episode:
    """The last CartPole episode of some thousand steps of PPO."""
    learner = LearnerConfig(epochs=10, minibatches=2, learning_rate=1e-3, adam_epsilon=1e-5, max_gradient_norm=0.5)
    config = ControlConfig(env="CartPole-v1", output=str(folder / "control"), total_steps=25_000, seed=seed)
    config = replace(config, learner=learner)
    with train_control(config).world.environments:
        return _stored(config.output, "control")


def _stored(folder: str, world: str) -> Episode:
    """The newest episode of a run, its advantages as they were before whitening."""
    run = read_config(folder)
    is_control = "env" in run
    if is_control != (world == "control"):
        raise UserError(
            f"{folder}: a run of the {'control' if is_control else 'language'} world, expected one of the {world} world"
        )
    episodes = read_episodes(folder, order="newest", limit=1)
    if not episodes:
        raise UserError(f"{folder}: no whole episode is stored there yet")
    episode = episodes[0]
    if run["advantage"]["estimator"] != "gae":
        return episode
    # the return that GAE gives the critic as its target is A + V
    return replace(episode, advantages=[r - v for r, v in zip(episode.returns, episode.values, strict=True)])


def _show(console: Console, config: ExplainConfig, text: Episode, control: Episode) -> None:
    console.print("[bold]The same words in two worlds[/bold]")
    words = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("", "language", "control"):
        words.add_column(name)
    for row in SAME_WORDS:
        words.add_row(*row)
    console.print(words)
    console.print("\n[bold]Language[/bold], an episode is one response; prompt and response:")
    console.print(f"  {text.prompt!r} → {text.response!r}, score {text.score:+g}", markup=False)
    console.print(episode_table(text, config.rows))
    console.print("[bold]Control[/bold], an episode goes from reset to the end:")
    console.print(f"  {control.response}, return {control.score:+g}", markup=False)
    console.print(episode_table(control, config.rows))
    console.print(
        "The return is what the critic is taught to expect of the state; the advantage, return − V(s), is what the "
        "policy\nlearns from, whitened over its batch."
    )


__all__ = ["ExplainConfig", "Explained", "explain", "fresh_control", "fresh_language"]
