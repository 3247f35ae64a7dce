"""Tether's PPO for control against Stable-Baselines3 and CleanRL: environment steps per second, and how fast it learns.

    python benchmarks/control.py --cleanrl ppo.py            # ppo.py: cleanrl/ppo.py of github.com/vwxyzjn/cleanrl
    python benchmarks/control.py --steps 20000 --repeats 1   # a quick look, without CleanRL
    python benchmarks/control.py --curves RUN [RUN ...] --png FILE   # only draw the scores of runs of `tether control`

CartPole-v1 with the same settings for everyone. Each run is a process of its own, and the contestants take turns, so
that whatever else the machine does falls on all of them. The clock runs from the first collection to the last update:
imports and construction are not in it, everything else is, learning included. What a contestant does meanwhile:

    tether        `train_control`: run folder with metrics, episodes and checkpoints, a printed line per iteration
    tether-bare   collection and updates alone (`iterate`): nothing is written or printed
    tether-sync   as `tether`, but with CartPoles stepped one by one, as the others have them (only where named)
    sb3           `PPO.learn` with its Monitor and, as `verbose=1` asks, a printed table per iteration; no files
    cleanrl       the script: TensorBoard files and printed lines

The ratios in the table are Tether's speed, run folder included, divided by the other's. Steps that only begin a new
episode do not count. What equal settings leave different: Tether normalises advantages over the batch, the others over
each minibatch; CleanRL takes a time limit for the end of the world, the others do not. The clip range stays constant
for all, which the RL Zoo lets fall to 0. Stable-Baselines3's value loss lacks the factor ½ of the others, so its
coefficient is half of theirs. Tether steps gymnasium's native vector CartPole, its default, where the others, by their
defaults too, step single ones: `--contestants tether tether-sync ...` shows what that makes. CleanRL's script runs from
a copy with what gymnasium 1 needs and the clock, and nothing else changed (`CLEANRL_CHANGES`).

Exit codes: 0, everything ran; 1, a run failed, and what it said is shown; 2, something is missing or was asked wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers" / "control"


@dataclass(frozen=True)
class Setting:
    """What all contestants of a run are given. The learning rate falls linearly to 0."""

    envs: int
    steps: int  # of each environment per iteration
    minibatches: int
    epochs: int
    gamma: float
    lam: float
    learning_rate: float
    entropy_coefficient: float
    value_coefficient: float  # of ½(V − R)²
    total_steps: int = 0  # whole iterations
    clip: float = 0.2
    max_gradient_norm: float = 0.5
    adam_epsilon: float = 1e-5
    env: str = "CartPole-v1"


SETTINGS = {
    # hyperparams/ppo.yml of rl-baselines3-zoo; its value coefficient is Stable-Baselines3's default, 0.5 without the ½
    "zoo": Setting(8, 32, 1, 20, 0.98, 0.8, 1e-3, 0.0, 1.0),
    # the defaults of CleanRL's ppo.py, with 8 environments instead of 4 and its value clipping off
    "cleanrl": Setting(8, 128, 4, 4, 0.99, 0.95, 2.5e-4, 0.01, 0.5),
}

Episodes = list[tuple[int, float]]  # environment steps of the run when an episode ended, its return


class Clock:
    """The seconds between `start` and `stop`."""

    seconds = 0.0
    processor_seconds = 0.0  # of all threads of this process: less at the mercy of what else the machine does

    def start(self) -> None:
        """The first collection begins."""
        self._started = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """The last update is done, and so is what is written after it."""
        wall, processor = self._started
        self.seconds, self.processor_seconds = time.perf_counter() - wall, time.process_time() - processor


# --- what runs in a process of its own: it may import tether or the peers, whichever it needs ---


def run_tether(
    setting: Setting, seed: int, clock: Clock, in_folder: bool = True, native: bool = True
) -> tuple[int, Episodes]:
    """Steps done, and the episodes."""
    import torch.utils.tensorboard  # noqa: F401  Tether waits with this import until the first line is logged

    from tether.control.environments import EnvironmentsConfig
    from tether.control.world import ControlCollectConfig, ControlWorld
    from tether.pipeline.control import SHOWN, ControlConfig, build_control, set_threads
    from tether.pipeline.progress import Progress
    from tether.pipeline.training import train_in_folder
    from tether.ppo import AdvantageConfig, Learner, LearnerConfig
    from tether.train import iterate

    config = ControlConfig(
        env=setting.env,
        output="run",
        total_steps=setting.total_steps,
        seed=seed,
        environments=EnvironmentsConfig(count=setting.envs, vectorization="native" if native else "sync"),
        collect=ControlCollectConfig(steps=setting.steps),
        advantage=AdvantageConfig(gamma=setting.gamma, lam=setting.lam),
        learner=LearnerConfig(
            epochs=setting.epochs,
            minibatches=setting.minibatches,
            learning_rate=setting.learning_rate,
            schedule="linear",
            adam_epsilon=setting.adam_epsilon,
            max_gradient_norm=setting.max_gradient_norm,
            clip_low=setting.clip,
            clip_high=setting.clip,
            value_coefficient=setting.value_coefficient,
            entropy_coefficient=setting.entropy_coefficient,
        ),
    )
    seen: list[tuple[Any, Any, Any]] = []  # of each step: rewards, whether episodes ended, whether it was a step at all

    def build(checkpoint: Path | None) -> tuple[ControlWorld, Learner]:
        world, learner = build_control(config, checkpoint)
        set_threads(config, world.environments)
        step = world.environments.step

        def recorded(actions: Any) -> Any:
            result = step(actions)
            seen.append((result.rewards, result.terminated | result.truncated, result.valid))
            return result

        world.environments.step = recorded  # type: ignore[method-assign]
        clock.start()
        return world, learner

    if in_folder:  # what `train_control` does, and `tether control` prints
        with Progress(config.iterations, SHOWN) as progress:
            train_in_folder(config, build, progress=progress)
    else:
        for _ in iterate(*build(None)):
            pass
    clock.stop()

    episodes: Episodes = []
    steps, running = 0, np.zeros(setting.envs)
    for rewards, ended, valid in seen:
        steps += int(valid.sum())
        running += np.where(valid, rewards, 0.0)
        for n in np.flatnonzero(ended & valid):
            episodes.append((steps, float(running[n])))
            running[n] = 0.0
    return steps, episodes


def run_sb3(setting: Setting, seed: int, clock: Clock) -> tuple[int, Episodes]:
    """Steps done, and the episodes."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Timed(BaseCallback):
        def _on_training_start(self) -> None:
            clock.start()

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            clock.stop()

    environments = make_vec_env(setting.env, n_envs=setting.envs, seed=seed)
    model = PPO(
        "MlpPolicy",
        environments,
        learning_rate=lambda remaining: remaining * setting.learning_rate,
        n_steps=setting.steps,
        batch_size=setting.envs * setting.steps // setting.minibatches,
        n_epochs=setting.epochs,
        gamma=setting.gamma,
        gae_lambda=setting.lam,
        clip_range=setting.clip,
        ent_coef=setting.entropy_coefficient,
        vf_coef=0.5 * setting.value_coefficient,
        max_grad_norm=setting.max_gradient_norm,
        policy_kwargs={"optimizer_kwargs": {"eps": setting.adam_epsilon}},
        seed=seed,
        device="cpu",
        verbose=1,
    )
    model.learn(setting.total_steps, callback=Timed())
    lengths, returns = environments.env_method("get_episode_lengths"), environments.env_method("get_episode_rewards")
    ends = [np.cumsum(of_one) * setting.envs for of_one in lengths]
    return model.num_timesteps, [
        (int(end), float(total)) for one in zip(ends, returns, strict=True) for end, total in zip(*one, strict=True)
    ]


