"""An episode as the page shows it: one column per quantity, with the KL and the ratio worked out.

Knows the store's episodes; nothing of HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tether.runs import StoredEpisode, count_episodes, read_episode
from tether.runs.episode_queries import EpisodeSummary, same_prompt, siblings
from tether.runs.episodes import EPISODES_FILE

from .places import inside
from .replies import NotFoundError, reading

FILMS = {".gif": "image/gif", ".png": "image/png", ".webp": "image/webp", ".mp4": "video/mp4", ".webm": "video/webm"}
COLUMNS = (
    *("actions", "action_ids", "states", "log_probs", "new_log_probs", "reference_log_probs", "values", "rewards"),
    *("advantages", "returns", "entropies", "clipped", "alternatives"),
)


def summary_of(episode: EpisodeSummary) -> dict[str, Any]:
    """A line of the list."""
    return asdict(episode)


def load_episode(folder: Path, id: int) -> StoredEpisode:
    """The episode with this id.

    Raises:
        NotFoundError: there is none, or no store.
        UserError: the store is damaged.
    """
    file = folder / EPISODES_FILE
    if not file.is_file():
        raise NotFoundError(f"{EPISODES_FILE}: this run has stored no episodes")
    with reading(file):
        if not 1 <= id <= count_episodes(folder):
            raise NotFoundError(f"{EPISODES_FILE}: no episode {id}, expected 1 to {count_episodes(folder)}")
        return _checked(read_episode(folder, id))


def episode_details(folder: Path, id: int) -> dict[str, Any]:
    """All that the page of an episode shows, but the film's address."""
    episode = load_episode(folder, id)
    with reading(folder / EPISODES_FILE):
        return whole(episode) | {
            "details": {name: value for name, value in episode.details.items() if name != "messages"},
            "steps": steps_of(episode),
            "siblings": [summary_of(other) for other in siblings(folder, id) if other.id != id],
            "previous": id - 1 if id > 1 else None,
            "next": id + 1 if id < count_episodes(folder) else None,
            "film": episode.frames,
        }


def across_iterations(folder: Path, id: int) -> list[dict[str, Any]]:
    """The episodes of the same prompt, one of each iteration, whole."""
    load_episode(folder, id)
    with reading(folder / EPISODES_FILE):
        return [summary_of(other) for other in same_prompt(folder, id)]


def whole(episode: StoredEpisode) -> dict[str, Any]:
    """What a summary says, with prompt and response uncut."""
    return {field.name: getattr(episode, field.name) for field in fields(EpisodeSummary)}


def steps_of(episode: StoredEpisode) -> dict[str, Any]:
    """One list per quantity, one entry per step. The ratio is π/π_old when the update last saw the step."""
    ratios: list[float] | None = None
    if episode.new_log_probs is not None:
        ratios = [_exp(new - old) for new, old in zip(episode.new_log_probs, episode.log_probs, strict=True)]
    return {
        "action": episode.actions,
        "action_id": episode.action_ids,
        "state": episode.states,
        "log_prob": episode.log_probs,
        "new_log_prob": episode.new_log_probs,
        "reference_log_prob": episode.reference_log_probs,
        "kl": _difference(episode.log_probs, episode.reference_log_probs),
        "value": episode.values,
        "reward": episode.rewards,
        "advantage": episode.advantages,
        "return": episode.returns,
        "entropy": episode.entropies,
        "ratio": ratios,
        "clipped": episode.clipped,
        "alternatives": episode.alternatives,
    }


def film_of(root: Path, folder: Path, id: int) -> tuple[Path, str]:
    """The file of an episode's film, and its media type.

    Raises:
        NotFoundError: it has none, or none that a browser shows.
        ForbiddenError: it lies outside of the runs folder.
    """
    name = load_episode(folder, id).frames
    if not name:
        raise NotFoundError(f"episode {id}: no film was recorded")
    file = inside(root, f"{folder.relative_to(root).as_posix()}/{name}")
    kind = FILMS.get(file.suffix.lower())
    if kind is None or not file.is_file():
        raise NotFoundError(f"episode {id}: its film is no {', '.join(FILMS)} file")
    return file, kind


def _checked(episode: StoredEpisode) -> StoredEpisode:
    """The episode, of which texts are text and all columns have one entry per step."""
    steps = len(episode.log_probs)
    for name in COLUMNS:
        column = getattr(episode, name)
        if column is not None and (not isinstance(column, list) or len(column) != steps):
            raise ValueError(f"{name} of episode {episode.id} are not the {steps} of its steps")
    if not isinstance(episode.details, dict):
        raise ValueError(f"details of episode {episode.id} are no JSON object")
    if not all(isinstance(text, str) for text in (episode.prompt, episode.response, *episode.actions)):
        raise ValueError(f"prompt, response or an action of episode {episode.id} is no text")
    return episode


def _difference(left: Sequence[float], right: Sequence[float] | None) -> list[float] | None:
    return None if right is None else [a - b for a, b in zip(left, right, strict=True)]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
