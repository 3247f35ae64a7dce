"""Makes the pictures of docs/studio.md again: trains what they show, opens each page, and writes docs/studio/*.png.

    python -m tests.studio.browser.screenshots [RUNS]

Runs that are in RUNS (default: runs/pictures) already are not trained anew; the rest takes some minutes.

    python -m tests.studio.browser.screenshots --real FOLDER

makes docs/studio/real-*.png alone, of the run that `examples/real/run.sh FOLDER` has left.
"""

from __future__ import annotations

import copy
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from playwright.sync_api import Browser, Page
from tests.studio.browser.conftest import LAPTOP, PHONE, chromium, drawn, serving
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from tether.language.models import prepare_model
from tether.language.sampler import SamplingConfig
from tether.language.world import CollectConfig
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.pipeline.sft import SFTConfig, fine_tune
from tether.ppo import AdvantageConfig, KLConfig, LearnerConfig
from tether.runs import Run, read_config, read_episodes
from tether.runs.labels import LabelSet, NewPair, create_labels
from tether.runs.notes import Notes, write_notes

OUTPUT = Path(__file__).resolve().parents[3] / "docs" / "studio"
EOS = "</s>"
LARGEST = 49
SLOPPY = 0.35  # share of the partial sums that are wrong in the text for fine-tuning
SFT_STEPS, ITERATIONS = 1200, 60


def question(a: int, b: int) -> str:
    return f"What is {a} + {b}?"


def working(a: int, b: int, rng: random.Random) -> str:
    """The sum in steps, each of which may be a little wrong."""

    def sloppy(n: int) -> int:
        return n + rng.choice((-2, -1, 1, 2)) if rng.random() < SLOPPY else n

    ones = max(0, sloppy(a % 10 + b % 10))
    tens = a // 10 * 10 + b // 10 * 10
    return (
        f"{a % 10} + {b % 10} = {ones}, {a // 10 * 10} + {b // 10 * 10} = {tens}, in all {max(0, sloppy(ones + tens))}."
    )


def right_sum(completions: Sequence[str], prompts: Sequence[str], **_: Any) -> list[float]:
    """+1 where the last number is the sum, −1 elsewhere."""
    sums = [sum(map(int, re.findall(r"\d+", prompt))) for prompt in prompts]
    last = [re.search(r"in all (\d+)\.$", text.strip()) for text in completions]
    return [1.0 if found and int(found[1]) == right else -1.0 for found, right in zip(last, sums, strict=True)]


