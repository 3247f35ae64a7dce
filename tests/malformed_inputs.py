"""Malformed inputs, and what is said of each: the cases of `test_malformed.py` and of `docs/malformed-inputs.md`.

Every case runs in a folder of its own that holds `model`, `chat` (the same with a chat template), `judge` (a reward
model), `prompts.jsonl`, `rows.jsonl`, `pairs.jsonl`, `responses.jsonl`, `rewards.py` and `world.py`, all of them good
until the case spoils one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from tests.models import make_model, make_tokenizer
from tether.rewards.classifiers import load_classifier
from tether.runs.labels import LabelSet, NewPair, create_labels

Prepare = Callable[[], None]
PPO = (
    "ppo --model model --prompts.path prompts.jsonl --reward.functions rewards.py:score --output run --iterations 3 "
    "--collect.prompts 4 --sampling.max-new-tokens 4 --learner.epochs 1 --learner.minibatches 2"
)
SFT = "sft --model model --data rows.jsonl --output run --max-steps 2"
GENERATE = "generate --model model --prompt ab --sampling.max-new-tokens 4"
REWARD = "reward --model model --preferences.path pairs.jsonl --output run --max-steps 2"
SCORE = "score --model judge --data responses.jsonl --output run.jsonl"
TASK = (
    "ppo --model model --output run --iterations 3 --collect.prompts 4 --sampling.max-new-tokens 4 "
    "--learner.minibatches 2 --task"
)
EVAL = (
    "eval --model model --prompts.path prompts.jsonl --reward.functions rewards.py:score --sampling.max-new-tokens 4 "
    "--output run/result.json"
)
RESUME = "ppo --resume run"
CONTROL = (
    "control --env world.py:make_env --output run --total-steps 96 --environments.count 2 --collect.steps 16 "
    "--network.hidden 8 --learner.epochs 1 --learner.minibatches 2"
)
GOOD_REWARD = """
calls = 0

def score(completions, **columns):
    global calls
    calls += 1
    return [float(completion.count("a")) for completion in completions]
"""
GOOD_WORLD = """
import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

class World(gymnasium.Env):
    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Discrete(2)
    total = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.total += 1
        self.time += 1
        seen, reward = np.array([self.time, action], np.float32), float(action)
        return seen, reward, self.time >= 5, False, {}

def make_env():
    return World()
"""


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        what: what is wrong, a row of the table.
        command: the arguments of `tether`.
        says: the place, and what was found there; both are in the line that is printed.
        files: contents of files in the working folder, against the good ones.
        prepare: spoils what `files` cannot; runs in the working folder.
        library: a regular expression for words of a library in the line, which differ between versions.
        needs: a module without which there is nothing to see.
    """

    what: str
    command: str
    says: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Prepare | None = None
    library: str | None = None
    needs: str | None = None


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def older_episodes() -> None:
    file = Path("run/episodes.db")
    file.unlink()
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE episodes (id INTEGER PRIMARY KEY)")


