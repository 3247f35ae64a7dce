"""An episode as people read it and as runs store it. Knows no tensors, no algorithm and no world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

FILMS_FOLDER = "films"
"""Where a run's folder has the films of its episodes."""


@dataclass(frozen=True, repr=False)
class Episode:
    """One trajectory from start to end: plain numbers and text.

    The lists have one entry per step.

    Attributes:
        prompt: what it started from: the prompt, or the first observation.
        response: what came of it: the response, or how the episode ended.
        score: what the world gave for the whole episode, before any penalty.
        terminated: it came to an end of its own (eos, a fallen pole).
        truncated: it was cut off.
        actions: in words.
        action_ids: as numbers: a token id or a discrete action, or a list of controls.
        log_probs: log π_old(a|s).
        values: V_old(s) before the action.
        rewards: penalties included.
        advantages: as the policy was trained on, whitened where the run whitens.
        returns: the critic's targets.
        reference_log_probs: log π_ref(a|s); None without a reference.
        new_log_probs: log π(a|s) when the update saw the step for the last time, before the optimizer step that
            followed; NaN where it never did. None: not known.
        entropies: of π(·|s) at that same moment, nats.
        clipped: whether the policy's gradient was clipped away at that same moment. None: not known.
        alternatives: the likeliest actions when the action was drawn, likeliest first, each (in words, probability), of
            the distribution that was really sampled: at its temperature, after top-k and top-p. The action itself
            is among them where it is likely enough. None where none were kept, or actions are continuous.
        states: what was observed before each action; None where that is the prompt and the actions so far.
        frames: a film of the episode, one image that holds its frames in rows from left to right: the file's name
            relative to the run's folder. `details["film"]` says how it is cut. None where none was made.
        details: the world's own facts.
    """

    prompt: str
    response: str
    score: float
    terminated: bool
    truncated: bool
    actions: list[str]
    action_ids: list[Any]
    log_probs: list[float]
    values: list[float]
    rewards: list[float]
    advantages: list[float]
    returns: list[float]
    reference_log_probs: list[float] | None = None
    new_log_probs: list[float] | None = None
    entropies: list[float] | None = None
    clipped: list[bool] | None = None
    alternatives: list[list[tuple[str, float]]] | None = None
    states: list[str] | None = None
    frames: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        end = "terminated" if self.terminated else "truncated"
        steps = f"{len(self.actions)} step{'' if len(self.actions) == 1 else 's'}"
        words = f"{short_repr(self.prompt)} → {short_repr(self.response)}"
        return f"{type(self).__name__}({words}, score {self.score:.3g}, {steps}, {end})"


def short_repr(text: object, most: int = 60) -> str:
    """The `repr` of something in one line of at most so many characters."""
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[: most - 2]}…{shown[-1]}"