# what gymnasium 1 does otherwise than the 0.29 that the script was written for; each text has to occur exactly once
CLEANRL_CHANGES = {
    # an ended episode begins anew within the step, as it did; the default is now a step of its own, recorded as if real
    "for i in range(args.num_envs)],\n    )": "for i in range(args.num_envs)],\n"
    "        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,\n    )",
    # the last infos are no longer one dictionary for each environment but one for all
    'in infos["final_info"]:': 'in ended_episodes(infos["final_info"]):',
    # the clock
    "    start_time = time.time()\n": "    start_time = time.time()\n    clock.start()\n",
    "    envs.close()\n    writer.close()\n": "    clock.stop()\n    envs.close()\n    writer.close()\n",
}


def changed_cleanrl(source: str) -> str:
    """The script, fit for gymnasium 1 and with a clock.

    Raises:
        ValueError: it is another script than the one these changes are for.
    """
    for old, new in CLEANRL_CHANGES.items():
        if source.count(old) != 1:
            raise ValueError(
                f"{old.strip().splitlines()[0]!r} occurs {source.count(old)} times, expected once: "
                "take cleanrl/ppo.py of a version that imports gymnasium (2023 or later)"
            )
        source = source.replace(old, new)
    return source


def ended_episodes(final: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One dictionary for each environment whose episode ended, as CleanRL reads them."""
    for n in np.flatnonzero(final.get("_episode", ())):
        yield {"episode": {name: values[n] for name, values in final["episode"].items()}}


def run_cleanrl(setting: Setting, seed: int, clock: Clock, script: str) -> tuple[int, Episodes]:
    """Steps done, and the episodes, as the script printed them."""
    copy = Path("ppo.py")
    copy.write_text(changed_cleanrl(Path(script).read_text(encoding="utf-8")), encoding="utf-8")
    given = {
        "env-id": setting.env, "seed": seed, "total-timesteps": setting.total_steps, "num-envs": setting.envs,
        "num-steps": setting.steps, "num-minibatches": setting.minibatches, "update-epochs": setting.epochs,
        "gamma": setting.gamma, "gae-lambda": setting.lam, "learning-rate": setting.learning_rate,
        "clip-coef": setting.clip, "ent-coef": setting.entropy_coefficient, "vf-coef": setting.value_coefficient,
        "max-grad-norm": setting.max_gradient_norm,
    }  # fmt: skip
    sys.argv = [str(copy), "--no-cuda", "--no-clip-vloss"]
    sys.argv += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    runpy.run_path(str(copy), {"clock": clock, "ended_episodes": ended_episodes}, run_name="__main__")
    sys.stdout.flush()
    printed = re.findall(r"global_step=(\d+), episodic_return=\[?([\d.e+-]+)", Path("printed").read_text("utf-8"))
    return setting.total_steps, [(int(step), float(total)) for step, total in printed]


def work(task: dict[str, Any]) -> None:
    """Do one run in the current folder and leave `result.json` there; what it prints goes into `printed`."""
    contestant, setting, seed = task["contestant"], Setting(**task["setting"]), task["seed"]
    clock = Clock()
    runners: dict[str, Callable[[], tuple[int, Episodes]]] = {
        "tether": lambda: run_tether(setting, seed, clock),
        "tether-sync": lambda: run_tether(setting, seed, clock, native=False),
        "tether-bare": lambda: run_tether(setting, seed, clock, in_folder=False),
        "sb3": lambda: run_sb3(setting, seed, clock),
        "cleanrl": lambda: run_cleanrl(setting, seed, clock, task["script"]),
    }
    with open("printed", "w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        steps, episodes = runners[contestant]()
    result = {
        "steps": steps,
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "episodes": sorted(episodes),
    }
    Path("result.json").write_text(json.dumps(result), encoding="utf-8")


# --- the peers' environment ---


class MissingError(Exception):
    """Something that the benchmark needs is not there; the message is for the user."""


def find_uv() -> str:
    """The uv that installed Tether, or another."""
    found = shutil.which("uv") or str(HERE.parent / ".uv" / "bin" / "uv")
    if not Path(found).exists():
        raise MissingError(
            "uv not found: run `make sync` in the repository, or name an environment with --peers-python"
        )
    return found


def installed(python: Path) -> dict[str, str]:
    """Versions of what matters in an environment.

    Raises:
        MissingError: one of these packages is not there.
    """
    names = ("torch", "stable-baselines3", "gymnasium", "numpy", "tyro", "tensorboard")
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    except OSError as error:
        raise MissingError(f"{python}: cannot be run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise MissingError(f"{python}: {error.stderr.strip().splitlines()[-1]}; it needs {', '.join(names)}") from error
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def make_peers() -> Path:
    """The Python of `benchmarks/.peers/control`, made where it is missing: torch, gymnasium and numpy as here."""
    python = PEERS / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    same = {name: version(name) for name in ("torch", "gymnasium", "numpy")}
    with contextlib.suppress(MissingError):
        if same.items() <= installed(python).items():
            return python
    uv = find_uv()
    print(f"installing Stable-Baselines3 into {PEERS} ...", flush=True)
    backend = ["--torch-backend", "cpu"] if "+cpu" in same["torch"] else []
    pins = [f"{name}=={number.partition('+')[0]}" for name, number in same.items()]
    packages = [*pins, "stable-baselines3", "tyro", "tensorboard"]
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(PEERS)],
        [uv, "pip", "install", "--quiet", "--python", str(python), *backend, *packages],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise MissingError(f"{' '.join(command)}\n{error.stderr.strip()}") from error
    return python


# --- the comparison ---


@dataclass(frozen=True)
class Result:
    """One run."""

    setting: str
    contestant: str
    seed: int
    steps: int
    seconds: float
    processor_seconds: float
    episodes: Episodes

    @property
    def steps_per_second(self) -> float:
        """Environment steps per second of the clock, learning included."""
        return self.steps / self.seconds

    @property
    def steps_per_processor_second(self) -> float:
        """The same per second that a processor worked for this run."""
        return self.steps / self.processor_seconds

    @property
    def final_return(self) -> float:
        """Mean return of the episodes that ended in the last tenth of the steps."""
        return float(np.mean([total for step, total in self.episodes if step > 0.9 * self.steps] or [np.nan]))


class FailedError(Exception):
    """A run ended with an error; the message is what it said."""


def run_once(name: str, contestant: str, seed: int, python: Path, arguments: argparse.Namespace) -> Result:
    """One run in a process of its own and a folder that goes with it.

    Raises:
        FailedError: it ended with an error.
    """
    setting = SETTINGS[name]
    batch = setting.envs * setting.steps
    setting = replace(setting, total_steps=-(-arguments.steps // batch) * batch)
    task = {"contestant": contestant, "setting": asdict(setting), "seed": seed, "script": arguments.cleanrl}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    threads = dict.fromkeys(names, str(arguments.threads)) if arguments.threads else {}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), str(Path(__file__).resolve()), WORKER, json.dumps(task)]
        done = subprocess.run(command, cwd=folder, env=os.environ | threads, capture_output=True, text=True)
        if done.returncode:
            raise FailedError(
                f"{contestant}, setting {name}, seed {seed}, ended with code {done.returncode}:\n{done.stderr.strip()}"
            )
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    return Result(name, contestant, seed, **result)


def curve(result: Result, points: int = 100, window: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """(points,) steps, and the mean return of the episodes that ended in the window of 5% of all steps before each.

    Where none ended, the mean before stands; nan before the first episode.
    """
    at = np.linspace(0, result.steps, points + 1)[1:]
    ends, returns = np.array(result.episodes or [(0, np.nan)]).T
    means = np.full(points, np.nan)
    for i, x in enumerate(at):
        inside = (ends > x - window * result.steps) & (ends <= x)
        means[i] = returns[inside].mean() if inside.any() else means[i - 1] if i else np.nan
    return at, means


def spread(values: list[float], form: str) -> str:
    """Median, and in brackets the least and the greatest."""
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}–{max(values):{form}})"


def table(results: list[Result]) -> str:
    """Markdown: a line for each setting and contestant. Ratios are of runs that took turns, with the same seed."""
    header = [
        "setting", "contestant", "steps/s", "tether ÷ it", "steps per processor second", "tether ÷ it",
        "return, last tenth",
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    ours = {(r.setting, r.seed): r for r in results if r.contestant == "tether"}
    for setting, contestant in dict.fromkeys((r.setting, r.contestant) for r in results):
        runs = [r for r in results if (r.setting, r.contestant) == (setting, contestant)]
        pairs = [(ours[r.setting, r.seed], r) for r in runs if (r.setting, r.seed) in ours]
        wall = [a.steps_per_second / b.steps_per_second for a, b in pairs]
        processor = [a.steps_per_processor_second / b.steps_per_processor_second for a, b in pairs]
        compared = contestant != "tether" and bool(pairs)
        cells = [
            setting,
            contestant,
            spread([r.steps_per_second for r in runs], ",.0f"),
            spread(wall, ".2f") if compared else "",
            spread([r.steps_per_processor_second for r in runs], ",.0f"),
            spread(processor, ".2f") if compared else "",
            spread([r.final_return for r in runs], ".0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(arguments: argparse.Namespace) -> None:
    """Run everything, print the table, write the figures and the picture.

    Raises:
        MissingError: something that is needed is not there.
        FailedError: a run ended with an error.
    """
    contestants = arguments.contestants or [
        c for c in CONTESTANTS if c != "tether-sync" and (c != "cleanrl" or arguments.cleanrl)
    ]
    if "cleanrl" in contestants:
        if arguments.cleanrl is None:
            raise MissingError("contestant cleanrl: its script is missing: name cleanrl/ppo.py with --cleanrl")
        arguments.cleanrl = str(Path(arguments.cleanrl).resolve())
        try:
            changed_cleanrl(Path(arguments.cleanrl).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MissingError(f"--cleanrl {arguments.cleanrl}: {error}") from error
    picture = None if arguments.no_png else Path(arguments.png or Path(arguments.output).with_suffix(".png"))
    for file in (Path(arguments.output), picture):
        if file is not None and not file.parent.is_dir():
            raise MissingError(f"{file}: its folder does not exist")
    if picture is not None:
        load_pyplot()
    python, versions = Path(sys.executable), {"tether": installed_here()}
    pythons = dict.fromkeys(CONTESTANTS, python)
    if {"sb3", "cleanrl"} & set(contestants):
        peers = Path(arguments.peers_python).absolute() if arguments.peers_python else make_peers()
        pythons |= {"sb3": peers, "cleanrl": peers}
        versions["peers"] = installed(peers)
        for name in ("torch", "gymnasium", "numpy"):
            if versions["peers"][name] != versions["tether"][name]:
                print(f"note: {name} is {versions['tether'][name]} here, {versions['peers'][name]} for the peers")
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors, " + (
        f"{arguments.threads} thread(s) each" if arguments.threads else "each with its own number of threads"
    )
    print(f"{machine}; {versions}\n", flush=True)

    results: list[Result] = []
    for seed in range(arguments.repeats):
        for name in arguments.settings:
            for contestant in contestants:
                results.append(run_once(name, contestant, seed, pythons[contestant], arguments))
                last = results[-1]
                print(
                    f"seed {seed}  {name:8} {contestant:12} {last.steps_per_second:8,.0f} steps/s"
                    f"  return, last tenth {last.final_return:6.1f}",
                    flush=True,
                )
        report = {
            "machine": machine,
            "versions": versions,
            "settings": {name: asdict(SETTINGS[name]) for name in arguments.settings},
            "results": [asdict(r) | {"steps_per_second": r.steps_per_second} for r in results],
        }
        Path(arguments.output).write_text(json.dumps(report), encoding="utf-8")
    print(f"\nMedian of {arguments.repeats} (least–greatest), {arguments.steps:,} steps each.\n\n{table(results)}\n")
    print(f"figures: {arguments.output}")
    if picture is not None:
        draw_comparison(results, picture)
        print(f"picture: {picture}")


def installed_here() -> dict[str, str]:
    """Versions of what matters of Tether's environment."""
    return {name: version(name) for name in ("tether", "torch", "gymnasium", "numpy")} | {
        "python": platform.python_version()
    }


# --- pictures ---

NAMES = {
    "tether": "Tether",
    "tether-bare": "Tether, no run folder",
    "tether-sync": "Tether, single CartPoles",
    "sb3": "Stable-Baselines3",
    "cleanrl": "CleanRL",
}
# of the palette of Okabe and Ito, which everyone can tell apart
COLOURS = {
    "tether": "#0072B2",
    "tether-bare": "#56B4E9",
    "tether-sync": "#CC79A7",
    "sb3": "#D55E00",
    "cleanrl": "#009E73",
}
RUN_COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingError("the picture needs matplotlib: uv sync --group benchmarks, or --no-png") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        "legend.frameon": False, "savefig.dpi": 150, "figure.constrained_layout.use": True,
    }  # fmt: skip
    return plt


