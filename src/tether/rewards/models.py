"""Reward models: classifiers with one label that score a prompt with its completion, alone or as an ensemble.

Reads what `tether reward` saves; knows nothing of policies or of training.
N = texts, K = members of an ensemble.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from tether.chat import ChatOptions, ChatTemplate
from tether.errors import RewardError, UserError
from tether.pretrained import context_length
from tether.rewards.classifiers import load_classifier
from tether.rewards.normalisation import COMBINE, NORMALISATION_FILE, Combine, Normalisation
from tether.rewards.passes import encode, score_all, shortened
from tether.rewards.verifiers import Text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MEMBER = "member-{}"  # the folder of each member of an ensemble


class RewardModel:
    """A reward model or an ensemble of them, as `tether reward` saves it; any classifier with one label will do.

    Args:
        path: folder or hub name of a reward model, or a folder with `member-0`, `member-1`, ….
        combine: `mean`, `min` or `mean-std` (mean − k·standard deviation) over the members of an ensemble (Coste et al.
            2023); the same for a single model.
        k: of `mean-std`.
        normalise: scores of mean 0 and standard deviation 1 on the samples it was normalised on. A model without
            `score_normalisation.json` gives its raw scores, and the log says so.
        truncate: texts longer than the model's context lose their beginning, behind the special tokens there. Off: they
            are an error.
        dtype: precision of the weights.
        device: a torch device.
        most_tokens: tokens (padding included) that go through a member at once.
        trust_remote_code: run Python code that comes with the model.
        chat: how messages are rendered. None: as the model was trained.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        combine: Combine = "mean",
        k: float = 1.0,
        normalise: bool = True,
        truncate: bool = False,
        dtype: str = "float32",
        device: str = "cpu",
        most_tokens: int = 8192,
        trust_remote_code: bool = False,
        chat: ChatOptions | None = None,
    ) -> None:
        if combine not in COMBINE:
            raise UserError(f"reward model: combine is {combine!r}, expected one of {', '.join(COMBINE)}")
        if not 0 <= k < math.inf:
            raise UserError(f"reward model: k is {k}, expected 0 or more")
        self.path, self.combine, self.k = str(path), combine, k
        self.truncate, self.most_tokens = truncate, most_tokens
        folders = member_folders(Path(path)) or [Path(path)]
        names = [str(folder) for folder in folders] if len(folders) > 1 or folders[0].is_dir() else [str(path)]
        loaded = [load_classifier(name, dtype, device, None, trust_remote_code) for name in names]
        self.members = [model for model, _ in loaded]
        self.tokenizers = [tokenizer for _, tokenizer in loaded]
        for tokenizer in self.tokenizers:
            ChatTemplate(tokenizer, chat).keep()
        self.normalisation = Normalisation.identity(len(loaded))
        if normalise:
            found = Normalisation.load(Path(path)) or _from_config(self.members)
            if found is None:
                logger.info("%s: no %s: its scores are used as they are", path, NORMALISATION_FILE)
            elif len(found.means) != len(loaded):
                raise UserError(
                    f"{Path(path) / NORMALISATION_FILE}: of {len(found.means)} members, but there are {len(loaded)}"
                )
            else:
                self.normalisation = found

    def tokens(
        self, prompts: Sequence[Text], completions: Sequence[Text], names: Sequence[str] | None = None
    ) -> list[list[list[int]]]:
        """What each of K members reads: (K, N) lists of token ids.

        Args:
            prompts: (N,) texts, or lists of messages.
            completions: (N,) of the same kinds.
            names: (N,) what messages call them. None: `completion 0` and so on.

        Raises:
            RewardError: a text is longer than the context, or its messages cannot be rendered.
        """
        read = []
        for model, tokenizer in zip(self.members, self.tokenizers, strict=True):
            token_ids = encode(tokenizer, prompts, completions, names)
            room = context_length(model)
            for index, ids in enumerate(token_ids):
                if room is None or len(ids) <= room:
                    continue
                if not self.truncate:
                    name = f"completion {index}" if names is None else names[index]
                    raise RewardError(
                        f"{name}: with its prompt {len(ids)} tokens, but the context of the reward model {self.path} "
                        f"is {room}: shorten them, or set its option `truncate`"
                    )
                token_ids[index] = shortened(tokenizer, ids, room)
            read.append(token_ids)
        return read

    def raw(self, prompts: Sequence[Text], completions: Sequence[Text], names: Sequence[str] | None = None) -> Tensor:
        """Scores (K, N) of each member, before normalisation; arguments as in `tokens`.

        Raises:
            RewardError: as in `tokens`; a score is not finite.
        """
        read = self.tokens(prompts, completions, names)
        scored = zip(self.members, read, strict=True)
        scores = torch.stack([score_all(model, token_ids, self.most_tokens) for model, token_ids in scored])
        if not bool((finite := scores.isfinite().all(dim=0)).all()):
            index = int((~finite).nonzero()[0])
            name = f"completion {index} of {text_of(prompts[index])[-60:]!r}" if names is None else names[index]
            kind = str(self.members[0].dtype).removeprefix("torch.")
            raise RewardError(
                f"{name}: the score of the reward model {self.path} is NaN or infinite in {kind}: numbers overflow in "
                "the model; " + ("look at its weights" if kind == "float32" else "take dtype float32")
            )
        return scores

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], names: Sequence[str] | None = None
    ) -> list[float]:
        """One normalised score for each of N prompts with its completion; arguments and errors as in `tokens`."""
        if not prompts:
            return []
        combined = self.normalisation.combine(self.raw(prompts, completions, names), self.combine, self.k)
        return [float(score) for score in combined]

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """`score`, by the calling convention of reward functions."""
        return self.score(prompts, completions)


