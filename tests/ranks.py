"""What one of several processes does in the test of many ranks; a file of its own, so that a process starts quickly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.toy import ToyPolicy, gradient, trajectories
from tether.ppo import AdvantageConfig, KLConfig, KLController, Learner, LearnerConfig, Trajectories

SHARES = (slice(0, 5), slice(5, 8))  # rows of rank 0 and of rank 1: not the same number
AGGREGATIONS = ("step", "episode")


def whole_batch() -> Trajectories:
    return trajectories(ToyPolicy(), episodes=8, seed=3)


def measure(batch: Trajectories) -> dict[str, Any]:
    """Advantages, gradients and metrics of this process's batch."""
    policy = ToyPolicy()
    found: dict[str, Any] = {}
    advantages, returns = Learner(policy).credit(batch)
    found["advantages"] = advantages[batch.mask]
    scaled = Learner(policy, advantage=AdvantageConfig(whiten_rewards=True)).credit(batch)
    found["returns of whitened rewards"] = scaled[1][batch.mask]
    for aggregation in AGGREGATIONS:
        config = LearnerConfig(aggregation=aggregation, entropy_coefficient=0.01)
        found[f"gradient/{aggregation}"] = gradient(policy, batch, advantages, returns, config)
        kl = KLController(KLConfig(beta=0.1, target=0.05, horizon=100))
        learner = Learner(policy, replace(config, epochs=2, minibatches=1, learning_rate=1e-2), AdvantageConfig(), kl)
        found[f"metrics/{aggregation}"] = learner.update(batch, advantages, returns) | {"beta_after": kl.beta}
        found[f"parameters/{aggregation}"] = torch.cat([p.detach().flatten() for p in policy.parameters()])
        policy = ToyPolicy()
    return found


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARES))
    try:
        torch.save(measure(share(whole_batch(), rank)), Path(folder) / f"rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def share(batch: Trajectories, rank: int) -> Trajectories:
    rows: Tensor = torch.arange(len(batch))[SHARES[rank]]
    return batch.select(rows)
