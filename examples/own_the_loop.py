"""PPO with the loop in your own hands. Copy this file and change it.

    python own_the_loop.py my-model

`my-model` is the folder of a causal language model, or its name on the Hugging Face hub.
"""

import sys
from pathlib import Path

import tether

OUTPUT = Path("runs/own")
PROMPTS = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(10) for b in range(10)]


def correct(completions, answer, **columns):
    """+1 where the completion is the right answer and nothing else, -1 elsewhere."""
    return [1.0 if text.strip() == right else -1.0 for text, right in zip(completions, answer, strict=True)]


config = tether.PPOConfig(
    model=sys.argv[1],
    iterations=3,
    sampling=tether.SamplingConfig(max_new_tokens=8),
    collect=tether.CollectConfig(prompts=16, samples_per_prompt=2),
    learner=tether.LearnerConfig(learning_rate=1e-5, value_learning_rate=1e-4),
)
world, learner = tether.build_ppo(config, tether.Parts(prompts=PROMPTS, reward=correct))

for step in tether.iterate(world, learner):
    metrics = step.metrics
    print(f"{step.number}: score {metrics['score']:+.3f}, KL {metrics['kl']:.4f} nats per response")

    # Everything that was collected is here: tensors to compute with, episodes to read.
    assert step.trajectories.actions.shape == step.advantages.shape  # (responses, tokens of the longest)
    best = max(world.episodes(step.trajectories, step.advantages, step.returns), key=lambda episode: episode.score)
    print(f"   best: {best.prompt!r} → {best.response!r}")

    # And everything may be changed between two iterations, such as the price of the KL.
    if metrics["kl"] > 5.0:
        learner.kl.beta *= 2

world.save_policy(OUTPUT)
print(f"the policy, a Hugging Face folder: {OUTPUT / 'policy'}")
