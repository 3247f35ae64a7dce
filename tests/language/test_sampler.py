"""The sampler: exact distributions, greedy as transformers has it, independence of the batch, ends of responses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.models import (
    END,
    EOS,
    KINDS,
    PAD,
    VOCABULARY,
    make_model,
    make_prompts,
    make_tokenizer,
    perturbed,
    plain_forward,
    token,
)
from torch import Tensor

from tether.language import decoding
from tether.language import sampler as sampler_module
from tether.language.decoding import Decoder, PlainDecoder, SlotDecoder
from tether.language.policy import LanguagePolicy
from tether.language.sampler import Sampler, SamplingConfig, draw, invert, invert_by_blocks, support_size

PROMPTS = [list(prompt.token_ids) for prompt in make_prompts(6)]


def make_sampler(config: SamplingConfig, kind: str = "llama", seed: int = 0, critic: bool = False) -> Sampler:
    policy = LanguagePolicy(make_model(kind), separate_value_trunk=critic)
    return Sampler(perturbed(policy, 0.02), make_tokenizer(), config, seed)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def chi_square_limit(degrees: int) -> float:
    """Quantile at 1 − 1e-4 (Wilson and Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_distributed(counts: Counter, probabilities: dict[Any, float]) -> None:
    """Pearson's test, outcomes with fewer than five expected pooled; nothing impossible may occur."""
    total = sum(counts.values())
    assert set(counts) <= {outcome for outcome, p in probabilities.items() if p > 0}
    cells, rare = [], [0.0, 0.0]
    for outcome, p in probabilities.items():
        if p * total >= 5:
            cells.append((counts[outcome], p * total))
        else:
            rare = [rare[0] + counts[outcome], rare[1] + p * total]
    if rare[1] >= 5:
        cells.append((int(rare[0]), rare[1]))
    assert len(cells) > 2
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells)
    assert statistic < chi_square_limit(len(cells) - 1)


def next_token(sampler: Sampler, ids: Sequence[int]) -> list[float]:
    """The distribution of the next token by the definition, in float64."""
    config = sampler.config
    logits, _ = plain_forward(sampler.policy.model, ids)
    p = (logits[-1].double() / config.temperature).softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    kept, mass = [], 0.0
    for i in order:
        if (config.top_k is not None and len(kept) == config.top_k) or (
            config.top_p is not None and mass >= config.top_p
        ):
            break
        kept.append(i)
        mass += p[i]
    return [p[i] / mass if i in kept else 0.0 for i in range(len(p))]


SAMPLINGS = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5),
    SamplingConfig(temperature=2.0),
    SamplingConfig(top_k=5),
    SamplingConfig(top_p=0.8),
    SamplingConfig(temperature=1.5, top_k=8, top_p=0.6),
]


@pytest.mark.parametrize("config", SAMPLINGS, ids=str)
def test_two_token_responses_follow_the_exact_distribution(config: SamplingConfig) -> None:
    config = SamplingConfig(2, config.temperature, config.top_k, config.top_p, batch_size=4000)
    sampler = make_sampler(config)
    prompt = [token("a"), token("b")]
    samples = sampler.sample([prompt] * 12_000)
    counts = Counter(tuple(ids) for ids in samples.response_ids)
    first = next_token(sampler, prompt)
    exact = {(EOS,): first[EOS]}
    for i, p in enumerate(first):
        if i != EOS and p > 0:
            exact |= {(i, j): p * q for j, q in enumerate(next_token(sampler, [*prompt, i]))}
    assert sum(exact.values()) == pytest.approx(1)
    assert_distributed(counts, exact)
    for row in range(20):
        ids, log_probs = samples.response_ids[row], samples.log_probs[row].tolist()
        assert sum(log_probs[: len(ids)]) == pytest.approx(math.log(exact[tuple(ids)]), abs=1e-4)


