"""The reference policy: what the KL is measured against, where its weights are kept, and whether it follows the policy.

It stands still unless asked to move. It knows models and tokens; nothing of rewards or of β.
N = episodes, T = response tokens of the longest.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tether.errors import UserError
from tether.language.adapters import (
    POLICY,
    REFERENCE,
    adapter_weights,
    copy_adapters,
    in_reference,
    is_adapter,
    using,
)
from tether.language.models import fingerprint
from tether.language.policy import LanguagePolicy
from tether.language.reading import Reader
from tether.pretrained import DTYPES


@dataclass(frozen=True)
class ReferenceConfig:
    """The policy that the KL is measured against."""

    model: str = ""
    """Folder or hub name. Empty: `model` as it was before training, which LoRA has in memory already."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of its weights. None: that of the policy's. Rounding alone makes a KL, which starts above 0 then."""
    offload: Literal["none", "cpu", "disk"] = "none"
    """Where its weights are while nobody asks for its log-probabilities, which is most of an iteration. none: on the
    device. cpu: in the memory of the host. disk: in a file among the temporary ones (`TMPDIR`), gone with the run."""
    ema: float | None = None
    """The reference follows as an exponential moving average: after each iteration θ_ref ← ema·θ_ref + (1 − ema)·θ
    (the anchor of WARP, Ramé et al. 2024, which averages after each optimizer step). None: it does not."""
    reset_every: int | None = None
    """Iterations after which the reference becomes the policy as it then is (ProRL, Liu et al. 2025, which begins
    the optimizer anew as well; here it goes on). None: never."""

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}, expected 0 or more and below 1, or none")
        if self.reset_every is not None and self.reset_every < 1:
            raise ValueError(f"reset_every is {self.reset_every}, expected at least 1 iteration, or none")
        if self.ema is not None and self.reset_every is not None:
            raise ValueError("ema and reset_every are both set: the reference follows in one of the two ways")
        if self.offload == "disk" and self.moves:
            raise ValueError("offload is disk, but a reference that follows is kept in memory; expected cpu or none")

    @property
    def moves(self) -> bool:
        """Whether it follows the policy."""
        return self.ema is not None or self.reset_every is not None


