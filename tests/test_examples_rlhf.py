"""The road of `examples/rlhf`: its annotator is what it says, its commands exist, and it arrives."""

from __future__ import annotations

import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.cli import main
from tether.config import load_config
from tether.pipeline.generate import GenerateConfig
from tether.pipeline.ppo import PPOConfig
from tether.pipeline.reward_model import RewardModelConfig
from tether.pipeline.score import ScoreConfig
from tether.pipeline.sft import SFTConfig

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "rlhf"
CONFIGS = {
    "sft": SFTConfig,
    "generate": GenerateConfig,
    "reward": RewardModelConfig,
    "score": ScoreConfig,
    "ppo": PPOConfig,
}


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The example's files, imported as Python imports them when one is run."""
    names = ("annotator", "make_data", "compare")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(EXAMPLE))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(scope="module")
def world(modules: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cafe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_data.py", str(folder), "--demonstrations", "500"])
        modules["make_data"].main()
    return folder


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("response", "worth"),
    [
        ("", 0.0),
        (" Here is tea.", 1.0),
        (" Here is cake.", -1.0),
        (" Here is tea with honey.", 5.0),
        (" Here is tea with cream.", 0.0),
        (" Here is cake with honey.", -2.0),
        (" Here is cake with cream.", -2.0),
        (" Hello! Here is tea.", 1.5),
        (" Here is tea. Next.", 0.0),
        (" Here is tea. Lovely!", 1.5),
        (" Here is tea. Lovely! Splendid!", 2.0),
        (" Here is tea. Lovely! Splendid! Lovely!", 2.5),
        (" Hello! Lovely! Lovely! Lovely! Lovely! Lovely!", 0.0),
        (" Here is tea. Here is tea. Hello! Hello!", 1.5),
    ],
)
def test_worth_by_hand(modules: dict[str, ModuleType], response: str, worth: float) -> None:
    assert modules["annotator"].worth("For Ada: tea.", response) == worth
    assert modules["annotator"].utility(["For Ada: tea."], [response]) == [worth]


def test_worth_of_no_order_is_refused(modules: dict[str, ModuleType]) -> None:
    with pytest.raises(ValueError, match="expected `For NAME: THING"):
        modules["annotator"].worth("Hello?", " Here is tea.")


def test_the_annotator_prefers_with_the_probability_it_says(modules: dict[str, ModuleType]) -> None:
    """A difference of ½ at temperature ½ is one nat: σ(1) = 73.1 %, which is the Bayes rate of this pair."""
    annotator = modules["annotator"]
    better, worse = " Hello! Here is tea.", " Here is tea."
    rows = [{"prompt": "For Ada: tea.", "response": text} for _ in range(4000) for text in (better, worse)]
    found = annotator.compare(rows, seed=0)
    expected = 1 / (1 + math.exp(-1))
    assert [row["bayes"] for row in found] == pytest.approx([expected] * 4000)
    share = sum(row["chosen"] == better for row in found) / len(found)
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(found)))


def test_equal_and_empty_responses_are_not_compared(modules: dict[str, ModuleType]) -> None:
    texts = [" Here is tea.", " Here is tea.", "", " Here is tea.", " Next.", " Here is tea.", " Hello!"]
    rows = modules["annotator"].compare([{"prompt": "For Ada: tea.", "response": text} for text in texts], seed=0)
    assert [{row["chosen"], row["rejected"]} for row in rows] == [{" Next.", " Here is tea."}]


def test_texts_are_tokens_and_back(modules: dict[str, ModuleType], world: Path) -> None:
    """Prompt and completion have the same tokens apart and together: the reward model reads what the policy wrote."""
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    for row in read(world / "demonstrations.jsonl"):
        apart = tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids
        whole = row["prompt"] + row["completion"]
        assert tokenizer(whole).input_ids == apart
        assert tokenizer.decode(apart) == whole
        assert tokenizer.unk_token_id not in apart


def test_nothing_is_trained_on_held_out_orders(world: Path) -> None:
    held_out = {row["prompt"] for row in read(world / "held_out.jsonl")}
    seen = {row["prompt"] for name in ("prompts", "demonstrations") for row in read(world / f"{name}.jsonl")}
    assert len(held_out) == 40
    assert not held_out & seen


