"""PPO: tensors in, tensors out. Imports torch alone, and knows no world."""

from tether.ppo.advantages import AdvantageConfig
from tether.ppo.kl import KLConfig, KLController
from tether.ppo.learner import Learner, LearnerConfig
from tether.ppo.trajectories import ActorCritic, Context, Evaluation, LastSeen, Trajectories

__all__ = [
    "ActorCritic",
    "AdvantageConfig",
    "Context",
    "Evaluation",
    "KLConfig",
    "KLController",
    "LastSeen",
    "Learner",
    "LearnerConfig",
    "Trajectories",
]
