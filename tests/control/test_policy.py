"""Control policies: distributions equal torch's, masks hide what they should, initial weights are those published."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from tether.control.policy import ControlPolicy, NetworkConfig, StateContext
from tether.errors import UserError
from tether.ppo import Learner, LearnerConfig, Trajectories

VECTOR = spaces.Box(-np.inf, np.inf, (4,))
IMAGE = spaces.Box(0, 255, (4, 84, 84), np.uint8)
CHOICE = spaces.Discrete(3)
CHOICES = spaces.MultiDiscrete([3, 2, 4])
FORCES = spaces.Box(-2.0, 2.0, (3,))
ACTION_SPACES = [CHOICE, CHOICES, FORCES]
SPACE_NAMES = ["discrete", "multi-discrete", "box"]


def make_policy(action_space: spaces.Space[Any], **changes: Any) -> ControlPolicy:
    """A policy whose distribution depends visibly on the state, unlike that of a fresh one."""
    policy = ControlPolicy(VECTOR, action_space, NetworkConfig(**{"hidden": (16,), **changes}), seed=1)
    with torch.no_grad():
        policy.head.linear.weight.mul_(200.0)
        policy.head.linear.bias.copy_(torch.linspace(-1, 1, len(policy.head.linear.bias)))
        if isinstance(action_space, spaces.Box):
            policy.head.log_std.copy_(torch.tensor([-1.0, 0.0, 0.5]))
    return policy


def make_steps(policy: ControlPolicy, count: int, steps: int) -> tuple[StateContext, Tensor]:
    """(N, T) states and the actions drawn in them."""
    generator = torch.Generator().manual_seed(7)
    observations = torch.randn(count, steps, 4, generator=generator)
    noise = policy.noise(steps, count, generator)
    actions = torch.stack([policy.act(observations[:, step], noise[step]) for step in range(steps)], 1)
    return StateContext(observations), actions


class MultiCategorical:
    """Independent choices, by torch's own distribution of each."""

    def __init__(self, logits: Tensor, choices: list[int]) -> None:
        self.parts = [Categorical(logits=part) for part in logits.split(choices, -1)]

    def log_prob(self, actions: Tensor) -> Tensor:
        return torch.stack([part.log_prob(a) for part, a in zip(self.parts, actions.unbind(-1), strict=True)]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for part in self.parts]).sum(0)


def reference_distribution(
    policy: ControlPolicy, space: spaces.Space[Any], states: Tensor
) -> Distribution | MultiCategorical:
    head: Any = policy.head
    outputs = head.linear(policy.trunk(states))
    if isinstance(space, spaces.Discrete):
        return Categorical(logits=outputs)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategorical(outputs, space.nvec.tolist())
    return Independent(Normal(outputs, head.log_std.exp()), 1)


