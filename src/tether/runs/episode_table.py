"""One episode as a table: each token an action, with its log-probability, value, KL, reward, advantage and return.

It knows `Episode` and nothing of where it came from.
"""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tether.ppo import Episode


def episode_table(episode: Episode) -> Table:
    """Steps from top to bottom, the columns of the trajectory from left to right."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("action", style="bold", no_wrap=True)
    names = ["log π"] + (["KL"] if episode.reference_log_probs else []) + ["V(s)", "reward", "advantage", "return"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    state = "the prompt"
    for step, action in enumerate(episode.actions):
        numbers = [episode.log_probs[step]]
        if episode.reference_log_probs:
            numbers.append(episode.log_probs[step] - episode.reference_log_probs[step])
        numbers += [episode.values[step], episode.rewards[step], episode.advantages[step], episode.returns[step]]
        table.add_row(str(step), state, repr(action), *(f"{number:+.3f}" for number in numbers))
        state = f"… + {action!r}"
    return table
