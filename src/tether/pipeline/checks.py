"""What can be seen of a run before it computes anything: tokenizer, template, pad, weights, context, memory.

One list, which `tether check` prints and `tether ppo` heeds: a problem ends it, a warning is logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.chat import ChatTemplate
from tether.errors import UserError
from tether.language.models import end_token_ids
from tether.language.prompts import Prompt
from tether.memory import free_memory
from tether.pretrained import context_length
from tether.tokens import shared_length

if TYPE_CHECKING:
    from tether.pipeline.ppo import PPOConfig

logger = logging.getLogger(__name__)

GIB = 2**30
PROMPTS_READ = 256  # of which the tokens are looked at
MARKED = re.compile(r"[<\[{|].+[>\]}|]|_*(pad|padding|unk)_*", re.IGNORECASE | re.DOTALL)
"""How tokens that are no text are written."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        about: what was looked at.
        state: ok; warning: it may be meant; problem: the run would stumble over it; skipped: what it needs is missing.
        text: what was found, and what to do about it.
    """

    about: str
    state: Literal["ok", "warning", "problem", "skipped"]
    text: str


def heed(findings: Iterable[Finding]) -> None:
    """Log what is a warning. Raises UserError at the first problem."""
    for finding in findings:
        if finding.state == "problem":
            raise UserError(finding.text)
        if finding.state == "warning":
            logger.warning("%s: %s", finding.about, finding.text)


def cheap_findings(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, prompts: Sequence[Prompt]
) -> Iterator[Finding]:
    """What costs nothing to look at, of pieces that could be loaded."""
    ends = end_token_ids(model, tokenizer)
    yield _round_trips(tokenizer, prompts)
    yield _ends(tokenizer, ends)
    yield _pad(tokenizer, prompts, ends)
    yield _template(config, tokenizer, prompts, ends)
    yield _weights(model)
    yield _context(config, model, prompts)
    yield _memory(config, model, prompts)


def _round_trips(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> Finding:
    """Tokens that do not come back as the text are not what the data set says."""
    seen = prompts[:PROMPTS_READ]
    for prompt in seen:
        back = tokenizer.decode(prompt.token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if prompt.text.strip() not in back:  # a bos stands before it; some tokenizers take a leading space
            return Finding(
                "tokenizer",
                "warning",
                f"{prompt.place}: {_beside(prompt.text, back)}: the tokenizer does not know some of the text, or "
                "changes it; is it the model's own?",
            )
    words = f"{len(tokenizer):,} tokens; the text of {len(seen)} prompts comes back from their tokens"
    return Finding("tokenizer", "ok", words)


def _beside(text: str, back: str) -> str:
    """Where two texts part."""
    place = shared_length(text, back)
    start = max(0, place - 10)
    return f"{text[start : place + 30]!r} comes back as {back[start : place + 30]!r}"


def _ends(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> Finding:
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    begins = f"{_named(tokenizer, [bos])} begins a text" if adds else "no bos is added to a text"
    return Finding("bos and eos", "ok", f"{begins}; a response ends at {_named(tokenizer, ends)}")


def _pad(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], ends: Sequence[int]) -> Finding:
    """A pad token that is also a piece of text is taken out of every text that a reward is shown."""
    pad, text = tokenizer.pad_token_id, str(tokenizer.pad_token)
    if pad in {*ends, tokenizer.bos_token_id, tokenizer.unk_token_id}:
        same = "; padding is known by its place, so that it may be the eos" if pad in ends else ""
        return Finding("pad", "ok", f"{_named(tokenizer, [pad])}{same}")
    within = next((prompt.place for prompt in prompts[:PROMPTS_READ] if pad in prompt.token_ids), None)
    where = "" if within is None else f", and stands in {within}"
    remedy = "set pad_token in tokenizer_config.json to the eos or to a token of its own"
    if not MARKED.fullmatch(text):
        return Finding(
            "pad",
            "problem",
            f"the pad token is {text!r} (id {pad}), which is a piece of text{where}: it would be cut from every "
            f"response that a reward sees; {remedy}",
        )
    if within is not None:
        return Finding("pad", "warning", f"the pad token is {text!r} (id {pad}){where}: is it meant? Else {remedy}")
    return Finding("pad", "ok", _named(tokenizer, [pad]))


def _template(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], ends: Sequence[int]
) -> Finding:
    if isinstance(prompts[0].source, str):
        if tokenizer.chat_template:
            words = "the tokenizer has one, but the prompts are plain text; add --prompts.chat for a chat model"
            return Finding("chat template", "ok", words)
        return Finding("chat template", "ok", "none, and the prompts are plain text")
    fault = _does_not_tell(ChatTemplate(tokenizer), prompts)
    if fault:
        return Finding("chat template", "warning", fault)
    turn = _turn_end(tokenizer)
    name = "" if turn is None else _text(tokenizer, turn)
    if turn is not None and turn not in ends and not any(stop in name for stop in config.sampling.stop):
        return Finding(
            "chat template",
            "warning",
            f"it ends a turn with {name!r}, at which no response ends (they end at {_named(tokenizer, ends)}): "
            f"add --sampling.stop {name!r}",
        )
    closing = "" if turn is None else f"; it ends a turn with {_named(tokenizer, [turn])}"
    return Finding("chat template", "ok", f"renders all {len(prompts):,} prompts{closing}")


def _does_not_tell(chat: ChatTemplate, prompts: Sequence[Prompt]) -> str:
    """What a template leaves out that a policy has to see; empty where it is all there."""
    first = prompts[0]
    assert not isinstance(first.source, str)
    if chat.render(first.source, first.place) == chat.render(first.source, first.place, generation_prompt=True):
        return (
            "it writes nothing that begins an answer (it ignores add_generation_prompt), so that the policy goes on "
            "with the user's turn; mend it, or name another by --prompts.chat-template"
        )
    other = next((prompt for prompt in prompts if prompt.source != first.source), None)
    if other is not None and other.token_ids == first.token_ids:
        return f"{first.place} and {other.place} differ, and it renders them alike: does it read the messages?"
    return ""


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the template writes after an answer; None where it is no token of its own, or cannot be told."""
    after = ChatTemplate(tokenizer).after_answer().strip()
    added = tokenizer.added_tokens_encoder
    written = [token for token in added if after.startswith(token)]
    return added[max(written, key=len)] if written else None


