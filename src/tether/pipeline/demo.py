"""`tether demo`: a small model learns to add by PPO, and shows each token as an action.

A language model and its tokenizer are made on the spot and fine-tuned on arithmetic whose answers are often wrong, so
that the model knows the form of an answer and, at best, what is likelier right than wrong. Then a verifier is the only
teacher: +1 for a right answer, −1 for a wrong one, and β·KL holds the policy to the fine-tuned model.

"What is 2 + 2?" is among the sums that are practised, ten times as often as each other; how far the model can add is
measured on sums that it has never seen.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tether.episode import Episode
from tether.language.context import TokenContext
from tether.language.models import prepare_model
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt
from tether.language.reference import ModelReference, Reference
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.pipeline.evaluate import Estimate, estimate_share
from tether.pipeline.ppo import Parts, PPOConfig, Trained, train_ppo
from tether.pipeline.sft import SFTConfig, fine_tune
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig
from tether.rewards import Rewards, RewardsConfig
from tether.runs import Display
from tether.runs.episode_table import episode_table
from tether.uncertainty import percent

FIRST_QUESTION = (2, 2)
EOS = "</s>"
SFT_BATCH = 128  # answers in each step of fine-tuning
BETA = 0.05
OFTEN = 10  # times as often as each other sum the first question is practised, so that every seed gets it right
TRIES = 4  # answers to each sum that is held out
ANSWERS = 8  # answers to it that are shown, before and after


@dataclass(frozen=True)
class DemoConfig:
    """The demonstration."""

    seed: int = 0
    """Of everything random: the problems held out, the wrong answers, the model, the samples."""
    output: str = "runs/demo"
    """Folder of the run; the demo of an earlier time there is replaced."""
    largest: int = 49
    """The numbers to add go from 0 to this."""
    held_out: float = 0.1
    """Share of the problems that neither phase of training sees."""
    wrong: float = 0.42
    """Share of the answers that are wrong in the text for fine-tuning."""
    sft_steps: int = 1700
    """Optimizer steps of fine-tuning."""
    iterations: int = 130
    """Iterations of PPO."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda. A GPU is no faster with a model as small as this one."""
    autocast: bool = False
    """Multiply matrices in bfloat16."""
    threads: int | None = None
    """Threads of torch. None: its own number."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^62")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}, expected at least 1")
        if self.largest < 9:
            raise ValueError(f"largest is {self.largest}, expected at least 9")
        for name in ("held_out", "wrong"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share between 0 and 1")
        for name in ("sft_steps", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class Exam:
    """How well a policy adds, by sampled answers to the sums held out, and how it answers the first question.

    Attributes:
        accuracy: share of right answers to the sums held out.
        kl: to the fine-tuned model, nats per answer.
        objective: E[r] − β·KL.
        probability: π("4</s>" | "What is 2 + 2?"), exact.
        answers: to the first question, each (text, score).
    """

    accuracy: Estimate
    kl: float
    objective: float
    probability: float
    answers: list[tuple[str, float]]


@dataclass(frozen=True)
class DemoResult:
    """The exam before and after PPO, and one episode after it."""

    before: Exam
    after: Exam
    seconds: float
    episode: Episode


def demo(config: DemoConfig) -> DemoResult:
    """Run the demonstration and print it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return _demonstrate(config)
    finally:
        torch.set_num_threads(threads)


