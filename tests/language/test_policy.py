"""The language policy: contexts, and what it says of tokens, against one plain forward pass per sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import EOS, KINDS, make_model, make_prompts, perturbed, plain_forward
from tests.toy import relative_error
from torch import Tensor

from tether.language.context import TokenContext
from tether.language.divergence import reference_log_probs
from tether.language.head import action_log_probs, keep_likeliest
from tether.language.policy import LanguagePolicy
from tether.language.reading import Reader, decode_step, output_head, plain_layout

PROMPTS = [list(prompt.token_ids) for prompt in make_prompts(5)]
RESPONSES = [[4, 5, 6, EOS], [7], [8, 9, 10, 11, 12, 13], [EOS], [14, 15, EOS]]
MASK = torch.arange(6) < torch.tensor([len(ids) for ids in RESPONSES])[:, None]
ACTIONS = torch.zeros(5, 6, dtype=torch.long).masked_scatter(MASK, torch.tensor([i for ids in RESPONSES for i in ids]))


def context(temperature: float = 1.0, support: Tensor | None = None) -> TokenContext:
    return TokenContext.from_ids(PROMPTS, RESPONSES, temperature, support)


def make_policy(kind: str = "llama", separate: bool = False) -> LanguagePolicy:
    moved: LanguagePolicy = perturbed(LanguagePolicy(make_model(kind), separate), 0.02)
    return moved


# ---- contexts --------------------------------------------------------------------------------------------------------


def test_from_ids_sets_sequences_flush_left() -> None:
    made = TokenContext.from_ids([[5, 6], [7]], [[8], [EOS, 9, 4]])
    assert made.tokens.tolist() == [[5, 6, 8, 0], [7, EOS, 9, 4]]
    assert made.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert made.starts.tolist() == [2, 1]
    assert made.lengths.tolist() == [3, 4]


def test_select_cuts_padding_that_no_row_needs_on_either_side() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    support = torch.arange(6).reshape(3, 2)
    made = TokenContext(torch.arange(18).reshape(3, 6), mask, torch.tensor([4, 2, 3]), 0.7, support)
    part = made.select(torch.tensor([1, 0]))
    assert part.tokens.tolist() == [[7, 8, 9, 10], [1, 2, 3, 4]]
    assert part.attention_mask.tolist() == [[True, True, True, False], [False, True, True, True]]
    assert part.starts.tolist() == [1, 3]
    assert part.temperature == 0.7
    assert part.support is not None
    assert part.support.tolist() == [[2, 3], [0, 1]]


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_is_a_plain_forward_pass_of_each_sequence(kind: str, separate: bool) -> None:
    policy = make_policy(kind, separate)
    with torch.no_grad():
        found = policy.evaluate(context(temperature=0.8), ACTIONS, MASK)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits, hidden = plain_forward(policy.model, prompt + response)
        if policy.value_trunk is not None:
            hidden = policy.value_trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        before = torch.arange(len(response)) + len(prompt) - 1
        log_softmax = (logits[before] / 0.8).log_softmax(-1)
        near: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
        part = slice(0, len(response))
        chosen = log_softmax.gather(-1, torch.tensor(response)[:, None]).squeeze(-1)
        torch.testing.assert_close(found.log_probs[row, part], chosen, **near)
        torch.testing.assert_close(found.values[row, part], policy.values_of(hidden[before]).detach(), **near)
        torch.testing.assert_close(found.entropy[row, part], -(log_softmax.exp() * log_softmax).sum(-1), **near)
    for tensor in (found.log_probs, found.values, found.entropy):
        assert not bool(tensor[~MASK].any())


def test_logits_exist_at_response_tokens_only() -> None:
    policy = make_policy()
    rows: list[int] = []
    handle = output_head(policy.model).register_forward_hook(
        lambda _, __, out: rows.append(out.numel() // out.shape[-1])
    )
    reader = Reader(policy.model)
    assert reader.head is not None
    assert policy.reader.packs == reader.packs  # asks the model, too
    rows.clear()
    policy.evaluate(context(), ACTIONS, MASK)
    reference_log_probs(reader, context(), ACTIONS, MASK)
    assert rows == [0, 0]  # tile by tile, around the model
    rows.clear()
    policy.reader.head = None
    policy.evaluate(context(), ACTIONS, MASK)
    handle.remove()
    assert rows == [int(MASK.sum())]
    logits, hidden = plain_forward(policy.model, PROMPTS[0])  # and afterwards the model is as it was
    assert len(logits) == len(hidden) == len(PROMPTS[0])


def test_a_failing_forward_pass_leaves_the_model_as_it_was() -> None:
    policy = make_policy()
    broken = TokenContext.from_ids([[4, 5]], [[999]])
    with pytest.raises((IndexError, RuntimeError)):
        policy.evaluate(broken, torch.tensor([[999]]), torch.tensor([[True]]))
    assert len(plain_forward(policy.model, PROMPTS[0])[0]) == len(PROMPTS[0])


def test_critic_gradient_reaches_the_trunk_it_shares_and_not_the_policy_of_one_of_its_own() -> None:
    for separate in (False, True):
        policy = make_policy(separate=separate)
        policy.evaluate(context(), ACTIONS, MASK).values.sum().backward()
        touched = any(p.grad is not None and bool(p.grad.any()) for p in policy.policy_parameters())
        assert touched != separate
        assert any(p.grad is not None and bool(p.grad.any()) for p in policy.value_parameters())


@pytest.mark.parametrize("separate", [False, True])
def test_every_parameter_is_the_policys_or_the_critics(separate: bool) -> None:
    policy = make_policy("gpt2", separate)  # its embeddings are tied to its output layer
    mine = [id(p) for p in policy.policy_parameters()]
    critics = [id(p) for p in policy.value_parameters()]
    assert len({*mine, *critics}) == len(mine) + len(critics)
    assert {*mine, *critics} == {id(p) for p in policy.parameters()}


@pytest.mark.parametrize("separate", [False, True])
def test_successor_values_are_those_after_the_last_token(separate: bool) -> None:
    policy = make_policy(separate=separate)
    found = policy.successor_values(context(), MASK.sum(1))
    longer = TokenContext.from_ids(PROMPTS, [[*ids, 4] for ids in RESPONSES])
    lengths = torch.tensor([len(ids) for ids in RESPONSES])
    mask = torch.arange(7) == lengths[:, None]
    values = policy.evaluate(longer, torch.full((5, 7), 4), mask).values.sum(1).detach()
    torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-4)


def test_values_are_float32_whatever_the_trunk() -> None:
    policy = LanguagePolicy(make_model().to(torch.bfloat16))
    with torch.no_grad():
        found = policy.evaluate(context(), ACTIONS, MASK)
    assert found.values.dtype == found.log_probs.dtype == policy.value_head.weight.dtype == torch.float32


def test_a_model_without_a_linear_output_layer_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a causal language model"):
        LanguagePolicy(make_model().base_model)


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens_at_once", [1, 13, 10**6])
def test_reference_does_not_depend_on_how_it_is_cut(tokens_at_once: int) -> None:
    model = make_model()
    found = reference_log_probs(Reader(model), context(1.3), ACTIONS, MASK, tokens_at_once)
    with torch.no_grad():
        expected = LanguagePolicy(model).evaluate(context(1.3), ACTIONS, MASK).log_probs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not found.requires_grad


def test_reference_is_over_the_whole_vocabulary() -> None:
    reader = Reader(make_model())
    truncated = context(support=torch.full(MASK.shape, 2))
    torch.testing.assert_close(
        reference_log_probs(reader, truncated, ACTIONS, MASK), reference_log_probs(reader, context(), ACTIONS, MASK)
    )


# ---- truncated distributions -----------------------------------------------------------------------------------------


def test_support_leaves_the_likeliest_and_shares_their_probability() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.1, 0.4, 0.3, 0.2]]).log()
    log_probs, entropy = action_log_probs(logits, torch.tensor([1, 2]), 1.0, torch.tensor([2, 3]))
    torch.testing.assert_close(log_probs, torch.tensor([0.4 / 0.7, 0.3 / 0.9]).log())
    p = torch.tensor([4 / 7, 3 / 7])
    torch.testing.assert_close(entropy[0], -(p * p.log()).sum())


def test_an_action_that_has_left_the_support_stays_possible() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().requires_grad_(True)
    log_probs, entropy = action_log_probs(logits, torch.tensor([0]), 1.0, torch.tensor([2]))
    assert bool(log_probs.isfinite().all())
    (log_probs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("support", [1, 2, 3])
def test_a_tie_at_the_edge_of_the_support_does_not_widen_it(support: int) -> None:
    """Rounding may rank the drawn token one place lower than at sampling; as many tokens share the probability."""
    logits = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    for action in range(4):
        kept = keep_likeliest(logits, torch.tensor([support]), torch.tensor([action])).isfinite()
        assert int(kept.sum()) == support
        assert bool(kept[0, action])


def test_first_ratio_is_one_with_logits_that_differ_by_rounding_alone() -> None:
    """Two tokens whose logits agree but for the last bits change places between sampling and evaluation."""
    at_sampling, at_evaluation = torch.tensor([[1.0, 1.0 + 1e-7, 0.0]]), torch.tensor([[1.0 + 1e-7, 1.0, 0.0]])
    drawn = torch.tensor([1])
    one = torch.tensor([1])
    before = keep_likeliest(at_sampling, one).log_softmax(-1)[0, 1]
    after, _ = action_log_probs(at_evaluation, drawn, 1.0, one)
    torch.testing.assert_close(after[0], before, atol=1e-5, rtol=0)


# ---- decoding --------------------------------------------------------------------------------------------------------


def test_decode_step_gives_the_last_columns_logits_and_states() -> None:
    model = make_model("gpt2")
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        logits, hidden, cache = decode_step(model, {"input_ids": tokens})
    expected_logits, expected_hidden = plain_forward(model, PROMPTS[0])
    torch.testing.assert_close(logits[0], expected_logits[-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(hidden[0], expected_hidden[-1], atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == len(PROMPTS[0])


def test_padding_on_the_right_alone_needs_no_mask_and_the_left_gets_one() -> None:
    assert set(plain_layout(context()).inputs) == {"input_ids"}
    left = TokenContext(
        torch.tensor([[0, 4], [5, 6]]), torch.tensor([[False, True], [True, True]]), torch.tensor([1, 1])
    )
    assert plain_layout(left).inputs["position_ids"].tolist() == [[0, 0], [0, 1]]


def test_gradients_of_a_batch_are_the_sum_of_its_rows() -> None:
    policy = make_policy("gemma3")

    def flat(rows: list[int]) -> Tensor:
        policy.zero_grad()
        part = context().select(torch.tensor(rows))
        steps = int(MASK[rows].sum(1).max())
        found = policy.evaluate(part, ACTIONS[rows, :steps], MASK[rows, :steps])
        (found.log_probs.sum() + found.values.sum()).backward()
        return torch.cat(
            [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in policy.parameters()]
        )

    assert relative_error(sum((flat([row]) for row in range(5)), torch.zeros(())), flat([3, 0, 4, 1, 2])) < 1e-5
