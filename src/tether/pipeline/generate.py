"""`tether generate`: responses of a policy to prompts, printed to be read or written to be used.

Knows folders, prompts and the sampler; nothing of rewards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console

from tether.chat import said
from tether.episode import short_repr
from tether.errors import UserError
from tether.language.models import load_causal_lm, load_tokenizer
from tether.language.policy import LanguagePolicy
from tether.language.prompts import Prompt, PromptsConfig, load_prompts, prompts_from_rows
from tether.language.sampler import NotANumberError, Sampler, Samples, SamplingConfig
from tether.pipeline.opening import count
from tether.pipeline.opening_language import describe_policy, describe_tokenizer
from tether.pipeline.progress import Tally
from tether.positions import settle_positions
from tether.pretrained import check_vocabulary, context_length

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerateConfig:
    """Responses of a policy to prompts."""

    model: str = ""
    """Folder or hub name of the policy, such as the `policy/` of a checkpoint."""
    prompt: str | None = None
    """One prompt, instead of those of `prompts.path`."""
    samples: int = 1
    """Responses to each prompt."""
    output: str | None = None
    """File for the responses, one JSON object a line: prompt, response, terminated (it ended by itself, not by the
    length limit), log_prob (of the whole response), and the other columns of the prompt. None: print them."""
    overwrite: bool = False
    """Replace a file that is already there."""
    raw: bool = False
    """Print chat prompts as the model reads them, the chat template applied, instead of as turns."""
    seed: int = 0
    """Of the sampler."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:1. auto: cuda where there is one, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's parameters."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the hub. Off: such models are refused."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}, expected 1 or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 or more, and below 2^63")
        if self.prompt is not None and self.prompts.path:
            raise ValueError("prompt and prompts.path are both set: give one of them")
        if self.prompt is not None and (self.prompts.template is not None or self.prompts.column is not None):
            raise ValueError("prompts.template and prompts.column read a file: leave them out with prompt")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("prompt is empty, expected text")
        if self.raw and self.output is not None:
            raise ValueError("raw is about what is printed, but output writes a file: drop one")


@dataclass(frozen=True, repr=False)
class Response:
    """One response to one prompt.

    Attributes:
        token_ids: what was drawn, the eos included where it was.
        terminated: it ended by eos or a stop string; otherwise the length limit cut it off.
        log_prob: log π(y|x) of the whole response under the distribution that was sampled, in nats.
    """

    prompt: Prompt
    text: str
    token_ids: list[int]
    terminated: bool
    log_prob: float

    def __repr__(self) -> str:
        end = "" if self.terminated else ", cut off"
        words = f"{short_repr(self.prompt.text)} → {short_repr(self.text)}"
        return f"Response({words}, {len(self.token_ids)} tokens{end}, log π {self.log_prob:.2f})"

    def as_row(self) -> dict[str, Any]:
        """What is written of it."""
        row: dict[str, Any] = {"prompt": self.prompt.source, "response": self.text}
        row |= {"terminated": self.terminated, "log_prob": self.log_prob}
        return row | {name: value for name, value in self.prompt.columns.items() if name not in row}


