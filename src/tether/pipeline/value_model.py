"""A critic that starts as a reward model (Ouyang et al. 2022, arXiv:2203.02155, appendix C.4).

It reads the reward model and hands over trunk and head; how the critic is trained is not its concern.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from tether.errors import UserError
from tether.language.adapters import LoRAConfig, give_adapters
from tether.language.policy import Critic
from tether.pretrained import context_length
from tether.rewards.models import RewardModel


def critic_from_reward_model(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    lora: LoRAConfig,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Critic:
    """The trunk of a reward model and its head, with the normalisation of its scores folded into the latter.

    Args:
        path: folder or hub name of a single reward model.
        tokenizer: the policy's, whose tokens it must read the same way.
        longest: the longest sequence in tokens that it will see.
        lora: gives the trunk adapters, and freezes the rest of it, where a rank is set.
        dtype: precision of the trunk.
        device: a torch device.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: there is no such reward model, or it cannot be this policy's critic.
    """
    try:
        reward = RewardModel(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"value_model {error}") from error
    if len(reward.members) > 1:
        raise UserError(f"value_model {path}: an ensemble; the critic starts from one of it: {path}/member-0")
    model, known = reward.members[0], reward.tokenizers[0].get_vocab()
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UserError(f"value_model {path}: {type(model).__name__} has no linear head called score")
    for token, index in tokenizer.get_vocab().items():
        if known.get(token) != index:
            raise UserError(
                f"value_model {path}: another tokenizer than the policy's: {token!r} is {known.get(token)} there and "
                f"{index} here; expected a reward model trained from the same base model"
            )
    room = context_length(model)
    if room is not None and longest > room:
        raise UserError(
            f"value_model {path}: its context is {room} tokens, but a prompt with its response may have {longest}; "
            "lower sampling.max_new_tokens or prompts.max_tokens"
        )
    # the normalisation is a straight line, which its values at 0 and 1 give
    at_zero, at_one = reward.normalisation.combine(torch.tensor([[0.0, 1.0]])).tolist()
    slope = at_one - at_zero
    bias = 0.0 if head.bias is None else float(head.bias)
    weight = head.weight.detach()[0].float() * slope
    trunk = model.base_model
    if lora.rank:
        give_adapters(trunk, lora)
    return Critic(trunk, weight, bias * slope + at_zero)
