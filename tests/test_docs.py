"""What the pages for users show is run, and what they name exists.

A comment on the line above a fenced block says what is done with it; the reader of the page does not see it.

    <!-- file: NAME -->   the block is written to NAME
    <!-- run -->          its commands, or its Python, are run and must succeed
    <!-- run: 2 -->       its last command must end with this exit code
    <!-- run, where there is LIBRARY -->   the same; passed over where this library is not installed
    <!-- prints -->       each of its lines is printed by the block that was run before

The blocks of a page are run in its order, in an empty folder that holds the files of `examples/`, a tiny language model
`my-model` and a tiny `my-reward-model`. Commands run in this process: a start of Python for each would take minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tether.cli import COMMANDS, main
from tether.memory import process_peak
from tether.pipeline.control import ControlConfig, ControlEvalConfig
from tether.pipeline.evaluate import EvalConfig
from tether.pipeline.generate import GenerateConfig
from tether.pipeline.ppo import PPOConfig
from tether.pipeline.sft import SFTConfig

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {page: page.name for page in PAGES}
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class Block:
    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(match["mark"] or "", match["language"], match["text"]) for match in found]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, continuation lines joined, comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


RUN = [page for page in PAGES if any(block.mark.startswith("run") for block in blocks(page))]


# What is pointed to is there --------------------------------------------------------------------------------------

POINTER = re.compile(r"\[`(?P<name>\w+)`\]\((?:\.\./)?(?P<file>src/[\w/]+\.py)#L(?P<line>\d+)\)")
"""A link to the line of a source file that defines a name."""


def definition(file: str, name: str) -> int:
    """The line, from 1, on which a source file defines a class, function or method."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return next(n for n, line in enumerate(lines, start=1) if re.match(rf"\s*(class|def) {name}\b", line))


@pytest.mark.parametrize("page", [p for p in PAGES if POINTER.search(p.read_text(encoding="utf-8"))], ids=NAMES.get)
def test_pointers_to_lines_of_code_meet_the_definition(page: Path) -> None:
    """TETHER_WRITE_DOCS=1 writes the lines anew."""
    text = page.read_text(encoding="utf-8")

    def mended(match: re.Match[str]) -> str:
        return match[0].replace(f"#L{match['line']}", f"#L{definition(match['file'], match['name'])}")

    expected = POINTER.sub(mended, text)
    if os.environ.get("TETHER_WRITE_DOCS"):
        page.write_text(expected, encoding="utf-8")
    else:
        assert text == expected


