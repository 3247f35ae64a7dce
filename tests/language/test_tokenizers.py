"""Tokenizers of every kind: what is sampled is what is stored, shown, scored and trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models import EOS, CountingRewards, make_model, make_tokenizer, plain_forward
from tests.tokenizers_of_kinds import KINDS
from transformers import PreTrainedTokenizerFast

from tether.language.environment import TokenEnv, score_with_rewards
from tether.language.models import end_token_ids
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt, PromptsConfig, prompts_from_rows
from tether.language.reference import ModelReference
from tether.language.sampler import Sampler, SamplingConfig
from tether.language.texts import Texts
from tether.language.world import CollectConfig, LanguageWorld
from tether.pipeline.samples import RowFormat, tokenize_rows
from tether.ppo import AdvantageConfig, KLConfig, KLController
from tether.ppo.advantages import estimate
from tether.rewards import Rewards, RewardsConfig, check_reward
from tether.rewards.passes import encode

PROMPT = "What is 12 + 7?"
ANSWERS = [" 19 12", " 19", "19", "  the fox .", "\n\nthe dog", " think : 7 ", " 12 é€😀 13"]
LIMIT = 12
OVER = 7  # rows of the model's embedding beyond the tokenizer


WITH_CHAT = [kind for kind, make in KINDS.items() if make().chat_template]
THINKING = ["qwen", "llama3", "thinking in special tokens"]


@pytest.fixture
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()


def written(tokenizer: PreTrainedTokenizerFast, answer: str) -> tuple[list[int], list[int]]:
    """The prompt's tokens, and those of the answer behind it, less an eos that the tokenizer appends."""
    before, whole = (
        [token for token in tokenizer(text).input_ids if token != tokenizer.eos_token_id]
        for text in (PROMPT, PROMPT + answer)
    )
    assert whole[: len(before)] == before
    return before, whole[len(before) :]


def lossless(kind: str, text: str) -> bool:
    """Whether this kind of tokenizer can write the text at all."""
    if kind == "t5":
        return text.isascii() and "\n" not in text and "  " not in text and not text.endswith(" ")
    return kind != "sentence piece without bytes" or (text.isascii() and "\n" not in text)


def drawn(tokenizer: PreTrainedTokenizerFast) -> tuple[LanguageWorld, Any, CountingRewards]:
    """A batch that a small model has drawn, and what its reward was given."""
    model = make_model("llama", vocabulary_size=len(tokenizer) + OVER)
    special = [token for token in ("<|im_end|>", "<|endoftext|>", "<end_of_turn>") if token in tokenizer.get_vocab()]
    ends = tokenizer.convert_tokens_to_ids(special)
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, *ends})
    policy, rewards = LanguagePolicy(model), CountingRewards()
    prompts = prompts_from_rows([{"prompt": PROMPT}], PromptsConfig(), tokenizer, None, LIMIT)
    _, hidden = plain_forward(model, prompts[0].token_ids)
    with torch.no_grad():  # some responses end at once
        model.lm_head.weight[tokenizer.eos_token_id] = 8 * hidden[-1] / hidden[-1].square().sum()
    sampler = Sampler(policy, tokenizer, SamplingConfig(max_new_tokens=LIMIT, temperature=1.5), seed=3)
    collect = CollectConfig(prompts=1, samples_per_prompt=24)
    kl = KLController(KLConfig(beta=0.1))
    world = LanguageWorld(policy, ModelReference(model), sampler, prompts, rewards, kl, collect)
    return world, world.collect(), rewards


every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize(("kind", "answer"), [(k, a) for k in KINDS for a in ANSWERS if lossless(k, a)])
def test_an_answer_keeps_its_text_and_its_tokens_add_up_to_it(tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    before, ids = written(tokenizer, answer)
    texts = Texts(tokenizer)
    assert texts.responses([ids]) == [answer]
    assert "".join(texts.pieces([ids])[0]) == answer
    assert texts.responses([[*ids, tokenizer.eos_token_id]]) == [answer]
    # a reward model that reads the text reads the tokens that were drawn
    read = encode(tokenizer, [PROMPT], texts.responses([ids]))[0]
    assert read[: len(before + ids)] == before + ids
    assert set(read[len(before + ids) :]) <= {tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if lossless(kind, "é€")])
def test_half_a_character_is_held_back_until_it_is_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    _, ids = written(tokenizer, " 12 é€😀 13")
    texts = Texts(tokenizer)
    for count in range(1, len(ids) + 1):
        (pieces,), (text,) = texts.pieces([ids[:count]]), texts.responses([ids[:count]])
        assert "".join(pieces) == text
        assert " 12 é€😀 13".startswith(text.rstrip("\ufffd"))


