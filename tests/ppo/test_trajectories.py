"""The batch type: what it refuses, and how it is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.toy import ToyPolicy, trajectories

from tether.ppo.trajectories import last_step


def test_last_step_with_gaps_and_without_any() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert last_step(mask).tolist() == [2, -1, 3]
    assert last_step(mask[:, :0]).tolist() == [-1, -1, -1]


def test_select_takes_rows_and_cuts_to_the_longest() -> None:
    batch = trajectories(ToyPolicy(), episodes=6, gaps=False)
    lengths = batch.mask.sum(1)
    rows = (lengths < lengths.max()).nonzero().flatten().flip(0)
    part = batch.select(rows)
    longest = int(lengths[rows].max())
    assert part.mask.shape == (len(rows), longest)
    for name in ("actions", "log_probs", "values", "rewards", "terminated", "truncated", "reference_log_probs"):
        torch.testing.assert_close(getattr(part, name), getattr(batch, name)[rows, :longest])
    assert batch.groups is not None
    assert part.groups is not None
    assert part.groups.tolist() == batch.groups[rows].tolist()
    assert torch.equal(part.context.lengths, batch.context.lengths[rows])


def test_select_keeps_vector_actions_and_missing_fields() -> None:
    batch = trajectories(ToyPolicy(), episodes=4)
    batch = replace(batch, actions=torch.randn(*batch.mask.shape, 3), reference_log_probs=None, groups=None)
    part = batch.select(torch.tensor([2, 0]))
    assert part.actions.shape == (*part.mask.shape, 3)
    assert part.reference_log_probs is None
    assert part.groups is None


@pytest.mark.parametrize(
    "name", ["log_probs", "values", "rewards", "terminated", "truncated", "bootstrap_values", "actions"]
)
def test_wrong_shapes_are_named(name: str) -> None:
    batch = trajectories(ToyPolicy(), episodes=4)
    with pytest.raises(ValueError, match=f"{name} ha.* shape"):
        replace(batch, **{name: getattr(batch, name)[:, :-1]})


def test_mask_must_have_two_dimensions() -> None:
    batch = trajectories(ToyPolicy(), episodes=4)
    with pytest.raises(ValueError, match=r"expected \(N, T\)"):
        replace(batch, mask=batch.mask[0])
