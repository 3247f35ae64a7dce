"""Reading sequences: packed as each alone, layers checkpointed and compiled as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import KINDS, make_model, perturbed
from tests.toy import relative_error
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from transformers import OPTConfig, OPTForCausalLM

from tether.language import layers, products, reading
from tether.language.context import TokenContext
from tether.language.policy import LanguagePolicy
from tether.language.reading import Reader, packed_layout, plain_layout, wasteful

PROMPTS = [[4, 5], [6], [7, 8, 9], [4], [5, 6], [9, 4, 4]]
RESPONSES = [[5] * 20, [6, 7], [8], [9, 4, 5], [4, 4], [7]]
MASK = torch.arange(20) < torch.tensor([len(ids) for ids in RESPONSES])[:, None]
ACTIONS = torch.zeros(6, 20, dtype=torch.long).masked_scatter(MASK, torch.tensor([i for ids in RESPONSES for i in ids]))


def context(left: int = 0) -> TokenContext:
    """Six sequences, most of them padding; `left` columns of it on the left."""
    made = TokenContext.from_ids(PROMPTS, RESPONSES, 0.8)
    pad = (left, 0)
    return TokenContext(
        torch.nn.functional.pad(made.tokens, pad),
        torch.nn.functional.pad(made.attention_mask, pad),
        made.starts + left,
        made.temperature,
    )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PADDED_TOKENS", 1)


def make_policy(kind: str, separate: bool = False, **options: Any) -> LanguagePolicy:
    torch.manual_seed(0)
    policy: LanguagePolicy = perturbed(LanguagePolicy(make_model(kind), separate, **options), 0.05)
    return policy


def gradient(policy: LanguagePolicy, given: TokenContext, steps: int = 20) -> Tensor:
    """Of something that every log-probability, value and entropy of the first `steps` tokens has a part in."""
    policy.zero_grad()
    found = policy.evaluate(given, ACTIONS[:, :steps], MASK[:, :steps])
    (found.log_probs.sum() + found.values.square().sum() + found.entropy.sum()).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("left", [0, 3])
def test_a_packed_layout_holds_each_sequence_once_and_hardly_any_padding(left: int) -> None:
    given = context(left)
    layout = packed_layout(given)
    tokens, positions = layout.inputs["input_ids"], layout.inputs["position_ids"]
    assert tokens.numel() <= 44 < given.attention_mask.sum() * 2 < given.tokens.numel()
    rows = torch.arange(6)
    first_row, first_column = layout.before(given, rows, torch.ones(6, dtype=torch.long) * 0)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        start = int(first_column[row]) - len(prompt) + 1
        found = tokens[first_row[row], start : start + len(prompt) + len(response)]
        assert found.tolist() == prompt + response
        assert positions[first_row[row], start : start + len(found)].tolist() == list(range(len(found)))


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_give_what_each_gives_alone(kind: str, separate: bool, left: int, few: None) -> None:
    policy, given = make_policy(kind, separate), context(left)
    assert wasteful(given)
    assert policy.reader.packs
    found = policy.evaluate(given, ACTIONS, MASK)
    for row in range(6):
        alone = given.select(torch.tensor([row]))
        assert not wasteful(alone)
        steps = len(RESPONSES[row])
        expected = policy.evaluate(alone, ACTIONS[row : row + 1, :steps], MASK[row : row + 1, :steps])
        for name in ("log_probs", "values", "entropy"):
            ours, theirs = getattr(found, name)[row, :steps], getattr(expected, name)[0]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    after = policy.successor_values(given, MASK.sum(dim=1))
    policy.reader.__dict__["packs"] = False
    torch.testing.assert_close(after, policy.successor_values(given, MASK.sum(dim=1)), atol=1e-5, rtol=1e-4)


def test_packing_does_not_change_the_gradient(few: None) -> None:
    policy = make_policy("llama")
    found = gradient(policy, context())
    policy.reader.__dict__["packs"] = False
    assert relative_error(found, gradient(policy, context())) < 1e-5


def test_a_model_that_does_not_keep_sequences_apart_is_not_packed(few: None) -> None:
    shape = {"vocab_size": 16, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    reader = Reader(OPTForCausalLM(OPTConfig(**shape, max_position_embeddings=64, word_embed_proj_dim=16)).eval())
    assert not reader.packs
    assert set(reader.layout(context()).inputs) == set(plain_layout(context()).inputs)


def test_little_padding_is_left_as_it_is() -> None:
    assert not wasteful(context())  # much of it, but of few tokens
    full = TokenContext.from_ids([[4] * 64] * 16, [[5] * 64] * 16)
    assert not wasteful(full)
    half = TokenContext.from_ids([[4]] * 16, [[5] * (64 if row < 8 else 4) for row in range(16)])
    assert not wasteful(half)
    large = TokenContext.from_ids([[4]] * 32, [[5] * (64 if row < 8 else 4) for row in range(32)])
    assert wasteful(large)


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
def test_checkpointed_layers_run_again_and_give_the_same_gradient(separate: bool) -> None:
    plain, checkpointed = make_policy("llama", separate), make_policy("llama", separate, checkpointing=True)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    for layer in layers._layers(checkpointed):  # type: ignore[arg-type]
        layer.register_forward_hook(count)
    expected = gradient(plain, context())
    found = gradient(checkpointed, context())
    assert relative_error(found, expected) < 1e-6
    count_of_layers = len(layers._layers(checkpointed))  # type: ignore[arg-type]
    assert count_of_layers == (4 if separate else 2)
    assert runs >= count_of_layers
    for layer in layers._layers(checkpointed):  # type: ignore[arg-type]
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiled_layers_are_whole_and_give_the_same_gradient(
    kind: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[GraphModule] = []

    def note(graph: GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)  # which needs no compiler

    monkeypatch.setattr(layers, "BACKEND", note)
    monkeypatch.setattr(products, "SMALLEST", 0)
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = make_policy(kind, autocast=autocast), make_policy(kind, autocast=autocast, compiled=True)
    for steps in (20, 11, 4):  # other lengths, the same graphs
        expected, found = (gradient(policy, context(), steps) for policy in (plain, compiled))
        assert relative_error(found, expected) < (1e-2 if autocast else 1e-5)
    assert not counters["graph_break"]
    assert len(graphs) == 2, "one for each layer"
    for graph in graphs:
        code = "".join(part.code for part in graph.modules() if isinstance(part, GraphModule))
        assert "torch.ops.tether.product" in code


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_layers_compiled_to_machine_code_give_the_same_gradient(
    autocast: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # torch's own folder may hold code for other instructions of the same processor, which gave NaN
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(products, "SMALLEST", 0)
    torch._dynamo.reset()
    plain, compiled = make_policy("llama", autocast=autocast), make_policy("llama", autocast=autocast, compiled=True)
    for steps in (20, 11, 4):
        expected, found = (gradient(policy, context(), steps) for policy in (plain, compiled))
        assert relative_error(found, expected) < (1e-2 if autocast else 1e-5)


def test_bfloat16_products_are_near_and_parameters_values_and_gradients_stay_float32() -> None:
    plain, rounded = make_policy("llama"), make_policy("llama", autocast=True)
    found = rounded.evaluate(context(), ACTIONS, MASK)
    expected = plain.evaluate(context(), ACTIONS, MASK)
    assert found.log_probs.dtype == found.values.dtype == torch.float32
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=0.2, rtol=0.05)
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
