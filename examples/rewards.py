"""Two rewards of your own. Copy this file and change it.

    tether ppo ... --reward.functions rewards.py:correct rewards.py:short --reward.weights 1 0.01

A reward function is called with keyword arguments and takes those that it names: `prompts`, `completions`,
`completion_ids`, and every column of the prompts (here `answer`). It returns one number per completion.
"""


def correct(completions, answer, **columns):
    """+1 where the completion is the right answer and nothing else, -1 elsewhere."""
    return [1.0 if text.strip() == right else -1.0 for text, right in zip(completions, answer, strict=True)]


def short(completion_ids, **columns):
    """Minus the number of tokens: of two right answers, the shorter one is better."""
    return [-float(len(ids)) for ids in completion_ids]