def _demonstrate(config: DemoConfig) -> DemoResult:
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    rng = random.Random(config.seed)
    torch.manual_seed(config.seed)
    seen, held_out = split_problems(config, rng)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, config.device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]1. A model that has read sloppy arithmetic[/bold]\n"
        f"   {parameters:,} parameters, {len(tokenizer)} tokens; fine-tuned on sums of numbers up to {config.largest}, "
        f"{config.wrong:.0%} of the answers wrong\n"
    )
    _fine_tune(config, model, tokenizer, seen, rng)
    before = examine(config, exam_world(config, model, tokenizer, held_out))
    console.print(f"\n   right answers to {len(held_out)} sums that it has never seen: [bold]{_percent(before)}[/bold]")
    _show_answers(console, before)
    console.print(
        "[bold]2. PPO: a verifier is the only teacher[/bold]  (+1 right, −1 wrong, −β·KL to the model above)\n"
    )
    trained = _reinforce(config, model, tokenizer, seen)
    after = examine(config, exam_world(config, model, tokenizer, held_out, trained.world.reference))
    seconds = time.perf_counter() - started
    console.print(
        f"\n   right answers to the same {len(held_out)} sums: "
        f"[bold]{before.accuracy.mean:.1%} → {_percent(after)}[/bold], "
        f"at {after.kl:.2f} nats of KL per response; {seconds:.0f} s in all"
    )
    _show_answers(console, after)
    episode = one_episode(trained, FIRST_QUESTION, tokenizer)
    _show_episode(console, episode)
    _what_was_learned(console, episode, before, after)
    _what_next(console, config, trained)
    return DemoResult(before, after, seconds, episode)


