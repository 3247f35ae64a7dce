"""Reward models: loss and measures by hand, cuts that change nothing, the whole road from pairs to scores."""

from __future__ import annotations

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.models import EOS, KINDS, make_model, make_tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from tether.cli import main
from tether.errors import RewardError, UserError
from tether.language.preferences import Preference, PreferencesConfig
from tether.pipeline.agreement import calibration, evaluate_scores
from tether.pipeline.comparisons import accumulate_gradients, preference_loss, tokenize_pairs
from tether.pipeline.reward_model import RewardModelConfig, RewardTraining, split_by_prompt, train_reward_model
from tether.rewards import Rewards, RewardsConfig, check_reward
from tether.rewards.classifiers import load_classifier
from tether.rewards.models import RewardModel
from tether.rewards.normalisation import NORMALISATION_FILE, Normalisation
from tether.rewards.passes import encode, passes, score_all, score_tokens
from tether.runs import read_config, read_metrics

CHAT = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<end>{% endfor %}"


def utility(text: str) -> int:
    """What the annotator of these tests likes."""
    return text.count("a") - text.count("b")


def make_rows(count: int = 400, seed: int = 0, prompts: int = 100) -> list[dict[str, Any]]:
    """Comparisons by the annotator, without noise and of unequal utility."""
    drawn = random.Random(seed)
    asked = ["".join(drawn.choices("abcdef", k=4)) + " " for _ in range(prompts)]
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        first, second = ("".join(drawn.choices("abcdef", k=drawn.randint(2, 6))) for _ in range(2))
        if utility(first) != utility(second):
            chosen, rejected = sorted((first, second), key=utility, reverse=True)
            rows.append({"prompt": drawn.choice(asked), "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and comparisons."""
    folder = tmp_path_factory.mktemp("world")
    make_model().save_pretrained(folder / "lm")
    make_tokenizer().save_pretrained(folder / "lm")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, make_rows())))
    (folder / "few.jsonl").write_text("\n".join(map(json.dumps, make_rows(40, seed=1))))
    return folder


def configure(world: Path, name: str, data: str = "pairs.jsonl", **options: Any) -> RewardModelConfig:
    options = {"eval_fraction": 0.2, "epochs": 5, "batch_size": 32, "learning_rate": 1e-2} | options
    return RewardModelConfig(
        model=str(world / "lm"),
        preferences=PreferencesConfig(str(world / data)),
        output=str(world / name),
        **options,
    )


@pytest.fixture(scope="module")
def trained(world: Path) -> RewardTraining:
    return train_reward_model(configure(world, "single"))


@pytest.fixture(scope="module")
def ensemble(world: Path) -> RewardTraining:
    return train_reward_model(configure(world, "ensemble", epochs=1, members=3, combine="min"))


def make_pairs(seed: int = 0) -> Any:
    """Pairs of different lengths with a margin and a tie among them, in tokens."""
    rows = make_rows(9, seed)
    pairs = [Preference(row["prompt"] * (1 + i % 3), row["chosen"], row["rejected"]) for i, row in enumerate(rows)]
    pairs[1] = Preference("ab", "c", "dd", margin=0.5)
    pairs[2] = Preference("ab", "cc", "d", tie=True)
    return pairs


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, -1.0])
    margins, ties = torch.tensor([0.0, 0.5, 0.0]), torch.tensor([False, False, True])
    found = preference_loss(chosen, rejected, margins, ties, centring=0.1)
    won = math.log(1 + math.exp(-1.0)) + 0.1 * 9
    lost = math.log(1 + math.exp(1.5)) + 0.1 * 9
    tied = 0.5 * math.log(1 + math.exp(-1.5)) + 0.5 * math.log(1 + math.exp(1.5)) + 0.1 * 0.25
    assert found.tolist() == pytest.approx([won, lost, tied], abs=1e-6)


def test_a_tie_is_at_its_best_where_scores_are_equal() -> None:
    ties = torch.tensor([True] * 3)
    losses = preference_loss(torch.tensor([0.0, 1.0, -1.0]), torch.zeros(3), torch.zeros(3), ties)
    assert losses.argmin() == 0
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[1] == pytest.approx(float(losses[2]))


