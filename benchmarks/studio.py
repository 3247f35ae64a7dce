"""The studio's speed: lists and single episodes of a large store over HTTP, and what storing costs training.

    python benchmarks/studio.py                                  # 100,000 episodes of 200 tokens: 2.5 GB, some minutes
    python benchmarks/studio.py --quick                          # 2,000 episodes, the smallest model
    python benchmarks/studio.py --only store --folder RUNS       # keep the store in RUNS/large, for looking around

store      A run's folder is filled through `Run.log_episodes` with episodes whose texts and numbers are drawn at random
           (prompts come again, as in a run). `tether studio` serves it from a process of its own, and one client asks:
           each request of the table 15 times, after one that is not counted, over one connection. The time is from the
           request to the last byte of the answer. `direct` is the query without the server.
training   Iterations of PPO as `benchmarks/workloads.py` shapes them, and CartPole with the defaults of
           `tether control`, each into a run's folder. Counted as storing: choosing the alternatives as tokens are
           drawn, keeping what the update saw last, making the episodes of the batch, and writing them. Its share is of
           the whole iteration, storing included; medians of the iterations after the first.

Asked for are less than 200 ms for any list, 300 ms for an episode, and 2 % of training.

Exit codes: 0, everything ran; 1, a run failed, and what it said is shown; 2, something is missing or was asked wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlencode

import torch
from control import FailedError, MissingError, exit_code, positive
from workloads import WORKLOADS, machine_line, make_ppo, write_json

from tether.config import config_to_dict
from tether.episode import Episode
from tether.runs import EpisodeFilter, Run, count_episodes, find_episodes, read_episode, same_prompt

PER_ITERATION = 500
PROMPTS = 2500
REPEATS = 15
RUN = "large"

LISTS: dict[str, dict[str, Any]] = {
    "newest first": {"order": "id", "descending": 1},
    "best first": {"order": "score", "descending": 1},
    "by KL": {"order": "kl", "descending": 1},
    "by length, last page": {"order": "length", "offset": -50},
    "score from 0 to 1, by KL": {"score_from": 0, "score_to": 1, "order": "kl"},
    "iterations of the middle, truncated": {"iteration_from": 50, "iteration_to": 150, "ended": "truncated"},
    "text that is nowhere": {"text": "Zebra crossing"},
    "text in many, best first": {"text": "ab", "order": "score", "descending": 1},
    "text in all, by score": {"text": "e", "order": "score"},
}


# The store --------------------------------------------------------------------------------------------------------


def make_words(count: int, source: random.Random) -> list[str]:
    """Pieces of text of 3 to 6 letters with a space before them."""
    return [" " + "".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 5))) for _ in range(count)]


def random_episode(tokens: int, words: list[str], source: random.Random) -> Episode:
    """An episode of so many tokens with everything that a run stores."""
    actions = source.choices(words, k=tokens)

    def numbers() -> list[float]:
        return [source.gauss(0, 1) for _ in range(tokens)]

    return Episode(
        prompt="",
        response="",
        score=0.0,
        terminated=True,
        truncated=False,
        actions=actions,
        action_ids=[source.randrange(50_000) for _ in range(tokens)],
        log_probs=numbers(),
        values=numbers(),
        rewards=numbers(),
        advantages=numbers(),
        returns=numbers(),
        reference_log_probs=numbers(),
        new_log_probs=numbers(),
        entropies=numbers(),
        alternatives=[[(a, 0.5), *((word, 0.1) for word in source.choices(words, k=4))] for a in actions],
    )


def fill(folder: Path, episodes: int, tokens: int) -> float:
    """Write the run; returns the seconds that storing took."""
    from tether.pipeline.ppo import PPOConfig

    source = random.Random(0)
    words = make_words(4000, source)
    starts = ["Question:" + "".join(source.choices(words, k=30)) for _ in range(PROMPTS)]
    patterns = [random_episode(tokens, words, source) for _ in range(PER_ITERATION)]
    storing = 0.0
    config = config_to_dict(PPOConfig(model="random", output=str(folder)))
    with Run.create(folder, config, overwrite=True, tensorboard=False) as run:
        for iteration in range(1, -(-episodes // PER_ITERATION) + 1):
            batch = []
            for place in range(min(PER_ITERATION, episodes - (iteration - 1) * PER_ITERATION)):
                if source.random() < 0.1:
                    patterns[place] = random_episode(tokens, words, source)
                cut_off = source.random() < 0.1
                group = place // 4
                batch.append(
                    replace(
                        patterns[place],
                        prompt=starts[(iteration * PER_ITERATION // 4 + group) % PROMPTS],
                        response="".join(source.choices(words, k=tokens)),
                        score=source.gauss(0, 1),
                        terminated=not cut_off,
                        truncated=cut_off,
                        details={"group": group, "row": group, "scores": {"reward": 1.0}},
                    )
                )
            started = time.perf_counter()
            run.log(iteration, {"score": 0.0, "kl": 0.0})
            run.log_episodes(iteration, batch)
            storing += time.perf_counter() - started
    return storing


@contextlib.contextmanager
def studio(runs: Path) -> Iterator[http.client.HTTPConnection]:
    """A connection to a server over this folder."""
    command = [sys.executable, "-m", "tether", "studio", str(runs), "--port", "0", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
            if not found:
                raise FailedError(f"tether studio did not start: {said}{server.stdout.read()}")
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]))
            yield connection
            connection.close()
        finally:
            server.terminate()


def ask(connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
    """The answer to a GET as JSON; FailedError where it is an error."""
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise FailedError(f"{path}: no answer: {error!r}") from error
    if response.status != 200:
        raise FailedError(f"{path}: {response.status} {body[:200]!r}")
    return json.loads(body)


def timed(call: Callable[[], Any]) -> list[float]:
    """Milliseconds of each of `REPEATS` calls after one that is not counted."""
    took = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        call()
        took.append(1000 * (time.perf_counter() - started))
    return took[1:]


def measure_store(folder: Path) -> list[dict[str, Any]]:
    """A row for each request: milliseconds over HTTP and of the query alone."""
    total = count_episodes(folder)
    rows = []

    def add(name: str, path: str, query: dict[str, Any], direct: Callable[[], Any]) -> None:
        connection.close()  # the server does so after a few idle seconds; the call that is not counted opens another
        path = f"{path}?{urlencode({'run': RUN} | query)}"
        http_ms = timed(lambda: ask(connection, path))
        rows.append({"request": name, "http_ms": http_ms, "direct_ms": timed(direct)})

    with studio(folder.parent) as connection:
        for name, asked in LISTS.items():
            wanted = asked | ({"offset": total - 50} if asked.get("offset") else {})
            where = {key: value for key, value in wanted.items() if key not in ("order", "descending", "offset")}
            page = (wanted.get("order", "id"), bool(wanted.get("descending")), 50, wanted.get("offset", 0))
            add(name, "/api/episodes", wanted, lambda w=where, p=page: find_episodes(folder, EpisodeFilter(**w), *p))
        ids = [1 + total * part // 40 for part in range(1, 40)]
        pick = random.Random(0).choice
        add("one episode, always the same", "/api/episode", {"id": ids[0]}, lambda: read_episode(folder, ids[0]))
        add("same prompt", "/api/same-prompt", {"id": ids[0]}, lambda: same_prompt(folder, ids[0]))
        connection.close()
        path = f"/api/episode?run={RUN}&id="
        others = timed(lambda: ask(connection, f"{path}{pick(ids)}"))
        direct = timed(lambda: read_episode(folder, pick(ids)))
        rows.append({"request": "episodes here and there", "http_ms": others, "direct_ms": direct})
    return rows


# Training ---------------------------------------------------------------------------------------------------------


class Meter:
    """Seconds spent in functions that are watched."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("alternatives", "last seen", "making episodes", "writing"), 0.0)

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Add what `owner.name` takes to the phase."""
        function = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[phase] += time.perf_counter() - started

        setattr(owner, name, watched)

    def lap(self) -> dict[str, float]:
        """What was added since the last lap."""
        seconds, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return seconds


def build(workload: str) -> tuple[Any, Any]:
    """World and learner."""
    if workload != "cartpole":
        return make_ppo(WORKLOADS[workload])
    from tether.pipeline.control import ControlConfig, build_control

    torch.set_num_threads(1)  # as `tether control` does
    return build_control(ControlConfig(env="CartPole-v1", total_steps=10**7))


def measure_training(workload: str, iterations: int) -> dict[str, Any]:
    """Seconds of each iteration and of what storing took in it."""
    from tether.language import sampler
    from tether.ppo import learner as learner_module
    from tether.train import iterate

    threads = torch.get_num_threads()
    world, learner = build(workload)
    meter = Meter()
    originals = [(sampler, "alternatives"), (learner_module._Seen, "add"), (learner_module._Seen, "last")]
    kept = [(owner, name, getattr(owner, name)) for owner, name in originals]
    meter.watch(sampler, "alternatives", "alternatives")
    meter.watch(learner_module._Seen, "add", "last seen")
    meter.watch(learner_module._Seen, "last", "last seen")
    meter.watch(world, "episodes", "making episodes")
    if workload == "cartpole":
        meter.watch(world.recorder, "likeliest", "alternatives")
    rows, stored = [], 0
    with tempfile.TemporaryDirectory() as name, Run.create(Path(name) / "run", {}, tensorboard=False) as run:
        meter.watch(run, "log_episodes", "writing")
        started = time.perf_counter()
        for step in iterate(world, learner):
            episodes = world.episodes(step.trajectories, step.advantages, step.returns, step.last_seen)
            run.log_episodes(step.number, episodes)
            now = time.perf_counter()
            rows.append({"iteration": now - started, **meter.lap()})
            stored += sum(len(episode.actions) for episode in episodes)
            started = now
            if step.number > iterations:
                break
    for owner, attribute, function in kept:
        setattr(owner, attribute, function)
    torch.set_num_threads(threads)
    return {"workload": workload, "iterations": rows[1:], "steps_stored": stored / len(rows)}


def share(result: dict[str, Any]) -> float:
    """The median share of an iteration that storing takes."""
    rows = result["iterations"]
    return median(sum(value for name, value in row.items() if name != "iteration") / row["iteration"] for row in rows)


# ------------------------------------------------------------------------------------------------------------------


def tables(figures: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    if "store" in figures:
        store = figures["store"]
        lines += [
            f"{store['episodes']:,} episodes of {store['tokens']} tokens, {store['bytes'] / 1e9:.2f} GB",
            "",
            "| request | over HTTP, ms: median (greatest) | the query alone, ms |",
            "|---|---|---|",
        ]
        for row in store["requests"]:
            over, alone = row["http_ms"], row["direct_ms"]
            lines.append(f"| {row['request']} | {median(over):.0f} ({max(over):.0f}) | {median(alone):.0f} |")
        lines.append("")
    if "training" in figures:
        phases = ("alternatives", "last seen", "making episodes", "writing")
        header = ["training", "iteration, ms", "steps stored", *(f"{name}, ms" for name in phases), "storing"]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for result in figures["training"]:
            rows = result["iterations"]
            times = [1000 * median(row[name] for row in rows) for name in ("iteration", *phases)]
            cells = [result["workload"], f"{times[0]:,.0f}", f"{result['steps_stored']:,.0f}"]
            lines.append("| " + " | ".join([*cells, *(f"{t:.1f}" for t in times[1:]), f"{share(result):.2%}"]) + " |")
    return "\n".join(lines)


def measure(arguments: argparse.Namespace) -> None:
    """Run what was asked for, print tables, write figures."""
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise MissingError(f"{arguments.json}: its folder does not exist")
    machine = machine_line()
    print(machine, end="\n\n", flush=True)
    figures: dict[str, Any] = {"machine": machine}
    with contextlib.ExitStack() as stack:
        if arguments.only != "training":
            runs = Path(arguments.folder or stack.enter_context(tempfile.TemporaryDirectory()))
            seconds = fill(runs / RUN, arguments.episodes, arguments.tokens)
            size = sum(file.stat().st_size for file in (runs / RUN).glob("episodes.db*"))
            shape = {"episodes": arguments.episodes, "tokens": arguments.tokens, "bytes": size, "storing": seconds}
            figures["store"] = shape | {"requests": measure_store(runs / RUN)}
        if arguments.only != "store":
            figures["training"] = [measure_training(name, arguments.iterations) for name in arguments.workloads]
    write_json(arguments.json, figures)
    print(tables(figures), flush=True)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", choices=["store", "training"], help="one of the two parts")
    add("--quick", action="store_true", help="2,000 episodes, tiny alone, two iterations")
    add("--episodes", type=positive, default=100_000)
    add("--tokens", type=positive, default=200)
    add("--folder", metavar="RUNS", help="keep the store there instead of in a temporary folder")
    add("--workloads", nargs="+", default=["tiny", "15m", "cartpole"], choices=[*WORKLOADS, "cartpole"])
    add("--iterations", type=positive, default=10, help="counted iterations of training")
    add("--json", metavar="FILE", help="write all figures")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.episodes, arguments.workloads, arguments.iterations = 2000, ["tiny"], 2
    return arguments


def main() -> int:
    """Exit code."""
    arguments = parse()
    return exit_code("studio.py", lambda: measure(arguments))


if __name__ == "__main__":
    sys.exit(main())
