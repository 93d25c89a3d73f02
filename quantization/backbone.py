"""Load a frozen backbone: read, given a head, quantised, fingerprinted, and proved trainable.

    folder of a checkpoint -> model (float32, no dropout) -> fresh head -> scheme -> device -> proof

Every device of a federation ends with the same function: fine-tuning here has no dropout, and what
a seed draws depends on neither the platform nor the version of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from quantization.bnb import output_embeddings, quantize_linears
from quantization.errors import BackboneError
from quantization.fingerprint import fingerprint, resolve_backbone
from quantization.names import is_below
from quantization.schemes import Scheme
from quantization.seeded import head_start
from quantization.tasks import TaskKind

__all__ = ["Backbone", "Scheme", "TaskKind", "load_backbone", "resolve_backbone"]

_PROOF_TEXTS: Final = ("The gradient comes back.", "So it does, all the way.")


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen model, ready to carry adapters.

    `head_modules` names the top-level modules that the task adds to the backbone (`classifier`,
    `score`; none for a causal LM): fresh from a seed, in float32, never quantised, frozen as given.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    scheme: Scheme
    task: TaskKind
    head_modules: tuple[str, ...]
    device: torch.device


def load_backbone(
    name_or_path: str,
    *,
    scheme: Scheme | str = Scheme.NONE,
    device: str = "cpu",
    task: TaskKind | str,
    label_count: int = 0,
    head_seed: int = 0,
    attention: str | None = None,
) -> Backbone:
    """Load the backbone that `name_or_path` stands for (see `resolve_backbone`).

    A classification head always starts from `head_seed`, also where the checkpoint brings one.
    `attention` is transformers' `attn_implementation`; double backward needs "eager". Whatever is
    not a quantised layer is float32. The global torch generator is left as it was.

    Raises:
        BackboneError: not found, incomplete, of a kind without that task, or the proof failed: one
            forward and backward must bring a finite, non-zero gradient to the input embeddings.
        SchemeError: no such scheme, or nothing to quantise.
        MissingExtraError: the scheme needs bitsandbytes, and it is not installed.
    """
    scheme = Scheme.parse(scheme)
    kind, place = _task(task, label_count), _device(device)
    folder = resolve_backbone(name_or_path)
    tokenizer = _read_tokenizer(folder)
    model: Any  # the methods of nn.Module lose their types in PreTrainedModel
    model, head_modules = _read_model(folder, kind, label_count, attention)
    model.config.pad_token_id = tokenizer.pad_token_id
    _start_head(model, head_modules, head_seed)
    model.float()
    quantize_linears(model, scheme, place, keep=(*head_modules, *output_embeddings(model)))
    model.to(place).requires_grad_(False).eval()
    _prove(model, tokenizer, f"{name_or_path!r}, scheme {scheme.value}, device {place}")
    return Backbone(model, tokenizer, fingerprint(folder), scheme, kind, head_modules, place)


def _task(task: TaskKind | str, label_count: int) -> TaskKind:
    try:
        kind = TaskKind(task)
    except ValueError:
        known = ", ".join(kind.value for kind in TaskKind)
        raise BackboneError(f"no task {task!r}; there are: {known}") from None
    if kind is TaskKind.SEQUENCE_CLASSIFICATION and label_count < 2:
        raise BackboneError(f"{kind.value} needs a label_count of two or more, not {label_count}")
    return kind


def _device(device: str) -> torch.device:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackboneError(f"device {device!r} cannot be used: {error}") from error
    return torch.device(device)


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as many kinds as there are tokenizers
        raise BackboneError(f"{folder}: the tokenizer cannot be read: {error}") from error
    files = tokenizer.vocab_files_names.values()
    if files and not any((folder / file).is_file() for file in files):
        # transformers makes an empty tokenizer of nothing, without a word.
        raise BackboneError(f"{folder}: the tokenizer has no vocabulary: none of {sorted(files)}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BackboneError(f"{folder}: the tokenizer has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_model(
    folder: Path, kind: TaskKind, label_count: int, attention: str | None
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model with its head as transformers left it, and the names of the head's modules."""
    classify = kind is TaskKind.SEQUENCE_CLASSIFICATION
    reader: Any = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            raise BackboneError(f"{folder}: already quantised; give the checkpoint before that")
        _switch_off_dropout(config)
        if classify:
            config.num_labels = label_count
        with _quiet_transformers(), torch.random.fork_rng(devices=[]):
            model, report = reader.from_pretrained(
                folder,
                config=config,
                attn_implementation=attention,
                dtype="auto",
                ignore_mismatched_sizes=True,  # a checkpoint's own head; others are refused below
                local_files_only=True,
                output_loading_info=True,
            )
    except BackboneError:
        raise
    except Exception as error:  # as many kinds as there are architectures
        raise BackboneError(f"{folder}: no {kind.value} model can be read: {error}") from error
    head_modules = _head_modules(model) if classify else ()
    _forbid_gaps(folder, report, head_modules)
    return model, head_modules


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


def _head_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Top-level modules with parameters beside the base model."""
    return tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )


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


def _start_head(model: nn.Module, head_modules: tuple[str, ...], seed: int) -> None:
    """Give the head the values that every device starts from, as seeded.head_start has them."""
    for name, parameter in model.named_parameters():
        if not is_below(name, head_modules):
            continue
        parameter.data = torch.from_numpy(head_start(name, tuple(parameter.shape), seed))


def _prove(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Run forward and backward once: what cannot train must fail now, not in the first round."""
    try:
        gradient = _embedding_gradient(model, tokenizer)
    except Exception as error:  # whatever kernels and architectures raise
        raise BackboneError(f"{what}: the forward and backward failed: {error}") from error
    if not bool(torch.isfinite(gradient).all()):
        raise BackboneError(f"{what}: the gradient of the input embeddings is not finite")
    if not bool(gradient.any()):
        raise BackboneError(f"{what}: the gradient of the input embeddings is zero")


def _embedding_gradient(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    embedded: list[Tensor] = []

    def want_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        embedded.append(output.requires_grad_())

    batch = tokenizer(list(_PROOF_TEXTS), padding=True, return_tensors="pt").to(model.device)
    handle = model.get_input_embeddings().register_forward_hook(want_gradient)
    try:
        with torch.enable_grad():
            loss = model(**batch).logits.float().square().mean()
            return torch.autograd.grad(loss, embedded[0])[0]
    finally:
        handle.remove()
