"""One episode as a table: each step an action, with its log-probability, value, KL, reward, advantage and return.

It knows `Episode` and nothing of where it came from.
"""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tether.episode import Episode


def episode_table(episode: Episode, rows: int | None = None) -> Table:
    """Steps from top to bottom, the columns of the trajectory from left to right, the same for every world.

    Args:
        episode: what to show.
        rows: at most so many steps, those of the start and of the end; None: all.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    # a narrow terminal breaks states into lines and cuts nothing
    table.add_column("step", justify="right", no_wrap=True, min_width=4)
    table.add_column("state", overflow="fold")
    table.add_column("action", style="bold", no_wrap=True, min_width=6)
    names = ["log π"] + (["KL"] if episode.reference_log_probs else []) + ["V(s)", "reward", "advantage", "return"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=max(7, len(name)))
    steps = len(episode.actions)
    head, tail = (steps, 0) if rows is None or rows >= steps else ((rows + 1) // 2, rows // 2)
    for step in range(steps):
        if head <= step < steps - tail:
            if step == head:
                table.add_row("⋮", f"({steps - head - tail} more steps)")
            continue
        numbers = [episode.log_probs[step]]
        if episode.reference_log_probs:
            numbers.append(episode.log_probs[step] - episode.reference_log_probs[step])
        numbers += [episode.values[step], episode.rewards[step], episode.advantages[step], episode.returns[step]]
        table.add_row(str(step), *_state_and_action(episode, step), *(f"{number:+.3f}" for number in numbers))
    return table


def _state_and_action(episode: Episode, step: int) -> tuple[str, str]:
    if episode.states is not None:
        return episode.states[step], episode.actions[step]
    # text is quoted, so that spaces and line breaks are seen
    state = f"… + {episode.actions[step - 1]!r}" if step else "the prompt"
    return state, repr(episode.actions[step])
