"""Reward models: classifiers with one label that score a prompt with its completion, alone or as an ensemble.

Reads plain Hugging Face folders, with `score_normalisation.json` beside the weights where `tether reward` made them.
Needs torch and transformers; knows nothing of policies or of training.

N = texts, B = texts of a pass, L = tokens of its longest text, K = members of an ensemble.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from tether.errors import RewardError, UserError
from tether.rewards.verifiers import Text, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NORMALISATION_FILE = "score_normalisation.json"
MEMBER = "member-{}"  # the folder of each member of an ensemble
PAD = "<|pad|>"  # the pad token of a model that had none of its own
COMBINE = ("mean", "min", "mean-std")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Combine = Literal["mean", "min", "mean-std"]


# ---- normalisation and ensembles -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Normalisation:
    """What makes scores have mean 0 and standard deviation 1 on reference samples.

    The scores of each member are normalised first, as a Bradley–Terry score is known only up to a constant and members
    would not agree on it; what they are combined to is normalised again. For mean − k·std the moments of the members'
    mean m and standard deviation s are kept, which fit every k: its mean is E[m] − k·E[s], its variance
    Var[m] − 2k·Cov[m, s] + k²·Var[s].

    Attributes:
        means: (K,) of each member's scores on the reference samples.
        stds: (K,) their standard deviations.
        mean: (mean, variance) of the members' mean.
        min: (mean, variance) of the members' minimum.
        spread: (mean, variance, covariance with the members' mean) of the members' standard deviation.
        samples: how many reference samples there were.
        source: what they were.
    """

    means: tuple[float, ...]
    stds: tuple[float, ...]
    mean: tuple[float, float] = (0.0, 1.0)
    min: tuple[float, float] = (0.0, 1.0)
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)
    samples: int = 0
    source: str = ""

    @staticmethod
    def of(scores: Tensor, source: str) -> Normalisation:
        """From the raw scores (K, N) of the members on N reference samples."""
        scores = scores.double()
        means, stds = scores.mean(dim=1), scores.std(dim=1, correction=0)
        stds = torch.where(stds > 0, stds, torch.ones_like(stds))  # a member that says the same of everything
        each = (scores - means[:, None]) / stds[:, None]
        mean, least, spread = each.mean(dim=0), each.amin(dim=0), each.std(dim=0, correction=0)
        covariance = float(((mean - mean.mean()) * (spread - spread.mean())).mean())
        return Normalisation(
            tuple(means.tolist()),
            tuple(stds.tolist()),
            _moments(mean),
            _moments(least),
            (*_moments(spread), covariance),
            scores.shape[1],
            source,
        )

    @staticmethod
    def identity(members: int) -> Normalisation:
        """Leaves scores as they are."""
        return Normalisation((0.0,) * members, (1.0,) * members)

    def combine(self, scores: Tensor, how: Combine = "mean", k: float = 1.0) -> Tensor:
        """One normalised score (N,) out of the members' raw scores (K, N), as float64."""
        shape = (len(self.means), 1)
        means = torch.tensor(self.means, dtype=torch.float64).reshape(shape)
        stds = torch.tensor(self.stds, dtype=torch.float64).reshape(shape)
        each = (scores.double().cpu() - means) / stds
        if how == "mean":
            combined, (mean, variance) = each.mean(dim=0), self.mean
        elif how == "min":
            combined, (mean, variance) = each.amin(dim=0), self.min
        else:
            combined = each.mean(dim=0) - k * each.std(dim=0, correction=0)
            mean = self.mean[0] - k * self.spread[0]
            variance = self.mean[1] - 2 * k * self.spread[2] + k**2 * self.spread[1]
        return (combined - mean) / (math.sqrt(variance) if variance > 0 else 1.0)

    def member(self, index: int) -> Normalisation:
        """That of one member alone."""
        return Normalisation((self.means[index],), (self.stds[index],), samples=self.samples, source=self.source)

    def save(self, folder: Path) -> None:
        """Write `score_normalisation.json`."""
        text = json.dumps({"members": len(self.means), **asdict(self)}, indent=2)
        (folder / NORMALISATION_FILE).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Normalisation | None:
        """Read it back; None where the folder has none.

        Raises:
            UserError: the file is there, and is not what `save` writes.
        """
        file = folder / NORMALISATION_FILE
        if not file.is_file():
            return None
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            return _normalisation(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}: no normalisation of scores ({_one_line(error)}); copy it again from the trained model"
            ) from error


def _moments(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.var(correction=0))


