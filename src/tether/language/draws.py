"""What was drawn for one batch, and which of it is trained on: prompts, responses and scores that stay together.

A group is all responses to one drawn prompt, which stand next to each other. It knows neither how responses are drawn
nor how they are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tether.language.prompts import Prompt
from tether.language.sampler import Samples, join_samples
from tether.rewards import Scores


@dataclass(frozen=True)
class Draw:
    """N scored responses.

    Attributes:
        prompts: N, each repeated for every response to it.
        samples: the responses.
        scores: of the responses.
    """

    prompts: list[Prompt]
    samples: Samples
    scores: Scores

    @property
    def tokens(self) -> int:
        """Length of all responses together."""
        return sum(len(ids) for ids in self.samples.response_ids)

    def alike(self, size: int) -> list[bool]:
        """For each group of `size` responses, whether they all have the same score, to the last bit."""
        total = self.scores.total
        return [len(set(total[start : start + size])) == 1 for start in range(0, len(total), size)]

    def select(self, rows: Sequence[int]) -> Draw:
        """These responses, in this order."""
        parts = {name: [part[row] for row in rows] for name, part in self.scores.parts.items()}
        scores = Scores([self.scores.total[row] for row in rows], parts)
        return Draw([self.prompts[row] for row in rows], self.samples.select(rows), scores)


def join_draws(draws: Sequence[Draw]) -> Draw:
    """All of them, one after the other."""
    if len(draws) == 1:
        return draws[0]
    names = draws[0].scores.parts
    return Draw(
        prompts=[prompt for draw in draws for prompt in draw.prompts],
        samples=join_samples([draw.samples for draw in draws]),
        scores=Scores(
            [score for draw in draws for score in draw.scores.total],
            {name: [score for draw in draws for score in draw.scores.parts[name]] for name in names},
        ),
    )


def telling_groups(draw: Draw, size: int, groups: int) -> Draw:
    """`groups` groups of `size` responses: those whose scores differ first, then others, each in the order drawn."""
    alike = draw.alike(size)
    chosen = sorted(range(len(alike)), key=alike.__getitem__)[:groups]
    return draw.select([size * group + member for group in chosen for member in range(size)])