def gradients(policy: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = list(policy.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# the context


def test_a_context_counts_every_step_and_selects_rows() -> None:
    context = StateContext(torch.arange(24.0).view(4, 3, 2))
    assert context.lengths.tolist() == [3, 3, 3, 3]
    assert torch.equal(context.select(torch.tensor([2, 0])).observations, context.observations[[2, 0]])


@pytest.mark.parametrize("mask", [[[True, False], [True, True]], [[True, True], [True, True]]], ids=["part", "whole"])
def test_steps_of_a_context_are_rows_in_the_order_of_the_mask(mask: list[list[bool]]) -> None:
    context, where = StateContext(torch.arange(8.0).view(2, 2, 2)), torch.tensor(mask)
    steps = context.steps(where)
    assert steps.observations.shape == (int(where.sum()), 1, 2)
    assert torch.equal(steps.observations[:, 0], context.observations[where])


# the distributions


@pytest.mark.parametrize("space", ACTION_SPACES, ids=SPACE_NAMES)
@pytest.mark.parametrize("shared", [False, True])
def test_log_probs_and_entropy_and_their_gradients_equal_those_of_torch_distributions(
    space: spaces.Space[Any], shared: bool
) -> None:
    policy = make_policy(space, shared=shared)
    context, actions = make_steps(policy, 5, 3)
    evaluation = policy.evaluate(context, actions, torch.ones(5, 3, dtype=torch.bool))
    expected = reference_distribution(policy, space, context.observations.flatten(0, 1))
    log_probs, entropy = expected.log_prob(actions.flatten(0, 1)), expected.entropy()
    for found, flat in ((evaluation.log_probs, log_probs), (evaluation.entropy, entropy)):
        wanted = flat.view(5, 3)
        torch.testing.assert_close(found, wanted)
        weights = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
        for ours, theirs in zip(
            gradients(policy, (found * weights).sum()), gradients(policy, (wanted * weights).sum()), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", ACTION_SPACES, ids=SPACE_NAMES)
def test_actions_drawn_with_noise_are_distributed_as_evaluate_says(space: spaces.Space[Any]) -> None:
    """E[log π(a)] = −entropy, within four standard errors of the mean."""
    policy, draws = make_policy(space), 20_000
    states = torch.randn(1, 4, generator=torch.Generator().manual_seed(2)).expand(draws, 4)
    actions = policy.act(states, policy.noise(1, draws, torch.Generator().manual_seed(5))[0])
    with torch.no_grad():
        evaluation = policy.evaluate(
            StateContext(states.unsqueeze(1)), actions.unsqueeze(1), torch.ones(draws, 1, dtype=torch.bool)
        )
    log_probs = evaluation.log_probs
    assert abs(float(log_probs.mean() + evaluation.entropy[0, 0])) < 4 * float(log_probs.std()) / math.sqrt(draws)


@pytest.mark.parametrize("space", [CHOICE, CHOICES], ids=SPACE_NAMES[:2])
def test_frequencies_of_choices_are_their_probabilities(space: spaces.Space[Any]) -> None:
    policy, draws = make_policy(space), 20_000
    state = torch.randn(1, 4, generator=torch.Generator().manual_seed(2))
    actions = policy.act(state.expand(draws, 4), policy.noise(1, draws, torch.Generator().manual_seed(6))[0])
    assert actions.dtype == torch.int64
    head: Any = policy.head
    sizes = [3] if space is CHOICE else [3, 2, 4]
    for logits, taken in zip(
        head.linear(policy.trunk(state))[0].split(sizes), actions.view(draws, -1).unbind(-1), strict=True
    ):
        probabilities = logits.softmax(-1)
        frequencies = torch.bincount(taken, minlength=len(logits)) / draws
        assert ((frequencies - probabilities).abs() < 4 * (probabilities * (1 - probabilities) / draws).sqrt()).all()


def test_continuous_actions_have_the_mean_and_deviation_of_the_gaussian() -> None:
    policy, draws = make_policy(FORCES), 20_000
    state = torch.randn(1, 4, generator=torch.Generator().manual_seed(2))
    actions = policy.act(state.expand(draws, 4), policy.noise(1, draws, torch.Generator().manual_seed(6))[0])
    std = torch.tensor([-1.0, 0.0, 0.5]).exp()
    assert ((actions.mean(0) - policy.act(state, None)[0]).abs() < 4 * std / math.sqrt(draws)).all()
    torch.testing.assert_close(actions.std(0), std, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("space", ACTION_SPACES, ids=SPACE_NAMES)
def test_without_noise_the_most_probable_action_is_taken(space: spaces.Space[Any]) -> None:
    policy = make_policy(space)
    context, drawn = make_steps(policy, 50, 1)
    mask = torch.ones(50, 1, dtype=torch.bool)
    greedy = policy.act(context.observations[:, 0], None).unsqueeze(1)
    assert greedy.shape == drawn.shape
    best, other = policy.evaluate(context, greedy, mask), policy.evaluate(context, drawn, mask)
    assert (best.log_probs >= other.log_probs).all()
    assert (best.log_probs > other.log_probs).any()


@pytest.mark.parametrize(
    ("space", "shape"), [(CHOICE, (5, 2, 3)), (CHOICES, (5, 2, 9)), (FORCES, (5, 2, 3))], ids=SPACE_NAMES
)
def test_noise_is_a_function_of_the_generator(space: spaces.Space[Any], shape: tuple[int, ...]) -> None:
    policy = make_policy(space)
    first = policy.noise(5, 2, torch.Generator().manual_seed(1))
    assert first.shape == shape
    assert first.dtype == torch.float32
    assert torch.equal(first, policy.noise(5, 2, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, policy.noise(5, 2, torch.Generator().manual_seed(2)))


# the mask


@pytest.mark.parametrize("space", ACTION_SPACES, ids=SPACE_NAMES)
def test_steps_outside_the_mask_are_zero_and_never_read(space: spaces.Space[Any]) -> None:
    policy = make_policy(space)
    context, actions = make_steps(policy, 4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    whole = policy.evaluate(context, actions, torch.ones_like(mask))
    spoilt = context.observations.clone()
    spoilt[~mask] = math.nan
    unknown = actions.clone()
    unknown[~mask] = 999
    part = policy.evaluate(StateContext(spoilt), unknown, mask)
    for name in ("log_probs", "values", "entropy"):
        found, wanted = getattr(part, name), getattr(whole, name) * mask
        torch.testing.assert_close(found, wanted)
        for ours, theirs in zip(
            gradients(policy, found.sum()), gradients(policy, (getattr(whole, name) * mask).sum()), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_states_beyond_the_mask_are_left_out() -> None:
    policy = make_policy(CHOICE)
    context, actions = make_steps(policy, 4, 3)
    whole = policy.evaluate(context, actions, torch.ones(4, 3, dtype=torch.bool))
    cut = policy.evaluate(context, actions[:, :2], torch.ones(4, 2, dtype=torch.bool))
    torch.testing.assert_close(cut.log_probs, whole.log_probs[:, :2])


def test_a_batch_without_steps_is_evaluated_to_nothing() -> None:
    policy = make_policy(CHOICES)
    evaluation = policy.evaluate(
        StateContext(torch.zeros(0, 1, 4)), torch.zeros(0, 1, 3, dtype=torch.long), torch.ones(0, 1, dtype=torch.bool)
    )
    assert evaluation.log_probs.shape == evaluation.values.shape == evaluation.entropy.shape == (0, 1)


@pytest.mark.parametrize("shared", [False, True])
def test_values_are_those_of_evaluate_without_a_gradient(shared: bool) -> None:
    policy = make_policy(CHOICE, shared=shared)
    context, actions = make_steps(policy, 5, 1)
    evaluation = policy.evaluate(context, actions, torch.ones(5, 1, dtype=torch.bool))
    values = policy.values(context.observations[:, 0])
    torch.testing.assert_close(values, evaluation.values[:, 0])
    assert evaluation.values.requires_grad
    assert not values.requires_grad


# the networks


@pytest.mark.parametrize(
    ("space", "shared"), [(VECTOR, False), (VECTOR, True), (IMAGE, False)], ids=["apart", "shared", "images"]
)
def test_each_parameter_is_the_policy_s_or_the_critic_s(space: spaces.Box, shared: bool) -> None:
    policy = ControlPolicy(space, FORCES, NetworkConfig(shared=shared), seed=0)
    groups = [{id(p) for p in policy.policy_parameters()}, {id(p) for p in policy.value_parameters()}]
    assert not groups[0] & groups[1]
    assert groups[0] | groups[1] == {id(p) for p in policy.parameters()}
    observations = torch.as_tensor(np.stack([space.sample() for _ in range(3)])).unsqueeze(1)
    evaluation = policy.evaluate(StateContext(observations), torch.randn(3, 1, 3), torch.ones(3, 1, dtype=torch.bool))
    (evaluation.log_probs.sum() + evaluation.entropy.sum()).backward(retain_graph=True)
    assert {id(p) for p in policy.parameters() if p.grad is not None} == groups[0]
    policy.zero_grad(set_to_none=True)
    evaluation.values.sum().backward()
    reached = {id(p) for p in policy.parameters() if p.grad is not None}
    assert groups[1] <= reached
    assert bool(reached & groups[0]) == (shared or space is IMAGE)


def test_act_computes_the_actor_alone() -> None:
    policy = make_policy(CHOICE)
    expected = policy.act(torch.ones(2, 4), None)
    del policy.value_trunk, policy.value_head
    assert torch.equal(policy.act(torch.ones(2, 4), None), expected)


@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "images"])
def test_initial_weights_are_orthogonal_with_the_published_gains(space: spaces.Box) -> None:
    policy = ControlPolicy(space, FORCES, NetworkConfig(log_std=-0.5), seed=0)
    gains = {"head.linear.weight": 0.01, "value_head.weight": 1.0}
    for name, parameter in policy.named_parameters():
        if name == "head.log_std":
            assert parameter.tolist() == [-0.5] * 3
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            matrix = parameter.detach().flatten(1)
            gain = gains.get(name, math.sqrt(2.0))
            torch.testing.assert_close(
                torch.linalg.svdvals(matrix), torch.full((min(matrix.shape),), gain), rtol=1e-4, atol=1e-5, msg=name
            )


def test_the_seed_alone_decides_the_weights_and_no_global_random_state_is_touched() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = ControlPolicy(VECTOR, CHOICE, NetworkConfig(), seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, other = (ControlPolicy(VECTOR, CHOICE, NetworkConfig(), seed=seed) for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.head.linear.weight, other.head.linear.weight)


def test_the_critic_does_not_start_as_a_copy_of_the_actor() -> None:
    policy = ControlPolicy(VECTOR, CHOICE, NetworkConfig(), seed=0)
    assert policy.value_trunk is not None
    assert not torch.equal(next(policy.trunk.parameters()), next(policy.value_trunk.parameters()))


@pytest.mark.parametrize(("activation", "module"), [("tanh", nn.Tanh), ("relu", nn.ReLU)])
def test_the_perceptron_is_linear_layers_with_the_activation_between(activation: Any, module: type[nn.Module]) -> None:
    policy = ControlPolicy(VECTOR, CHOICE, NetworkConfig(hidden=(8, 5), activation=activation), seed=0)
    first, second = policy.trunk.layers
    plain = nn.Sequential(first, module(), second, module(), policy.head.linear)
    states = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.act(states, None), plain(states).argmax(-1))
    torch.testing.assert_close(policy.trunk(states), plain[:-1](states))


def test_a_policy_without_hidden_layers_is_linear_and_leaves_observations_alone() -> None:
    policy = ControlPolicy(VECTOR, CHOICE, NetworkConfig(hidden=()), seed=0)
    states = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    before = states.clone()
    assert torch.equal(policy.act(states, None), policy.head.linear(states).argmax(-1))
    assert torch.equal(states, before)


def test_states_of_any_other_shape_and_dtype_are_flattened() -> None:
    grid = ControlPolicy(spaces.Box(-1, 1, (2, 3), np.float64), CHOICE, NetworkConfig(), seed=0)
    states = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(grid.values(states), grid.values(states.flatten(1).float()))
    scalar = ControlPolicy(spaces.Box(-1, 1, ()), CHOICE, NetworkConfig(), seed=0)
    assert scalar.act(torch.randn(5), None).shape == (5,)
    assert scalar.act(torch.randn(1), None).shape == (1,)


@pytest.mark.parametrize("shape", [(4, 84, 84), (1, 36, 50), (3, 96, 64)])
def test_images_of_other_sizes_go_through_the_same_convolutions(shape: tuple[int, ...]) -> None:
    policy = ControlPolicy(spaces.Box(0, 255, shape, np.uint8), CHOICE, NetworkConfig(hidden=(7,)), seed=0)
    kernels = [p.shape for name, p in policy.named_parameters() if p.dim() == 4]
    assert kernels == [(32, shape[0], 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert policy.head.linear.in_features == 512
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert policy.act(images, None).shape == (2,)
    torch.testing.assert_close(policy.values(images), policy.values(images / 255))


def test_bytes_that_are_no_image_are_scaled_too() -> None:
    policy = ControlPolicy(spaces.Box(0, 255, (128,), np.uint8), CHOICE, NetworkConfig(), seed=0)
    memory = torch.arange(256, dtype=torch.uint8).view(2, 128)
    torch.testing.assert_close(policy.values(memory), policy.values(memory / 255))


def test_a_loaded_or_copied_policy_is_the_same_policy() -> None:
    policy, other = make_policy(FORCES), ControlPolicy(VECTOR, FORCES, NetworkConfig(hidden=(16,)), seed=9)
    states = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    other.load_state_dict(policy.state_dict())
    copied = copy.deepcopy(policy)
    for same in (other, copied):
        assert torch.equal(same.act(states, None), policy.act(states, None))
    with torch.no_grad():
        copied.head.linear.bias.add_(1.0)
    torch.testing.assert_close(copied.act(states, None), policy.act(states, None) + 1.0)


# actions for the environment


def test_discrete_actions_are_counted_from_the_start_of_the_space() -> None:
    space = spaces.Discrete(3, start=-1)
    actions = ControlPolicy(VECTOR, space).to_environment(torch.tensor([0, 1, 2]))
    assert actions.tolist() == [-1, 0, 1]
    assert all(space.contains(action) for action in actions)


def test_several_choices_take_the_shape_and_start_of_the_space() -> None:
    space = spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [2, 3]])
    actions = ControlPolicy(VECTOR, space).to_environment(torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4]]))
    assert actions.tolist() == [[[0, 1], [2, 3]], [[1, 3], [5, 7]]]
    assert all(space.contains(action) for action in actions)


def test_bounded_dimensions_are_mapped_and_clipped_and_others_taken_as_they_are() -> None:
    largest = np.finfo(np.float32).max
    low = np.array([-2, 0, -np.inf, -np.inf, 0, -largest], np.float32)
    high = np.array([2, 10, np.inf, 1, np.inf, largest], np.float32)
    space = spaces.Box(low, high)
    policy = ControlPolicy(VECTOR, space)
    raw = torch.tensor([[0.0] * 6, [0.5] * 6, [1.0] * 6, [3.0] * 6, [-3.0] * 6])
    actions = policy.to_environment(raw)
    expected = [[0, 5, 0, 0, 0, 0], [1, 7.5, 0.5, 0.5, 0.5, 0.5], [2, 10, 1, 1, 1, 1], [2, 10, 3, 1, 3, 3],
                [-2, 0, -3, -3, 0, -3]]  # fmt: skip
    np.testing.assert_allclose(actions, expected)
    assert all(space.contains(action) for action in actions)
    assert torch.equal(raw[3], torch.full((6,), 3.0)), "the raw actions were changed"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuous_actions_take_the_shape_and_dtype_of_the_space(dtype: Any) -> None:
    space = spaces.Box(-0.1, 0.3, (2, 2), dtype)
    policy = ControlPolicy(VECTOR, space)
    states = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    raw = policy.act(states, policy.noise(1, 50, torch.Generator().manual_seed(0))[0])
    assert raw.shape == (50, 4)
    assert all(space.contains(action) for action in policy.to_environment(raw))


# what cannot work


@pytest.mark.parametrize(
    "space",
    [spaces.MultiBinary(3), spaces.Dict({"a": CHOICE}), spaces.Box(0, 9, (2,), np.int64), spaces.Box(-1, 1, (0,))],
    ids=["multi-binary", "dict", "integer box", "empty box"],
)
def test_other_action_spaces_are_refused_by_name(space: spaces.Space[Any]) -> None:
    with pytest.raises(UserError, match=r"action space is .*, expected Discrete, MultiDiscrete or a Box") as caught:
        ControlPolicy(VECTOR, space)
    assert type(space).__name__ in str(caught.value)


@pytest.mark.parametrize("shape", [(3, 35, 84), (84, 84, 3)])
def test_images_too_small_for_the_convolutions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"expected at least 36 × 36 .*ResizeObservation") as caught:
        ControlPolicy(spaces.Box(0, 255, shape, np.uint8), CHOICE)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": (64, 0)}, "hidden has a layer of 0 units"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"log_std": math.inf}, "log_std is inf"),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**changes)


# with the learner


@pytest.mark.parametrize("space", ACTION_SPACES, ids=SPACE_NAMES)
def test_the_learner_raises_the_probability_of_what_was_rewarded(space: spaces.Space[Any]) -> None:
    """One-step episodes; the reward asks for action 0 (or less) of the first component where the state is positive."""
    policy = ControlPolicy(spaces.Box(-1, 1, (1,)), space, NetworkConfig(hidden=(16,)), seed=0)
    learner = Learner(policy, LearnerConfig(learning_rate=0.01, minibatches=2), iterations=12)
    generator, count, scores = torch.Generator().manual_seed(0), 128, []
    mask, nowhere = torch.ones(count, 1, dtype=torch.bool), torch.zeros(count, 1, dtype=torch.bool)
    for _ in range(12):
        states = torch.randn(count, 1, generator=generator).sign()
        actions = policy.act(states, policy.noise(1, count, generator)[0]).unsqueeze(1)
        first = actions.view(count, -1)[:, 0]
        rewards = ((first <= 0) == (states[:, 0] > 0)).float().unsqueeze(1)
        context = StateContext(states.unsqueeze(1))
        with torch.no_grad():
            old = policy.evaluate(context, actions, mask)
        trajectories = Trajectories(
            actions, old.log_probs, old.values, rewards, mask, mask, nowhere, torch.zeros(count, 1), context
        )
        learner.update(trajectories, *learner.credit(trajectories))
        scores.append(float(rewards.mean()))
    assert scores[0] < 0.7
    assert scores[-1] > 0.85


# alternatives


@pytest.mark.parametrize("count", [1, 5, 100])
@pytest.mark.parametrize("space", [CHOICE, CHOICES], ids=SPACE_NAMES[:2])
def test_the_likeliest_actions_are_the_first_of_all_sorted_by_their_probability(
    space: spaces.Space[Any], count: int
) -> None:
    policy = make_policy(space)
    states = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    sizes = [3] if space is CHOICE else [3, 2, 4]
    actions = torch.cartesian_prod(*[torch.arange(size) for size in sizes])
    distribution: Any = reference_distribution(policy, space, states.repeat_interleave(len(actions), 0))
    with torch.no_grad():
        probabilities = distribution.log_prob(actions.repeat(6, *[1] * (actions.dim() - 1))).exp().view(6, -1)
    expected = probabilities.sort(dim=-1, descending=True)
    found = policy.likeliest(states, count)
    assert found is not None
    torch.testing.assert_close(found[1], expected.values[:, :count])
    for row, places in enumerate(expected.indices[:, :count].tolist()):
        assert found[0][row].tolist() == actions[places].tolist()


def test_continuous_actions_have_no_likeliest_ones() -> None:
    assert make_policy(FORCES).likeliest(torch.zeros(2, 4), 5) is None


@pytest.mark.parametrize(
    ("high", "divided"),
    [(1, 1.0), (2, 1.0), (255, 255.0), (np.array([1, 255, 7], np.uint8), np.array([1, 255, 1], np.float32))],
    ids=["one-hot", "board", "bytes", "some bytes"],
)
def test_bytes_of_a_vector_are_scaled_and_other_small_numbers_are_what_they_say(high: Any, divided: Any) -> None:
    space = spaces.Box(np.zeros(3, np.uint8), np.broadcast_to(np.uint8(high), (3,)), dtype=np.uint8)
    floats = spaces.Box(-1, 1, (3,), np.float32)
    numbers = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    policies = [ControlPolicy(one, spaces.Discrete(2), NetworkConfig((4,))) for one in (space, floats)]
    scaled = torch.from_numpy((numbers / divided).astype(np.float32))
    assert torch.allclose(policies[0].values(torch.from_numpy(numbers)), policies[1].values(scaled), atol=1e-6)
    assert policies[0].state_dict().keys() == policies[1].state_dict().keys()


@pytest.mark.parametrize("high", [1, 3, 255])
def test_pictures_end_at_one_whatever_their_bound(high: int) -> None:
    spaces_of = [spaces.Box(0, bound, (1, 36, 36), np.uint8) for bound in (high, 255)]
    pictures = [torch.full((1, 1, 36, 36), bound, dtype=torch.uint8) for bound in (high, 255)]
    found = [ControlPolicy(s, spaces.Discrete(2)).values(p) for s, p in zip(spaces_of, pictures, strict=True)]
    assert torch.allclose(*found)
