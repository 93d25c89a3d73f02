"""Where tensors lie, without an accelerator: nothing may mix a device's tensors with the CPU's.

torch's meta device stands for CUDA. It computes nothing, so what is read back is made up here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_blockwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edge_client.backends import torch_backend
from edge_client.backends.base import Level
from edge_client.backends.torch_backend import load_trainer
from edge_client.data import Example
from protocol.federation import (
    Adapter,
    Backbone,
    FederationSettings,
    Task,
    TaskKind,
    Training,
    WireDtype,
)
from protocol.methods import (
    Algorithm,
    FedDPA,
    FedSALoRA,
    FFALoRA,
    HetLoRA,
    HomLoRA,
    Hypergradient,
    LocalOnly,
    LowerOptimizer,
    PerFedAvg,
    PF2LoRA,
    PFedLoRA,
)
from quantization import backbone
from quantization.quantize import quantize
from quantization.schemes import Scheme
from tests.quantization.tiny import write_bert

ROWS = [Example(f"a {'fine' if i % 2 else 'dull'} film" + " so" * i, None, i % 2) for i in range(8)]
EXACT = PF2LoRA(Hypergradient.EXACT, LowerOptimizer.SGD, 0.1)
METHODS: list[Algorithm] = [
    *[PF2LoRA(kind) for kind in Hypergradient],
    replace(EXACT, lower_momentum=0.5),
    PF2LoRA(personal_rank_max=2),
    HomLoRA(),
    LocalOnly(),
    PerFedAvg(hessian_free=True),
    HetLoRA(rank_min=1),
    FFALoRA(),
    FedSALoRA(),
    FedDPA(),
    PFedLoRA(shared_width=8),
]
MOVES = ("aten::copy_", "aten::_to_copy")


class OneDevice(TorchDispatchMode):
    """Refuses what CUDA would: tensors of two devices in one operation, but numbers and copies."""

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        given = [one for one in tree_leaves((arguments, named)) if isinstance(one, Tensor)]
        devices = {one.device.type for one in given if one.dim()}
        assert len(devices) < 2 or function.name().startswith(MOVES), function.name()
        return function(*arguments, **(named or {}))


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a device gives back, for one that has nothing."""

    def made_up(name: str, value: Any) -> None:
        plain = getattr(Tensor, name)

        def read(tensor: Tensor, *arguments: Any) -> Any:
            if not tensor.is_meta:
                return plain(tensor, *arguments)
            return value(tensor) if callable(value) else value

        monkeypatch.setattr(Tensor, name, read)

    made_up("__float__", 0.5)
    made_up("__int__", 1)
    made_up("__bool__", True)
    made_up("cpu", lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype))
    # bitsandbytes keeps its table of 8-bit numbers where it was used first.
    quantize_blockwise(torch.zeros(256))
    # Which look at numbers, and at whether they are right.
    for module in (torch_backend, backbone):
        monkeypatch.setattr(module, "_prove", lambda *_: None)
    with OneDevice():
        yield


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), width=64, blocks=1)


def _settings(name: Path, algorithm: Algorithm, **training: Any) -> FederationSettings:
    own = isinstance(algorithm, PFedLoRA)
    return FederationSettings(
        "placement",
        None if own else Backbone(str(name), "sha256:" + "0" * 64),
        Task(TaskKind.SEQUENCE_CLASSIFICATION, ("dull", "fine"), 16),
        Adapter(rank=4, personal_rank=1),
        Training(local_steps=2, batch_size=4, clip_norm=0.1, **training),
        algorithm,
    )


def _live(settings: FederationSettings, name: Path, scheme: str = "none") -> None:
    """All that a device does with its model."""
    trainer = load_trainer(
        settings, backbone=str(name), scheme=scheme, device="meta", personal_seed=1
    )
    held = {*trainer._model.parameters(), *trainer._model.buffers()}
    assert all(tensor.is_meta for tensor in held)
    rows = trainer.encode(ROWS)
    base = trainer.common()
    for number in (1, 3):  # after the third round ranks follow
        trainer.set_common(base)
        trainer.train(rows, 2 * number, number)
        trainer.update_from(base)
    assert all(vector.is_meta for vector in trainer._state.vectors.values())
    trainer.set_personal(trainer.personal())
    trainer.set_optimizer_state(trainer.optimizer_state())
    trainer.personalise(rows)
    for level in Level:
        with trainer._at(level):
            assert len(trainer._logits(trainer.batch(rows))) == len(rows)
    with trainer._running_on({name: trainer._factors(name) for name in trainer._shape.layers}):
        trainer._logits(trainer.batch(rows))
    trainer.become(2)


@pytest.mark.parametrize("algorithm", METHODS, ids=lambda method: method.NAME)
def test_every_method_stays_on_its_device(bert: Path, algorithm: Algorithm) -> None:
    _live(_settings(bert, algorithm), bert)


@pytest.mark.parametrize("algorithm", [PF2LoRA(), EXACT], ids=["secant", "exact"])
@pytest.mark.parametrize("scheme", [scheme for scheme in Scheme if scheme is not Scheme.NONE])
def test_every_scheme_stays_on_its_device(bert: Path, scheme: Scheme, algorithm: Algorithm) -> None:
    saving = {"micro_batch_size": 2, "gradient_checkpointing": True}
    settings = _settings(bert, algorithm, **saving)
    _live(replace(settings, update_dtype=WireDtype.TOPK), bert, scheme.value)


def test_a_quantised_folder_comes_to_its_device(bert: Path, tmp_path: Path) -> None:
    quantize(str(bert), "nf4-double", tmp_path / "held", int8_embeddings=True)
    _live(_settings(bert, EXACT), tmp_path / "held", "nf4-double")
