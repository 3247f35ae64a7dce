"""What the speed and memory benchmarks share: models of given shapes with random weights, prompts, clocks and peaks.

No weights are downloaded: PPO costs the same whatever the weights are, once all responses have a given length.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import control
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2


@dataclass(frozen=True)
class Workload:
    """A model's shape, and what one iteration of PPO does with it; every response has all its tokens."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    key_value_heads: int
    mlp_width: int
    prompts: int
    samples: int  # responses to each prompt
    prompt_tokens: int
    response_tokens: int
    family: str = "llama"
    minibatches: int = 4
    epochs: int = 4

    @property
    def sequences(self) -> int:
        """Responses of an iteration."""
        return self.prompts * self.samples


WORKLOADS = {
    "tiny": Workload(512, 4, 128, 4, 4, 352, 64, 1, 16, 32),
    "15m": Workload(32_000, 6, 288, 6, 6, 768, 32, 1, 32, 64),
    "124m": Workload(50_257, 12, 768, 12, 12, 2048, 8, 1, 32, 64),
    "0.5b": Workload(151_936, 24, 896, 14, 2, 4864, 64, 8, 64, 512, family="qwen2"),  # Qwen2.5-0.5B; for a GPU
}


def make_model(workload: Workload, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """A causal language model of this shape with weights drawn at random (seed 0), output and input rows tied."""
    shape: dict[str, Any] = {
        "vocab_size": workload.vocabulary,
        "hidden_size": workload.width,
        "intermediate_size": workload.mlp_width,
        "num_hidden_layers": workload.layers,
        "num_attention_heads": workload.heads,
        "num_key_value_heads": workload.key_value_heads,
        "max_position_embeddings": max(2048, workload.prompt_tokens + workload.response_tokens),
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = Qwen2(Qwen2Config(**shape)) if workload.family == "qwen2" else LlamaForCausalLM(LlamaConfig(**shape))
    return model.to(device, dtype).eval()


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one word per id, "0" to str(V − 1); id 0 pads, id 2 is the eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", bos_token="1", eos_token="2")


def make_prompts(workload: Workload, seed: int = 0) -> list[list[int]]:
    """`prompts` lists of `prompt_tokens` ids drawn at random, each once."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        4, workload.vocabulary, (workload.prompts, workload.prompt_tokens), generator=generator
    ).tolist()


PRECISIONS = ("float32", "bfloat16", "bfloat16-weights")
"""Of matrix products and of parameters: both float32; products alone in bfloat16 (autocast); both in bfloat16."""


def make_ppo(workload: Workload, device: str = "cpu", precision: str = "float32", **learner: Any) -> tuple[Any, Any]:
    """Tether's world and learner for a workload; the optimizer's moments are in memory, as after its first step.

    Args:
        workload: the model, the prompts, the epochs and the minibatches. No token ends a response.
        device: where the model is.
        precision: one of `PRECISIONS`.
        learner: further settings of `LearnerConfig`.
    """
    from tether.language.policy import LanguagePolicy
    from tether.language.prompts import Prompt
    from tether.language.reference import ModelReference
    from tether.language.sampler import Sampler, SamplingConfig
    from tether.language.world import CollectConfig, LanguageWorld
    from tether.ppo import KLConfig, KLController, Learner, LearnerConfig
    from tether.rewards import Scores

    def reward(prompts: list[str], completions: list[str], ids: list[list[int]], columns: Any) -> Scores:
        scores = [float(len(text) % 7) for text in completions]
        return Scores(scores, {"length": scores})

    dtype = torch.bfloat16 if precision == "bfloat16-weights" else torch.float32
    policy = LanguagePolicy(make_model(workload, dtype, device), autocast=precision == "bfloat16")
    sampling = SamplingConfig(max_new_tokens=workload.response_tokens, batch_size=workload.sequences)
    sampler = Sampler(policy, make_tokenizer(workload.vocabulary), sampling)
    sampler.end_ids = torch.zeros(0, dtype=torch.long)
    texts = [(" ".join(map(str, ids)), tuple(ids)) for ids in make_prompts(workload)]
    prompts = [Prompt(text, ids, text, {}, row) for row, (text, ids) in enumerate(texts, start=1)]
    kl = KLController(KLConfig())
    collect = CollectConfig(prompts=workload.prompts, samples_per_prompt=workload.samples)
    reference = ModelReference(make_model(workload, dtype, device))
    world = LanguageWorld(policy, reference, sampler, prompts, reward, kl, collect)  # type: ignore[arg-type]
    config = LearnerConfig(epochs=workload.epochs, minibatches=workload.minibatches, **learner)
    ppo = Learner(policy, config, kl=kl, iterations=10**6)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ppo.optimizer.step()  # of no gradient, so nothing moves
    ppo.optimizer.zero_grad()
    return world, ppo


class PhaseMeter:
    """Seconds and peak bytes of each call of Tether's sampling, reference and learning, in the order of the calls."""

    def __init__(self, world: Any, learner: Any, device: str = "cpu") -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.bytes: dict[str, list[int]] = {}
        self._watch(world.sampler, "sample", "sampling")
        self._watch(world, "_trajectories", "reference")
        self._watch(learner, "update", "learning")
        from tether.memory import old_objects_left_alone

        frozen = contextlib.ExitStack()
        frozen.enter_context(old_objects_left_alone())
        atexit.register(frozen.close)  # some modules speak of leaks otherwise
        give_back_freed()
        reset_peak(device)
        self.base = peak_bytes(device)  # what is held before anything is done

    def _watch(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            results = []
            give_back_freed()
            reset_peak(self.device)
            took = seconds(lambda: results.append(function(*arguments)), self.device)
            self.seconds.setdefault(phase, []).append(took)
            self.bytes.setdefault(phase, []).append(peak_bytes(self.device))
            return results[0]

        setattr(owner, name, watched)


def give_back_freed() -> None:
    """Let the allocator give memory back that is free, so that it does not count as held: glibc alone keeps much."""
    gc.collect()
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def synchronise(device: str) -> None:
    """Wait until the device has done all that it was asked to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: str = "cpu") -> float:
    """How long one call takes, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - started


_tethers: list[Any] = []  # the measurement in this process, where it runs Tether, which begins the peak anew itself


def reset_peak(device: str = "cpu") -> None:
    """Begin to measure the peak anew: of the device's memory, or of the process's resident memory (Linux alone)."""
    gc.collect()
    if "tether.memory" in sys.modules:
        _tethers[:] = [sys.modules["tether.memory"].PeakMemory(device)]
    elif torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str = "cpu") -> int:
    """The most memory held at once since `reset_peak`; of a whole process where it was never called."""
    if _tethers:
        return int(_tethers[0].peak() * 2**20)
    if "tether.memory" in sys.modules and (peak := sys.modules["tether.memory"].process_peak(device)) is not None:
        return int(peak * 2**20)
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(FileNotFoundError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matrix_peak(
    device: str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None, plain: bool = False
) -> float:
    """FLOP/s of the fastest matrix product that torch offers here, best of several; `plain`: of `a @ b` alone."""
    size = size or (2048 if torch.device(device).type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: a @ b]
    if not plain and torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return max(2 * size**3 / seconds(product, device) for product in products for _ in range(8))


def memory_bandwidth(device: str = "cpu") -> float:
    """Bytes per second at which a large tensor is read, best of several."""
    tensor = torch.ones(2**26 if torch.device(device).type == "cpu" else 2**30, device=device)
    return max(tensor.numel() * 4 / seconds(tensor.sum, device) for _ in range(8))


def machine_line(device: str = "cpu", packages: Sequence[str] = ("torch", "transformers")) -> str:
    """Machine, threads, versions and date in one line."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = []
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return f"{name}; Python {platform.python_version()}, {', '.join(versions)}; {date.today()}"


def _processor() -> str:
    with contextlib.suppress(FileNotFoundError), open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    return platform.processor() or "unknown"


def load_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only, in the style of all pictures here. Raises MissingError without it."""
    try:
        return control.load_pyplot()
    except control.MissingError as error:
        raise control.MissingError(
            "the picture needs matplotlib: uv sync --group benchmarks, or leave out --png"
        ) from error


def check_request(arguments: Any) -> None:
    """Raises MissingError where `--device`, `--json` or `--png` ask for what is not there, before anything runs."""
    for file in filter(None, (arguments.json, arguments.png)):
        if not Path(file).absolute().parent.is_dir():
            raise control.MissingError(f"{file}: its folder does not exist")
    if arguments.png:
        load_pyplot()
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        raise control.MissingError(f"--device {arguments.device}: torch finds no GPU")


def write_json(path: str | None, content: Any) -> None:
    """Write figures where asked to."""
    if path:
        Path(path).write_text(json.dumps(content, indent=2) + "\n")