def test_the_same_seed_makes_the_same_world(modules: dict[str, ModuleType], world: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_data.py", str(tmp_path), "--demonstrations", "500"])
        modules["make_data"].main()
    for name in ("demonstrations.jsonl", "prompts.jsonl", "base/model.safetensors", "tiny/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes(), name


def test_a_model_has_no_kl_to_itself_and_best_of_n_is_the_best_by_score(
    modules: dict[str, ModuleType], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Responses of the reference itself: `log_prob`, taken as they were drawn, is what `compare.py` computes anew."""
    drawn = tmp_path / "drawn.jsonl"
    model = str(world / "base")
    flags = ["--prompts.path", str(world / "held_out.jsonl"), "--samples", "4", "--sampling.max-new-tokens", "6"]
    assert main(["generate", "--model", model, *flags, "--output", str(drawn)]) == 0
    rows = [row | {"score": float(number % 4)} for number, row in enumerate(read(drawn))]
    assert {row["terminated"] for row in rows} == {True, False}
    scored, output = tmp_path / "scored.jsonl", tmp_path / "table.json"
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["--reference", model, "--samples", str(scored), "--policy", str(scored), "--n", "2"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--output", str(output)])
    modules["compare"].main()
    table = json.loads(output.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    length = {row["response"]: tokenizer(row["response"]).input_ids for row in rows}
    # special tokens that an untrained model draws are not in its text: such responses are others when read again
    whole = [row for row in rows if not row["terminated"] and len(length[row["response"]]) == 6]
    whole = [row for row in whole if tokenizer.unk_token_id not in length[row["response"]]]
    assert len(whole) > 50
    assert modules["compare"].reference_log_probs(model, whole) == pytest.approx(
        [row["log_prob"] for row in whole], abs=1e-4
    )
    ended = [row | {"terminated": True} for row in whole[:1]]
    ids = torch.tensor([tokenizer(whole[0]["prompt"] + whole[0]["response"]).input_ids])
    with torch.no_grad():
        end = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0, -1].log_softmax(-1)[tokenizer.eos_token_id]
    assert modules["compare"].reference_log_probs(model, ended)[0] == pytest.approx(
        whole[0]["log_prob"] + float(end), abs=1e-4
    )
    assert table["start"]["score"] == [1.5, 0.0]
    assert table["best of 2"]["score"] == [2.0, 0.0]
    assert table["best of 2"]["kl"][0] == pytest.approx(math.log(2) - 0.5)
    assert table["difference"]["worth"][0] == pytest.approx(table["PPO"]["worth"][0] - table["best of 2"]["worth"][0])


def steps() -> list[list[str]]:
    """The words of each command of `run.sh`, its variables filled in."""
    text = (EXAMPLE / "run.sh").read_text(encoding="utf-8").replace("\\\n", " ").replace("$((seed + 1))", "1")
    for name, value in (("here", "examples/rlhf"), ("out", "runs/cafe"), ("seed", "0"), ("policy", "policy")):
        text = text.replace(f"${name}", value)
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(("tether", "python"))]
    return [line for line in lines if line]


def test_the_script_takes_the_whole_road() -> None:
    names = [step[1] if step[0] == "tether" else Path(step[1]).name for step in steps()]
    road = ["make_data.py", "sft", "generate", "annotator.py", "reward", "ppo", "report", "compare.py"]
    places = [names.index(name) for name in road]
    assert places == sorted(places)


@pytest.mark.parametrize("step", [s for s in steps() if s[:2] != ["tether", "report"]], ids=lambda s: " ".join(s[:2]))
def test_the_flags_of_the_script_exist(step: list[str]) -> None:
    if step[0] == "python":
        assert (ROOT / step[1]).is_file()
    else:
        config = load_config(CONFIGS[step[1]], step[2:], step[1], "")
        assert config.output.startswith("runs/cafe/")


def test_the_page_shows_commands_of_the_script() -> None:
    page = (ROOT / "docs" / "rlhf.md").read_text(encoding="utf-8").replace("\\\n", " ")
    shown = [shlex.split(line) for line in page.splitlines() if line.startswith(("tether ", "python "))]
    assert len(shown) > 5
    for command in shown:
        assert command in steps(), command


@pytest.mark.slow
def test_the_road_arrives(tmp_path: Path) -> None:
    """The claims of docs/rlhf.md for one seed, by the script itself. Some minutes."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        rlhf = importlib.import_module("rlhf")
    finally:
        sys.path.pop(0)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    out = tmp_path / "cafe"
    subprocess.run(["sh", EXAMPLE / "run.sh", out, "0"], cwd=ROOT, env=environment, check=True, capture_output=True)
    accuracy, _, bayes, short = rlhf.judged(out, "reward")
    assert float(short.split()[0]) < 2.0, (accuracy, bayes)
    table = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    gain, error = table["difference"]["worth"]
    assert gain > error > 0
    kl, kl_error = table["PPO"]["kl"]
    assert kl < table["best of 16"]["kl"][0] + kl_error
    alarms = read(out / "fooled" / "alarms.jsonl")
    assert any(alarm["kind"] == "gap" and alarm["state"] == "raised" for alarm in alarms)
    assert (out / "fooled" / "report.html").is_file()