@pytest.mark.parametrize("size", [1, 16, 127, 128, 129, 300, 1024])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 50.0])
def test_blocks_find_the_token_that_the_plain_sum_finds(size: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(size)
    weights = (scale * torch.randn(2000, size, generator=generator)).softmax(-1)
    weights[:, torch.rand(size, generator=generator) < 0.3] = 0.0  # as top-k and top-p leave it
    weights[:, size // 2] += 0.1
    uniforms = torch.rand(2000, generator=generator, dtype=torch.float64)
    token, total = invert(weights, uniforms)
    found, found_total = invert_by_blocks(weights, uniforms)
    assert bool(weights.gather(-1, token).all())
    assert found.tolist() == token.tolist()
    torch.testing.assert_close(found_total, total, atol=0, rtol=1e-6)


def test_where_blocks_lead_onto_no_probability_the_plain_sum_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((3, 300), -math.inf)
    logits[:, 200] = 0.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert draw(logits, uniforms, SamplingConfig())[0].tolist() == [200] * 3
    wrong = torch.full((3, 1), 7)  # what rounding might lead to
    monkeypatch.setattr(sampler_module, "invert_by_blocks", lambda weights, _: (wrong, weights.sum(-1, keepdim=True)))
    token, log_prob, _ = draw(logits, uniforms, SamplingConfig())
    assert token.tolist() == [200] * 3
    assert log_prob.tolist() == [0.0] * 3


def test_draw_inverts_the_cumulative_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.4, 0.5])
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    tokens, log_probs, kept = draw(probabilities.log().expand(6, 4), uniforms, SamplingConfig())
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(log_probs, probabilities.log()[tokens])
    assert kept is None


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]]).expand(1000, 5)
    edges = torch.cat([torch.zeros(1), torch.linspace(0, 1, 998), torch.tensor([1 - 2**-24])]).double()
    assert set(draw(logits, edges.clamp(max=1 - 2**-53), SamplingConfig())[0].tolist()) == {1, 3}


def test_support_is_the_fewest_that_hold_p_and_at_most_k() -> None:
    scaled = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]]).log()
    assert support_size(scaled, None, None) is None
    for top_k, top_p, expected in (
        (2, None, [2, 2]),
        (9, None, [4, 4]),
        (None, 0.7, [2, 1]),
        (3, 0.9, [3, 1]),
        (None, 1e-9, [1, 1]),
    ):
        found = support_size(scaled, top_k, top_p)
        assert found is not None
        assert found.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_transformers_generates(kind: str) -> None:
    sampler = make_sampler(SamplingConfig(max_new_tokens=20, temperature=0.0), kind)
    samples = sampler.sample(PROMPTS)
    model = sampler.policy.model
    for ids, found in zip(PROMPTS, samples.response_ids, strict=True):
        tokens = torch.tensor([ids])
        generated = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=20, pad_token_id=PAD
        )
        assert found == generated[0, len(ids) :].tolist()
    assert bool((samples.log_probs <= 0).all())
    assert samples.support is None


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_the_argmax_of_a_full_forward_pass(kind: str) -> None:
    sampler = make_sampler(SamplingConfig(max_new_tokens=10, temperature=0.0), kind)
    samples = sampler.sample(PROMPTS)
    for row, (ids, found) in enumerate(zip(PROMPTS, samples.response_ids, strict=True)):
        logits, hidden = plain_forward(sampler.policy.model, ids + found)
        before = torch.arange(len(found)) + len(ids) - 1
        assert logits[before].argmax(-1).tolist() == found
        values = sampler.policy.values_of(hidden[before]).detach()
        torch.testing.assert_close(samples.values[row, : len(found)], values, atol=1e-5, rtol=1e-4)


def test_values_of_a_trunk_of_its_own() -> None:
    sampler = make_sampler(SamplingConfig(max_new_tokens=6), critic=True)
    samples = sampler.sample(PROMPTS)
    assert sampler.policy.value_trunk is not None
    for row, (ids, found) in enumerate(zip(PROMPTS, samples.response_ids, strict=True)):
        states = sampler.policy.value_trunk(input_ids=torch.tensor([ids + found])).last_hidden_state[0]
        values = sampler.policy.values_of(states[len(ids) - 1 : -1]).detach()
        torch.testing.assert_close(samples.values[row, : len(found)], values, atol=1e-5, rtol=1e-4)