def _variables(text: str) -> dict[str, Any]:
    """Variables of a chat template, written as JSON."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"reward `reward_model`: option `chat_template_kwargs` is {text!r:.60}; expected a JSON object, as in "
            '{"enable_thinking": false}'
        )
    return found


def _from_config(members: Sequence[PreTrainedModel]) -> Normalisation | None:
    """What the configuration of a single model says, which comes with it from the hub too."""
    said = getattr(members[0].config, "score_normalisation", None) if len(members) == 1 else None
    if not isinstance(said, dict) or not said.get("std", 0) > 0:
        return None
    return Normalisation((float(said["mean"]),), (float(said["std"]),))


def member_folders(path: Path) -> list[Path]:
    """`member-0`, `member-1`, … of an ensemble's folder; empty where it is none."""
    folders: list[Path] = []
    while (folder := path / MEMBER.format(len(folders))).is_dir():
        folders.append(folder)
    return folders


@dataclass(frozen=True)
class ModelReward:
    """The score of a reward model: what `reward_model?path=runs/reward/model` names."""

    offline: ClassVar[bool] = False
    """Not tried on all prompts before a run: unlike that of a verifier, its work costs something."""

    path: str
    """Folder or hub name of a reward model, or of an ensemble that `tether reward` trained."""
    combine: str = "mean"
    """Score of an ensemble: `mean`, `min` or `mean-std`, the mean less `k` standard deviations."""
    k: float = 1.0
    """Of `mean-std`."""
    normalise: bool = True
    """Mean 0 and standard deviation 1 on the samples that the model was normalised on."""
    truncate: bool = False
    """Texts longer than the model's context lose their beginning, behind the special tokens there; otherwise they are
    an error."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:1. auto: cuda where there is one, else cpu."""
    dtype: str = "float32"
    """Precision of the weights."""
    chat_template: str = ""
    """File with a chat template to render messages with; otherwise the one that the model was trained with."""
    chat_template_kwargs: str = ""
    """Variables for the chat template, as JSON: `{"enable_thinking": false}`."""
    model: RewardModel = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model = RewardModel(
            self.path,
            cast(Combine, self.combine),
            self.k,
            normalise=self.normalise,
            truncate=self.truncate,
            dtype=self.dtype,
            device=self.device,
            chat=ChatOptions(
                chat_template=self.chat_template or None, chat_template_kwargs=_variables(self.chat_template_kwargs)
            ),
        )
        object.__setattr__(self, "model", model)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion."""
        return self.model.score(prompts, completions)
