"""PPO for language models and for control, from one core.

    import tether

    config = tether.PPOConfig(model="my-model", output="runs/first")
    tether.train_ppo(config, tether.Parts(prompts=rows, reward=my_reward))

Everything here is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tether.control.environments import Environments, EnvironmentsConfig
    from tether.control.policy import ControlPolicy, NetworkConfig
    from tether.control.world import ControlCollectConfig, ControlWorld
    from tether.episode import Episode
    from tether.errors import RewardError, UserError
    from tether.language.adapters import LoRAConfig
    from tether.language.environment import TokenEnv
    from tether.language.policy import LanguagePolicy
    from tether.language.preferences import PreferencesConfig, load_preferences
    from tether.language.prompts import PromptsConfig
    from tether.language.reference import ReferenceConfig
    from tether.language.sampler import Sampler, SamplingConfig
    from tether.language.world import CollectConfig, LanguageWorld
    from tether.pipeline.check import Checked, check
    from tether.pipeline.control import (
        ControlConfig,
        ControlEvalConfig,
        build_control,
        evaluate_control,
        train_control,
    )
    from tether.pipeline.evaluate import EvalConfig, evaluate
    from tether.pipeline.export import ExportConfig, export
    from tether.pipeline.frontier import FrontierConfig
    from tether.pipeline.ppo import Parts, PPOConfig, Trained, build_ppo, train_ppo
    from tether.pipeline.reward_model import RewardModelConfig, train_reward_model
    from tether.pipeline.score import ScoreConfig, score
    from tether.pipeline.sft import SFTConfig, fine_tune, sft
    from tether.ppo import AdvantageConfig, KLConfig, Learner, LearnerConfig, Trajectories
    from tether.rewards import Rewards, RewardsConfig, check_reward
    from tether.rewards.models import RewardModel
    from tether.runs import read_episodes, read_metrics
    from tether.runs.alarms import AlarmsConfig
    from tether.train import Iteration, World, iterate

_HOMES = {
    "tether.control.environments": ("Environments", "EnvironmentsConfig"),
    "tether.control.policy": ("ControlPolicy", "NetworkConfig"),
    "tether.control.world": ("ControlCollectConfig", "ControlWorld"),
    "tether.episode": ("Episode",),
    "tether.errors": ("RewardError", "UserError"),
    "tether.language.adapters": ("LoRAConfig",),
    "tether.language.environment": ("TokenEnv",),
    "tether.language.policy": ("LanguagePolicy",),
    "tether.language.preferences": ("PreferencesConfig", "load_preferences"),
    "tether.language.prompts": ("PromptsConfig",),
    "tether.language.reference": ("ReferenceConfig",),
    "tether.language.sampler": ("Sampler", "SamplingConfig"),
    "tether.language.world": ("CollectConfig", "LanguageWorld"),
    "tether.pipeline.check": ("Checked", "check"),
    "tether.pipeline.control": (
        "ControlConfig",
        "ControlEvalConfig",
        "build_control",
        "evaluate_control",
        "train_control",
    ),
    "tether.pipeline.evaluate": ("EvalConfig", "evaluate"),
    "tether.pipeline.export": ("ExportConfig", "export"),
    "tether.pipeline.frontier": ("FrontierConfig",),
    "tether.pipeline.ppo": ("PPOConfig", "Parts", "Trained", "build_ppo", "train_ppo"),
    "tether.pipeline.reward_model": ("RewardModelConfig", "train_reward_model"),
    "tether.pipeline.score": ("ScoreConfig", "score"),
    "tether.pipeline.sft": ("SFTConfig", "fine_tune", "sft"),
    "tether.ppo": ("AdvantageConfig", "KLConfig", "Learner", "LearnerConfig", "Trajectories"),
    "tether.rewards": ("Rewards", "RewardsConfig", "check_reward"),
    "tether.rewards.models": ("RewardModel",),
    "tether.runs": ("read_episodes", "read_metrics"),
    "tether.runs.alarms": ("AlarmsConfig",),
    "tether.train": ("Iteration", "World", "iterate"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdvantageConfig",
    "AlarmsConfig",
    "Checked",
    "CollectConfig",
    "ControlCollectConfig",
    "ControlConfig",
    "ControlEvalConfig",
    "ControlPolicy",
    "ControlWorld",
    "Environments",
    "EnvironmentsConfig",
    "Episode",
    "EvalConfig",
    "ExportConfig",
    "FrontierConfig",
    "Iteration",
    "KLConfig",
    "LanguagePolicy",
    "LanguageWorld",
    "Learner",
    "LearnerConfig",
    "LoRAConfig",
    "NetworkConfig",
    "PPOConfig",
    "Parts",
    "PreferencesConfig",
    "PromptsConfig",
    "ReferenceConfig",
    "RewardError",
    "RewardModel",
    "RewardModelConfig",
    "Rewards",
    "RewardsConfig",
    "SFTConfig",
    "Sampler",
    "SamplingConfig",
    "ScoreConfig",
    "TokenEnv",
    "Trained",
    "Trajectories",
    "UserError",
    "World",
    "build_control",
    "build_ppo",
    "check",
    "check_reward",
    "evaluate",
    "evaluate_control",
    "export",
    "fine_tune",
    "iterate",
    "load_preferences",
    "read_episodes",
    "read_metrics",
    "score",
    "sft",
    "train_control",
    "train_ppo",
    "train_reward_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tether' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME_OF)