# ---- a response does not depend on its company -----------------------------------------------------------------------


def arranged_uniforms(monkeypatch: pytest.MonkeyPatch, sampler: Sampler, keys: Sequence[int]) -> None:
    """Give the i-th sampled prompt the uniforms of its key, whatever it finds itself beside."""
    table = torch.rand(
        100, sampler.config.max_new_tokens, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )

    def rand(*size: int, **_: Any) -> Tensor:
        assert size == (sampler.config.max_new_tokens, len(keys))
        return table[list(keys)].T

    monkeypatch.setattr(sampler_module.torch, "rand", rand)


def sampled(
    monkeypatch: pytest.MonkeyPatch, sampler: Sampler, keys: Sequence[int]
) -> dict[int, tuple[list[int], Tensor, Tensor, bool]]:
    """Response, log-probs, values and end of each key; key k is prompt k modulo their number."""
    with monkeypatch.context() as patched:
        arranged_uniforms(patched, sampler, keys)
        samples = sampler.sample([PROMPTS[key % len(PROMPTS)] for key in keys])
    result = {}
    for row, key in enumerate(keys):
        ids = samples.response_ids[row]
        result[key] = (
            ids,
            samples.log_probs[row, : len(ids)],
            samples.values[row, : len(ids)],
            bool(samples.terminated[row]),
        )
    return result


