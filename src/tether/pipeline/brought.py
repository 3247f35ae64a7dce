"""What a run was begun with, besides its configuration: noted in each checkpoint, compared where the run goes on.

The place in a pass over the prompts means nothing for other prompts, so that these are refused. Of files whose content
matters in a lesser way, such as a reward's, it is said that they have changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.errors import UserError
from tether.language.models import fingerprint
from tether.language.prompts import Prompt
from tether.rewards import Rewards
from tether.rewards.models import ModelReward

logger = logging.getLogger(__name__)


def describe_data(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """How many prompts there are, and SHA-256 of their rows and of their tokens."""
    rows, tokens = hashlib.sha256(), hashlib.sha256()
    for prompt in prompts:
        rows.update(_text([prompt.source, prompt.columns]))
        tokens.update(_text(prompt.token_ids))
    return {"count": len(prompts), "rows": rows.hexdigest(), "tokens": tokens.hexdigest()}


def describe_sources(tokenizer: PreTrainedTokenizerBase, rewards: Mapping[str, Rewards | None]) -> dict[str, str]:
    """SHA-256 of the tokenizer, its chat template, and each reward's file or model, by what messages call them.

    Args:
        tokenizer: the policy's.
        rewards: by the section of the configuration that they are from.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    found = {
        "the tokenizer": _hash(_text([vocabulary, tokenizer.special_tokens_map])),
        "the chat template": _hash(_text(tokenizer.chat_template)),
    }
    for section, scorer in rewards.items():
        for function in scorer.functions.values() if scorer is not None else ():
            if isinstance(function.call, ModelReward):
                members = function.call.model.members
                weights = (parameter for member in members for parameter in member.parameters())
                found[f"{section}: the reward model {function.call.path}"] = fingerprint(weights)
            elif not function.built_in and Path(function.source).is_file():
                found[f"{section}: {function.source}"] = _hash(Path(function.source).read_bytes())
    return found


def check_data(saved: Mapping[str, Any] | None, now: Mapping[str, Any], place: str) -> None:
    """UserError where a run goes on with other prompts than it was begun with, unless nothing was noted of them."""
    if saved is None or saved == now:
        return
    if saved["count"] != now["count"]:
        changed = f"the run was begun with {saved['count']:,} prompts, and now there are {now['count']:,}"
    elif saved["rows"] != now["rows"]:
        changed = f"these are {now['count']:,} prompts, but not those that the run was begun with"
    else:
        changed = "the prompts have other tokens than when the run was begun: tokenizer or chat template has changed"
    raise UserError(
        f"{place}: {changed}; resume with what was there then, add --new-pass to begin a new pass over these, "
        "or start another run"
    )


def warn_of_changes(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Log a warning for each source that is not what the run was begun with."""
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            logger.warning("%s has changed since the run was begun; it goes on with what is there now", name)


def _text(value: Any) -> bytes:
    return json.dumps(value, default=_plain, skipkeys=True).encode()


def _plain(value: Any) -> Any:
    """What JSON has no form for: arrays, dates, bytes; all else by its kind alone, as its text may hold an address."""
    for method in ("tolist", "isoformat", "hex"):
        if hasattr(value, method):
            return getattr(value, method)()
    return f"<{type(value).__name__}>"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