def draw_comparison(results: list[Result], file: Path) -> None:
    """One panel for each setting: mean over the repeats, and the range from the least to the greatest."""
    plt = load_pyplot()
    settings = list(dict.fromkeys(r.setting for r in results))
    figure, panels = plt.subplots(1, len(settings), figsize=(5 * len(settings), 4.4), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], settings, strict=True):
        shown = dict.fromkeys(r.contestant for r in results if r.setting == name)
        if "tether" in shown:
            shown.pop("tether-bare", None)  # learns the very same
        for contestant in shown:
            runs = [r for r in results if (r.setting, r.contestant) == (name, contestant)]
            curves = np.array([curve(r)[1] for r in runs])
            begun = ~np.isnan(curves).any(axis=0)  # from where every run has ended an episode
            steps, curves = curve(runs[0])[0][begun], curves[:, begun]
            speed = median(r.steps_per_second for r in runs)
            label = f"{NAMES[contestant]}, {speed:,.0f} steps/s"
            front = 3 if contestant == "tether" else 2
            panel.plot(steps, curves.mean(axis=0), color=COLOURS[contestant], label=label, linewidth=2, zorder=front)
            if len(runs) > 1:
                panel.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=COLOURS[contestant], alpha=0.15)
        panel.set_title(f"CartPole-v1, settings “{name}”")
        panel.set_xlabel("environment steps")
        panel.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))  # below: curves fill the panel
    repeats = len({r.seed for r in results})
    shown_by = f"\n(line: mean of {repeats} runs, band: their range)" if repeats > 1 else ""
    panels[0, 0].set_ylabel(f"mean return of an episode{shown_by}")
    figure.savefig(file)
    plt.close(figure)