class Reference(ABC):
    """A policy that is asked, never trained.

    Args:
        config: whether it follows the policy, and how.

    Attributes:
        fingerprint: SHA-256 of the weights that it began with; a run is resumed with the same ones.
    """

    fingerprint: str
    reader: Reader

    def __init__(self, config: ReferenceConfig | None = None) -> None:
        self.config = config or ReferenceConfig()
        self._iterations = 0  # of the policy's that it has been told of
        self._moved = False

    @abstractmethod
    def as_model(self) -> AbstractContextManager[PreTrainedModel]:
        """A model whose softmax is π_ref, for as long as the context lasts."""

    @abstractmethod
    def _weights(self) -> dict[str, Tensor]:
        """Those that move, by name."""

    @abstractmethod
    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put these tensors in the place of `_weights`, which are left as they are: a state may hold them still."""

    @abstractmethod
    def _weights_of(self, policy: LanguagePolicy) -> dict[str, Tensor]:
        """The policy's, by the names of `_weights`."""

    @torch.no_grad()
    def follow(self, policy: LanguagePolicy) -> None:
        """To be called once after each of the policy's iterations."""
        if not self.config.moves:
            return
        self._iterations += 1
        if self.config.ema is not None:
            own, theirs, step = self._weights(), self._weights_of(policy), 1.0 - self.config.ema
            self._move({name: weight.lerp(theirs[name].to(weight), step) for name, weight in own.items()})
        elif self.config.reset_every is not None and self._iterations % self.config.reset_every == 0:
            own, theirs = self._weights(), self._weights_of(policy)
            self._move({name: theirs[name].to(weight, copy=True) for name, weight in own.items()})

    def _move(self, weights: Mapping[str, Tensor]) -> None:
        self._set_weights(weights)
        self._moved = True

    def state_dict(self) -> dict[str, Any]:
        """The iterations that it knows of and, once it has moved, its weights; empty for one that stands still."""
        state: dict[str, Any] = {"iterations": self._iterations} if self.config.moves else {}
        return state | ({"weights": self._weights()} if self._moved else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._iterations = state.get("iterations", 0)
        if "weights" in state:
            # out of the file's memory map, aligned as torch does it: log-probabilities equal to the bit
            self._move({name: state["weights"][name].to(own, copy=True) for name, own in self._weights().items()})


class ModelReference(Reference):
    """A model of its own.

    Args:
        model: it is frozen, dropout off; nobody else should change it.
        config: see `ReferenceConfig`; its `model` is not read here.

    Raises:
        UserError: the reference follows, and is too coarse for that or of another shape than the policy.
    """

    def __init__(self, model: PreTrainedModel, config: ReferenceConfig | None = None) -> None:
        super().__init__(config)
        self.model = model.requires_grad_(False).eval()
        self._device = next(model.parameters()).device
        if self.config.dtype is not None:
            model.to(DTYPES[self.config.dtype])
        self.reader = Reader(model)
        if self.config.ema is not None and next(model.parameters()).dtype != torch.float32:
            raise UserError(
                "reference.ema: averaging needs weights in float32, which keep the small steps that others round away; "
                "set reference.dtype float32, or use reference.reset_every"
            )
        self._check_offload()
        self.fingerprint = fingerprint(model.parameters())
        self._away: dict[str, Tensor] = {}  # where offload is cpu
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if self.config.offload == "cpu":
            self._away = {name: parameter.data.cpu() for name, parameter in model.named_parameters()}
            self._drop()
        elif self.config.offload == "disk":
            self._folder = tempfile.TemporaryDirectory(prefix="tether-reference-")
            self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            with open(self._file, "wb") as file:
                for parameter in model.parameters():
                    file.write(_bytes(parameter.data.cpu().contiguous()))
            self._drop()

    def _check_offload(self) -> None:
        if self.config.offload == "cpu" and self._device.type == "cpu":
            raise UserError("reference.offload is cpu, where the run is already; expected disk or none")

    @property
    def _file(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "weights"

    def _read(self) -> Iterator[tuple[str, Tensor]]:
        """From the file, one by one: mapped into memory at once, the weights would be there twice."""
        with open(self._file, "rb") as file:
            for name, parameter in self.model.named_parameters():
                weight = torch.empty(self._shapes[name], dtype=parameter.dtype)
                file.readinto(_bytes(weight))
                yield name, weight

    def _drop(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)

    @contextmanager
    def as_model(self) -> Iterator[PreTrainedModel]:
        """The model, its weights brought back while the context lasts."""
        if self.config.offload == "none":
            yield self.model
            return
        parameters = dict(self.model.named_parameters())
        for name, weight in self._read() if self._folder is not None else self._away.items():
            parameters[name].data = weight.to(self._device)
        try:
            yield self.model
        finally:
            self._drop()

    def _weights(self) -> dict[str, Tensor]:
        if self.config.offload == "cpu":
            return dict(self._away)
        return {name: parameter.data for name, parameter in self.model.named_parameters()}

    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        if self.config.offload == "cpu":
            self._away = dict(weights)
            return
        for name, parameter in self.model.named_parameters():
            parameter.data = weights[name]

    def _weights_of(self, policy: LanguagePolicy) -> dict[str, Tensor]:
        theirs = {name: parameter.data for name, parameter in policy.model.named_parameters()}
        own = self._weights()
        if {n: w.shape for n, w in own.items()} != {n: w.shape for n, w in theirs.items()}:
            raise UserError(
                "the reference is to follow the policy, but is a model of another shape; drop reference.ema and "
                "reference.reset_every, or reference.model"
            )
        return theirs


class AdapterReference(Reference):
    """The policy's own model with its adapters off, or with frozen ones in their place: it costs no memory of a model.

    Args:
        model: the policy's, with adapters that no training of this run has touched yet.
        config: see `ReferenceConfig`; neither its `model` nor its `dtype` nor `offload` is for it.
        trained: the adapters had been trained before, and so belong to the model as it was before training.
    """

    def __init__(self, model: PreTrainedModel, config: ReferenceConfig | None = None, trained: bool = False) -> None:
        super().__init__(config)
        self.model = model
        self.reader = Reader(model)
        self.adapter = REFERENCE if trained or self.config.moves else None
        if self.adapter is not None:
            copy_adapters(model)
        if self.config.ema is not None and any(weight.dtype != torch.float32 for weight in self._weights().values()):
            raise UserError(
                "reference.ema: averaging needs weights in float32, which keep the small steps that others round away, "
                "but the adapters hold whole layers in another precision; set dtype float32, or use "
                "reference.reset_every"
            )
        began = [parameter for name, parameter in model.named_parameters() if not is_adapter(name)]
        self.fingerprint = fingerprint([*began, *(adapter_weights(model, REFERENCE).values() if trained else ())])

    def as_model(self) -> AbstractContextManager[PreTrainedModel]:
        """The policy's model, which is the policy again once the context ends."""
        return using(self.model, self.adapter)

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in adapter_weights(self.model, REFERENCE).items()}

    def _set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in adapter_weights(self.model, REFERENCE).items():
            parameter.data = weights[name]

    def _weights_of(self, policy: LanguagePolicy) -> dict[str, Tensor]:
        theirs = adapter_weights(policy.model, POLICY)
        return {in_reference(name): parameter.data for name, parameter in theirs.items()}


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.flatten().view(torch.uint8).numpy().data
