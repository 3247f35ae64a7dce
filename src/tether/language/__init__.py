"""The world of text: the token environment, the policy, the sampler, prompts."""