def generate(config: GenerateConfig) -> list[Response]:
    """Sample the responses; write or print them as they come, and return them all.

    Raises:
        UserError: names the folder, file, row or field that cannot be used.
    """
    sampler = load_sampler(
        config.model, config.sampling, config.seed, config.device, config.dtype, config.trust_remote_code
    )
    prompts = _prompts(config, sampler)
    tally = tell_size(len(prompts), config.samples, config.sampling)
    responses: list[Response] = []
    console = Console(highlight=False, soft_wrap=True)
    with open_rows(config.output, config.overwrite) as file:
        for group in sample_responses(sampler, prompts, config.samples):
            responses += group
            for response in group:
                if file is not None:
                    write_row(file, response.as_row())
                else:
                    _show(console, response, config.raw)
            if file is not None:
                tally.update(len(responses) // config.samples)
    if config.output is not None:
        console.print(f"{len(responses):,} responses to {len(prompts):,} prompts: {config.output}", markup=False)
    return responses


def load_sampler(
    model: str, sampling: SamplingConfig, seed: int, device: str, dtype: str, trust_remote_code: bool
) -> Sampler:
    """A sampler for the policy in a folder or on the hub."""
    logger.info("loading %s", model or "the model")
    tokenizer = load_tokenizer(model, trust_remote_code)
    loaded = load_causal_lm(model, dtype, device, trust_remote_code)
    check_vocabulary(loaded, tokenizer, model)
    logger.info("%s; %s", describe_policy(loaded, model), describe_tokenizer(tokenizer))
    return Sampler(LanguagePolicy(loaded), tokenizer, sampling, seed)


def tell_size(prompts: int, samples: int, sampling: SamplingConfig) -> Tally:
    """Log how much there is to sample; the tally counts prompts."""
    logger.info(
        "%s × %s × up to %s",
        count(prompts, "prompt"),
        count(samples, "response"),
        count(sampling.max_new_tokens, "token"),
    )
    return Tally(prompts, "prompts")


def sample_responses(sampler: Sampler, prompts: Sequence[Prompt], samples: int) -> Iterator[list[Response]]:
    """Responses in the order of the prompts, `samples` to each, as many at once as the sampler's batch takes.

    Raises:
        UserError: the model gives NaN for a prompt.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    settle_positions(sampler.policy.models(), longest + sampler.config.max_new_tokens)
    size = max(1, sampler.config.batch_size // samples)
    for start in range(0, len(prompts), size):
        chosen = [prompt for prompt in prompts[start : start + size] for _ in range(samples)]
        drawn = sample_prompts(sampler, chosen)
        log_probs = drawn.log_probs.double().sum(dim=1).tolist()
        columns = (chosen, drawn.texts, drawn.response_ids, drawn.terminated.tolist(), log_probs)
        yield [Response(*values) for values in zip(*columns, strict=True)]


def sample_prompts(sampler: Sampler, prompts: Sequence[Prompt]) -> Samples:
    """A response to each prompt. Raises UserError, which names the prompt, where the model gives NaN for one."""
    try:
        return sampler.sample([prompt.token_ids for prompt in prompts])
    except NotANumberError as error:
        raise UserError(f"{prompts[error.index].place}: {error}") from error


def check_output(path: str, overwrite: bool) -> None:
    """Whether a file can be written there, to be asked before anything is computed; makes its folder."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path or 'output'}: {'a folder' if path else 'no name given'}, expected a file to write")
    if file.exists() and not overwrite:
        raise UserError(f"{path}: the file is already there; name another, or set `overwrite`")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {file.parent} is no folder ({error.strerror})") from error


@contextmanager
def open_rows(path: str | None, overwrite: bool) -> Iterator[TextIO | None]:
    """A file to write rows to as they come; None where there is no path."""
    if path is None:
        yield None
        return
    check_output(path, overwrite)
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below; the `try` must not cover the caller's code
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    with file:
        yield file


def write_row(file: TextIO, row: Mapping[str, Any]) -> None:
    """One line of JSON, on the disk at once; dates and the like, which JSON has not, as text."""
    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    file.flush()


def _prompts(config: GenerateConfig, sampler: Sampler) -> list[Prompt]:
    room = (context_length(sampler.policy.model), config.sampling.max_new_tokens)
    if config.prompt is not None:
        return prompts_from_rows([{"prompt": config.prompt}], config.prompts, sampler.tokenizer, *room)
    if not config.prompts.path:
        raise UserError("no prompts given: write one with --prompt, or name a file with --prompts.path")
    return load_prompts(config.prompts, sampler.tokenizer, *room)


def _show(console: Console, response: Response, raw: bool) -> None:
    end, source = "" if response.terminated else " […]", response.prompt.source
    console.rule(f"row {response.prompt.row}, log π {response.log_prob:.2f}", align="left", style="dim")
    if raw or isinstance(source, str):
        console.print(response.prompt.text, style="dim", markup=False)
    else:
        for message in source:
            console.print(f"{message['role']}: {said(message)}", style="dim", markup=False)
        console.print("assistant:", style="dim", markup=False, end=" ")
    console.print(response.text + end, markup=False)