def draw_runs(folders: list[str], file: Path) -> None:
    """The scores of runs of `tether control`, a panel for each environment.

    Raises:
        MissingError: a folder holds no run, or none of its episodes has ended.
    """
    from tether.errors import UserError
    from tether.runs import read_config, read_metrics

    plt = load_pyplot()
    runs: dict[str, list[tuple[str, list[tuple[float, float]]]]] = {}
    for folder in folders:
        try:
            env = str(read_config(folder).get("env"))
        except UserError as error:
            raise MissingError(str(error)) from error
        points = [(line["steps"], line["score"]) for line in read_metrics(folder) if "score" in line]
        if not points:
            raise MissingError(
                f"{folder}: its metrics hold no score: no episode has ended yet, or it is no control run"
            )
        runs.setdefault(env, []).append((Path(folder).name, points))
    columns = min(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.4 * rows), squeeze=False)
    for panel in panels.flat[len(runs) :]:
        panel.remove()
    for panel, (env, of_env) in zip(panels.flat, runs.items(), strict=False):
        for i, (name, points) in enumerate(of_env):
            panel.plot(*zip(*points, strict=True), color=RUN_COLOURS[i % len(RUN_COLOURS)], label=name, linewidth=1.8)
        panel.set_title(env)
        panel.set_xlabel("environment steps")
        panel.set_ylabel("score\n(mean return of the last 100 episodes)")
        panel.xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
        panel.set_xlim(left=0)
        if len(of_env) > 1:
            panel.legend(loc="best")
    figure.savefig(file)
    plt.close(figure)