def assert_same(found: dict[int, Any], expected: dict[int, Any]) -> None:
    for key, (ids, log_probs, values, terminated) in found.items():
        assert (ids, terminated) == (expected[key][0], expected[key][3])
        torch.testing.assert_close(log_probs, expected[key][1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values, expected[key][2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("decoder", [PlainDecoder, SlotDecoder])
def test_results_do_not_depend_on_company_order_batch_size_or_decoder(
    monkeypatch: pytest.MonkeyPatch, decoder: type[Decoder], kind: str, critic: bool
) -> None:
    monkeypatch.setattr(SlotDecoder, "fits", lambda policy: decoder is SlotDecoder)
    monkeypatch.setattr(decoding, "SLACK", 3)  # so that the buffers are tidied often
    config = SamplingConfig(max_new_tokens=16, temperature=1.2, top_p=0.95)
    sampler = make_sampler(config, kind, critic=critic)
    enough = torch.tensor([EOS, token("a"), token("bc"), token("d"), token("ca")])  # so that many end, at many steps
    sampler.end_ids = enough
    keys = list(range(24))
    together = sampled(monkeypatch, sampler, keys)
    assert len({len(ids) for ids, *_ in together.values()}) > 3
    alone: dict[int, Any] = {}
    for key in keys[:6]:
        alone |= sampled(monkeypatch, sampler, [key])
    assert_same(alone, together)
    assert_same(sampled(monkeypatch, sampler, keys[::-1]), together)
    for size in (2, 5):
        split = make_sampler(SamplingConfig(16, 1.2, top_p=0.95, batch_size=size), kind, critic=critic)
        split.end_ids = enough
        assert_same(sampled(monkeypatch, split, keys), together)


def test_batches_are_joined_in_order() -> None:
    whole = make_sampler(SamplingConfig(max_new_tokens=12, temperature=0.0)).sample(PROMPTS)
    parts = make_sampler(SamplingConfig(max_new_tokens=12, temperature=0.0, batch_size=4)).sample(PROMPTS)
    assert parts.response_ids == whole.response_ids
    assert parts.texts == whole.texts
    for name in ("log_probs", "values", "mask", "terminated"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-5, rtol=1e-4)
    supports = make_sampler(SamplingConfig(max_new_tokens=12, top_k=3, batch_size=4)).sample(PROMPTS)
    assert supports.support is not None
    assert supports.support.shape == supports.mask.shape
    assert set(supports.support[supports.mask].tolist()) == {3}


def test_the_same_seed_draws_the_same_tokens() -> None:
    config = SamplingConfig(max_new_tokens=10)
    first = make_sampler(config, seed=3)
    drawn = [first.sample(PROMPTS).response_ids for _ in range(2)]
    again = make_sampler(config, seed=3)
    torch.manual_seed(0)
    assert [again.sample(PROMPTS).response_ids for _ in range(2)] == drawn
    assert drawn[0] != drawn[1]
    assert make_sampler(config, seed=4).sample(PROMPTS).response_ids != drawn[0]


# ---- where a response ends -------------------------------------------------------------------------------------------


def scripted(
    monkeypatch: pytest.MonkeyPatch, texts: Sequence[Sequence[str]], stop: tuple[str, ...], limit: int = 6
) -> Any:
    """Samples whose draws are these tokens; a row that has run out of them draws "f"."""
    where: list[tuple[int, int]] = []  # the response and the step of each row that is drawn
    take = Sampler._take

    def taken(sampler: Sampler, drawn: Any, rows: Tensor, *read: Tensor) -> None:
        where[:] = zip(rows.tolist(), drawn.lengths[rows].tolist(), strict=True)
        take(sampler, drawn, rows, *read)

    def draws(logits: Tensor, uniforms: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor, None]:
        chosen = [token(texts[row][step]) if step < len(texts[row]) else token("f") for row, step in where]
        return torch.tensor(chosen), torch.full((len(chosen),), -1.0), None

    monkeypatch.setattr(Sampler, "_take", taken)
    monkeypatch.setattr(sampler_module, "draw", draws)
    return make_sampler(SamplingConfig(max_new_tokens=limit, stop=stop)).sample([PROMPTS[0]] * len(texts))


def test_stop_strings_are_found_across_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ["ab", "c"],
        ["a", "bc"],
        ["a", "b", "c"],
        ["d", "ab", "ca"],
        ["ab", "d", "c"],
        ["bc", "a", "ab"],
        ["<eos>"],
    ]
    samples = scripted(monkeypatch, rows, stop=("abc", "\n\n"))
    assert samples.texts == ["abc", "abc", "abc", "dabca", "abdcfff", "bcaabfff", ""]
    assert samples.terminated.tolist() == [True, True, True, True, False, False, True]
    assert [len(ids) for ids in samples.response_ids] == [2, 2, 3, 3, 6, 6, 1]
    assert samples.mask.sum(1).tolist() == [2, 2, 3, 3, 6, 6, 1]
    assert not bool(samples.log_probs[~samples.mask].any())


def test_stop_strings_of_two_lengths_and_of_one_character(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = scripted(monkeypatch, [["a", "\n", "b", "\n"], ["b", "de"], ["\n", "\n"]], stop=("\n\n", "e"))
    assert samples.texts == ["a\nb\nff", "bde", "\n\n"]


def test_a_special_token_between_parts_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop strings are looked for in the text with its special tokens."""
    samples = scripted(monkeypatch, [["a", "<unk>", "bc"], ["a", "bc"]], stop=("abc",))
    assert samples.terminated.tolist() == [False, True]


def test_a_special_token_can_be_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """As chat models need it whose end of turn is not their eos."""
    samples = scripted(monkeypatch, [["a", "<end>", "b"], ["a", "b"]], stop=("<end>",))
    assert samples.texts == ["a", "abffff"]
    assert samples.terminated.tolist() == [True, False]


def test_the_length_limit_truncates() -> None:
    samples = make_sampler(SamplingConfig(max_new_tokens=3), "gpt2").sample(PROMPTS * 8)
    ended = torch.tensor([ids[-1] == EOS for ids in samples.response_ids])
    assert torch.equal(samples.terminated, ended)
    assert 0 < int(ended.sum()) < len(ended)
    assert all(len(ids) == 3 for ids, end in zip(samples.response_ids, ended, strict=True) if not end)
    only_one = make_sampler(SamplingConfig(max_new_tokens=1)).sample(PROMPTS)
    assert [len(ids) for ids in only_one.response_ids] == [1] * len(PROMPTS)


@pytest.mark.parametrize(
    ("named", "ends"), [([EOS, END], {EOS, END}), (END, {EOS, END}), (None, {EOS}), ([token("a")], {EOS})]
)
def test_ends_come_from_the_generation_config_if_the_tokenizer_knows_them_as_special(
    named: Any, ends: set[int]
) -> None:
    """A default id of a model class that is an ordinary token of this tokenizer ends nothing."""
    model = make_model()
    model.generation_config.eos_token_id = named
    sampler = Sampler(LanguagePolicy(model), make_tokenizer(), SamplingConfig(max_new_tokens=6))
    assert set(sampler.end_ids.tolist()) == ends
    samples = sampler.sample(PROMPTS * 10)
    last = {ids[-1] for ids, end in zip(samples.response_ids, samples.terminated.tolist(), strict=True) if end}
    assert last == ends
    assert not any(ends & set(ids[:-1]) for ids in samples.response_ids)


def test_texts_are_the_tokens_without_those_that_end_a_response() -> None:
    samples = make_sampler(SamplingConfig(max_new_tokens=8)).sample(PROMPTS * 4)
    for ids, text in zip(samples.response_ids, samples.texts, strict=True):
        assert text == "".join(VOCABULARY[i] for i in ids if i != EOS)  # other special tokens are content


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [[], [[4], []]])
def test_empty_prompts_are_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        make_sampler(SamplingConfig()).sample(prompts)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("stop", ("a", "")),
        ("batch_size", 0),
    ],
)
def test_bad_numbers_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingConfig(**{field: value})


# ---- alternatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "temperature": 1.4}, {"top_p": 0.6}], ids=str)
def test_alternatives_are_the_likeliest_tokens_and_change_nothing_else(options: dict[str, Any]) -> None:
    config = SamplingConfig(max_new_tokens=6, batch_size=4, alternatives=4, **options)
    plain, sampler = make_sampler(config), make_sampler(config)
    expected = plain.sample(PROMPTS)
    found = sampler.sample(PROMPTS, alternatives=True)
    assert (expected.likeliest, expected.likeliest_probabilities) == (None, None)
    for name in ("response_ids", "texts"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("log_probs", "values", "mask", "terminated"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(plain.generator.get_state(), sampler.generator.get_state())
    assert found.likeliest is not None
    assert found.likeliest_probabilities is not None
    for row, (prompt, response) in enumerate(zip(PROMPTS, found.response_ids, strict=True)):
        for step in range(len(response)):
            p = next_token(sampler, [*prompt, *response[:step]])
            order = sorted(range(len(p)), key=lambda i: -p[i])[:4]
            given = found.likeliest_probabilities[row, step].tolist()
            assert given == pytest.approx([p[i] for i in order], abs=1e-5)
            named = [i for i, q in zip(found.likeliest[row, step].tolist(), given, strict=True) if q > 0]
            assert named == order[: len(named)]


def test_alternatives_stay_with_their_responses() -> None:
    config = SamplingConfig(max_new_tokens=6, alternatives=3)
    first = make_sampler(config).sample(PROMPTS, alternatives=True)
    second = make_sampler(config, seed=1).sample(PROMPTS[:2], alternatives=True)
    joined = sampler_module.join_samples([first, second])
    for part, start in ((first, 0), (second, len(PROMPTS))):
        picked = joined.select(range(start, start + len(part.texts)))
        for name in ("likeliest", "likeliest_probabilities", "log_probs", "mask"):
            assert torch.equal(getattr(picked, name), getattr(part, name)), name
    none = make_sampler(SamplingConfig(max_new_tokens=6, alternatives=0)).sample(PROMPTS, alternatives=True)
    assert none.likeliest is None
    assert torch.equal(none.log_probs, first.log_probs)