@every_kind
def test_what_is_sampled_is_what_is_stored_scored_and_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    world, batch, rewards = drawn(tokenizer)
    sampler, (call,) = world.sampler, rewards.calls
    prompt_ids = list(world.prompts[0].token_ids)
    ends = set(end_token_ids(world.policy.model, tokenizer))
    stored = world.episodes(batch, *estimate(batch, AdvantageConfig()))
    assert any(episode.terminated for episode in stored)
    for row, episode in enumerate(stored):
        length = int(batch.mask[row].sum())
        ids = batch.actions[row, :length].tolist()
        assert episode.action_ids == call["completion_ids"][row] == ids
        assert batch.context.tokens[row][batch.context.attention_mask[row]].tolist() == prompt_ids + ids
        assert episode.terminated == (ids[-1] in ends)
        assert episode.response == call["completions"][row]
        shown = [text for text, token in zip(episode.actions, ids, strict=True) if token not in sampler.texts.hidden]
        assert "".join(shown) == episode.response
        assert len(episode.actions) == length
        assert ends <= sampler.texts.hidden
        # the text by another road: behind the prompt itself
        visible = [token for token in ids if token not in sampler.texts.hidden]
        before = tokenizer.decode(prompt_ids, clean_up_tokenization_spaces=False)
        whole = tokenizer.decode(prompt_ids + visible, clean_up_tokenization_spaces=False)
        if visible == ids[: len(visible)]:
            assert before + episode.response == whole


@every_kind
def test_the_bos_of_a_rendered_text_is_read_once(tokenizer: PreTrainedTokenizerFast) -> None:
    bos = tokenizer.bos_token or ""
    text = bos + PROMPT
    plain = tokenizer(text, add_special_tokens=False).input_ids
    prompt = prompts_from_rows([{"prompt": text}], PromptsConfig(), tokenizer, None, 1)[0]
    samples = tokenize_rows([{"prompt": text, "completion": " 19"}], tokenizer, RowFormat(), 99).samples
    whole = tokenize_rows([{"text": text + " 19" + tokenizer.eos_token}], tokenizer, RowFormat(), 99).samples
    read = encode(tokenizer, [text], [" 19" + tokenizer.eos_token])[0]
    if bos:
        assert list(prompt.token_ids) == plain
    for ids in (list(prompt.token_ids), samples.token_ids.tolist(), whole.token_ids.tolist(), read):
        assert ids[: len(plain)] == list(prompt.token_ids)[: len(plain)]
        assert ids[:2].count(tokenizer.bos_token_id) <= 1
        assert ids[-2:].count(tokenizer.eos_token_id) <= 1
    assert samples.token_ids[-1] == whole.token_ids[-1] == tokenizer.eos_token_id


@every_kind
def test_sft_learns_the_tokens_that_ppo_would_draw(tokenizer: PreTrainedTokenizerFast) -> None:
    before, ids = written(tokenizer, " 19 12")
    samples = tokenize_rows([{"prompt": PROMPT, "completion": " 19 12"}], tokenizer, RowFormat(), 99).samples
    assert samples.token_ids.tolist() == [*before, *ids, tokenizer.eos_token_id]
    assert samples.is_target.tolist() == [False] * len(before) + [True] * (len(ids) + 1)


