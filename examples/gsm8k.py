"""Two rewards for school-maths questions whose `answer` column ends in `#### 72`. Copy this file and change it.

    tether ppo ... --reward.functions gsm8k.py:correct gsm8k.py:well_formed --reward.weights 1.0 0.2

A reward function is called with keyword arguments and takes those that it names: `prompts`, `completions`,
`completion_ids`, and every column of the data set (here `answer`). It returns one number per completion.
"""

import re

FINAL_ANSWER = re.compile(r"####\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)\s*$")


def text_of(completion):
    """Chat completions are `[{"role": "assistant", "content": text}]`; plain ones are the text itself."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_number(text):
    """The number after `#### ` at the end of the text, None where there is none."""
    match = FINAL_ANSWER.search(text.strip())
    return None if match is None else float(match.group(1).replace(",", ""))


def correct(completions, answer, **columns):
    """1 where the completion ends in `#### ` and the right number, else -1."""
    scores = []
    for completion, solution in zip(completions, answer, strict=True):
        given = final_number(text_of(completion))
        scores.append(1.0 if given is not None and given == final_number(solution) else -1.0)
    return scores


def well_formed(completions, **columns):
    """1 where the completion ends in `#### ` and any number, else 0: it teaches the form before the answers."""
    return [float(final_number(text_of(completion)) is not None) for completion in completions]
