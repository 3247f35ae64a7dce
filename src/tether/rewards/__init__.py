"""Where scores come from: a user's reward functions and built-in verifiers. Knows nothing of policies or training."""

from tether.rewards.functions import Rewards, RewardsConfig, Scores, check_reward

__all__ = ["Rewards", "RewardsConfig", "Scores", "check_reward"]
