"""Small language models, a small tokenizer and a small world of text, made on the spot.

The vocabulary has single letters and pairs of them, so that one text can be cut into tokens in several ways.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tether.language.models import prepare_model
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt
from tether.language.reference import ModelReference
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.world import CollectConfig, LanguageWorld
from tether.ppo import KLConfig, KLController
from tether.rewards import Scores

EOS, PAD, END, UNKNOWN = range(4)
SPECIAL = ["<eos>", "<pad>", "<end>", "<unk>"]
TEXT = ["a", "b", "c", "d", "e", "f", " ", "\n", "ab", "bc", "ca", "de"]
VOCABULARY = SPECIAL + TEXT
KINDS = ("llama", "gpt2", "qwen3", "gemma3", "gpt_neox", "mistral")


def token(text: str) -> int:
    return VOCABULARY.index(text)


def make_overflowing_model() -> PreTrainedModel:
    """One whose activations fit float32 and not float16."""
    model = make_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(3000)
            layer.mlp.up_proj.weight.mul_(3000)
    return model


def make_tokenizer(pad: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """Letters and pairs; by default pad and eos share an id. Text is encoded letter by letter."""
    backend = Tokenizer(WordLevel({text: i for i, text in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token=pad,
        unk_token="<unk>",
        additional_special_tokens=["<end>"],
        clean_up_tokenization_spaces=False,
    )


def make_model(
    kind: str = "llama", seed: int = 0, vocabulary_size: int = len(VOCABULARY), **overrides: Any
) -> PreTrainedModel:
    """A two-layer model of this architecture with random weights, large enough that its softmax is far from uniform."""
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "bos_token_id": None,
    }
    grouped = {"num_key_value_heads": 1, "head_dim": 8}
    windowed = {"sliding_window": 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes | grouped | overrides))
        elif kind == "gpt2":
            renamed = {"n_embd": 16, "n_inner": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
            shared = {k: sizes[k] for k in ("vocab_size", "initializer_range", "eos_token_id", "bos_token_id")}
            model = GPT2LMHeadModel(GPT2Config(**renamed | shared | overrides))
        elif kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes | grouped | overrides))
        elif kind == "gemma3":
            layers = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8}
            model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes | grouped | windowed | layers | overrides))
        elif kind == "gpt_neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes | overrides))
        else:
            model = MistralForCausalLM(MistralConfig(**sizes | grouped | windowed | overrides))
    model.generation_config.eos_token_id = EOS
    model.generation_config.pad_token_id = EOS
    return prepare_model(model)


def perturbed(module: Any, scale: float = 0.02, seed: int = 1) -> Any:
    """A copy with noise on every parameter: a policy that has moved, a value head that is not zero."""
    moved = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return moved


class CountingRewards:
    """Stands where `tether.rewards.Rewards` does: scores a response by its text, keeps what it was given."""

    def __init__(self, score: Callable[[str], float] = lambda text: text.count("a") - 0.25 * len(text)) -> None:
        self.score = score
        self.calls: list[dict[str, Any]] = []

    def __call__(self, prompts: list, completions: list, completion_ids: list, columns: dict) -> Scores:
        self.calls.append(
            {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "columns": columns}
        )
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        total = [float(self.score(text)) for text in texts]
        return Scores(total, {"count": total})


def make_prompts(count: int = 6, chat: bool = False) -> list[Prompt]:
    """Prompts of different lengths; some have the eos (and pad) id in their midst, one starts with it."""
    prompts = []
    for i in range(count):
        text = ("abcdef" * 3)[i : i + 2 + (i * 3) % 7]
        ids = [token(letter) for letter in text]
        if i % 2:
            ids.insert(1, EOS)
        if i == 2:
            ids.insert(0, EOS)
        source: Any = [{"role": "user", "content": text}] if chat else text
        prompts.append(Prompt(text, tuple(ids), source, {"prompt": text, "answer": f"answer {i}"}, i + 1))
    return prompts


def make_world(
    kind: str = "llama",
    sampling: SamplingConfig | None = None,
    kl: KLConfig | None = None,
    collect: CollectConfig | None = None,
    seed: int = 0,
    rewards: Any = None,
    prompts: Sequence[Prompt] | None = None,
    **model_overrides: Any,
) -> LanguageWorld:
    """A world whose policy has moved from its reference, and whose critic has something to say."""
    reference = make_model(kind, seed, **model_overrides)
    policy = perturbed(LanguagePolicy(copy.deepcopy(reference)), scale=0.02, seed=seed + 1)
    sampler = Sampler(policy, make_tokenizer(), sampling or SamplingConfig(max_new_tokens=8), seed)
    return LanguageWorld(
        policy,
        ModelReference(reference),
        sampler,
        make_prompts() if prompts is None else prompts,
        CountingRewards() if rewards is None else rewards,
        KLController(kl or KLConfig(beta=0.1)),
        collect or CollectConfig(prompts=6, samples_per_prompt=2),
        seed,
    )


@torch.no_grad()
def plain_forward(model: PreTrainedModel, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (L, V) and last hidden states (L, H) of one sequence on its own: no padding, no cache."""
    output = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
    return output.logits[0], output.hidden_states[-1][0]