@pytest.mark.parametrize("kind", WITH_CHAT)
def test_chat_is_read_as_its_template_writes_it(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    by_messages = prompts_from_rows([{"prompt": chat}], PromptsConfig(), tokenizer, None, 1)[0]
    assert by_messages.text == text
    assert list(by_messages.token_ids) == tokenizer(text, add_special_tokens=False).input_ids
    answered = [*chat, {"role": "assistant", "content": "19"}]
    samples = tokenize_rows([{"messages": answered}], tokenizer, RowFormat(), 99).samples
    assert samples.token_ids.tolist()[: len(by_messages.token_ids)] == list(by_messages.token_ids)
    assert samples.token_ids[-1] == tokenizer.eos_token_id
    learned = samples.token_ids[samples.is_target].tolist()
    assert Texts(tokenizer).responses([learned])[0].strip() == "19"  # what ends a turn is hidden


@pytest.mark.parametrize("kind", THINKING)
def test_special_tokens_that_are_content_are_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    _, ids = written(tokenizer, "<think>12</think> 19")
    (text,) = Texts(tokenizer).responses([[*ids, tokenizer.eos_token_id]])
    assert text.startswith("<think>")
    assert text.replace(" ", "") == "<think>12</think>19"


@every_kind
def test_ids_beyond_the_tokenizer_are_drawn_without_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = Texts(tokenizer)
    _, ids = written(tokenizer, " 19")
    beyond = [*ids, len(tokenizer) + OVER - 1, *ids]
    assert texts.responses([beyond]) == [" 19 19"]
    assert len(texts.pieces([beyond])[0]) == len(beyond)


STOPS = [" 19", "é", "\n", " 12 é€"]


@pytest.mark.parametrize(("kind", "stop"), [(k, stop) for k in KINDS for stop in STOPS if lossless(k, stop)])
def test_a_stop_string_is_found_wherever_its_tokens_are(
    kind: str, tokenizer: PreTrainedTokenizerFast, stop: str
) -> None:
    texts = Texts(tokenizer)
    for answer in (stop, "7" + stop, "😀" + stop, "é€" + stop):
        if not lossless(kind, answer):
            continue
        _, ids = written(tokenizer, answer)
        window = len(stop.encode())
        assert stop in texts.tails([ids], window)[0]


@every_kind
def test_draws_stop_at_their_string(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama", vocabulary_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any other
    text = Texts(tokenizer).responses([written(tokenizer, " 12")[1][:1]])[0]
    config = SamplingConfig(max_new_tokens=24, stop=(text,))
    sampler = Sampler(LanguagePolicy(model), tokenizer, config, seed=0)
    samples = sampler.sample([written(tokenizer, "")[0]] * 32)
    for shown, ended, ids in zip(
        sampler.texts.shown(samples.response_ids), samples.terminated.tolist(), samples.response_ids, strict=True
    ):
        assert ended == (text in shown or ids[-1] in sampler.end_ids.tolist())
    assert any(text in shown for shown in samples.texts)


@pytest.mark.parametrize("kind", ["thinking in special tokens"])
def test_rewards_see_tags_that_are_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    _, ids = written(tokenizer, "<think>7</think><answer>19</answer>")
    assert {"<think>", "</answer>"} <= set(tokenizer.convert_ids_to_tokens(ids))
    texts = Texts(tokenizer).responses([[*ids, tokenizer.eos_token_id], ids[1:]])
    assert check_reward("format?tags=think,answer", [PROMPT] * 2, texts) == [1.0, -1.0]
    assert check_reward("regex?pattern=<answer> ?19", [PROMPT] * 2, texts) == [1.0, 1.0]
    env = TokenEnv(
        [tokenizer(PROMPT).input_ids],
        score_with_rewards(Rewards(RewardsConfig(("format?tags=think,answer",))), [_prompt(tokenizer)], tokenizer),
        vocabulary_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=20,
        tokenizer=tokenizer,
    )
    env.reset()
    for token in [*ids, tokenizer.eos_token_id]:
        _, _, ended, _, info = env.step(token)
    assert ended
    assert (info["text"], info["score"]) == (texts[0], 1.0)


def _prompt(tokenizer: PreTrainedTokenizerFast) -> Prompt:
    return prompts_from_rows([{"prompt": PROMPT}], PromptsConfig(), tokenizer, None, 1)[0]


@pytest.mark.parametrize("kind", ["qwen", "gemma", "llama2"])
def test_a_special_token_that_stops_is_no_text_and_stops_in_both_environments(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    stop = {"qwen": "<|im_start|>", "gemma": "<start_of_turn>", "llama2": "<unk>"}[kind]
    _, ids = written(tokenizer, " 19")
    ended = [*ids, tokenizer.convert_tokens_to_ids(stop)]
    assert Texts(tokenizer).responses([ended]) == [" 19" + stop]
    assert Texts(tokenizer, stop=(stop,)).responses([ended]) == [" 19"]
    assert stop in Texts(tokenizer, stop=(stop,)).tails([ended], len(stop))[0]
    env = TokenEnv(
        [tokenizer(PROMPT).input_ids],
        lambda prompt, response: 0.0,
        vocabulary_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=20,
        tokenizer=tokenizer,
        stop=(stop,),
    )
    env.reset()
    assert [env.step(token)[2] for token in ended] == [False] * len(ids) + [True]


def test_a_turns_end_that_is_no_special_token_ends_responses_where_the_model_names_it() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    end = tokenizer.convert_tokens_to_ids("f")
    model.generation_config.eos_token_id = [EOS, end]
    assert end_token_ids(model, tokenizer) == (EOS,)  # it may be the default of a class, and a piece of text here
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}f{% endfor %}"
    assert end_token_ids(model, tokenizer) == (EOS, end)
