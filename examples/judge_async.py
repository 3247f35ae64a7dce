"""An async reward: every completion is judged at the same time, as one would ask a remote service. Copy and change it.

    tether ppo ... --reward.functions judge_async.py:politeness

`judge` here only counts polite words, so that the file runs as it is; put a request to your service in its place.
"""

import asyncio

POLITE = ("please", "thank", "welcome", "sorry")


async def judge(text):
    """1 for a text with a polite word, else 0."""
    await asyncio.sleep(0)  # here an HTTP client would wait for the answer
    return float(any(word in text.lower() for word in POLITE))


async def politeness(completions, **columns):
    """The judge's score of every completion."""
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return await asyncio.gather(*(judge(text) for text in texts))