def split_problems(config: DemoConfig, rng: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Problems for training, "2 + 2" always among them, and problems held out."""
    numbers = range(config.largest + 1)
    problems = [(a, b) for a in numbers for b in numbers if (a, b) != FIRST_QUESTION]
    rng.shuffle(problems)
    count = round(config.held_out * len(problems))
    return [FIRST_QUESTION, *problems[count:]], problems[:count]


def question(problem: tuple[int, int]) -> str:
    """The prompt of a problem."""
    return f"What is {problem[0]} + {problem[1]}?"


def make_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on questions, with each digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    questions = [question((a, b)) for a in range(10) for b in range(10)]
    trainer = trainers.BpeTrainer(vocab_size=64, special_tokens=[EOS], show_progress=False)
    tokenizer.train_from_iterator(questions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def make_model(tokenizer: PreTrainedTokenizerBase, device: str = "cpu") -> PreTrainedModel:
    """A GPT-2 of a quarter of a million parameters, its weights drawn from torch's global generator."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=96,
        n_layer=2,
        n_head=4,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return prepare_model(GPT2LMHeadModel(config), device)


def sloppy_rows(config: DemoConfig, seen: list[tuple[int, int]], rng: random.Random) -> list[dict[str, str]]:
    """Problems with answers for fine-tuning, as many of them wrong as the configuration says."""
    rows = []
    for _ in range(config.sft_steps * SFT_BATCH):
        problem = rng.choice(seen)
        answer = sum(problem)
        if rng.random() < config.wrong:
            answer = rng.choice([n for n in range(max(0, answer - 2), answer + 3) if n != answer])
        rows.append({"prompt": question(problem), "completion": str(answer)})
    return rows


def sft_settings(config: DemoConfig) -> SFTConfig:
    """How the model reads the sloppy arithmetic."""
    return SFTConfig(
        learning_rate=2e-3,
        weight_decay=0.1,
        adam_beta2=0.98,
        batch_size=SFT_BATCH,
        warmup_steps=30,
        seed=config.seed,
        microbatch_tokens=16384,
        autocast=config.autocast,
    )


def ppo_settings(config: DemoConfig) -> PPOConfig:
    """How the verifier teaches it."""
    return PPOConfig(
        output=config.output,
        overwrite=True,
        iterations=config.iterations,
        seed=config.seed,
        device=config.device,
        autocast=config.autocast,
        checkpoint_every=config.iterations,
        reward=RewardsConfig(functions=("arithmetic",)),
        sampling=SamplingConfig(max_new_tokens=4, batch_size=1024),
        collect=CollectConfig(prompts=512, kl_responses=512),
        kl=KLConfig(beta=BETA),
        advantage=AdvantageConfig(lam=1.0),
        learner=LearnerConfig(
            epochs=2,
            learning_rate=5e-4,
            value_learning_rate=3e-3,
            schedule="linear",
            value_coefficient=0.1,
            microbatch_size=16384,
        ),
    )


def _fine_tune(
    config: DemoConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seen: list[tuple[int, int]],
    rng: random.Random,
) -> None:
    with Display(config.sft_steps, ("loss", "time/tokens_per_second"), unit="step") as display:

        def report(metrics: dict[str, float]) -> None:
            if metrics["step"] % 200 == 0 and metrics["step"]:
                display.update(int(metrics["step"]), metrics)

        fine_tune(model, tokenizer, sloppy_rows(config, seen, rng), sft_settings(config), report)


def _reinforce(
    config: DemoConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seen: list[tuple[int, int]]
) -> Trained[LanguageWorld]:
    practised = [*seen, *[FIRST_QUESTION] * (OFTEN - 1)]
    parts = Parts(model, tokenizer, [question(problem) for problem in practised])
    columns = ("score", "reward", "kl", "entropy", "clip_fraction")
    with Display(config.iterations, columns) as display:
        return train_ppo(ppo_settings(config), parts, report=lambda step: display.update(step.number, step.metrics))


def as_prompts(problems: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Problems as starts of episodes."""
    texts = [question(problem) for problem in problems]
    return [
        Prompt(text, tuple(ids), text, {"prompt": text}, row)
        for row, (text, ids) in enumerate(zip(texts, tokenizer(texts).input_ids, strict=True), start=1)
    ]


def exam_world(
    config: DemoConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[tuple[int, int]],
    reference: Reference | None = None,
) -> LanguageWorld:
    """A world that asks each problem a few times, all at once; without a reference the model is its own."""
    policy = LanguagePolicy(model, autocast=config.autocast)
    sampler = Sampler(policy, tokenizer, SamplingConfig(max_new_tokens=4, batch_size=1024), config.seed + 1)
    prompts = as_prompts(problems, tokenizer) * TRIES
    return LanguageWorld(
        policy,
        reference or ModelReference(copy.deepcopy(model)),
        sampler,
        prompts,
        Rewards(RewardsConfig(("arithmetic",))),
        KLController(KLConfig(beta=BETA)),
        CollectConfig(prompts=len(prompts), kl_responses=len(prompts)),
        config.seed,
    )


def examine(config: DemoConfig, world: LanguageWorld) -> Exam:
    """Sampled answers to the world's sums, and to the first question."""
    trajectories = world.collect()
    metrics, nothing = world.metrics(trajectories), torch.zeros(trajectories.mask.shape)
    right: dict[str, list[bool]] = {}
    for episode in world.episodes(trajectories, nothing, nothing):
        right.setdefault(episode.prompt, []).append(episode.score > 0)
    (first,) = as_prompts([FIRST_QUESTION], world.tokenizer)
    texts = world.sampler.sample([first.token_ids] * ANSWERS).texts
    scores = world.rewards([first.text] * ANSWERS, texts, [[] for _ in texts], {}).total
    return Exam(
        accuracy=estimate_share([sum(answers) / TRIES for answers in right.values()], TRIES),
        kl=metrics["kl"],
        objective=metrics["score"] - BETA * metrics["kl"],
        probability=answer_probability(world.policy, world.tokenizer, FIRST_QUESTION),
        answers=list(zip(texts, scores, strict=True)),
    )


@torch.no_grad()
def answer_probability(policy: LanguagePolicy, tokenizer: PreTrainedTokenizerBase, problem: tuple[int, int]) -> float:
    """π(y|x) of the right answer and eos, as one response to the problem."""
    (prompt,) = as_prompts([problem], tokenizer)
    response = [*tokenizer(str(sum(problem))).input_ids, tokenizer.eos_token_id]
    context = TokenContext.from_ids([prompt.token_ids], [response], device=policy.device)
    actions = torch.tensor([response], device=policy.device)
    log_probs = policy.evaluate(context, actions, torch.ones_like(actions, dtype=torch.bool)).log_probs
    return float(log_probs.double().sum().exp())


def one_episode(
    trained: Trained[LanguageWorld], problem: tuple[int, int], tokenizer: PreTrainedTokenizerBase
) -> Episode:
    """The trained policy answers one question; advantages are shown as they are, not whitened."""
    world = trained.world
    alone = LanguageWorld(
        world.policy,
        world.reference,
        world.sampler,
        as_prompts([problem], tokenizer),
        world.rewards,
        world.kl,
        replace(world.config, prompts=1),
    )
    trajectories = alone.collect()
    learner = Learner(world.policy, advantage=replace(trained.learner.advantage, whiten=False))
    return alone.episodes(trajectories, *learner.credit(trajectories))[0]


def _percent(exam: Exam) -> str:
    assert exam.accuracy.interval is not None
    return percent(exam.accuracy.mean, exam.accuracy.interval)


def _show_answers(console: Console, exam: Exam) -> None:
    answers = "  ".join(f"{text!r} {'+1' if score > 0 else '−1'}" for text, score in exam.answers)
    console.print(
        f'   "{question(FIRST_QUESTION)}", one of the sums to practise, asked {len(exam.answers)} times: {answers}\n'
        f"   the right answer has probability {exam.probability:.3f}\n"
    )


def _show_episode(console: Console, episode: Episode) -> None:
    verdict = "right: +1" if episode.score > 0 else "wrong: −1"
    practised = f"practised {OFTEN} times as often as other sums"
    console.print(f'[bold]3. One episode[/bold]  the prompt "{episode.prompt}", {practised}\n')
    console.print(episode_table(episode))
    console.print(
        f'   "{episode.response}" is {verdict}. Each token is an action; the score comes with the last, −β·KL with\n'
        "   each. V(s) is what the critic expected before the action; the advantage is what came beyond that.\n"
    )


def _what_was_learned(console: Console, episode: Episode, before: Exam, after: Exam) -> None:
    words = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    actions = ", then ".join(map(repr, episode.actions))
    values = ", then ".join(f"{value:+.3f}" for value in episode.values)
    advantages = ", ".join(f"{advantage:+.3f}" for advantage in episode.advantages)
    rows = [
        ("state", "the prompt and the tokens so far"),
        ("action", f"the next token: {actions}"),
        ("policy π(a|s)", f"the model's softmax: π(right answer) {before.probability:.3f} → {after.probability:.3f}"),
        ("reward", "+1 or −1 with the last token, −β·KL with each"),
        ("value V(s)", f"what is expected from here on: {values}"),
        ("advantage", f"how much better it came: {advantages}"),
        ("KL(π‖π_ref)", f"how far π has moved, nats per response: {before.kl:.2f} → {after.kl:.2f}"),
        ("E[r] − β·KL", f"what PPO maximises, on sums never seen: {before.objective:+.2f} → {after.objective:+.2f}"),
    ]
    for row in rows:
        words.add_row(*map(Text, row))  # E[r] is no markup
    console.print("[bold]4. What was learned, in the words of reinforcement learning[/bold]\n")
    console.print(Padding(words, (0, 0, 1, 3)))


def _what_next(console: Console, config: DemoConfig, trained: Trained[LanguageWorld]) -> None:
    console.print("[bold]What to try next[/bold]")
    console.print(
        f"   tether generate --model {trained.policy} --prompt 'What is 12 + 7?' --samples 4 "
        "--sampling.max-new-tokens 4\n"
        f"   tether studio {config.output}          every token on a web page\n"
        "   tether prove                      PPO where the optimum is known: how near does it come?\n"
        "   tether ppo --model my-model --prompts.path prompts.jsonl --reward.functions rewards.py:correct\n"
        "   (with .venv/bin on the path: source .venv/bin/activate)\n",
        soft_wrap=True,  # a command that is broken in two cannot be pasted
    )