def _normalisation(data: Mapping[str, Any]) -> Normalisation:
    numbers = {name: tuple(map(float, data[name])) for name in ("means", "stds", "mean", "min", "spread")}
    lengths = [len(numbers[name]) for name in ("mean", "min", "spread")]
    if lengths != [2, 2, 3] or not 0 < len(numbers["means"]) == len(numbers["stds"]):
        raise ValueError("a list has the wrong length")
    if not all(math.isfinite(number) for values in numbers.values() for number in values):
        raise ValueError("a number is not finite")
    if min(numbers["stds"]) <= 0:
        raise ValueError("a standard deviation is not above 0")
    return Normalisation(**cast(dict[str, Any], numbers), samples=int(data["samples"]), source=str(data["source"]))


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_classifier(
    path: str,
    dtype: str = "float32",
    device: str = "cpu",
    new_head_seed: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one label, in evaluation mode (dropout off), and its tokenizer.

    Args:
        path: folder or hub name.
        dtype: float32, bfloat16 or float16.
        device: a torch device.
        new_head_seed: a model without such a head, such as a causal LM, gets one: normal weights of standard deviation
            1/√(hidden size + 1) drawn from this seed (Stiennon et al. 2020), no bias. None: that is an error.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: the folder, its tokenizer or its weights cannot be used, or are not of such a model.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    _check_files(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UserError(f"{path}: no model and tokenizer could be loaded ({_one_line(error)})") from error
    architectures = getattr(config, "architectures", None) or []
    classifier = any("SequenceClassification" in name for name in architectures)
    if new_head_seed is None and not classifier:
        found = f" ({architectures[0]})" if architectures else ""
        raise UserError(f"{path}: not a reward model{found}; expected one with a head of one label: `tether reward`")
    if classifier and config.num_labels != 1:
        raise UserError(f"{path}: a classifier of {config.num_labels} labels; expected a reward model, which has one")
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):  # what transformers makes of no file at all
        raise UserError(f"{path}: the folder has no tokenizer; save one beside the model")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has neither a pad nor an eos token; set one of them")
    try:
        with torch.random.fork_rng(devices=[]):  # the head that is drawn here is drawn again below
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                num_labels=1,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
        model.to(device)
    except Exception as error:  # of transformers, safetensors and torch
        raise UserError(f"{path}: no reward model could be loaded ({_one_line(error)})") from error
    _check_weights(path, model, loading["missing_keys"], None if classifier else new_head_seed)
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(f"{path}: the tokenizer has token ids up to {largest}, but the model embeds only {rows}")
    _agree_on_padding(model, tokenizer, classifier)
    for parameter in model.parameters():  # out of the memory map, aligned as torch does it: scores equal to the bit
        parameter.data = parameter.data.clone()
    return model.eval(), tokenizer


def _agree_on_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, classifier: bool) -> None:
    """The score is read at the last token that is not padding, by the id in the model's configuration.

    A trained reward model keeps the id that it was trained with. A new one gets a pad token of its own where padding
    would be eos: that would hide the eos, and it is at a text's end, which looks alike in all, that a score is learned
    best.
    """
    known = model.config.get_text_config().pad_token_id
    if classifier:
        name = None if known is None else tokenizer.convert_ids_to_tokens(known)
        tokenizer.pad_token = name or tokenizer.pad_token or tokenizer.eos_token
    elif tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD})
        embeddings = model.get_input_embeddings().weight
        if tokenizer.pad_token_id >= embeddings.shape[0]:
            with torch.random.fork_rng(devices=[]):
                model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
            with torch.no_grad():  # attention never sees it
                model.get_input_embeddings().weight[tokenizer.pad_token_id].zero_()
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id


def _check_files(path: str) -> None:
    """A local folder must be one of a model whose weights are safetensors: those of pickles are never read."""
    if not path:
        raise UserError("no reward model was given; name a folder or a hub name")
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{path}: a file; expected a model folder or a hub name like owner/model")
        if path.startswith(("/", ".", "~")) or path.endswith("/") or path.count("/") > 1:
            raise UserError(f"{path}: no such folder; expected a model folder or a hub name like owner/model")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{path}: the folder has no config.json; expected a model saved with save_pretrained")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{path}: the folder has no model.safetensors; expected a model saved with save_pretrained")


def _check_weights(path: str, model: PreTrainedModel, missing: Sequence[str], new_head_seed: int | None) -> None:
    """Every weight was read, but for a head that is to be new: that is drawn here."""
    prefix = model.base_model_prefix + "."
    trunk = sorted(name for name in missing if name.startswith(prefix))
    head = sorted(name for name in missing if not name.startswith(prefix))
    if trunk or (head and new_head_seed is None):
        name = (trunk or head)[0]
        raise UserError(
            f"{path}: the weights do not fit config.json: {len(missing)} tensors missing ({name}); save the model again"
        )
    if head and new_head_seed is not None:
        generator = torch.Generator().manual_seed(new_head_seed)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in head:
                weight = parameters[name]
                if weight.ndim < 2:
                    weight.zero_()
                else:
                    drawn = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[-1] + 1)
                    weight.copy_(drawn)
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"{path}: the weights hold NaN or infinity: {name}; train the model again")