def make_model() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A small model that has read sloppy sums."""
    rng = random.Random(0)
    torch.manual_seed(0)
    problems = [(rng.randint(0, LARGEST), rng.randint(0, LARGEST)) for _ in range(SFT_STEPS * 64)]
    rows = [{"prompt": question(a, b), "completion": " " + working(a, b, rng)} for a, b in problems]
    backend = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=[EOS], show_progress=False)
    backend.train_from_iterator((row["prompt"] + row["completion"] for row in rows[:2000]), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)
    sizes = {"n_positions": 80, "n_embd": 96, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = prepare_model(
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), initializer_range=0.05, **sizes, **ends))
    )
    settings = SFTConfig(learning_rate=3e-3, batch_size=64, warmup_steps=30, microbatch_tokens=16384)
    fine_tune(model, tokenizer, rows, settings)
    return model, tokenizer


def train(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, **learner: Any) -> None:
    rng = random.Random(1)
    prompts = [question(rng.randint(0, LARGEST), rng.randint(0, LARGEST)) for _ in range(240)]
    config = PPOConfig(
        output=str(folder),
        overwrite=True,
        seed=seed,
        iterations=ITERATIONS,
        checkpoint_every=20,
        sampling=SamplingConfig(max_new_tokens=40, batch_size=512),
        collect=CollectConfig(prompts=48, samples_per_prompt=4),
        kl=KLConfig(beta=0.03),
        advantage=AdvantageConfig(lam=0.95),
        learner=LearnerConfig(epochs=4, value_coefficient=0.5, microbatch_size=16384, **learner),
    )
    train_ppo(config, Parts(copy.deepcopy(model), tokenizer, prompts, right_sum))


def make_runs(root: Path) -> None:
    """What is not there yet."""
    torch.set_num_threads(1)
    kinds = {"sums": (1e-4, 0), "sweep/sums-3e-4": (3e-4, 0), "sweep/sums-seed1": (1e-4, 1)}
    if any(not (root / name / "config.yaml").exists() for name in kinds):
        model, tokenizer = make_model()
        for name, (rate, seed) in kinds.items():
            train(root / name, model, tokenizer, seed, learning_rate=rate, value_learning_rate=1e-2)
    write_notes(root / "sums", Notes("Beats the faster rate in the end; the critic needs its own.", ("baseline",)))
    write_notes(root / "sweep" / "sums-3e-4", Notes(tags=("sweep",)))
    if not (root / "cartpole" / "config.yaml").exists():
        run = ["tether", "control", "--env", "CartPole-v1", "--output", f"{root.name}/cartpole"]
        more = ["--total-steps", "40000", "--collect.film-every", "2000", "--environments.vectorization", "sync"]
        subprocess.run([*run, *more], cwd=root.parent, check=True)  # as people do, for the picture of its console
    if not (root / "sums.labels.db").exists():
        make_label_set(root)


def make_label_set(root: Path) -> None:
    """Answers of the first iteration beside those of the last, half of them judged by two people."""
    first, last = (read_episodes(root / "sums", iteration, limit=200) for iteration in (1, ITERATIONS))
    later = {episode.prompt: episode.response for episode in last}
    pairs = [NewPair(e.prompt, e.response, later[e.prompt]) for e in first if e.prompt in later][:24]
    create_labels(root / "sums.labels.db", {"name": "sums"}, pairs)
    rng = random.Random(2)
    with LabelSet(root / "sums.labels.db", writable=True) as labels:
        for name, share in (("Ada", 0.9), ("Grace", 0.75)):
            while labels.done(name) < len(pairs) // 2:
                shown = labels.next_pair(name)
                assert shown is not None
                scores = right_sum([shown.left, shown.right], [str(shown.prompt)] * 2)
                better = "tie" if scores[0] == scores[1] else "left" if scores[0] > scores[1] else "right"
                labels.answer(name, shown.id, better if rng.random() < share else "tie")


def interesting(root: Path) -> tuple[int, int]:
    """A wrong answer, among right ones where prompts have several, in which an unlikely token stands out; its step."""
    episodes = [e for n in range(3, 12) for e in read_episodes(root / "sums", n, limit=200)]
    groups = Counter((e.iteration, e.prompt) for e in episodes if e.score > 0)
    wrong = [e for e in episodes if e.score < 0 and e.terminated]
    wrong = [e for e in wrong if groups[e.iteration, e.prompt]] or wrong or episodes
    chosen = min(wrong, key=lambda e: min(e.advantages) - max(e.advantages))
    return chosen.id, chosen.log_probs.index(min(chosen.log_probs))  # where it went wrong


def filmed(root: Path) -> int:
    """The last episode of the simulator that has a film."""
    return [episode.id for episode in read_episodes(root / "cartpole", limit=100_000) if episode.frames][-1]


def shoot(browser: Browser, url: str, root: Path) -> None:
    id, step = interesting(root)
    pages = {
        "runs": "/",
        "run": "/run?run=sums",
        "compare": "/compare?run=sums&run=sweep/sums-seed1&run=sweep/sums-3e-4&seeds=mean",
        "console": "/run?run=cartpole&tab=console",
        "configuration": "/run?run=sums&tab=configuration",
        "difference": "/run?run=sums&tab=difference&with=sweep/sums-3e-4",
        "alarms": "/run?run=sums&tab=alarms",
        "checkpoints": "/run?run=sums&tab=checkpoints",
        "episodes": "/episodes?run=sums&order=score&descending=0",
        "same-prompt": f"/episodes?run=sums&same={id}",
        "episode": f"/episode?run=sums&id={id}&step={step}",
        "control": f"/episode?run=cartpole&id={filmed(root)}&step=12",
        "labels": "/labels",
        "label": "/label?set=sums.labels.db",
    }
    dark = ("run", "episode")
    phone = ("runs", "run", "episodes", "episode", "label")
    for name, path in pages.items():
        picture(browser, url + path, OUTPUT / f"{name}.png", "light", LAPTOP)
        if name in dark:
            picture(browser, url + path, OUTPUT / f"{name}-dark.png", "dark", LAPTOP)
        if name in phone:
            picture(browser, url + path, OUTPUT / f"{name}-phone.png", "dark" if name in dark else "light", PHONE)


def shoot_real(browser: Browser, url: str, root: Path) -> None:
    id, step = interesting(root)
    picture(browser, f"{url}/run?run=sums", OUTPUT / "real-run.png", "light", LAPTOP)
    picture(browser, f"{url}/episode?run=sums&id={id}&step={step}", OUTPUT / "real-episode.png", "light", LAPTOP)


def picture(browser: Browser, url: str, file: Path, theme: Any, size: Any) -> None:
    context = browser.new_context(viewport=size, color_scheme=theme)
    context.add_init_script("localStorage.setItem('tether-annotator', 'Ada')")
    page = context.new_page()
    page.goto(url)
    drawn(page)
    settle(page)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=file)
    Image.open(file).convert("RGB").save(file, optimize=True)
    context.close()


def settle(page: Page) -> None:
    page.wait_for_load_state("load")
    page.wait_for_timeout(700)


def main(root: Path) -> None:
    make_runs(root)
    other = root / "sweep" / "sums-3e-4"
    config = read_config(other)
    with Run.open(other, tensorboard=False) as run, serving(root) as url, chromium() as browser:
        run.update_config(config | {"iterations": 2 * ITERATIONS})  # one of them is seen while it trains
        shoot(browser, url, root)
        run.update_config(config)


def main_real(root: Path) -> None:
    with serving(root) as url, chromium() as browser:
        shoot_real(browser, url, root)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--real"]:
        main_real(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/pictures"))
