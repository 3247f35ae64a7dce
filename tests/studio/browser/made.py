"""What the browser looks at: runs that were trained on the spot, a hostile one, and pairs to be judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.models import make_model, make_tokenizer

from tether.cli import main
from tether.config import config_to_dict
from tether.episode import Episode
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.ppo import LearnerConfig
from tether.runs import Run
from tether.runs.labels import NewPair, create_labels

TEXTS = ["ab", "c", "deab", "fa"]
ITERATIONS = 6
SAMPLES = 3
MARKUP = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>'
BIDI = "\u202eabc\u2066\u2069"
CONTROL = "\x00\x1b[31m\x07"


def letters_a(completions: Sequence[str], **_: Any) -> list[float]:
    """More of the letter a, and short."""
    return [text.count("a") - 0.25 * len(text) for text in completions]


def make_language_run(folder: Path, iterations: int = ITERATIONS, learning_rate: float = 3e-3) -> None:
    """PPO on a tiny model, in about a second."""
    config = PPOConfig(
        output=str(folder),
        iterations=iterations,
        sampling=SamplingConfig(max_new_tokens=12),
        collect=CollectConfig(prompts=4, samples_per_prompt=SAMPLES),
        learner=LearnerConfig(epochs=2, minibatches=2, learning_rate=learning_rate),
    )
    train_ppo(config, Parts(make_model(), make_tokenizer(), TEXTS, letters_a))


def make_control_run(folder: Path, steps: int = 3000, film_every: int = 600) -> None:
    """CartPole, with films."""
    arguments = ["--env", "CartPole-v1", "--output", str(folder), "--environments.vectorization", "sync"]
    numbers = ["--total-steps", str(steps), "--collect.film-every", str(film_every)]
    assert main(["control", *arguments, *numbers]) == 0


def hostile_episode() -> Episode:
    """A response of a megabyte with markup, scripts, control and bidirectional characters in every column of text."""
    pieces = [MARKUP, BIDI, CONTROL, "\n\n", " ", "plain", "x" * 1_000_000]
    numbers = [0.5 - i / 4 for i in range(len(pieces))]
    return Episode(
        prompt=f"{MARKUP} {BIDI}",
        response="".join(pieces),
        score=-1.0,
        terminated=False,
        truncated=True,
        actions=pieces,
        action_ids=list(range(len(pieces))),
        log_probs=[-1.0] * len(pieces),
        values=numbers,
        rewards=numbers,
        advantages=numbers,
        returns=numbers,
        reference_log_probs=[-1.5] * len(pieces),
        new_log_probs=[-0.5] * len(pieces),
        entropies=[0.5] * len(pieces),
        alternatives=[[(piece[:200], 0.6), (MARKUP, 0.3), (BIDI, 0.1)] for piece in pieces],
        states=[MARKUP + BIDI] * len(pieces),
        details={MARKUP: MARKUP},
    )


def make_hostile_run(folder: Path) -> None:
    """Markup in names, settings, metrics and episodes."""
    config = {"model": MARKUP, "iterations": 2, "output": BIDI, MARKUP: {"x": MARKUP}}
    with Run.create(folder, config, tensorboard=False) as run:
        for iteration in (1, 2):
            run.log(iteration, {"score": 0.5 * iteration, MARKUP: 1.0, "kl": 0.1})
            run.log_episodes(iteration, [hostile_episode()])


def make_chat_run(folder: Path) -> None:
    """A conversation of two turns, one of them hostile, before each response."""
    turns = [{"role": "system", "content": MARKUP + BIDI}, {"role": "user", "content": "Why?"}]
    episode = replace(hostile_episode(), prompt=f"[S]{MARKUP}[U]Why?[A]", details={"group": 0, "messages": turns})
    with Run.create(folder, {"model": "a/model", "iterations": 2}, tensorboard=False) as run:
        for iteration in (1, 2):
            run.log(iteration, {"score": 0.5 * iteration})
            run.log_episodes(iteration, [episode])
    pair = NewPair(turns, "an answer", "another one", text=episode.prompt)
    create_labels(folder / "chat.labels.db", {"name": "chat"}, [pair])


def make_seeds(folder: Path) -> None:
    """Two seeds of one setting, one of them shorter and slower; another setting; and a run that counted no episodes."""
    config = config_to_dict(PPOConfig(model="a/model", iterations=4))
    for name, seed, rate, length, level in (
        *(("sums-seed1", 1, 1e-4, 4, 1.0), ("sums-seed2", 2, 1e-4, 3, 3.0)),
        *(("fast-seed1", 1, 3e-4, 4, 5.0), ("old", 3, 1e-4, 4, 7.0)),
    ):
        learner = config["learner"] | {"learning_rate": rate}
        own = config | {"seed": seed, "output": name, "learner": learner, "device": f"cuda:{seed}"}
        with Run.create(folder / name, own, tensorboard=False) as run:
            for iteration in range(1, length + 1):
                counts = {} if name == "old" else {"episodes": 8.0}
                row = {"score": level + iteration, "tokens": 100.0 * seed, "time/iteration": 30.0 * seed}
                run.log(iteration, row | counts)


def make_labels(file: Path, pairs: int = 6) -> None:
    """Pairs whose answers can be told apart: the second policy's is the longer one."""
    made = [NewPair(f"prompt {n}", f"short answer {n}", f"a much longer answer {n}") for n in range(1, pairs + 1)]
    create_labels(file, {"name": file.name.removesuffix(".labels.db")}, made)


def make_all(root: Path) -> None:
    """Everything that the tests walk through."""
    make_language_run(root / "ppo")
    make_language_run(root / "sweep" / "faster", iterations=3, learning_rate=6e-3)
    make_control_run(root / "cartpole")
    make_hostile_run(root / "evil <b onmouseover=alert(1)>")
    make_chat_run(root / "chat")
    make_seeds(root / "seeds")
    make_labels(root / "pairs.labels.db")