# ---- texts to scores -------------------------------------------------------------------------------------------------


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each prompt with its completion, as a reward model reads them.

    Text is tokenized as one, with the special tokens that the tokenizer adds by habit, and ended by eos where padding
    is another token, where the score is read (padding with eos would hide it). Messages
    go through the chat template and stay as it ends them.

    Args:
        tokenizer: the reward model's.
        prompts: (N,) texts, or lists of messages.
        completions: (N,) of the same kinds; a text after messages is a message of the assistant.
        names: (N,) what messages call them. None: `completion 0` and so on.

    Raises:
        RewardError: the chat template is missing or refuses the messages, or a text has no token.
    """
    names = names or [f"completion {index}" for index in range(len(completions))]
    texts, chats = [], []
    for prompt, completion, name in zip(prompts, completions, names, strict=True):
        chats.append(not isinstance(prompt, str))
        if isinstance(prompt, str):
            texts.append(prompt + text_of(completion))
        else:
            texts.append(_rendered(tokenizer, prompt, completion, name))
    ids: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        chosen = [index for index, is_chat in enumerate(chats) if is_chat is chat]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=not chat, verbose=False)["input_ids"]
            for index, found in zip(chosen, encoded, strict=True):
                ids[index] = list(found)
    eos = tokenizer.eos_token_id
    for index, found in enumerate(ids):
        if not chats[index] and eos is not None and eos != tokenizer.pad_token_id and found[-1:] != [eos]:
            found.append(eos)
        if not found:
            raise RewardError(f"{names[index]}: the tokenizer makes no token of {texts[index]!r:.40}")
    return ids


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, where: str) -> str:
    if not tokenizer.chat_template:
        raise RewardError(
            f"{where} is of chat messages, but the tokenizer of the reward model "
            f"{tokenizer.name_or_path} has no chat template: train it from a model that has one"
        )
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    try:
        return str(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False))
    except Exception as error:  # a template is a program of its author's: it may raise anything
        raise RewardError(f"{where}: the chat template refuses the messages: {_one_line(error)}") from error


def score_tokens(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], autocast: bool = False) -> Tensor:
    """Raw scores (B,) of one pass, float32; padded on the right, with gradients where they are on."""
    pad = model.config.get_text_config().pad_token_id
    longest = max(map(len, token_ids))
    inputs = torch.full((len(token_ids), longest), pad, dtype=torch.long)  # (B, L)
    attended = torch.zeros((len(token_ids), longest), dtype=torch.long)
    for row, ids in enumerate(token_ids):
        inputs[row, : len(ids)] = torch.tensor(ids)
        attended[row, : len(ids)] = 1
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output = model(input_ids=inputs.to(device), attention_mask=attended.to(device), **options)
    return output.logits[:, 0].float()


def passes(lengths: Sequence[int], most_tokens: int) -> Iterator[list[int]]:
    """Indices in passes of about equal lengths, each of at most `most_tokens` tokens, padding included, or one text."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    chosen: list[int] = []
    for index in order:
        if chosen and (len(chosen) + 1) * lengths[index] > most_tokens:
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


@torch.inference_mode()
def score_all(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], most_tokens: int = 8192) -> Tensor:
    """Raw scores (N,) on the CPU, in the order of `token_ids`, `most_tokens` tokens at a time."""
    scores = torch.zeros(len(token_ids))
    for chosen in passes([len(ids) for ids in token_ids], most_tokens):
        scores[torch.tensor(chosen)] = score_tokens(model, [token_ids[index] for index in chosen]).cpu()
    return scores