# --- the command ---

CONTESTANTS = list(NAMES)
WORKER = "--worker"  # not for users: how the benchmark starts a run of its own


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected at least 1")
    return number


def parse() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--settings",
        nargs="+",
        choices=list(SETTINGS),
        default=list(SETTINGS),
        help="zoo: 8 × 32 steps, 20 epochs of one minibatch; cleanrl: 8 × 128 steps, 4 epochs of 4 (default: both)",
    )
    add(
        "--contestants",
        nargs="+",
        choices=CONTESTANTS,
        help="who takes part (default: all but tether-sync, cleanrl with --cleanrl)",
    )
    add(
        "--steps",
        type=positive,
        default=100_000,
        help="environment steps of a run, rounded up to whole iterations (default: 100000)",
    )
    add("--repeats", type=positive, default=5, help="runs of each contestant, seeds 0, 1, ... (default: 5)")
    add("--threads", type=int, default=1, help="threads of each run; 0: as each sets them itself (default: 1)")
    add("--cleanrl", metavar="PATH", help="cleanrl/ppo.py, fetched from github.com/vwxyzjn/cleanrl")
    add(
        "--peers-python",
        metavar="PATH",
        help="Python of an environment with stable-baselines3, tyro, tensorboard and the torch and gymnasium of "
        "Tether's (default: benchmarks/.peers/control, made with uv where it is missing)",
    )
    add(
        "--output",
        metavar="FILE",
        default=str(HERE / "control.json"),
        help="JSON of all runs with all their episodes, written after each round (default: benchmarks/control.json)",
    )
    add("--png", metavar="FILE", help="picture of the learning curves (default: beside the output)")
    add("--no-png", action="store_true", help="no picture")
    add("--curves", nargs="+", metavar="RUN", help="run nothing: draw the scores of these run folders into --png")
    arguments = parser.parse_args()
    if arguments.no_png and (arguments.png or arguments.curves):
        parser.error("--no-png contradicts --png and --curves")
    if arguments.curves and not arguments.png:
        parser.error("--curves needs --png FILE")
    return arguments


def exit_code(script: str, run: Callable[[], None]) -> int:
    """Run; 0, 1 where a run failed, 2 where something is missing or was asked wrongly: the script says what."""
    try:
        run()
    except MissingError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except FailedError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def main() -> int:
    """Exit code."""
    if sys.argv[1:2] == [WORKER]:
        work(json.loads(sys.argv[2]))
        return 0
    arguments = parse()

    def run() -> None:
        if arguments.curves:
            draw_runs(arguments.curves, Path(arguments.png))
            print(f"picture: {arguments.png}")
        else:
            compare(arguments)

    return exit_code("control.py", run)


if __name__ == "__main__":
    sys.exit(main())
