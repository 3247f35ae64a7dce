"""The token MDP as a `gymnasium.Env`: state = prompt + tokens so far, action = next token, transition = append.

For people who want to see, test or drive language generation as any other environment. It knows nothing of
policies, KL or batches: PPO on language models goes through the batched sampler instead, and a test replays what the
sampler drew in this environment.

L = length of an observation, V = vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import InvalidAction, ResetNeeded
from numpy.typing import NDArray

from tether.errors import RewardError, UserError
from tether.language.texts import Texts
from tether.language.world import as_completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tether.language.prompts import Prompt
    from tether.rewards import Rewards

Score = Callable[[int, Sequence[int]], float]
"""Gives one response its score: called with the prompt's index and the response's token ids (eos included)."""

_INTEGERS = (int, np.integer)


class TokenEnv(gymnasium.Env[NDArray[np.int64], np.int64]):
    """Text generation as an episode: reset shows a prompt, each step appends one token, the end brings the score.

    The reward is 0 at every step but the last, where it is `score(prompt, response_ids)`. The transition and the
    score are the only things that depend on the action; no KL penalty is inside.

    Observation: (L,) int64 with L = longest prompt + `max_new_tokens`; the token ids so far, then `pad_id` = V to
    the right. V is one past the last token id, so padding is no token at all and never eos, whatever ids the
    tokenizer shares between its pad and its eos. A `spaces.Box` rather than the alternatives, for what they cost
    (L = 512, V = 151,936, gymnasium 1.4): `spaces.Sequence` has no fixed shape, so vector environments return
    ragged tuples, `AsyncVectorEnv` cannot share memory and the space cannot be flattened, and each membership test
    of the environment checker takes 1.5 ms against 0.02 ms; `MultiDiscrete` is as fast, but is one-hot when
    flattened: 77.8 million numbers against 512.

    Action: `Discrete(V)`, the id of the next token. pad is no action; the tokenizer's own pad token, where it is
    not eos, is a token like any other.

    `terminated`: eos was drawn, or the response's text now contains one of `stop`. `truncated`: the response has
    `max_new_tokens` tokens and did not terminate with the last of them.

    `info`: `prompt` (index of the prompt), `length` (tokens so far, prompt included: the observation without its
    padding is `observation[:length]`); with a tokenizer also `text` (the response so far, less what begins or ends
    one: see `tether.language.texts.Texts`); at the end also `score` (before any penalty).

    gymnasium's `check_env` refuses environments that truncate at once, so it needs `max_new_tokens` of 2 or more.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012 (gymnasium's own form)

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        score: Score,
        *,
        vocabulary_size: int,
        eos_token_id: int | Sequence[int],
        max_new_tokens: int,
        missing_eos_penalty: float = 0.0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop: Sequence[str] = (),
        render_mode: str | None = None,
    ) -> None:
        """Make the environment of these prompts.

        Args:
            prompts: token ids of each prompt; `reset` draws one of them, or takes `options={"prompt": index}`.
            score: gives the finished response its score; `score_with_rewards` makes one from `tether.rewards`.
            vocabulary_size: V, the number of actions: the number of the model's logits.
            eos_token_id: the token that ends a response, or several such tokens.
            max_new_tokens: longest response, eos included.
            missing_eos_penalty: subtracted from the score of a truncated response.
            tokenizer: needed for `stop` and for text in `info` and `render`.
            stop: strings that end the response once its text contains one of them.
            render_mode: None, or "ansi" for the text so far.

        Raises:
            UserError: an argument is empty, or a token id is not in the vocabulary.
        """
        self._eos_ids = frozenset(
            (int(eos_token_id),) if isinstance(eos_token_id, _INTEGERS) else map(int, eos_token_id)
        )
        self._prompts = [tuple(int(token) for token in prompt) for prompt in prompts]
        _check_arguments(self._prompts, self._eos_ids, vocabulary_size, max_new_tokens, missing_eos_penalty)
        if stop and (tokenizer is None or not all(stop)):
            raise UserError("stop: stop strings must not be empty and need a tokenizer; pass `tokenizer`")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UserError(f"render_mode: found {render_mode!r}, expected None or 'ansi'")
        self._score = score
        self._max_new_tokens = max_new_tokens
        self._missing_eos_penalty = missing_eos_penalty
        self._tokenizer = tokenizer
        self._texts = None if tokenizer is None else Texts(tokenizer, self._eos_ids, tuple(stop))
        self._stop = tuple(stop)
        self.render_mode = render_mode
        self.pad_id = vocabulary_size
        length = max(len(prompt) for prompt in self._prompts) + max_new_tokens
        self.observation_space = spaces.Box(0, self.pad_id, (length,), np.int64)
        self.action_space = spaces.Discrete(vocabulary_size)
        self._prompt = 0
        self._response: list[int] = []
        self._running = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The state: the prompt's token ids and those drawn since."""
        return (*self._prompts[self._prompt], *self._response)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Start a response to a prompt: the one named by `options={"prompt": index}`, else a uniformly drawn one.

        Raises:
            UserError: the option is not the index of a prompt.
        """
        super().reset(seed=seed)
        chosen = (options or {}).get("prompt")
        if chosen is None:
            chosen = self.np_random.integers(len(self._prompts))
        elif not isinstance(chosen, _INTEGERS) or not 0 <= chosen < len(self._prompts):
            raise UserError(f'options["prompt"]: found {chosen!r}, expected 0 to {len(self._prompts) - 1}')
        self._prompt = int(chosen)
        self._response = []
        self._running = True
        return self._observation(), self._info()

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.int64], float, bool, bool, dict[str, Any]]:
        """Append the token `action`.

        Raises:
            ResetNeeded: the episode is over, or never began.
            InvalidAction: `action` is not a token id.
            RewardError: the score is not one finite number.
        """
        if not self._running:
            raise ResetNeeded("the episode is over: call reset() before step()")
        if not self.action_space.contains(action):
            raise InvalidAction(f"action: found {action!r}, expected a token id from 0 to {self.pad_id - 1}")
        self._response.append(int(action))
        terminated = self._response[-1] in self._eos_ids or self._stops()
        truncated = not terminated and len(self._response) == self._max_new_tokens
        info = self._info()
        reward = 0.0
        if terminated or truncated:
            self._running = False
            info["score"] = self._finite_score()
            reward = info["score"] - (self._missing_eos_penalty if truncated else 0.0)
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> str | None:
        """In mode "ansi" the text so far, special tokens shown (the token ids where there is no tokenizer)."""
        if self.render_mode is None:
            return None
        if self._tokenizer is None:
            return " ".join(str(token) for token in self.token_ids)
        return str(self._tokenizer.decode(list(self.token_ids), clean_up_tokenization_spaces=False))

    def _observation(self) -> NDArray[np.int64]:
        observation = np.full(self.observation_space.shape or (), self.pad_id, dtype=np.int64)
        observation[: len(self.token_ids)] = self.token_ids
        return observation

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {"prompt": self._prompt, "length": len(self.token_ids)}
        if self._texts is not None:
            (info["text"],) = self._texts.responses([self._response])
        return info

    def _stops(self) -> bool:
        if not self._stop or self._texts is None:
            return False
        # The whole response is decoded: a stop string may span tokens, and tokens may decode differently in context.
        (text,) = self._texts.shown([self._response])
        return any(string in text for string in self._stop)

    def _finite_score(self) -> float:
        found: object = self._score(self._prompt, list(self._response))
        if not isinstance(found, int | float | np.integer | np.floating) or not math.isfinite(found):
            raise RewardError(f"score of prompt {self._prompt}: found {found!r}, expected one finite number")
        return float(found)


def score_with_rewards(
    rewards: Rewards,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int] = (),
    stop: Sequence[str] = (),
) -> Score:
    """A `Score` for `TokenEnv([prompt.token_ids for prompt in prompts], ...)` from the rewards of `tether.rewards`.

    The reward functions get what they get in training: the prompt's text or messages, the completion in the same
    form (see `tether.language.texts.Texts` for what is cut), its token ids, and the prompt's other columns.

    Args:
        rewards: what scores.
        prompts: as the environment's.
        tokenizer: the policy's.
        ends: token ids that end a response, besides the tokenizer's eos.
        stop: strings that end one.
    """
    texts = Texts(tokenizer, ends, stop)

    def score(prompt: int, response_ids: Sequence[int]) -> float:
        asked = prompts[prompt]
        completion = as_completion(asked, texts.responses([response_ids])[0])
        columns = {name: [value] for name, value in asked.columns.items()}
        return rewards([asked.source], [completion], [list(response_ids)], columns).total[0]

    return score


def _check_arguments(
    prompts: list[tuple[int, ...]],
    eos_ids: frozenset[int],
    vocabulary_size: int,
    max_new_tokens: int,
    missing_eos_penalty: float,
) -> None:
    if not prompts:
        raise UserError("prompts: found none, expected at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompts[{index}]: found no tokens, expected at least one")
        for token in prompt:
            if not 0 <= token < vocabulary_size:
                raise UserError(f"prompts[{index}]: found token id {token}, expected 0 to {vocabulary_size - 1}")
    if not eos_ids or not all(0 <= token < vocabulary_size for token in eos_ids):
        raise UserError(
            f"eos_token_id: found {sorted(eos_ids)}, expected one or more token ids from 0 to {vocabulary_size - 1}"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: found {max_new_tokens}, expected 1 or more")
    if not math.isfinite(missing_eos_penalty):
        raise UserError(f"missing_eos_penalty: found {missing_eos_penalty}, expected a finite number")
