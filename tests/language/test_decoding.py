"""The decoders: what is read how often, and that the fast one gives what the plain one gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.models import KINDS, make_model, make_prompts, make_tokenizer, perturbed
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM

from tether.language import decoding
from tether.language.decoding import Decoder, PlainDecoder, SlotDecoder
from tether.language.models import prepare_model
from tether.language.policy import LanguagePolicy
from tether.language.sampler import Sampler, SamplingConfig

PROMPTS = [list(prompt.token_ids) for prompt in make_prompts(6)]


def make_policy(kind: str = "llama", critic: bool = False) -> LanguagePolicy:
    return perturbed(LanguagePolicy(make_model(kind), separate_value_trunk=critic), 0.02)


def make_decoder(
    kind: type[Decoder],
    policy: LanguagePolicy,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    capacity: int = 8,
    room: int = 24,
) -> Decoder:
    return kind(policy, prompts, capacity, room)


def read(decoder: Decoder, steps: int, ends: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits and values of every response, side by side: response i leaves after the step in which `ends` names it."""
    count = len(decoder.waiting)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 16, (steps, count), generator=generator)
    seen: list[list[Tensor]] = [[] for _ in range(count)]
    active = torch.arange(count)

    def note(logits: Tensor, values: Tensor) -> None:
        for row, response in enumerate(active.tolist()):
            seen[response].append(torch.cat([logits[row], values[row : row + 1]]))

    with torch.no_grad():
        note(*decoder.admit(count))
        for step in range(steps):
            note(*decoder.step(tokens[step, active]))
            alive = torch.tensor([response not in ends[step] for response in active.tolist()])
            active = active[decoder.keep(alive)]
    return [torch.stack(rows) for rows in seen]


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_slots_give_what_the_plain_cache_gives(monkeypatch: pytest.MonkeyPatch, kind: str, critic: bool) -> None:
    monkeypatch.setattr(decoding, "SLACK", 1)
    policy = make_policy(kind, critic)
    ends: list[list[int]] = [[], [0], [], [5, 3], [], [1], [], [], []]
    plain = read(make_decoder(PlainDecoder, policy), len(ends), ends)
    slots = read(make_decoder(SlotDecoder, policy), len(ends), ends)
    assert [len(rows) for rows in slots] == [3, 7, 10, 5, 10, 5]
    for found, expected in zip(slots, plain, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_columns_that_no_row_needs_are_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SLACK", 2)
    decoder = make_decoder(SlotDecoder, make_policy(), PROMPTS[:4] * 3, capacity=2, room=6)
    assert isinstance(decoder, SlotDecoder)
    longest = max(map(len, PROMPTS[:4]))
    alone = {row: read(make_decoder(PlainDecoder, decoder.policy, [PROMPTS[row]]), 3, [[]] * 3)[0] for row in range(4)}
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(4, 16, (3, 1), generator=generator)
    with torch.no_grad():
        for turn in range(12):  # far more columns than there are
            row = turn % 4
            logits, values = decoder.admit(1)
            torch.testing.assert_close(torch.cat([logits[0], values]), alone[row][0], atol=1e-5, rtol=1e-4)
            for step in range(3):
                logits, values = decoder.step(tokens[step])
                torch.testing.assert_close(torch.cat([logits[0], values]), alone[row][step + 1], atol=1e-5, rtol=1e-4)
            decoder.keep(torch.tensor([False]))
            assert decoder.rows == 0
            assert decoder._end <= longest + 6 + 2


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, columns) of each forward pass of a policy's model, as it happens."""
    passes: list[tuple[int, int]] = []
    plain = decoding.decode_step

    def count(model: Any, inputs: dict[str, Any]) -> Any:
        passes.append(tuple(inputs["input_ids"].shape))
        return plain(model, inputs)

    monkeypatch.setattr(decoding, "decode_step", count)
    return passes


def test_a_prompt_is_read_once_for_all_its_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(make_policy(), make_tokenizer(), SamplingConfig(max_new_tokens=3))
    passes = counted(monkeypatch)
    sampler.end_ids = torch.tensor([-1])
    samples = sampler.sample([PROMPTS[0]] * 5 + [PROMPTS[1]] * 5)
    assert len({tuple(ids) for ids in samples.response_ids}) > 2
    assert [rows for rows, _ in passes] == [2, 10, 10]


def test_prompts_are_read_ahead_as_many_as_there_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = counted(monkeypatch)
    decoder = make_decoder(SlotDecoder, make_policy(), PROMPTS[:3] * 4 + PROMPTS[3:] * 2, capacity=4)
    read_alone = [read(make_decoder(PlainDecoder, decoder.policy, [ids]), 0, [])[0][0] for ids in PROMPTS]
    passes.clear()
    with torch.no_grad():
        for row in [0, 1, 2] * 4 + [3, 4, 5] * 2:
            logits, values = decoder.admit(1)
            torch.testing.assert_close(torch.cat([logits[0], values]), read_alone[row], atol=1e-5, rtol=1e-4)
            decoder.keep(torch.tensor([False]))
    assert [rows for rows, _ in passes] == [4, 3]  # the first four distinct ones, then all that are still wanted


def test_only_tokens_that_are_drawn_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(make_policy(), make_tokenizer(), SamplingConfig(max_new_tokens=20, batch_size=8))
    passes = counted(monkeypatch)
    sampler.end_ids = torch.tensor([4, 5, 6])
    samples = sampler.sample(PROMPTS * 20)
    tokens = sum(len(ids) for ids in samples.response_ids)
    assert sum(rows for rows, columns in passes if columns == 1) == tokens - len(samples.response_ids)
    widths = [rows for rows, columns in passes if columns == 1]
    assert sum(width == 8 for width in widths) > 0.7 * len(widths)  # the places of those that end are taken


def test_a_model_that_remembers_in_another_way_gets_the_plain_decoder() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Lfm2Config(
            vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, layer_types=["conv", "full_attention"], initializer_range=0.4,
            pad_token_id=0, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        model = prepare_model(Lfm2ForCausalLM(config))
    policy = LanguagePolicy(model)
    assert not SlotDecoder.fits(policy)
    assert SlotDecoder.fits(make_policy())
    sampler = Sampler(policy, make_tokenizer(), SamplingConfig(max_new_tokens=6, batch_size=4), seed=1)
    sampler.end_ids = torch.tensor([0, 4, 5, 6])
    same = [PROMPTS[0]] * 10
    samples = sampler.sample(same)
    assert len({len(ids) for ids in samples.response_ids}) > 1
    for row, ids in enumerate(samples.response_ids):
        logits = model(input_ids=torch.tensor([[*PROMPTS[0], *ids]])).logits[0, len(PROMPTS[0]) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).detach()
        torch.testing.assert_close(samples.log_probs[row, : len(ids)], expected, atol=1e-5, rtol=1e-4)