# ---- cuts and padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_company_change_no_score(kind: str, tmp_path: Path) -> None:
    make_model(kind).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_classifier(str(tmp_path), new_head_seed=1)
    ids = encode(tokenizer, ["ab", "c", "de", "abcdef"], ["abc", "a", "fffff", "f"])
    assert len({len(entry) for entry in ids}) > 1
    alone = torch.cat([score_tokens(model, [entry]) for entry in ids])
    torch.testing.assert_close(score_tokens(model, ids), alone, atol=2e-6, rtol=0)
    for most in (1, 8, 1000):
        torch.testing.assert_close(score_all(model, ids, most), alone.detach(), atol=2e-6, rtol=0)


def test_an_encoder_can_be_a_reward_model(tmp_path: Path) -> None:
    """Which sees padding, unlike a causal model, if nobody hides it."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=16, num_labels=1, initializer_range=0.4, pad_token_id=1, **sizes)
        BertForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer("<pad>").save_pretrained(tmp_path)
    prompts, completions = ["ab", "c", "abcdef"], ["abc", "a", "f"]
    reward = RewardModel(tmp_path)
    together = reward.score(prompts, completions)
    alone = [reward.score([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert together == pytest.approx(alone, abs=2e-6)
    assert len(set(together)) == 3


def test_the_gradient_does_not_depend_on_the_cut(world: Path) -> None:
    model, tokenizer = load_classifier(str(world / "lm"), new_head_seed=3)
    pairs = tokenize_pairs(make_pairs(), tokenizer, 60)
    order = [5, 2, 0, 8, 1, 7, 3, 4, 6]
    found = []
    for most in (1, 60, 100_000):
        loss, scores = accumulate_gradients(model, pairs, order, most, centring=0.01)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss, scores, gradient))
    whole = found[-1]
    for loss, scores, gradient in found[:-1]:
        assert loss == pytest.approx(whole[0], abs=1e-6)
        torch.testing.assert_close(scores, whole[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradient, whole[2], atol=1e-6, rtol=1e-4)
    assert len(list(passes(pairs.lengths(order), 30))) > 1


def test_the_gradient_is_that_of_the_plain_loss(world: Path) -> None:
    model, tokenizer = load_classifier(str(world / "lm"), new_head_seed=3)
    pairs = make_pairs()
    tokenized = tokenize_pairs(pairs, tokenizer, 60)
    accumulate_gradients(model, tokenized, list(range(9)), 8192, centring=0.01)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    losses: list[Tensor] = []
    for pair in pairs:
        texts = [pair.prompt + side for side in (pair.chosen, pair.rejected)]
        high, low = (
            model(torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]])).logits[0, 0]
            for text in texts
        )
        gap = high - low
        loss = -torch.log(torch.sigmoid(gap - pair.margin))
        if pair.tie:
            loss = -0.5 * torch.log(torch.sigmoid(gap)) - 0.5 * torch.log(torch.sigmoid(-gap))
        losses.append(loss + 0.01 * (high + low) ** 2)
    torch.stack(losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_passes_hold_every_text_once_within_the_budget() -> None:
    lengths = [5, 1, 30, 2, 9, 9, 3]
    found = list(passes(lengths, 20))
    assert sorted(index for chosen in found for index in chosen) == list(range(7))
    for chosen in found:
        assert len(chosen) == 1 or len(chosen) * max(lengths[i] for i in chosen) <= 20


# ---- what a text is --------------------------------------------------------------------------------------------------


def test_the_score_is_read_at_an_eos_that_padding_does_not_hide(world: Path) -> None:
    """The language model pads with eos; the reward model gets a pad token of its own."""
    model, tokenizer = load_classifier(str(world / "lm"), new_head_seed=0)
    assert tokenizer.pad_token_id != EOS
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert encode(tokenizer, ["ab"], ["c"])[0][-1] == EOS
    assert encode(tokenizer, ["ab"], ["c<eos>"])[0].count(EOS) == 1


def test_messages_go_through_the_chat_template() -> None:
    tokenizer = make_tokenizer("<pad>")
    tokenizer.chat_template = CHAT
    prompt, answer = [{"role": "user", "content": "b"}], [{"role": "assistant", "content": "c"}]
    ids = encode(tokenizer, [prompt, prompt], [answer, "c"])
    assert ids[0] == ids[1]
    assert tokenizer.decode(ids[0]) == "<unk>b<end>ac<end>"
    tokenizer.chat_template = None
    with pytest.raises(RewardError, match=r"completion 0 is of chat messages, but .* has no chat template"):
        encode(tokenizer, [prompt], [answer])


def test_a_pair_that_is_too_long(world: Path) -> None:
    tokenizer = make_tokenizer("<pad>")
    pairs = [Preference("abc", "d", "e", row=1), Preference("abc", "d", "abcdef", row=2)]
    with pytest.raises(UserError, match=r"preferences, row 2: 10 tokens, expected at most 6 \(`max_tokens`\)"):
        tokenize_pairs(pairs, tokenizer, 6)
    skipped = tokenize_pairs(pairs, tokenizer, 6, "skip")
    assert (len(skipped), skipped.skipped) == (1, 1)
    cut = tokenize_pairs(pairs, tokenizer, 6, "truncate")
    assert cut.truncated == 1
    assert tokenizer.decode(cut.rejected[1]) == "bcdef<eos>"  # the end stays
    with pytest.raises(UserError, match="all 2 comparisons are longer than 2 tokens"):
        tokenize_pairs(pairs, tokenizer, 2, "skip")


# ---- measures --------------------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    def gap(probability: float) -> float:
        return math.log(probability / (1 - probability))

    # predicted 0.62 three times and right once, 0.97 twice and right both times
    gaps = np.array([gap(0.62), -gap(0.62), -gap(0.62), gap(0.97), gap(0.97)])
    error, bins = calibration(gaps)
    assert error == pytest.approx(3 / 5 * abs(1 / 3 - 0.62) + 2 / 5 * abs(1 - 0.97))
    assert [part.count for part in bins] == [0, 0, 3, 0, 0, 0, 0, 0, 0, 2]
    assert (bins[2].low, bins[2].high) == pytest.approx((0.6, 0.65))
    assert bins[2].accuracy == pytest.approx(1 / 3)
    assert bins[2].confidence == pytest.approx(0.62)
    assert math.isnan(bins[0].accuracy)


def test_a_model_that_knows_its_annotator_is_calibrated() -> None:
    generator = np.random.default_rng(0)
    gaps = generator.normal(0, 2, 20_000)
    agreed = generator.random(20_000) < 1 / (1 + np.exp(-gaps))
    seen = np.where(agreed, gaps, -gaps)  # chosen minus rejected
    assert calibration(seen)[0] < 0.015
    assert calibration(3 * seen)[0] > 0.1  # too sure of itself


def test_the_evaluation_by_hand() -> None:
    found = evaluate_scores(
        [3.0, 1.0, 0.0, 5.0], [1.0, 2.0, 0.0, 1.0], [False, False, False, True], [4, 2, 3, 8], [1, 2, 5, 1]
    )
    assert (found.pairs, found.ties) == (3, 1)
    assert found.accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.margin == pytest.approx((2 - 1 + 0) / 3)
    expected = np.corrcoef([3, 1, 0, 5, 1, 2, 0, 1], [4, 2, 3, 8, 1, 2, 5, 1])[0, 1]
    assert found.length_correlation == pytest.approx(expected)
    assert found.longer_by_people == pytest.approx(0.5)  # the first pair, not the third
    assert found.longer_by_model == pytest.approx((1 + 0.5) / 2)
    tie = 0.5 * math.log(1 + math.exp(-4)) + 0.5 * math.log(1 + math.exp(4))
    losses = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(2), tie]
    assert found.loss == pytest.approx(np.mean(losses))


def test_held_out_prompts_are_not_learned_from() -> None:
    pairs = [Preference(f"prompt {i % 7}", str(i), "no", row=i + 1) for i in range(50)]
    train, held_out = split_by_prompt(pairs, 0.2, seed=3)
    assert {pair.key for pair in train}.isdisjoint(pair.key for pair in held_out)
    assert len(train) + len(held_out) == 50
    assert 10 <= len(held_out) < 10 + 8
    assert split_by_prompt(pairs, 0.2, seed=3) == (train, held_out)
    assert split_by_prompt(pairs, 0.2, seed=4) != (train, held_out)
    with pytest.raises(UserError, match="leaves nothing to learn: the 3 comparisons are of 1 prompts"):
        split_by_prompt([Preference("a", str(i), "no") for i in range(3)], 0.1, seed=0)


# ---- normalisation and ensembles -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "k"), [("mean", 1.0), ("min", 1.0), ("mean-std", 0.0), ("mean-std", 0.5), ("mean-std", 3.0)]
)
def test_combined_scores_have_mean_0_and_deviation_1_on_the_reference(how: Any, k: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, generator=generator)
    scale, shift = torch.tensor([[1.0], [5.0], [0.2]]), torch.tensor([[0.0], [-7.0], [100.0]])
    raw = scale * (shared + 0.5 * torch.randn(3, 500, generator=generator)) + shift
    combined = Normalisation.of(raw, "test").combine(raw, how, k)
    assert float(combined.mean()) == pytest.approx(0, abs=1e-5)
    assert float(combined.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_combinations_of_members_by_hand() -> None:
    raw = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
    same = Normalisation.identity(2)
    assert same.combine(raw, "mean").tolist() == [2.0, 2.0]
    assert same.combine(raw, "min").tolist() == [1.0, 0.0]
    assert same.combine(raw, "mean-std", 0.5).tolist() == [1.5, 1.0]  # deviations 1 and 2


def test_normalisation_is_read_back_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    normalisation = Normalisation.of(torch.randn(2, 50, generator=torch.Generator().manual_seed(1)), "here")
    normalisation.save(tmp_path)
    assert Normalisation.load(tmp_path) == normalisation
    data = json.loads((tmp_path / NORMALISATION_FILE).read_text())
    for damage in ({"stds": [0.0, 1.0]}, {"means": [1.0]}, {"mean": "x"}, {"means": [1.0, float("nan")]}):
        (tmp_path / NORMALISATION_FILE).write_text(json.dumps(data | damage))
        with pytest.raises(UserError, match=r"score_normalisation\.json: no normalisation of scores"):
            Normalisation.load(tmp_path)


# ---- the road --------------------------------------------------------------------------------------------------------


def test_it_learns_what_the_annotator_likes(trained: RewardTraining, world: Path) -> None:
    assert trained.evaluation is not None
    assert trained.evaluation.accuracy > 0.93
    assert trained.evaluation.interval[0] > 0.85
    assert trained.evaluation.pairs >= 80
    scores = RewardModel(trained.folder).score(["de "] * 4, ["aaa", "a", "c", "bbb"])
    assert scores == sorted(scores, reverse=True)
    first, *_, last = read_metrics(world / "single")
    assert first["eval_accuracy"] < 0.75
    assert last["eval_accuracy"] == trained.evaluation.accuracy
    assert last["accuracy"] > 0.9
    assert read_config(world / "single")["preferences"]["path"] == str(world / "pairs.jsonl")
    written = json.loads((world / "single" / "evaluation.json").read_text())
    assert written["held_out"]["accuracy"] == trained.evaluation.accuracy
    assert sum(part["count"] for part in written["held_out"]["reliability"]) == trained.evaluation.pairs


def test_the_folder_is_plain_hugging_face_and_gives_the_same_scores(trained: RewardTraining) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    reward = RewardModel(trained.folder, normalise=False)
    prompts, completions = ["ab ", "cdef "], ["ca", "bbaade"]
    texts = [p + c + tokenizer.eos_token for p, c in zip(prompts, completions, strict=True)]
    with torch.inference_mode():
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        plain = model(**batch).logits[:, 0].tolist()
    assert reward.score(prompts, completions) == pytest.approx(plain, abs=1e-5)
    said = model.config.score_normalisation
    normalised = [(score - said["mean"]) / said["std"] for score in plain]
    assert RewardModel(trained.folder).score(prompts, completions) == pytest.approx(normalised, abs=1e-5)


def test_loading_twice_gives_the_same_scores_to_the_bit(trained: RewardTraining) -> None:
    texts = ["ab", "c", "def"], ["abc", "a", "ffff"]
    assert RewardModel(trained.folder).score(*texts) == RewardModel(trained.folder).score(*texts)


def test_normalisation_travels_in_the_configuration_too(
    trained: RewardTraining, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = load_classifier(str(trained.folder))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["ab"], ["abc"]
    assert RewardModel(tmp_path).score(*texts) == pytest.approx(RewardModel(trained.folder).score(*texts), abs=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["score_normalisation"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, "tether"):
        assert RewardModel(tmp_path).score(*texts) == RewardModel(trained.folder, normalise=False).score(*texts)
    assert "its scores are used as they are" in caplog.text


def test_members_differ_and_their_combinations_are_scores(ensemble: RewardTraining, world: Path) -> None:
    assert [folder.name for folder in sorted(ensemble.folder.glob("member-*"))] == ["member-0", "member-1", "member-2"]
    assert len(ensemble.members) == 3
    prompts, completions = ["ab "] * 3, ["aa", "cb", "def"]
    members = [RewardModel(ensemble.folder / f"member-{i}") for i in range(3)]
    scores = torch.tensor([member.score(prompts, completions) for member in members], dtype=torch.float64)
    assert len({tuple(row) for row in scores.tolist()}) == 3
    raw = RewardModel(ensemble.folder).raw(prompts, completions)
    assert raw.shape == (3, 3)
    given = ensemble.normalisation
    least = (scores.amin(dim=0) - given.min[0]) / math.sqrt(given.min[1])
    assert RewardModel(ensemble.folder, "min").score(prompts, completions) == pytest.approx(least.tolist(), abs=1e-5)
    mean = (scores.mean(dim=0) - given.mean[0]) / math.sqrt(given.mean[1])
    assert RewardModel(ensemble.folder).score(prompts, completions) == pytest.approx(mean.tolist(), abs=1e-5)
    written = json.loads((world / "ensemble" / "evaluation.json").read_text())
    assert len(written["members"]) == 3
    assert written["combine"] == "min"
    steps = [line["iteration"] for line in read_metrics(world / "ensemble")]
    assert steps == sorted(set(steps))


def test_the_same_seed_gives_the_same_model(world: Path) -> None:
    runs = [train_reward_model(configure(world, f"again-{i}", "few.jsonl", epochs=1)) for i in range(2)]
    other = train_reward_model(configure(world, "other", "few.jsonl", epochs=1, seed=1))
    texts = ["ab"], ["abc"]
    first, second, third = (RewardModel(run.folder).score(*texts) for run in (*runs, other))
    assert first == second
    assert first != third


def test_a_reward_model_is_a_reward(trained: RewardTraining, ensemble: RewardTraining) -> None:
    prompts, completions = ["ab "] * 2, ["aa", "bb"]
    found = check_reward(f"reward_model?path={trained.folder}", prompts, completions)
    assert found == RewardModel(trained.folder).score(prompts, completions)
    assert found[0] > found[1]
    spec = f"reward_model?path={ensemble.folder}&combine=mean-std&k=2"
    assert check_reward(spec, prompts, completions) == RewardModel(ensemble.folder, "mean-std", 2.0).score(
        prompts, completions
    )
    rewards = Rewards(RewardsConfig((f"reward_model?path={trained.folder}", "regex?pattern=a&wrong=0"), (0.5, 2.0)))
    scores = rewards(prompts, completions, [[], []], {})
    assert list(scores.parts) == ["reward_model", "regex"]
    assert scores.total[0] == pytest.approx(0.5 * found[0] + 2.0)


def test_it_goes_on_from_a_reward_model(trained: RewardTraining, world: Path) -> None:
    config = configure(world, "further", "few.jsonl", learning_rate=0.0, epochs=1)
    further = train_reward_model(RewardModelConfig(**vars(config) | {"model": str(trained.folder)}))
    texts = ["ab"], ["abc"]
    kept = RewardModel(further.folder, normalise=False).score(*texts)
    assert kept == RewardModel(trained.folder, normalise=False).score(*texts)


def test_ctrl_c_saves_what_there_is(world: Path) -> None:
    def interrupt(metrics: dict[str, float]) -> None:
        if metrics["member"] == 1 and metrics["step"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reward_model(configure(world, "stopped", "few.jsonl", epochs=1, members=3), report=interrupt)
    assert len(RewardModel(world / "stopped" / "model").members) == 2
    assert not (world / "stopped" / "model.partial").exists()


def test_the_commands(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preferences.path", str(world / "few.jsonl"), "--output", str(world / "command"), "--epochs", "1"]
    assert main(["reward", "--model", str(world / "lm"), *flags]) == 0
    said = capsys.readouterr().out
    assert "held-out comparisons" in said
    assert f"reward_model?path={world / 'command' / 'model'}" in said.replace("\n", "")
    rows = [{"prompt": "ab ", "response": text, "id": i} for i, text in enumerate(["aa", "b", "cde"])]
    (world / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = str(world / "command" / "model")
    score = ["score", "--model", model, "--data", str(world / "rows.jsonl"), "--output", str(world / "scored.jsonl")]
    assert main(score) == 0
    written = [json.loads(line) for line in (world / "scored.jsonl").read_text().splitlines()]
    expected = RewardModel(model).score(["ab "] * 3, ["aa", "b", "cde"])
    assert written == [row | {"score": value} for row, value in zip(rows, expected, strict=True)]
    capsys.readouterr()
    assert main(score) == 2  # the file is there
    assert "already there" in capsys.readouterr().err


# ---- what cannot be used ---------------------------------------------------------------------------------------------


SCORE = ["score", "--output", "s.jsonl", "--data", "WORLD/few.jsonl", "--model", "WORLD/lm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reward"], "no output given"),
        (["reward", "--output", "run"], "no model given"),
        (["reward", "--output", "run", "--model", "WORLD/lm"], "no preferences given"),
        (["reward", "--output", "run", "--model", "WORLD/no"], "no such folder"),
        (["reward", "--output", "run", "--model", "WORLD/lm", "--preferences.path", "WORLD/no.jsonl"], "no such file"),
        (["reward", "--members", "0"], "members is 0, expected 1 or more"),
        (["reward", "--eval-fraction", "1"], "eval_fraction is 1.0, expected 0 or more and below 1"),
        (SCORE, "no column `response`"),
        (
            [*SCORE, "--response-column", "chosen"],
            "not a reward model (LlamaForCausalLM); expected one with a head of one label",
        ),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    message: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("WORLD", str(world)) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_text_beyond_the_context_is_an_error_or_cut(trained: RewardTraining) -> None:
    texts = ["ab " * 40], ["a"]
    with pytest.raises(
        RewardError, match="completion 0: with its prompt 122 tokens, but the context of the reward model"
    ):
        RewardModel(trained.folder).score(*texts)
    assert math.isfinite(RewardModel(trained.folder, truncate=True).score(*texts)[0])


def test_models_that_are_no_reward_models(world: Path, trained: RewardTraining, tmp_path: Path) -> None:
    model, tokenizer = load_classifier(str(trained.folder))
    for name, labels in (("two", 2),):
        two = type(model)(type(model.config)(**model.config.to_dict() | {"num_labels": labels, "id2label": None}))
        two.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="a classifier of 2 labels; expected a reward model"):
            load_classifier(str(tmp_path / name), new_head_seed=0)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    model.save_pretrained(tmp_path / "nan")
    tokenizer.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="the weights hold NaN or infinity"):
        RewardModel(tmp_path / "nan")
    with pytest.raises(UserError, match="combine is 'max', expected one of mean, min, mean-std"):
        RewardModel(trained.folder, "max")  # type: ignore[arg-type]
