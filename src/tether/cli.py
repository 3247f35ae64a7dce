"""The command line, thin: arguments in, a room called, errors as one line.

`tether COMMAND --help` lists every field of the command's configuration with its default and meaning.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from tether.errors import UserError, exited


@dataclass(frozen=True)
class _Command:
    summary: str
    run: Callable[[list[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 a check failed or numbers overflowed, 2 wrong input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"tether {version('tether')}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"no command {words[0]!r}; expected one of {', '.join(COMMANDS)}")
        _quiet_libraries()
        return _run(words)
    except (UserError, FloatingPointError) as error:
        if debug:
            traceback.print_exc()
        print(f"tether: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("tether: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(words: list[str]) -> int:
    try:
        return COMMANDS[words[0]].run(words[1:])
    except SystemExit as error:
        if {"-h", "--help"} & set(words):
            raise
        raise exited(error) from error


def script() -> None:
    """The console script."""
    sys.exit(main())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: tether COMMAND [--config FILE.yaml] [flags]",
        "",
        "PPO for language models and for control, from one core.",
        "",
        *(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        "tether COMMAND --help   every setting of a command, with its default",
        "--debug                 a traceback with an error",
    ]
    return "\n".join(lines)


def _quiet_libraries() -> None:
    """Tether shows its own progress; of the libraries only errors are of use here."""
    logging.basicConfig(format="tether: %(message)s", level=logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forks of a data loader would make it complain
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # last, since some of them set their own level when they are imported
    for name in ("httpx", "datasets", "filelock", "urllib3", "huggingface_hub", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _resuming(arguments: list[str], command: str) -> tuple[list[str], bool]:
    """`--resume FOLDER` as the flags that it stands for, and whether it was there."""
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--resume=") else [word])
    ]
    if "--resume" not in arguments:
        return arguments, False
    place = arguments.index("--resume")
    if len(arguments) <= place + 1 or arguments[place + 1].startswith("-"):
        raise UserError(f"--resume needs the folder of a run, e.g. --resume runs/{command}")
    if "--config" in arguments:
        raise UserError("--resume takes the configuration of the run; leave --config out, flags may change fields")
    folder = arguments[place + 1]
    if not (Path(folder) / "config.yaml").is_file():
        raise UserError(f"{folder}: holds no run to resume (no config.yaml)")
    rest = arguments[:place] + arguments[place + 2 :]
    return ["--config", str(Path(folder) / "config.yaml"), "--output", folder, *rest], True


def _ppo(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.ppo import PPOConfig, train_ppo

    arguments, resume = _resuming(arguments, "ppo")
    description = (
        "PPO on a language model, prompts and a reward. With `--resume FOLDER` a run that was stopped goes on with the "
        "configuration in its folder; flags may change fields, such as --iterations."
    )
    config = load_config(PPOConfig, arguments, "tether ppo", description)
    trained = train_ppo(config, resume=resume)
    print(f"\nthe policy, a Hugging Face folder:  {trained.policy}")
    print(f"how it went, as a page:            tether report {config.output}")
    if trained.learner.iteration < config.iterations:
        print(f"go on with it:                      tether ppo --resume {config.output}")
    return 0


def _check(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.check import check
    from tether.pipeline.ppo import PPOConfig

    description = (
        "What `tether ppo` with the same flags would stumble over: tokenizer, template, weights, memory, the first "
        "ratio, and what the reward gets and says. Trains nothing and writes nothing. Exits with 2 where there is a "
        "problem."
    )
    return 2 if check(load_config(PPOConfig, arguments, "tether check", description)).problems else 0


def _control(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.control import ControlConfig, ControlEvalConfig, evaluate_control, train_control

    if any(word == "--eval" or word.startswith("--eval=") for word in arguments):
        evaluate_control(load_config(ControlEvalConfig, arguments, "tether control", "Try the policy of a run."))
        return 0
    arguments, resume = _resuming(arguments, "control")
    description = (
        "PPO on a gymnasium environment, by the learner that trains language models. With `--resume FOLDER` a run that "
        "was stopped goes on; `--eval FOLDER` tries the policy of a run (`--eval FOLDER --help` for its settings)."
    )
    config = load_config(ControlConfig, arguments, "tether control", description)
    trained = train_control(config, resume=resume)
    trained.world.environments.close()
    print(f"\ntry it:           tether control --eval {config.output} --record {config.output}/film.gif")
    if trained.learner.iteration < config.iterations:
        print(f"go on with it:    tether control --resume {config.output}")
    return 0


def _sft(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.sft import SFTConfig, sft

    config = load_config(SFTConfig, arguments, "tether sft", "Fine-tune a causal language model on text or chat.")
    print(f"\nthe model, a Hugging Face folder:  {sft(config, show=True)}")
    return 0


def _reward(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.reward_model import RewardModelConfig, train_reward_model

    description = "A reward model, or an ensemble, from comparisons of responses."
    trained = train_reward_model(load_config(RewardModelConfig, arguments, "tether reward", description), show=True)
    print(f"\nthe reward model:  {trained.folder}")
    print(f"PPO against it:    tether ppo … --reward.functions 'reward_model?path={trained.folder}'")
    return 0


def _score(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.score import ScoreConfig, score

    score(load_config(ScoreConfig, arguments, "tether score", "Scores of a reward model for responses in a file."))
    return 0


def _generate(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.generate import GenerateConfig, generate

    generate(load_config(GenerateConfig, arguments, "tether generate", "Responses of a policy to prompts."))
    return 0


def _evaluate(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.evaluate import EvalConfig, evaluate

    evaluate(load_config(EvalConfig, arguments, "tether eval", "Mean score and pass@k of a policy on prompts."))
    return 0


def _report(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.report import ReportConfig, report

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run", *arguments]
    description = "One self-contained HTML page about a run: tether report FOLDER. Works while the run goes on."
    print(report(load_config(ReportConfig, arguments, "tether report", description)))
    return 0


def _studio(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.studio import StudioConfig, serve

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--runs", *arguments]
    description = "A web page over a folder of runs: tether studio RUNS. Works while they train."
    serve(load_config(StudioConfig, arguments, "tether studio", description))
    return 0


def _label(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.label import LabelConfig, label
    from tether.studio import StudioConfig, serve

    description = "Pairs of answers for people to compare in the studio, and --export of what they said."
    config = load_config(LabelConfig, arguments, "tether label", description)
    file = label(config)
    if config.export is None and config.open:
        serve(StudioConfig(runs=str(file.parent), port=config.port), f"/label?{urlencode({'set': file.name})}")
    elif config.export is None:
        print(f"judge them in the browser:  tether studio {file.parent}")
    else:
        print(f"a reward model from them:   tether reward --preferences.path {file} …")
    return 0


def _export(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.export import ExportConfig, export

    description = "A policy as one plain Hugging Face folder, with adapters merged into their base."
    config = load_config(ExportConfig, arguments, "tether export", description)
    print(f"the model, a Hugging Face folder:  {export(config)}")
    return 0


def _explain(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.explain import ExplainConfig, explain

    description = "One episode of a language model and one of a controller in the same table."
    explain(load_config(ExplainConfig, arguments, "tether explain", description))
    return 0


def _demo(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.demo import DemoConfig, demo

    demo(load_config(DemoConfig, arguments, "tether demo", "A small model learns arithmetic by PPO, in two minutes."))
    return 0


def _prove(arguments: list[str]) -> int:
    from tether.config import load_config
    from tether.pipeline.prove import ProveConfig, prove

    description = "PPO in a world whose optimum is known: how much of the possible gain does it get?"
    return 0 if prove(load_config(ProveConfig, arguments, "tether prove", description)).passed else 1


COMMANDS = {
    "demo": _Command("a small model learns arithmetic by PPO, token by token", _demo),
    "ppo": _Command("PPO on a language model, prompts and a reward", _ppo),
    "check": _Command("what `tether ppo` with the same flags would stumble over", _check),
    "control": _Command("PPO on a gymnasium environment, and trying what it learned", _control),
    "sft": _Command("fine-tune a language model on text or chat", _sft),
    "reward": _Command("train a reward model on preferences", _reward),
    "score": _Command("scores of a reward model for the responses in a file", _score),
    "generate": _Command("responses of a policy to prompts", _generate),
    "eval": _Command("mean score and pass@k of a policy on prompts with a reward", _evaluate),
    "report": _Command("a run as one page: was the reward followed or fooled?", _report),
    "studio": _Command("a web page over the runs: metrics, episodes, labelling", _studio),
    "label": _Command("pairs of answers for people to compare, and their labels", _label),
    "export": _Command("a policy as one plain folder, adapters merged", _export),
    "explain": _Command("one episode of each world in the same table", _explain),
    "prove": _Command("PPO in a world whose optimum is known: how near does it come?", _prove),
}

if __name__ == "__main__":
    script()