def make_folders(folder: Path) -> None:
    """What is good in the working folder of every case."""
    make_model("gpt2").save_pretrained(folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
        "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder / "chat")
    prompts = ("ab", "cd", "ef", "fa")
    (folder / "prompts.jsonl").write_text(jsonl(*({"prompt": text, "answer": "a"} for text in prompts)))
    (folder / "rows.jsonl").write_text(jsonl(*({"prompt": text, "completion": "c"} for text in prompts)))
    pairs = ({"prompt": text, "chosen": "c", "rejected": "d"} for text in prompts)
    (folder / "pairs.jsonl").write_text(jsonl(*pairs))
    (folder / "responses.jsonl").write_text(jsonl(*({"prompt": text, "response": "c"} for text in prompts)))
    judge, its_tokenizer = load_classifier(str(folder / "model"), new_head_seed=0)
    judge.save_pretrained(folder / "judge")
    its_tokenizer.save_pretrained(folder / "judge")
    (folder / "rewards.py").write_text(GOOD_REWARD)
    (folder / "world.py").write_text(GOOD_WORLD)


def config(**changes: Any) -> Prepare:
    """`model/config.json` with some fields changed, or left out where they are None."""

    def prepare() -> None:
        file = Path("model/config.json")
        fields = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return prepare


def remove(*names: str) -> Prepare:
    def prepare() -> None:
        for name in names:
            Path(name).unlink()

    return prepare


def weights(change: Callable[[bytes], bytes]) -> Prepare:
    """`model/model.safetensors` with its bytes changed."""

    def prepare() -> None:
        file = Path("model/model.safetensors")
        file.write_bytes(change(file.read_bytes()))

    return prepare


def pickled_weights() -> None:
    torch.save(load_file("model/model.safetensors"), "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()


def wider_weights() -> None:
    make_model("gpt2", n_embd=32).save_pretrained("wider")
    shutil.copy("wider/model.safetensors", "model/model.safetensors")


def fewer_layers() -> None:
    make_model("gpt2", n_layer=1).save_pretrained("shallow")
    shutil.copy("shallow/model.safetensors", "model/model.safetensors")


def weights_with_nan() -> None:
    tensors = load_file("model/model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] = float("nan")
    save_file(tensors, "model/model.safetensors", {"format": "pt"})


def missing_shard() -> None:
    make_model("gpt2").save_pretrained("model", max_shard_size="8KB")
    sorted(Path("model").glob("model-00*.safetensors"))[1].unlink()
    Path("model/model.safetensors").unlink(missing_ok=True)


def tokenizer(pad: str | None = "<eos>", **changes: Any) -> Prepare:
    """The tokenizer of `model` with some attributes changed."""

    def prepare() -> None:
        changed = make_tokenizer(pad)
        for name, value in changes.items():
            setattr(changed, name, value)
        changed.save_pretrained("model")

    return prepare


def larger_tokenizer() -> None:
    grown = make_tokenizer()
    grown.add_tokens([AddedToken("<tool>"), AddedToken("<image>")])
    grown.save_pretrained("model")


SETTINGS = [
    Case("no such command", "pop", ("'pop'", "expected one of", "ppo")),
    Case("a flag that is misspelt", f"{PPO} --itertions 3", ("--itertions", "did you mean --iterations?")),
    Case("a flag of a section without the section", f"{PPO} --beta 0", ("--beta", "did you mean --kl.beta?")),
    Case("a flag of another command", f"{GENERATE} --kl.beta 0", ("--kl.beta", "no such option")),
    Case("a flag whose value is of another type", f"{PPO} --iterations many", ("--iterations", "'many'", "an integer")),
    Case("a flag without its value", f"{PPO} --iterations", ("--iterations", "no value")),
    Case("a boolean that is no such word", f"{PPO} --overwrite maybe", ("--overwrite", "'maybe'", "--no-overwrite")),
    Case("a word that belongs to no flag", f"{PPO} --seed 1 2", ("'2'", "found after 1")),
    Case("a choice that there is not", f"{PPO} --advantage.estimator reinforce", ("'reinforce'", "'rloo'")),
    Case("a number out of its range", f"{PPO} --sampling.top-p 2", ("sampling: top_p", "2.0", "at most 1")),
    Case("a number that is NaN", f"{PPO} --kl.beta nan", ("kl: beta", "nan", "0 or more")),
    Case("a number that is infinite", f"{PPO} --learner.learning-rate inf", ("learning_rate", "inf", "finite")),
    Case("a negative seed", f"{SFT} --seed -1", ("seed", "-1", "0 or more")),
    Case("a device that there is not", f"{GENERATE} --device gpu", ("device", "'gpu'"), library=r"RuntimeError.*\w"),
    Case("sampling at temperature 0 in PPO", f"{PPO} --sampling.temperature 0", ("sampling.temperature", "above 0")),
    Case("a group baseline without groups", f"{PPO} --advantage.estimator rloo", ("samples_per_prompt is 1", "2")),
    Case("more minibatches than responses", f"{PPO} --learner.minibatches 9", ("learner.minibatches is 9", "only 4")),
    Case("two ways to hold rows out", f"{SFT} --eval-data rows.jsonl --eval-fraction 0.1", ("eval_data", "both")),
    Case("pass@k with fewer than k samples", f"{EVAL} --samples 2 --k 4", ("k holds 4", "samples (2)")),
    Case("several samples at temperature 0", f"{EVAL} --samples 2 --sampling.temperature 0", ("temperature is 0", "2")),
    Case("no model named", "generate --prompt ab", ("no model", "--model")),
    Case("no reward named", f"{PPO} --reward.functions", ("no reward", "--reward.functions")),
    Case("no folder for the run", f"{PPO} --output=", ("output is empty",)),
    Case("a run in the place of a file", f"{PPO} --output prompts.jsonl", ("prompts.jsonl", "File exists")),
    Case("a result in the place of a file", f"{GENERATE} --output rows.jsonl", ("rows.jsonl", "already there")),
    Case("a result under a file", f"{EVAL} --output rows.jsonl/a.json", ("rows.jsonl/a.json", "is no folder")),
    Case("the configuration file is missing", f"{PPO} --config c.yaml", ("c.yaml", "No such file")),
    Case("it is not YAML", f"{PPO} --config c.yaml", ("c.yaml:1:15", "not valid YAML"), {"c.yaml": "iterations: [1"}),
    Case("it is not UTF-8", f"{PPO} --config c.yaml", ("c.yaml", "byte 0"), {"c.yaml": b"\xff\xfe"}),
    Case("it is a list", f"{PPO} --config c.yaml", ("c.yaml", "the top level is a list"), {"c.yaml": "- seed: 1"}),
    Case("it has a field that is misspelt", f"{PPO} --config c.yaml",
         ("c.yaml", "learner.learning_rte", "did you mean learning_rate?"), {"c.yaml": "learner: {learning_rte: 1}"}),
    Case("it has a field twice", f"{PPO} --config c.yaml", ("c.yaml:2:1", "'seed'"), {"c.yaml": "seed: 1\nseed: 2"}),
    Case("it has text for a number", f"{PPO} --config c.yaml",
         ("c.yaml", "learner.learning_rate", "'fast'", "a number"), {"c.yaml": "learner: {learning_rate: fast}"}),
    Case("it has a number for text", f"{PPO} --config c.yaml", ("c.yaml", "model", "7"), {"c.yaml": "model: 7"}),
    Case("it has one value for a list", f"{PPO} --config c.yaml",
         ("c.yaml", "reward.functions", "a list"), {"c.yaml": "reward: {functions: arithmetic}"}),
    Case("it has fields that contradict each other", "ppo --config c.yaml",
         ("c.yaml", "learner.minibatches is 8", "only 2"),
         {"c.yaml": "collect: {prompts: 2}\nlearner: {minibatches: 8}"}),
]  # fmt: skip

MODELS = [
    Case("no such folder", f"{GENERATE} --model ./llama", ("./llama", "no such folder")),
    Case("no such folder, and no such model on the hub", f"{GENERATE} --model llama", ("llama", "hub"),
         library=r"OSError.*(?=\))"),
    Case("a file for a folder", f"{GENERATE} --model rows.jsonl", ("rows.jsonl", "a file")),
    Case("an empty folder", f"{GENERATE} --model empty", ("empty", "no config.json"),
         prepare=lambda: Path("empty").mkdir()),
    Case("config.json is missing", PPO, ("model", "no config.json"), prepare=remove("model/config.json")),
    Case("config.json is not JSON", SFT, ("model/config.json", "not valid JSON"), {"model/config.json": "{"}),
    Case("config.json is a list", SFT, ("model/config.json", "a list"), {"model/config.json": "[]"}),
    Case("config.json names no architecture", GENERATE, ("model/config.json", "no model that transformers knows"),
         prepare=config(model_type=None), library=r"ValueError.*\."),
    Case("config.json names an architecture that nobody knows", GENERATE, ("model/config.json", "no model that"),
         prepare=config(model_type="gpt9"), library=r"ValueError.*(?=\))"),
    Case("config.json has text for a number", GENERATE, ("model/config.json",),
         prepare=config(n_embd="wide"), library=r"StrictDataclass.*(?=\))"),
    Case("config.json contradicts itself", GENERATE, ("model", "no causal language model could be loaded"),
         prepare=config(n_head=5), library=r"ValueError.*(?=\))"),
    Case("the model is no causal language model", GENERATE, ("model", "'t5'", "causal language model"),
         prepare=config(model_type="t5", architectures=["T5Model"])),
    Case("the model needs code of its own", GENERATE, ("model", "Python code", "--trust-remote-code"),
         {"model/own.py": "raise SystemExit('this ran')"},
         prepare=config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})),
    Case("the weights are missing", EVAL, ("model", "no model.safetensors"), prepare=remove("model/model.safetensors")),
    Case("the weights are a pickle", PPO, ("model", "pytorch_model.bin", "pickle"), prepare=pickled_weights),
    Case("the weights are cut short", PPO, ("model/model.safetensors", "cut short"),
         prepare=weights(lambda data: data[: len(data) // 2]), library=r"SafetensorError.*(?=\))"),
    Case("the weights are empty", PPO, ("model/model.safetensors", "cut short"),
         prepare=weights(lambda data: b""), library=r"SafetensorError.*(?=\))"),
    Case("the weights are something else", SFT, ("model/model.safetensors", "damaged"),
         prepare=weights(lambda data: b"not weights, but text"), library=r"SafetensorError.*(?=\))"),
    Case("a shard of the weights is missing", GENERATE, ("model/model-00002-of-00004.safetensors",),
         prepare=missing_shard, library=r"\w+Error.*(?=: model)"),
    Case("the weights are of another shape", GENERATE, ("config.json", "another shape", "(96,), expected (48,)"),
         prepare=wider_weights),
    Case("the weights have fewer layers", GENERATE, ("config.json", "12 tensors missing"), prepare=fewer_layers),
    Case("the weights hold NaN", PPO, ("model", "NaN", "h.0.mlp.c_fc.weight"), prepare=weights_with_nan),
    Case("the reference model is not there", f"{PPO} --reference.model ./old", ("./old", "no such folder")),
]  # fmt: skip

TOKENIZERS = [
    Case("there is no tokenizer", PPO, ("model", "no tokenizer"),
         prepare=remove("model/tokenizer.json", "model/tokenizer_config.json")),
    Case("tokenizer.json is missing", PPO, ("model", "no tokenizer"),
         prepare=remove("model/tokenizer.json"), library=r"ValueError.*(?=\))"),
    Case("tokenizer.json is not JSON", SFT, ("model", "no tokenizer"), {"model/tokenizer.json": "{"},
         library=r"\w+Error.*(?=\))"),
    Case("it has no eos token", PPO, ("model", "no eos token", "tokenizer_config.json"),
         prepare=tokenizer(pad="<pad>", eos_token=None)),
    Case("it has no chat template, but the prompts are chat", PPO, ("prompts.jsonl", "no chat template"),
         {"prompts.jsonl": jsonl({"messages": [{"role": "user", "content": "ab"}]})}),
    Case("it has no chat template, but a prompt shall be chat", f"{GENERATE} --prompts.chat",
         ("prompt", "chat template")),
    Case("it has no chat template, but the training rows are chat", f"{SFT} --rows.chat",
         ("rows.jsonl, row 1", "chat template")),
    Case("it has more tokens than the model embeds", PPO, ("model", "up to 17", "only 16"), prepare=larger_tokenizer),
]  # fmt: skip


def prompts(what: str, contents: object, *says: str, name: str = "prompts.jsonl", more: str = "", **rest: Any) -> Case:
    """A case of `tether ppo` with this file of prompts: text or bytes as they are, or rows."""
    data = contents if isinstance(contents, (str, bytes)) else jsonl(*contents)  # type: ignore[misc]
    command = f"{PPO} --prompts.path {name} {more}".rstrip() if name != "prompts.jsonl" or more else PPO
    return Case(what, command, (name, *says), {name: data}, **rest)


def messages(what: str, conversation: object, *says: str) -> Case:
    return prompts(what, [{"messages": conversation}], "row 1", *says, more="--model chat")


LONG = "ab" * 40
PROMPTS = [
    Case("the file is missing", f"{PPO} --prompts.path p.jsonl", ("p.jsonl", "no such file")),
    prompts("the file is empty", "", "empty"),
    prompts("the file has no rows", "[]", "no rows", name="p.json"),
    prompts("a line is not JSON", '{"prompt": "ab"}\n{"prompt": \n', "line 2", "malformed JSON"),
    prompts("a line is no object", '{"prompt": "ab"}\n7\n', "line 2", "a number"),
    prompts("JSONL in a file called .json", jsonl({"prompt": "a"}, {"prompt": "b"}), "line 2", ".jsonl", name="p.json"),
    prompts("the file is not UTF-8", b'{"prompt": "ab"}\n{"prompt": "\xe4"}\n', "line 2", "0xe4"),
    prompts("a line of CSV has a field too many", "prompt,answer\nab,1,2\n", "line 2", "3 fields", name="p.csv"),
    prompts("a quote in CSV is never closed", 'prompt,answer\nab,"1\n', "line 2", "malformed CSV", name="p.csv"),
    prompts("the Parquet file is no Parquet", "prompt\n" * 9, "Parquet", name="p.parquet", library=r"Parquet magic.*"),
    prompts("the gzip file is cut short", b"\x1f\x8b\x08\x00\x00\x00", "gzip", name="p.jsonl.gz"),
    prompts("a format that cannot be read", "ab\n", "format", ".jsonl", name="p.txt"),
    prompts("there is no column for prompts", [{"question": "ab"}], "question", "--prompts.column"),
    prompts("the column that was named is not there", [{"prompt": "ab"}], "`text`", more="--prompts.column text"),
    prompts("a prompt is a number", [{"prompt": "ab"}, {"prompt": 7}], "row 2", "int (7)"),
    prompts("a row has no prompt", [{"prompt": "ab"}, {"answer": "a"}], "row 2", "missing"),
    prompts("a prompt is empty", [{"prompt": "ab"}, {"prompt": " "}], "row 2", "is empty"),
    prompts("a prompt holds half a character", '{"prompt": "\\ud83d"}', "row 1", "surrogate"),
    prompts("a prompt is longer than the context", [{"prompt": "a"}, {"prompt": LONG}], "row 2", "80 tokens", "60"),
    prompts("all prompts are longer than the context", [{"prompt": LONG}], "every one of the 1",
            more="--prompts.overlong skip"),
    prompts("a prompt is longer than was asked for", [{"prompt": "abcde"}], "row 1", "prompts.max_tokens is 4",
            more="--prompts.max-tokens 4"),
    Case("responses as long as the context", f"{PPO} --sampling.max-new-tokens 64",
         ("max_new_tokens is 64", "64 tokens")),
    Case("a prompt and its response longer than the context", f"{GENERATE} --sampling.max-new-tokens 63",
         ("prompt", "2 tokens", "64")),
    Case("a split of a file that has none", f"{PPO} --prompts.split test", ("prompts.jsonl", "`test`", "no splits")),
    Case("a template names a column that is not there", f"{PPO} --prompts.template {{q}}", ("`q`", "prompt, answer")),
    Case("a template with a lone brace", f"{PPO} --prompts.template {{prompt", ("prompts.template", "'}'")),
    Case("a system message for plain text", f"{PPO} --prompts.system Hi", ("prompts.system", "--prompts.chat")),
    Case("a prompt and a file of prompts", f"{GENERATE} --prompts.path prompts.jsonl", ("prompt", "both set")),
    messages("a role that the chat template refuses", [{"role": "robot", "content": "a"}], "unknown role robot"),
    messages("a message without a role", [{"content": "a"}], "message 1", "no `role`"),
    messages("a message whose content is no text", [{"role": "user", "content": 7}], "`content` is int"),
    messages("a conversation without messages", [], "empty list"),
    messages("a conversation that ends with the answer",
             [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "assistant turn"),
    prompts("text and chat in one file", [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}], "row 2",
            more="--model chat"),
    Case("training rows without a completion", SFT, ("rows.jsonl, row 1", "prompt"),
         {"rows.jsonl": jsonl({"prompt": "a"})}),
    Case("a training row with a null", SFT, ("rows.jsonl, row 2", "`completion`"),
         {"rows.jsonl": jsonl({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None})}),
    Case("a training row longer than the context", SFT, ("rows.jsonl, row 1", "82 tokens", "at most 64"),
         {"rows.jsonl": jsonl({"prompt": LONG, "completion": "b"})}),
    Case("a conversation to learn without an answer", f"{SFT} --model chat", ("rows.jsonl, row 1", "assistant"),
         {"rows.jsonl": jsonl({"messages": [{"role": "user", "content": "a"}]})}),
]  # fmt: skip


def reward(what: str, source: str, *says: str, **rest: Any) -> Case:
    return Case(what, PPO, ("rewards.py:score", *says), {"rewards.py": source}, **rest)


REWARDS = [
    Case("the file is missing", f"{PPO} --reward.functions r.py:score", ("r.py", "no such file")),
    Case("the file has no such function", f"{PPO} --reward.functions rewards.py:best", ("`best`", "it has: score")),
    Case("the function is not named", f"{PPO} --reward.functions rewards.py", ("`rewards.py`", "file.py:name")),
    Case("a module that is not installed", f"{EVAL} --reward.functions my.rewards:score", ("my.rewards:score", "`my`")),
    reward("a syntax error", "def score(:\n", "line 1", "SyntaxError"),
    reward("an import that fails", "import os\nimport nothing_such\n", "line 2", "nothing_such"),
    reward("it is no function", "score = 3\n", "not callable", "int"),
    reward("it needs a column that the prompts have not", "def score(completions, solution): ...\n",
           "`solution`", "answer"),
    Case("a weight too many", f"{PPO} --reward.weights 1 2", ("reward.weights", "2 numbers", "1 functions")),
    Case("a time limit of 0", f"{PPO} --reward.timeout 0", ("reward.timeout", "0")),
    Case("a verifier without its column", f"{PPO} --reward.functions numeric?answer=solution",
         ("`solution`", "answer")),
    Case("a verifier's option that there is not", f"{EVAL} --reward.functions numeric?good=1", ("`numeric`", "`good`")),
    Case("a verifier's option that cannot be", f"{EVAL} --reward.functions numeric?right=x", ("`right`", "'x'")),
    Case("a verifier's regular expression is none", f"{EVAL} --reward.functions regex?pattern=(", ("'('", "regular")),
    Case("an answer that a verifier cannot read", f"{EVAL} --reward.functions numeric",
         ("prompts.jsonl, row 1", "numeric", "`answer`", "'a'")),
    Case("a prompt that a verifier cannot work out", f"{PPO} --reward.functions arithmetic",
         ("prompts.jsonl, row 1", "arithmetic", "'ab'")),
]  # fmt: skip


def pairs(what: str, contents: object, *says: str, more: str = "") -> Case:
    """A case of `tether reward` with these comparisons."""
    data = contents if isinstance(contents, str) else jsonl(*contents)  # type: ignore[misc]
    return Case(what, f"{REWARD} {more}".rstrip(), ("pairs.jsonl", *says), {"pairs.jsonl": data})


def pair(**changes: Any) -> list[dict[str, Any]]:
    """Two comparisons, the second of them spoilt."""
    good = {"prompt": "ab", "chosen": "c", "rejected": "d"}
    return [good, {"prompt": "cd", "chosen": "a", "rejected": "b"} | changes]


def responses(what: str, rows: list[dict[str, Any]], *says: str, more: str = "") -> Case:
    """A case of `tether score` with these responses."""
    return Case(what, f"{SCORE} {more}".rstrip(), ("responses.jsonl", *says), {"responses.jsonl": jsonl(*rows)})


def answered(**changes: Any) -> list[dict[str, Any]]:
    """Two responses, the second of them spoilt."""
    return [{"prompt": "ab", "response": "c"}, {"prompt": "cd", "response": "a"} | changes]


def judge(change: Callable[[dict[str, Any]], None]) -> Prepare:
    """`judge/config.json` with something changed."""

    def prepare() -> None:
        fields = json.loads(Path("judge/config.json").read_text())
        change(fields)
        Path("judge/config.json").write_text(json.dumps(fields))

    return prepare


NORMALISED = {"members": 1, "means": [0.0], "stds": [0.0], "mean": [0, 1], "min": [0, 1], "spread": [0, 0, 0]}
PREFERENCES = [
    Case("no comparisons named", "reward --model model --output run", ("no preferences", ".jsonl")),
    Case("no model named", "reward --output run", ("no model", "--model")),
    Case("no folder for the run", "reward --model model --preferences.path pairs.jsonl", ("no output", "--output")),
    Case("the file is missing", f"{REWARD} --preferences.path p.jsonl", ("p.jsonl", "no such file")),
    pairs("a line is not JSON", '{"prompt": "ab"', "line 1", "malformed JSON"),
    pairs("there are no columns of responses", [{"prompt": "ab", "better": "c", "worse": "d"}], "`chosen`",
          "--preferences.chosen-column"),
    pairs("a response is missing", pair(rejected=None), "row 2", "`rejected`"),
    pairs("a response is a number", pair(chosen=7), "row 2", "`chosen`", "int (7)"),
    pairs("text against messages", pair(chosen=[{"role": "assistant", "content": "a"}]), "row 2", "same form"),
    pairs("messages for a model that has no chat template",
          [{"prompt": [{"role": "user", "content": "a"}],
            "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "c"}]}],
          "row 1", "no chat template"),
    pairs("neither a prompt nor a shared dialogue", [{"chosen": "a", "rejected": "b"}], "row 1", "no prompt"),
    pairs("both responses are the same in every row", [{"prompt": "a", "chosen": "b", "rejected": "b"}],
          "no comparison is left", "1 identical"),
    pairs("a margin below 0", pair(margin=-1), "row 2", "`margin`", "-1"),
    pairs("a tie that is neither true nor false", pair(tie="perhaps"), "row 2", "`tie`", "'perhaps'"),
    pairs("a comparison longer than the context", pair(chosen="a" * 80), "row 2", "83 tokens", "at most 64"),
    pairs("all comparisons of one prompt", [{"prompt": "a", "chosen": "b", "rejected": c} for c in "cdef"],
          "eval_fraction 0.1 leaves nothing", "eval_data"),
    Case("no members", f"{REWARD} --members 0", ("members is 0", "1 or more")),
    Case("a learning rate that is infinite", f"{REWARD} --learning-rate inf", ("learning_rate is inf", "finite")),
    Case("longer than the context allowed", f"{REWARD} --max-tokens 65", ("max_tokens is 65", "context of 64")),
    Case("a model of another kind of head", f"{REWARD} --model judge", ("judge", "2 labels"),
         prepare=judge(lambda fields: fields.update(id2label={"0": "bad", "1": "good"}, label2id=None))),
    Case("adapters in the place of a model", f"{REWARD} --model adapters", ("adapters", "tether export"),
         {"adapters/adapter_config.json": "{}"}),
    Case("scores by a language model", f"{SCORE} --model model", ("model", "not a reward model", "`tether reward`")),
    Case("a reward model whose weights are missing", SCORE, ("judge", "no model.safetensors"),
         prepare=remove("judge/model.safetensors")),
    Case("its normalisation is not JSON", SCORE, ("judge/score_normalisation.json", "no normalisation"),
         {"judge/score_normalisation.json": "{"}),
    Case("its normalisation divides by 0", SCORE, ("judge/score_normalisation.json", "not above 0"),
         {"judge/score_normalisation.json": json.dumps(NORMALISED | {"samples": 1, "source": "x"})}),
    Case("no file for the scores", "score --model judge --data responses.jsonl", ("no output", "--output")),
    Case("the file for the scores is there", f"{SCORE} --output rows.jsonl", ("rows.jsonl", "already there")),
    Case("no column of responses", f"{SCORE} --data prompts.jsonl", ("prompts.jsonl", "`response`", "answer")),
    responses("scores are there already", answered(score=1.0) + answered(), "`score`", "--column"),
    responses("a response to score is missing", answered(response=None), "row 2", "null or missing"),
    responses("a response to score is longer than the context", answered(response="a" * 80), "row 2", "83 tokens",
              "`truncate`"),
]  # fmt: skip

TASKS = [
    Case("a task of no library", f"{TASK} chain_sum", ("task `chain_sum`", "`reasoning_gym:NAME`")),
    Case("a task that there is not", f"{TASK} reasoning_gym:chain_sums", ("no such task", "chain_sum"),
         needs="reasoning_gym"),
    Case("an option that a task does not take", f"{TASK} reasoning_gym:chain_sum --problems.options '{{digits: 2}}'",
         ("reasoning_gym:chain_sum", "digits", "problems.options"), needs="reasoning_gym"),
    Case("an option that is a field", f"{TASK} reasoning_gym:chain_sum --problems.options '{{size: 2}}'",
         ("problems: options hold size",)),
    Case("no problems", f"{TASK} reasoning_gym:chain_sum --problems.size 0", ("problems: size is 0",)),
    Case("a seed beyond the last", f"{TASK} reasoning_gym:chain_sum --problems.seed 4001", ("seed is 4001", "4000")),
    Case("a task and prompts", f"{TASK} reasoning_gym:chain_sum --prompts.path prompts.jsonl", ("task", "both set")),
    Case("neither a task nor prompts", "eval --model model --reward.functions rewards.py:score",
         ("no prompts", "--task")),
]  # fmt: skip


def service(what: str, function: str, *says: str, **rest: Any) -> Case:
    """A reward that cannot be, given to `tether ppo`."""
    return Case(what, f"{PPO} --reward.functions '{function}'", says, **rest)


SERVICES = [
    service("an address without a host", "http:///score", "no address", "http://HOST:PORT/PATH"),
    service("an address whose port is no number", "http://scorer:many/score", "scorer:many", "no address"),
    service("a password in the address", "http://me:secret@scorer/score", "password", "`token_env`"),
    service("an option that a scorer has not", "http://scorer/score#size=3", "no option `size`", "batch"),
    service("an option that cannot be", "http://scorer/score#timeout=0", "option `timeout` is 0", "above 0"),
    service("a token that is not set", "http://scorer/score#token_env=NO_SUCH_TOKEN", "NO_SUCH_TOKEN is not set"),
    service("a judge without a model", "judge?url=http://scorer/v1", "needs the option `model`"),
    service("a judge without an address", "judge?model=m&url=scorer", "'scorer' is no address"),
    service("a scale that is upside down", "judge?model=m&url=http://scorer/v1&low=5&high=1", "low is 5, high is 1"),
    service("the rubric is missing", "judge?model=m&url=http://scorer/v1&rubric=r.txt", "r.txt", "No such file"),
    service("the rubric does not show the completion", "judge?model=m&url=http://scorer/v1&rubric=r.txt", "r.txt",
            "{completion}", files={"r.txt": "Rate {prompt}."}),
    service("the rubric has a lone brace", "judge?model=m&url=http://scorer/v1&rubric=r.txt", "r.txt", "{{ and }}",
            files={"r.txt": "Rate {completion} as {"}),
    service("the rubric names a column that is not there", "judge?model=m&url=http://scorer/v1&rubric=r.txt",
            "`solution`", "answer", files={"r.txt": "{completion} against {solution}"}),
    service("a reward model that is not there", "reward_model?path=./judges", "./judges", "no such folder"),
    service("a reward model without its path", "reward_model", "needs the option `path`"),
    service("a reward model that is a language model", "reward_model?path=model", "not a reward model"),
    service("a combination that there is not", "reward_model?path=judge&combine=max", "combine is", "mean-std"),
]  # fmt: skip


def failing(what: str, in_the_third_call: str, *says: str, more: str = "") -> Case:
    """A reward that scores two iterations, and not the third."""
    source = GOOD_REWARD.replace("calls += 1", f"calls += 1\n    if calls == 3:\n        {in_the_third_call}")
    return Case(what, f"{PPO} {more}".rstrip(), ("`rewards.py:score`", *says), {"rewards.py": source})


FAILING_REWARDS = [
    failing("it raises", "raise ValueError('no such answer')", "ValueError: no such answer", "rewards.py, line 8"),
    failing("it ends the program", "raise SystemExit('enough')", "SystemExit: enough", "rewards.py, line 8"),
    failing("it returns too few numbers", "return [1.0]", "returned 1 numbers", "a list of 4"),
    failing("it returns one number", "return 1.0", "returned float (1.0)", "a list of 4"),
    failing("it returns nothing", "return", "returned None", "`return` missing"),
    failing("it returns text", "return '1'", "returned str ('1')"),
    failing("it returns NaN", "return [1.0, float('nan'), 1.0, 1.0]", "returned nan for completion 1", "finite"),
    failing("it returns an infinite number", "return [float('inf')] * 4", "returned inf for completion 0", "finite"),
    failing("it returns a list of texts", "return ['1'] * 4", "returned str ('1') for completion 0"),
    failing("it hangs", "import time; time.sleep(3600)", "after 1 s", "--reward.timeout", more="--reward.timeout 1"),
]


PORT = "127.0.0.1:8000"  # stands for the one on which the tests have a service


def serving(what: str, path: str, *says: str, more: str = "", judge: bool = False) -> Case:
    """A service that answers two iterations, and goes wrong in the third as `path` says."""
    options = f"retries=1&backoff=0{more}"
    scorer = f"judge?model=m&url=http://{PORT}/{path}&{options}" if judge else f"http://{PORT}/{path}#{options}"
    return Case(what, f"{PPO} --frontier.samples 0 --reward.functions '{scorer}'", (PORT, *says))


FAILING_SERVICES = [
    serving("it answers 500", "error", "answered 500", "out of memory", "2 attempts"),
    serving("it refuses", "refusal", "answered 401 Unauthorized", "one attempt"),
    serving("it has moved", "moved", "answered 302", "http://elsewhere/score"),
    serving("it is slow", "slow", "no answer within 0.1 s", "2 attempts", more="&timeout=0.1"),
    serving("it hangs up", "hang-up", "no connection", "2 attempts"),
    serving("it answers with a page", "page", "not JSON", "<html>"),
    serving("it answers half a batch", "half", "2 scores for 4 completions"),
    serving("it answers something else", "other", "'result': 1", '{"scores": [one number per completion]}'),
    serving("it answers NaN", "nan", "nan for completion 0", "a finite number"),
    serving("it answers text", "text", "'good' for completion 0", "a finite number"),
    serving("the judge gives no rating", "chat", "gave no rating from 0 to 10", "'I would rather not.'", judge=True),
    serving("the judge's answer is none", "nothing", "expected a chat completion", judge=True),
]


def world(what: str, old: str, new: str, *says: str, **rest: Any) -> Case:
    """`world.py` with one part of it replaced."""
    assert old in GOOD_WORLD
    return Case(what, CONTROL, says, {"world.py": GOOD_WORLD.replace(old, new, 1)}, **rest)


VECTOR, OBSERVED = (
    "Box(-np.inf, np.inf, (2,), np.float32)",
    "observation_space = Box(-np.inf, np.inf, (2,), np.float32)",
)
BEGIN, MADE = "return np.zeros(2, np.float32), {}", "return World()"
STEPPED = "return seen, reward, self.time >= 5, False, {}"

ENVIRONMENTS = [
    Case("no environment named", "control --output run", ("no environment", "--env")),
    Case("no such id", "control --env CartPol-v1", ("CartPol-v1", "did you mean `CartPole-v1`"),
         library="(?<=mean `CartPole-v1`).*(?=\\?)"),
    Case("no such version of it", "control --env CartPole-v9", ("CartPole-v9", "no such version", "`CartPole-v1`")),
    Case("an id without its version", "control --env Pendulum", ("Pendulum", "no version", "`Pendulum-v1`")),
    Case("no such Atari game", "control --env ALE/Ping-v5", ("ALE/Ping-v5", "did you mean `ALE/Pong-v5`"),
         library="(?<=`ALE/Pong-v5`).*(?=\\?)"),
    Case("the file is missing", "control --env worlds.py:make_env", ("worlds.py", "no such file")),
    Case("the file has no such function", "control --env world.py:make_envs",
         ("`make_envs`", "it has: World, make_env")),
    Case("a file without a function", "control --env world.py", ("names a file", "`world.py:make_env`")),
    Case("the name is no function", "control --env world.py:np", ("world.py:np", "not callable, but module")),
    world("the file is no Python", "import numpy as np", "import numpy as", "SyntaxError", "world.py, line 3",
          library="(?<=SyntaxError: ).*"),
    world("the file fails when imported", "import numpy as np", "import nunpy as np", "nunpy", "world.py, line 3"),
    world("the function raises", MADE, "raise OSError('no licence')", "OSError: no licence", "world.py, line 23"),
    world("the function returns nothing", MADE, "World()", "returned", "expected a gymnasium.Env"),
    world("the function returns the class", MADE, "return World", "a class, World", "call the class"),
    world("the function needs an option", "make_env()", "make_env(size)", "needs the option `size`"),
    Case("an option that it does not take", f"{CONTROL} --config c.yaml", ("option `speed`", "it takes: none"),
         {"c.yaml": "environments: {options: {speed: 2}}"}),
    Case("an option that is a field", "control --config c.yaml", ("environments: options.max_episode_steps", "field"),
         {"c.yaml": "env: CartPole-v1\nenvironments: {options: {max_episode_steps: 2}}"}),
    Case("native stepping where there is none", f"{CONTROL} --environments.vectorization native",
         ("no vector environment", "`vectorization: sync`")),
    world("it has no observation space", OBSERVED, "pass", "its observation_space is", "set it in __init__"),
    world("observations are a dictionary", OBSERVED, "observation_space = gymnasium.spaces.Dict(a=Discrete(2))",
          "Dict('a': Discrete(2))", "FlattenObservation"),
    world("observations are a choice", OBSERVED, "observation_space = Discrete(5)", "Discrete(5)", "one-hot"),
    world("observations are a table", VECTOR, "Box(0, 1, (4, 4), np.float32)", "shape (4, 4)", "a vector"),
    world("observations are images too small for the CNN", VECTOR, "Box(0, 255, (20, 20, 3), np.uint8)",
          "(3, 20, 20)", "36 × 36"),
    world("actions are several switches", "action_space = Discrete(2)",
          "action_space = gymnasium.spaces.MultiBinary(3)", "MultiBinary(3)", "gymnasium.ActionWrapper"),
    world("reset is that of the old gym", BEGIN, "return np.zeros(2, np.float32)", "reset returned a ndarray",
          "(observation, info)"),
    world("step is that of the old gym", STEPPED, "return seen, reward, self.time >= 5, {}", "returned 4 values",
          "expected five"),
    world("reset takes no seed", "def reset(self, seed=None, options=None)", "def reset(self, options=None)",
          "TypeError", "'seed'"),
    world("observations are of another shape", BEGIN, "return np.zeros(3, np.float32), {}",
          "index 0, reset", "shape (3,)", "says shape (2,)"),
    world("observations are of another type", STEPPED, "return seen.astype(float), reward, False, False, {}",
          "index 0, step 1 of its episode", "float64", "dtype=np.float32"),
    world("the first observation is NaN", BEGIN, "return np.full(2, np.nan, np.float32), {}",
          "index 0, reset", "observation[0] is nan"),
    world("the reward is a list", "float(action)", "[float(action)]", "the reward is a list", "float(reward)"),
    Case("none stepped together", f"{CONTROL} --environments.count 0", ("environments: count is 0", "at least 1")),
    Case("no longest episode", f"{CONTROL} --environments.longest-episode 0", ("longest_episode is 0", "at least 1")),
    Case("no steps", f"{CONTROL} --collect.steps 0", ("collect: steps is 0", "at least 1")),
    Case("films of what cannot be rendered", f"{CONTROL} --collect.film-every 9",
         ("world.py:make_env", "`render_mode`")),
    Case("films of episodes that have no seed", f"{CONTROL.replace('world.py:make_env', 'CartPole-v1')} "
         "--collect.film-every 9", ("collect.film_every", "`CartPole-v1`", "vectorization to sync")),
    Case("more minibatches than steps", f"{CONTROL} --learner.minibatches 99", ("minibatches is 99", "only 32 steps")),
    Case("an estimator that needs groups", f"{CONTROL} --advantage.estimator grpo", ("grpo", "expected gae")),
    Case("a layer without units", f"{CONTROL} --network.hidden 0", ("network: hidden", "at least 1")),
    Case("a device that there is not", f"{CONTROL} --device gpu", ("'gpu'",), library=r"RuntimeError.*\w"),
    Case("--eval of a folder that is no run", "control --eval model", ("model", "config.yaml is missing")),
    Case("--eval of another command's run", "control --eval .", ("no `env`", "tether control"),
         {"config.yaml": "model: model"}),
    Case("a film of an unknown kind", "control --eval run --record a.avi", ("'a.avi'", ".gif or .mp4")),
]  # fmt: skip


def stumbling(what: str, fault: str, *says: str, more: str = "", **rest: Any) -> Case:
    """`world.py` whose first environment goes wrong in the third iteration: its step 40, two having been tried."""
    source = GOOD_WORLD.replace("        return seen", f"        if self.total == 40: {fault}\n        return seen")
    return Case(what, f"{CONTROL} {more}", says, {"world.py": source}, **rest)


FAILING_ENVIRONMENTS = [
    stumbling("it raises", "raise ValueError('fell apart')", "index 0, step 3", "ValueError: fell apart", "line 20"),
    stumbling("it raises, in a worker process", "raise ValueError('fell apart')", "index 0, step 3",
              "ValueError: fell apart", "line 20", more="--environments.vectorization async"),
    stumbling("it ends the program", "raise SystemExit", "index 0, step 3", "step raised SystemExit", "line 20"),
    stumbling("its worker process dies", "import os; os._exit(3)", "a worker process ended with exit code 3",
              "`vectorization: sync`", more="--environments.vectorization async"),
    stumbling("the observation is NaN", "seen[1] = np.nan", "index 0, step 3", "observation[1] is nan"),
    stumbling("the observation is NaN, in a worker process", "seen[1] = np.nan", "index 0, step 3",
              "observation[1] is nan", more="--environments.vectorization async"),
    stumbling("the reward is NaN", "reward = np.nan", "index 0, step 3", "reward is nan"),
    stumbling("the reward is infinite", "reward = np.inf", "index 0, step 3", "reward is inf"),
    stumbling("the reward is text", "reward = '1'", "index 0, step 3", "the reward is a str"),
    stumbling("the observation is of another shape", "seen = seen[:1]", "index 0, step 3", "shape (1,)"),
    stumbling("the observation is a list", "seen = [1.0, 2.0]", "index 0, step 3", "a list", "np.asarray"),
    stumbling("step returns nothing", "return", "index 0, step 3", "returned a NoneType", "expected five"),
    stumbling("the end is a number", "return seen, reward, 1, 0, {}", "index 0, step 3", "True or False"),
]  # fmt: skip


def damage(iteration: int, name: str = "policy/model.safetensors") -> None:
    """Change the last byte of a file of a checkpoint."""
    file = Path(f"run/checkpoints/iteration-{iteration:06d}") / name
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def damage_all() -> None:
    damage(1, "manifest.json")
    damage(2)


RUNS = [
    Case("a new run where one is already", PPO, ("run", "--resume")),
    Case("--overwrite, and a mistake elsewhere", f"{PPO} --overwrite --prompts.path p.jsonl",
         ("p.jsonl", "no such file")),
    Case("--resume without a folder", "ppo --resume", ("--resume", "folder")),
    Case("--resume of a folder that is no run", "ppo --resume model", ("model", "no config.yaml")),
    Case("--resume with another configuration", f"{RESUME} --config c.yaml", ("--resume", "--config")),
    Case("config.yaml of the run is not YAML", RESUME, ("run/config.yaml:1", "YAML"),
         {"run/config.yaml": "seed: ["}),
    Case("config.yaml of the run has a strange field", RESUME, ("run/config.yaml", "sed"),
         {"run/config.yaml": "sed: 1"}),
    Case("fewer iterations than are done", f"{RESUME} --iterations 1", ("iterations is 1", "has done 2")),
    Case("a critic of another form", f"{RESUME} --separate-value-trunk",
         ("critic.safetensors", "separate_value_trunk")),
    Case("the prompts are gone", f"{RESUME} --iterations 3", ("prompts.jsonl", "no such file"),
         prepare=remove("prompts.jsonl")),
    Case("the reward no longer works", f"{RESUME} --iterations 3", ("rewards.py", "SyntaxError"),
         {"rewards.py": "def"}),
    Case("all checkpoints are damaged", f"{RESUME} --iterations 3", ("run/checkpoints", "among the 2"),
         prepare=damage_all),
    Case("episodes.db is damaged", f"{RESUME} --iterations 3", ("run/episodes.db", "not a database"),
         {"run/episodes.db": "not a database, but text"}),
    Case("episodes.db is of an older version", f"{RESUME} --iterations 3",
         ("run/episodes.db", "layout 0", "expected 1 or 2"), prepare=older_episodes),
]  # fmt: skip

DETAILS = [
    Case(
        "an overlong buffer beyond the limit",
        f"{PPO} --collect.overlong-buffer 9 --collect.overlong-penalty 1",
        ("collect.overlong_buffer is 9", "at most sampling.max_new_tokens"),
    ),
    Case("an overlong buffer without its penalty", f"{PPO} --collect.overlong-buffer 3", ("buffer is 3", "both")),
    Case(
        "prompts without signal filtered, with one response each",
        f"{PPO} --collect.filter-prompts",
        ("filter_prompts", "samples_per_prompt is 1"),
    ),
    Case(
        "a λ for the critic where there is none",
        f"{PPO} --advantage.estimator rloo --advantage.value-lam 1 --collect.samples-per-prompt 2",
        ("advantage: value_lam is 1.0", "estimator rloo"),
    ),
    Case(
        "LoRA on layers that there are not",
        f"{PPO} --lora.rank 2 --lora.target-modules q_proj",
        ("lora.target_modules", "q_proj", "c_attn"),
    ),
    Case("LoRA's layers named, but no rank", f"{PPO} --lora.target-modules c_attn", ("rank is 0", "set rank")),
    Case("a quantized base without a GPU", f"{PPO} --quantization 4bit --lora.rank 4", ("4bit", "CUDA", "cpu")),
    Case("a quantized base without adapters", f"{PPO} --quantization 4bit", ("4bit", "set lora.rank")),
    Case("a reference offloaded to where it is", f"{PPO} --reference.offload cpu", ("offload is cpu", "disk")),
    Case("an average whose decay is no share", f"{PPO} --reference.ema 2", ("reference: ema is 2.0", "below 1")),
    Case("a reference that there is not", f"{PPO} --reference.model ./before", ("./before", "no such folder")),
    Case(
        "a critic from a model that is no reward model",
        f"{PPO} --value-model model",
        ("value_model model", "not a reward model"),
    ),
    Case("a folder exported onto another", "export --model model --output judge", ("judge", "--overwrite")),
    Case("an alarm at 0", f"{PPO} --alarms.kl 0", ("alarms: kl is 0", "above 0")),
    Case("fewer than no reference samples", f"{PPO} --frontier.samples -1", ("frontier: samples is -1", "0 or more")),
    Case(
        "more weights than held-out scores",
        f"{PPO} --gold.functions rewards.py:score --gold.weights 1 2",
        ("gold.weights has 2", "1 function"),
    ),
    Case(
        "a held-out score without its column",
        f"{PPO} --gold.functions exact_match?answer=right",
        ("exact_match", "right"),
    ),
    Case("a report without a run", "report", ("no run", "tether report")),
    Case("a report of a folder that is no run", "report model", ("model", "holds no run")),
]

LABEL = "label --policy model --prompts.path prompts.jsonl --pairs 2 --sampling.max-new-tokens 4 --no-open --output"


def answered() -> None:
    """A set of pairs in which somebody has said something."""
    create_labels(Path("done.labels.db"), {}, [NewPair("ab", "c", "d")])
    with LabelSet(Path("done.labels.db"), writable=True) as labels:
        labels.answer("ann", 1, "skip")


STUDIO = [
    Case("a folder of runs that is not there", "studio nowhere", ("nowhere", "no such folder")),
    Case("a port that there is not", "studio . --port 99999", ("port is 99999", "65535")),
    Case("a token that can be guessed", "studio . --token 1234", ("token", "at least 8")),
    Case("an address that is not this machine's", "studio . --host 192.0.2.1 --port 0", ("192.0.2.1", "--port 0")),
    Case("pairs without a policy", "label --output x.labels.db", ("no policy", "--policy")),
    Case("pairs without prompts", "label --policy model --output x.labels.db", ("no prompts", "--prompts.path")),
    Case("a set of pairs of another name", f"{LABEL} pairs.db", ("output", "'pairs.db'", "NAME.labels.db")),
    Case("no pairs at all", f"{LABEL} x.labels.db --pairs 0", ("pairs is 0", "1 or more")),
    Case("a policy that there is not", f"{LABEL} x.labels.db --against ./other", ("./other", "no such folder")),
    Case("one judge, who cannot disagree", f"{LABEL} x.labels.db --judge judge", ("judge judge", "--members 4")),
    Case("a pool without a judge", f"{LABEL} x.labels.db --pool 9", ("pool", "judge")),
    Case(
        "answers that are always the same",
        f"{LABEL} x.labels.db --sampling.temperature 0",
        ("are the same", "--sampling.temperature"),
    ),
    Case(
        "pairs in place of answers",
        f"{LABEL} done.labels.db --overwrite",
        ("done.labels.db", "1 answer"),
        prepare=answered,
    ),
    Case(
        "labels that say nothing",
        "label --export done.labels.db --output p.jsonl",
        ("done.labels.db", "no preference"),
        prepare=answered,
    ),
    Case(
        "labels in another format",
        "label --export x.labels.db --output p.jsonl",
        ("x.labels.db", "damaged or no set of labels"),
        files={"x.labels.db": "prompt,chosen\n" * 99},
    ),
    Case("labels that are not there", "label --export x.labels.db --output p.jsonl", ("x.labels.db", "no such file")),
]

SECTIONS: dict[str, list[Case]] = {
    "Command line and configuration": SETTINGS,
    "Models": MODELS,
    "Tokenizers": TOKENIZERS,
    "Prompts and training rows": PROMPTS,
    "Preferences and reward models": PREFERENCES,
    "Rewards, before training": REWARDS,
    "Tasks": TASKS,
    "Details, references, adapters, alarms and reports": DETAILS,
    "The studio and labels": STUDIO,
    "Scorers, judges and reward models as rewards": SERVICES,
    "Rewards, in the third iteration": FAILING_REWARDS,
    "Scorers and judges, in the third iteration": FAILING_SERVICES,
    "Environments, before training": ENVIRONMENTS,
    "Environments, in the third iteration": FAILING_ENVIRONMENTS,
    "Runs and checkpoints": RUNS,
}
