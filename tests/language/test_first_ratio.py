"""The first batch of a run: the learner must find what the sampler drew as likely as the sampler did, and no NaN."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import make_model, make_overflowing_model, make_tokenizer, make_world
from torch import Tensor

from tether.cli import main
from tether.errors import UserError
from tether.language.policy import LanguagePolicy
from tether.language.sampler import NotANumberError, Sampler, SamplingConfig
from tether.language.world import LanguageWorld
from tether.pipeline.frontier import FrontierConfig
from tether.pipeline.ppo import Parts, PPOConfig, train_ppo
from tether.ppo import Evaluation, LearnerConfig


def read_otherwise(world: LanguageWorld, by: float) -> LanguageWorld:
    """The learner finds the second token of every response likelier by this."""
    evaluate: Callable[..., Evaluation] = world.policy.evaluate

    def changed(context: Any, actions: Tensor, mask: Tensor) -> Evaluation:
        found = evaluate(context, actions, mask)
        shift = torch.zeros_like(found.log_probs)
        shift[:, 1] = by
        return replace(found, log_probs=found.log_probs + shift * mask)

    world.policy.evaluate = changed  # type: ignore[method-assign]
    return world


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_a_sound_model_passes(kind: str) -> None:
    make_world(kind).collect()


@pytest.mark.parametrize("by", [0.01, -0.01, math.nan])
def test_a_learner_that_reads_otherwise_is_refused_at_the_first_batch(by: float) -> None:
    world = read_otherwise(make_world(), by)
    message = r"^prompts, row \d: token 2 of the response \(.*\) was drawn with log-probability (-\S+), and the learner"
    with pytest.raises(UserError, match=message + r" finds (-\S+|nan) .* at most 0\.001 in float32"):
        world.collect()


@pytest.mark.parametrize(("by", "fits"), [(0.02, True), (0.5, False)])
def test_weights_in_bfloat16_may_round_more(by: float, fits: bool) -> None:
    world = make_world()
    world.policy.model.to(torch.bfloat16)
    read_otherwise(world, by)
    if fits:
        world.collect()
    else:
        with pytest.raises(UserError, match=r"at most 0\.1 in bfloat16; .* dtype float32"):
            world.collect()


@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_gone_in_float32_is_rounding(autocast: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The weights are to the bit what they were; what stays in float32 is a fault, however coarse the numbers."""
    world = make_world()
    world.policy.autocast = autocast
    if not autocast:
        world.policy.model.to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in world.policy.model.state_dict().items()}
    evaluate = world.policy.evaluate
    read_otherwise(world, 0.5)
    shifted = world.policy.evaluate
    world.policy.evaluate = lambda *asked: (evaluate if world.policy.exact else shifted)(*asked)  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO):
        world.collect()
    assert "differ by up to 0.5" in caplog.text
    after = world.policy.model.state_dict()
    assert all(
        torch.equal(weight, after[name]) and weight.dtype == after[name].dtype for name, weight in before.items()
    )
    assert world.policy.autocast == autocast
    with pytest.raises(UserError, match=r"at most 0\.1"):
        read_otherwise(make_coarse(), 0.5).collect()


def make_coarse() -> LanguageWorld:
    world = make_world()
    world.policy.autocast = True
    return world


def test_later_batches_are_not_asked() -> None:
    """Neither those after the first, nor those of a run that is resumed."""
    world, resumed = make_world(), make_world()
    world.collect()
    resumed.load_state_dict(world.state_dict())
    read_otherwise(world, 1.0).collect()
    read_otherwise(resumed, 1.0).collect()


def test_dropout_in_the_configuration_is_off_in_both() -> None:
    world = make_world("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    world.policy.train()
    world.collect()


def parts(broken: bool) -> Parts:
    model = make_model()
    if broken:
        with torch.no_grad():
            model.get_output_embeddings().weight[0] = math.nan
    return Parts(model, make_tokenizer(), ["ab", "c"], lambda completions, **_: [1.0] * len(completions))


def test_a_run_refused_at_its_first_batch_is_in_the_way_of_no_other(tmp_path: Path) -> None:
    config = PPOConfig(
        output=str(tmp_path / "run"),
        iterations=1,
        sampling=SamplingConfig(max_new_tokens=3),
        learner=LearnerConfig(minibatches=1),
        frontier=FrontierConfig(samples=2),
    )

    collect = LanguageWorld.collect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageWorld, "collect", lambda self: collect(read_otherwise(self, 1.0)))
        with pytest.raises(UserError, match="the learner finds"):
            train_ppo(config, parts(broken=False))
    with pytest.raises(UserError, match=r"prompts, row \d: the logits are NaN or infinite in float32"):
        train_ppo(config, parts(broken=True))
    train_ppo(config, parts(broken=False))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_found_by_the_sampler(value: float, temperature: float) -> None:
    """NaN and +inf at one token; −inf at all of them."""
    policy = LanguagePolicy(make_model())
    rows = slice(None) if value == -math.inf else slice(0, 1)

    def spoil(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, ..., rows] = value  # of the second prompt alone
        return output

    sampler = Sampler(policy, make_tokenizer(), SamplingConfig(max_new_tokens=3, temperature=temperature))
    policy.model.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(NotANumberError, match=r"logits are NaN or infinite in float32, at token 1") as told:
        sampler.sample([[5, 6], [7, 8]])
    assert told.value.index == 1


def test_logits_that_overflow_are_told_with_file_and_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model whose activations fit float32 and not float16, in everything that samples."""
    make_overflowing_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n')
    common = ["--model", str(tmp_path / "model"), "--prompts.path", str(tmp_path / "p.jsonl"), "--dtype", "float16"]
    common += ["--sampling.max-new-tokens", "4"]
    reward = ["--reward.functions", "length?per_token=1"]
    small = ["--collect.prompts", "1", "--learner.minibatches", "1", "--output", str(tmp_path / "run")]
    for words in (["generate"], ["eval", *reward], ["ppo", *reward, *small]):
        code, said = main([*words, *common]), capsys.readouterr().err
        assert (code, "p.jsonl, row 1: the logits are NaN or infinite in float16" in said) == (2, True), said