def _weights(model: PreTrainedModel) -> Finding:
    unread: list[str] = model.__dict__.get("unread_tensors", [])
    size = sum(parameter.numel() for parameter in model.parameters())
    if unread:
        return Finding(
            "weights",
            "warning",
            f"the file has {len(unread)} tensors that {type(model).__name__} does not know ({unread[0]}), and they are "
            "not read: is config.json of this model?",
        )
    return Finding("weights", "ok", f"{type(model).__name__}, {size:,} parameters, all there and finite")


def _context(config: PPOConfig, model: PreTrainedModel, prompts: Sequence[Prompt]) -> Finding:
    longest, new = max(len(prompt.token_ids) for prompt in prompts), config.sampling.max_new_tokens
    room = context_length(model)
    of = "the configuration names no limit" if room is None else f"of a context of {room:,}"
    words = f"the longest prompt has {longest:,} tokens, with its response {longest + new:,}; {of}"
    return Finding("context", "ok", words)


def _memory(config: PPOConfig, model: PreTrainedModel, prompts: Sequence[Prompt]) -> Finding:
    """What an iteration needs beside the weights that are loaded, against what is free: an estimate."""
    free = free_memory(model.device)
    fixed, passing = memory_needed(config, model, max(len(prompt.token_ids) for prompt in prompts))
    need = f"an iteration needs about {_gib(fixed + passing)} beside the loaded weights"
    if free is None:
        return Finding("memory", "ok", f"{need}; the system does not say what is free")
    words = f"{need} (reference, gradients and moments {_gib(fixed)}), {_gib(free)} are free on {model.device}"
    ways = "take lora.rank, a smaller learner.microbatch_size or sampling.batch_size, or gradient_checkpointing"
    if fixed > free:
        return Finding("memory", "problem", f"{words}: {ways}")
    if fixed + passing > free:
        return Finding("memory", "warning", f"{words}: {ways}")
    return Finding("memory", "ok", words)


def memory_needed(config: PPOConfig, model: PreTrainedModel, longest_prompt: int) -> tuple[int, int]:
    """Bytes that PPO needs beside the loaded model: those that stay, and an estimate of the most that come and go.

    What stays: the reference where it is a model of its own, the critic's trunk, gradients, and Adam's two moments.
    What comes and goes: keys, values and logits of sampling, or the activations of a microbatch.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    own_reference = not (config.lora.rank and not config.reference.model) and config.reference.offload == "none"
    trunk = trained if config.separate_value_trunk or config.value_model else 0
    fixed = weights * own_reference + trunk + 3 * (trained + trunk)
    text: Any = model.config.get_text_config()
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    width = int(getattr(text, "head_dim", None) or hidden // heads)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    size = next(model.parameters()).element_size()
    models = 2 if trunk else 1
    rows = min(config.sampling.batch_size, config.collect.prompts * config.collect.samples_per_prompt)
    columns = longest_prompt + config.sampling.max_new_tokens
    sampling = rows * (columns * layers * 2 * shared * width * size * models + int(text.vocab_size) * 4 * 4)
    tokens = min(config.learner.microbatch_size, rows * columns)
    # a layer keeps about ten states of its width and four of its inner width for the backward pass
    each = hidden if config.gradient_checkpointing else 10 * hidden + 4 * inner
    return fixed, max(sampling, tokens * layers * each * size * models)


def _gib(size: int) -> str:
    return f"{size / GIB:.2g} GiB" if size >= GIB / 10 else f"{max(1, round(size / 2**20))} MiB"


def _text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token_id))


def _named(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int | None]) -> str:
    """`'</s>' (2)`, each."""
    return ", ".join(f"{_text(tokenizer, i)!r} ({i})" for i in token_ids if i is not None)