# What is shown is run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my-model`, whose tokens are bytes, and `my-reward-model`; weights are random."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = {text: index for index, text in enumerate(["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder / "my-reward-model")
    for name in ("my-model", "my-reward-model"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def workplace(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a page's reader stands in."""
    shutil.copytree(tiny_models, tmp_path, dirs_exist_ok=True)
    shutil.copytree(EXAMPLES, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:  # `import rewards` of one page is not that of the next
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    program, *arguments = words
    if program == "tether":
        try:
            return main(arguments)
        except SystemExit as ended:  # --help
            return int(ended.code or 0)
    assert program == "python", f"{shlex.join(words)}: only tether and python are run"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


LONG = {"control.md", "lora.md", "rewards.md"}  # pages whose commands take seconds


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow) if p.name in LONG else p for p in RUN], ids=NAMES.get
)
def test_what_a_page_shows_is_run(
    page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    printed = ""
    for block in blocks(page):
        mark, _, library = block.mark.partition(", where there is ")
        if library and importlib.util.find_spec(library) is None:
            continue
        kind, _, value = mark.partition(": ")
        if kind == "file":
            (workplace / value).write_text(block.text, encoding="utf-8")
        elif kind == "prints":
            missing = [line for line in block.text.splitlines() if line not in printed]
            assert not missing, f"{page.name}: not printed: {missing}; printed was:\n{printed}"
        elif kind == "run" and block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
            printed = "".join(capfd.readouterr())
            for said in re.findall(r"^ *print\(.*\)  # (.+)$", block.text, re.M):
                assert said in printed.splitlines(), f"{page.name}: not printed: {said}; printed was:\n{printed}"
        elif kind == "run":
            codes = [run_command(words, monkeypatch) for words in commands(block.text)]
            printed = "".join(capfd.readouterr())
            expected = [0] * (len(codes) - 1) + [int(value or 0)]
            assert codes == expected, f"{page.name}: {codes}:\n{block.text}\n{printed}"
        else:
            assert kind in ("", "run"), f"{page.name}: no such mark: {block.mark}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_files_that_a_page_shows_are_those_of_the_examples(page: Path) -> None:
    """Python functions, docstrings included, and data; an example may say more around them."""
    for block in blocks(page):
        name = block.mark.removeprefix("file: ")
        if block.mark.startswith("file: ") and (EXAMPLES / name).exists():
            example = (EXAMPLES / name).read_text(encoding="utf-8")
            for part in block.text.strip().split("\n\n\n"):
                assert part in example, f"{page.name}: {name} differs from the one in examples/"


def test_metrics_of_a_run_are_all_explained(workplace: Path) -> None:
    """And no metric is explained that no run has; those with a condition are named here."""
    flags = ["--iterations", "1", "--overwrite"]
    names: set[str] = set()
    filtering = ["--collect.filter-prompts", "--collect.samples-per-prompt", "2", "--collect.max-draws", "2"]
    held_out = ["--gold.functions", "rewards.py:correct", "rewards.py:correct"]
    for changes in ([], ["--kl.placement", "loss"], filtering, held_out):
        assert main(["ppo", "--config", "ppo.yaml", *flags, *changes]) == 0
        names |= json.loads((workplace / "runs/arithmetic/metrics.jsonl").read_text()).keys()
    names = {re.sub("^(score|gold)/.*", r"\1/NAME", name) for name in names if name != "iteration"}
    names = {re.sub("^(time|memory)/.*", r"\1/…", name) for name in names}
    names |= {"memory/…"} if process_peak() is None else set()
    assert {span for row in table(ROOT / "docs/run-folder.md", "metric") for span in spans(row[0])} == names


# What is named exists ---------------------------------------------------------------------------------------------


def table(page: Path, column: str) -> list[list[str]]:
    """The rows of the tables that have this column, its cell first."""
    rows: list[list[str]] = []
    place: int | None = None
    header = True
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = True
        elif header:
            place, header = cells.index(column) if column in cells else None, False
        elif place is not None and set(line) - set("|- :"):
            rows.append([cells[place], *cells])
    return rows


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def fields(config: type) -> dict[str, Any]:
    """`name` and `section.name` of every field, with its default."""
    found: dict[str, Any] = {}
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= {f"{field.name}.{name}": default for name, default in fields(hints[field.name]).items()}
        else:
            found[field.name] = field.default
    return found


PPO_FIELDS = fields(PPOConfig)
CONTROL_FIELDS = fields(ControlConfig)
OTHERS = (SFTConfig, EvalConfig, GenerateConfig, ControlEvalConfig)
ALL_FIELDS = PPO_FIELDS.keys() | CONTROL_FIELDS.keys() | {name for config in OTHERS for name in fields(config)}


@pytest.mark.parametrize("name", ["configuration.md", "from-trl.md"])
def test_tables_of_settings_name_fields(name: str) -> None:
    rows = table(ROOT / "docs" / name, "Tether")
    assert len(rows) > 10
    for row in rows:
        named = [span for span in spans(row[0]) if not span.startswith("tether ")]
        assert named or "tether " in row[0], row
        assert set(named) <= PPO_FIELDS.keys(), row


def test_the_configuration_page_names_every_field_but_adams() -> None:
    named = {span for row in table(ROOT / "docs/configuration.md", "Tether") for span in spans(row[0])}
    left_out = PPO_FIELDS.keys() - named
    rare = {"trust_remote_code", "prompts.split", "prompts.max_tokens", "learner.weight_decay"}
    assert left_out == rare | {f"learner.adam_{name}" for name in ("beta1", "beta2", "epsilon")}


def test_the_page_on_control_names_fields_with_their_defaults() -> None:
    rows = table(ROOT / "docs/control.md", "setting")
    named = [span for row in rows for span in spans(row[0])]
    assert set(named) <= CONTROL_FIELDS.keys()
    sections = ("environments.", "network.", "collect.")
    assert {name for name in CONTROL_FIELDS if name.startswith(sections)} <= set(named)
    for row in rows:
        for name, text in zip(spans(row[0]), spans(row[3]), strict=True):
            default = functools.reduce(getattr, name.split("."), ControlConfig())
            assert text == (str(default).lower() if isinstance(default, bool) else str(default)), row


def test_defaults_in_the_table_for_users_of_trl_are_the_defaults() -> None:
    for row in table(ROOT / "docs/from-trl.md", "Tether"):
        named, shown = spans(row[0]), [part.strip(" `") for part in row[4].split(",")]
        if len(named) != len(shown):
            continue  # "the same", or none of one field's own
        for name, text in zip(named, shown, strict=True):
            default = PPO_FIELDS.get(name)
            if isinstance(default, float | int) and not isinstance(default, bool) and text[:1].isdigit():
                assert float(text) == default, row


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_sections_and_flags_in_the_text_exist(page: Path) -> None:
    sections = {name.split(".")[0] for name in ALL_FIELDS if "." in name}
    for span in spans(prose(page)):
        for name in re.findall(rf"(?:^|--)((?:{'|'.join(sections)})\.[a-z0-9_-]+)", span):
            positive = name.replace(".no-", ".").replace("-", "_")
            assert positive in ALL_FIELDS or name.endswith((".py", ".json", ".jsonl", ".db")), f"{page.name}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_links_between_pages_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor and place.suffix == ".md":  # lines of source files are pointers, which have a test of their own
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_commands_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.M))
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.M))
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_commands_of_tether_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"(?:^|`)tether ([a-z]+)", text, re.M):
        assert command in COMMANDS, f"{page.name}: tether {command}"


def test_every_page_can_be_found_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)\s#]+)\)", prose(ROOT / "README.md")))
    assert {os.path.relpath(page, ROOT) for page in PAGES} - {"README.md"} <= linked