def context_of(model: PreTrainedModel) -> int | None:
    """Longest text in tokens that the model has positions for, None where its configuration names none."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


class RewardModel:
    """A reward model or an ensemble of them, as `tether reward` saves it; any classifier with one label will do.

    Args:
        path: folder or hub name of a reward model, or a folder with `member-0`, `member-1`, ….
        combine: `mean`, `min` or `mean-std` (mean − k·standard deviation) over the members of an ensemble (Coste et al.
            2023); the same for a single model.
        k: of `mean-std`.
        normalise: scores of mean 0 and standard deviation 1 on the samples it was normalised on. A model without
            `score_normalisation.json` gives its raw scores, and the log says so.
        truncate: texts longer than the model's context lose their beginning. Off: they are an error.
        dtype: precision of the weights.
        device: a torch device.
        most_tokens: tokens (padding included) that go through a member at once.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        combine: Combine = "mean",
        k: float = 1.0,
        normalise: bool = True,
        truncate: bool = False,
        dtype: str = "float32",
        device: str = "cpu",
        most_tokens: int = 8192,
        trust_remote_code: bool = False,
    ) -> None:
        if combine not in COMBINE:
            raise UserError(f"reward model: combine is {combine!r}, expected one of {', '.join(COMBINE)}")
        if not 0 <= k < math.inf:
            raise UserError(f"reward model: k is {k}, expected 0 or more")
        self.path, self.combine, self.k = str(path), combine, k
        self.truncate, self.most_tokens = truncate, most_tokens
        folders = member_folders(Path(path)) or [Path(path)]
        names = [str(folder) for folder in folders] if len(folders) > 1 or folders[0].is_dir() else [str(path)]
        loaded = [load_classifier(name, dtype, device, None, trust_remote_code) for name in names]
        self.members = [model for model, _ in loaded]
        self.tokenizers = [tokenizer for _, tokenizer in loaded]
        self.normalisation = Normalisation.identity(len(loaded))
        if normalise:
            found = Normalisation.load(Path(path)) or _from_config(self.members)
            if found is None:
                logger.info("%s: no %s: its scores are used as they are", path, NORMALISATION_FILE)
            elif len(found.means) != len(loaded):
                raise UserError(
                    f"{Path(path) / NORMALISATION_FILE}: of {len(found.means)} members, but there are {len(loaded)}"
                )
            else:
                self.normalisation = found

    def raw(self, prompts: Sequence[Text], completions: Sequence[Text], names: Sequence[str] | None = None) -> Tensor:
        """Scores (K, N) of each member, before normalisation.

        Args:
            prompts: (N,) texts, or lists of messages.
            completions: (N,) of the same kinds.
            names: (N,) what messages call them. None: `completion 0` and so on.

        Raises:
            RewardError: a text is longer than the context, or its messages cannot be rendered.
        """
        scores = []
        for model, tokenizer in zip(self.members, self.tokenizers, strict=True):
            token_ids = encode(tokenizer, prompts, completions, names)
            room = context_of(model)
            for index, ids in enumerate(token_ids):
                if room is None or len(ids) <= room:
                    continue
                if not self.truncate:
                    name = f"completion {index}" if names is None else names[index]
                    raise RewardError(
                        f"{name}: with its prompt {len(ids)} tokens, but the context of the reward model {self.path} "
                        f"is {room}: shorten them, or set its option `truncate`"
                    )
                token_ids[index] = ids[-room:]
            scores.append(score_all(model, token_ids, self.most_tokens))
        return torch.stack(scores)

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], names: Sequence[str] | None = None
    ) -> list[float]:
        """One normalised score for each of N prompts with its completion; arguments and errors as in `raw`."""
        if not prompts:
            return []
        combined = self.normalisation.combine(self.raw(prompts, completions, names), self.combine, self.k)
        return [float(score) for score in combined]

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """`score`, by the calling convention of reward functions."""
        return self.score(prompts, completions)


def _from_config(members: Sequence[PreTrainedModel]) -> Normalisation | None:
    """What the configuration of a single model says, which comes with it from the hub too."""
    said = getattr(members[0].config, "score_normalisation", None) if len(members) == 1 else None
    if not isinstance(said, dict) or not said.get("std", 0) > 0:
        return None
    return Normalisation((float(said["mean"]),), (float(said["std"]),))


def member_folders(path: Path) -> list[Path]:
    """`member-0`, `member-1`, … of an ensemble's folder; empty where it is none."""
    folders: list[Path] = []
    while (folder := path / MEMBER.format(len(folders))).is_dir():
        folders.append(folder)
    return folders


@dataclass(frozen=True)
class ModelReward:
    """The score of a reward model: what `reward_model?path=runs/reward/model` names."""

    offline: ClassVar[bool] = False
    """Not tried on all prompts before a run: unlike that of a verifier, its work costs something."""

    path: str
    """Folder or hub name of a reward model, or of an ensemble that `tether reward` trained."""
    combine: str = "mean"
    """Score of an ensemble: `mean`, `min` or `mean-std`, the mean less `k` standard deviations."""
    k: float = 1.0
    """Of `mean-std`."""
    normalise: bool = True
    """Mean 0 and standard deviation 1 on the samples that the model was normalised on."""
    truncate: bool = False
    """Texts longer than the model's context lose their beginning; otherwise they are an error."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda."""
    dtype: str = "float32"
    """Precision of the weights."""
    model: RewardModel = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model = RewardModel(
            self.path,
            cast(Combine, self.combine),
            self.k,
            normalise=self.normalise,
            truncate=self.truncate,
            dtype=self.dtype,
            device=self.device,
        )
        object.__setattr__(self, "model", model)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """One score per completion."""
        return self.model.score(prompts, completions)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
