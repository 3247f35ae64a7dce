"""A run's folder: configuration, metrics, episodes and checkpoints; and progress for people.

Knows nothing of training: imports neither the loop nor the pipeline.
"""

from .console import recorded
from .display import Display
from .episode_queries import EpisodeFilter, EpisodeSummary, find_episodes, same_prompt, siblings
from .episodes import StoredEpisode, count_episodes, read_episode, read_episodes, read_revisited
from .folder import Run, latest_checkpoint, read_config, read_metrics, refuse_run
from .state import load_state, save_state

__all__ = [
    "Display",
    "EpisodeFilter",
    "EpisodeSummary",
    "Run",
    "StoredEpisode",
    "count_episodes",
    "find_episodes",
    "latest_checkpoint",
    "load_state",
    "read_config",
    "read_episode",
    "read_episodes",
    "read_metrics",
    "read_revisited",
    "recorded",
    "refuse_run",
    "same_prompt",
    "save_state",
    "siblings",
]
