"""Models from a folder's configuration, through transformers: with its weights, or without any."""

from __future__ import annotations

import pickle  # nosec B403 # for its error alone
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from quantization.errors import BackboneError, brief
from quantization.names import is_below
from quantization.tasks import TaskKind

# Some models keep a few of their positions for themselves, such as RoBERTa's two.
POSITIONS_KEPT: Final = 8
_READERS: Final[dict[TaskKind, Any]] = {
    TaskKind.SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    TaskKind.CAUSAL_LM: AutoModelForCausalLM,
    TaskKind.QUESTION_ANSWERING: AutoModelForQuestionAnswering,
}


def read_model(
    folder: Path, kind: TaskKind, label_count: int, attention: str | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model with its head as transformers left it, and the names of the head's modules.

    Raises:
        BackboneError: weights are absent, or the architecture does not know the task.
    """
    config = _read_config(folder, kind, label_count)
    try:
        with _quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, report = _READERS[kind].from_pretrained(
                folder,
                config=config,
                attn_implementation=attention,
                dtype="auto",
                ignore_mismatched_sizes=True,  # a checkpoint's own head; others are refused below
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                key_mapping=_renamed(kind, config),
            )
    except Exception as error:  # as many kinds as there are architectures
        raise _unreadable(folder, kind, error) from error
    found = head_modules(model, kind)
    _forbid_gaps(folder, report, found)
    _drop_idle_biases(model, kind, found)
    return model, found


def build_model(
    folder: Path, kind: TaskKind, label_count: int, attention: str | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The same model on the meta device: shapes without a byte behind them.

    Raises:
        BackboneError: the architecture does not know the task.
    """
    config = _read_config(folder, kind, label_count)
    try:
        with _quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = _READERS[kind].from_config(
                config,
                attn_implementation=attention,
                dtype=torch.float32,
                trust_remote_code=False,
            )
            model.tie_weights()  # which transformers 5.0 leaves out of a model without bytes
    except Exception as error:
        raise _unreadable(folder, kind, error) from error
    found = head_modules(model, kind)
    _drop_idle_biases(model, kind, found)
    return model, found


def head_modules(model: PreTrainedModel, kind: TaskKind) -> tuple[str, ...]:
    """Top-level modules with parameters beside the base model; none for a causal LM."""
    if kind.outputs(0) is None:
        return ()
    return tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )


def _drop_idle_biases(model: Any, kind: TaskKind, head_modules: tuple[str, ...]) -> None:
    """Leave out what a softmax over tokens does not see: the same number added to every token.

    Its gradient is what rounding leaves, and Adam would make whole steps of that.
    """
    if kind is not TaskKind.QUESTION_ANSWERING:
        return
    for name in head_modules:
        if isinstance(head := model.get_submodule(name), nn.Linear):
            head.register_parameter("bias", None)


def _renamed(kind: TaskKind, config: Any) -> dict[str, str] | None:
    """Names of a checkpoint that this kind's model has otherwise, for transformers to change.

    Its Llama that answers questions calls `transformer` what every Llama checkpoint calls `model`.
    """
    if kind is not TaskKind.QUESTION_ANSWERING:
        return None
    readers: tuple[Any, Any] = (_READERS[kind], AutoModel)
    with torch.device("meta"):
        own, usual = (
            reader.from_config(config, trust_remote_code=False).base_model_prefix
            for reader in readers
        )
    return None if own == usual else {rf"^{usual}\.": f"{own}."}


def output_embeddings(model: Any) -> list[str]:
    """The language model's head: often tied to the input embeddings, so it stays as it is."""
    output = model.get_output_embeddings()
    modules = model.named_modules()
    return [] if output is None else [name for name, module in modules if module is output]


def embedding_count_of(model: Any) -> int:
    """How many token ids the model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def longest_input(model: Any) -> int | None:
    """How many tokens the model's table of positions has rows for; None where it has no table."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return None
    words = model.get_input_embeddings()
    found = []
    for module in model.modules():
        rows = getattr(module, "num_embeddings", 0)
        if module is not words and positions <= rows <= positions + POSITIONS_KEPT:
            # RoBERTa's begin behind the row of its padding.
            kept = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(min(positions, rows - kept))
        # GPT-J's and CodeGen's is a tensor, each layer's own.
        if isinstance(table := getattr(module, "embed_positions", None), torch.Tensor):
            found.append(len(table))
    return min(found, default=None)


def stacked_weights(model: nn.Module) -> list[str]:
    """Names of weights that are stacks of matrices in one tensor, as experts are: no linear layers.

    They can be neither quantised nor adapted layer by layer.
    """
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if not isinstance(module, nn.Conv1d | nn.Conv2d)
        for key, weight in module.named_parameters(recurse=False)
        if weight.dim() > 2 and min(weight.shape) > 1
    ]


def _unreadable(folder: Path, kind: TaskKind, error: Exception) -> BackboneError:
    reason = brief(error)
    if isinstance(error, pickle.UnpicklingError):
        reason = "its .bin file holds more than tensors, and is not opened; convert it where it "
        reason += "came from, with save_pretrained, to safetensors"
    return BackboneError(f"{folder}: no {kind.value} model can be read: {reason}")


def _read_config(folder: Path, kind: TaskKind, label_count: int) -> Any:
    if (folder / "adapter_config.json").is_file():
        # With PEFT installed transformers would load that too, which no fingerprint covers.
        raise BackboneError(
            f"{folder}: an adapter lies beside the model (adapter_config.json); give a folder with "
            "the model alone"
        )
    try:
        # Left out, transformers would ask on the terminal whether to run a model's own code.
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise _unreadable(folder, kind, error) from error
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(
            f"{folder}: {config.model_type} is an encoder with a decoder; want a model that is one "
            "of them"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise BackboneError(
            f"{folder}: quantised by another program; give the checkpoint before that"
        )
    _switch_off_dropout(config)
    # Every pass begins anew here, and would hold the keys and values of all layers for nothing.
    config.use_cache = False
    if (outputs := kind.outputs(label_count)) is not None:
        config.num_labels = outputs
    return config


def _switch_off_dropout(config: Any) -> None:
    """Zero every dropout rate, so that even a model set to train mode stays deterministic."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in key:
            setattr(config, key, 0.0)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the progress bar and the table of fresh parameters: `_forbid_gaps` judges those."""
    reports: Any = transformers_logging  # untyped
    verbosity, had_bar = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        if had_bar:
            reports.enable_progress_bar()


def _forbid_gaps(folder: Path, report: Mapping[str, Any], head_modules: tuple[str, ...]) -> None:
    """Refuse a checkpoint that lacks weights of the backbone: transformers would invent them."""
    mismatched = [entry[0] for entry in report["mismatched_keys"]]
    absent = [
        name for name in (*report["missing_keys"], *mismatched) if not is_below(name, head_modules)
    ]
    if absent or report["error_msgs"]:
        shown = ", ".join(sorted(absent)[:8])
        raise BackboneError(
            f"{folder}: {len(absent)} weights are absent or of another shape: {shown} "
            f"{' '.join(report['error_msgs'])}".rstrip()
        )
