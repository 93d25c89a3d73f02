"""Load a frozen backbone: read, given a head, quantised, fingerprinted, and proved trainable.

    folder of a checkpoint -> model (float32, no dropout) -> fresh head -> scheme -> device -> proof

Every device of a federation ends with the same function: fine-tuning here has no dropout, and what
a seed draws depends on neither the platform nor the version of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantization.bnb import parse_compute_dtype, quantize_embeddings, quantize_linears
from quantization.checkpoint import (
    embedding_count_of,
    output_embeddings,
    read_model,
    stacked_weights,
)
from quantization.errors import BackboneError, SchemeError, brief
from quantization.fingerprint import fingerprint_of, resolve_backbone
from quantization.folder_manifest import is_quantized
from quantization.names import is_below
from quantization.quantized_folder import read_quantized
from quantization.schemes import Scheme
from quantization.seeded import head_start
from quantization.tasks import TaskKind
from quantization.tokenizer import digest_of, read_tokenizer

__all__ = ["Backbone", "Scheme", "TaskKind", "load_backbone", "logits_of", "resolve_backbone"]

_PROOF_TEXTS: Final = ("The gradient comes back.", "So it does, all the way.")
# A logit of what cannot be: the softmax leaves nothing of it.
_NEVER: Final = -1e9


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen model, ready to carry adapters.

    `head_modules` names the top-level modules that the task adds to the backbone (`classifier`,
    `score`, `qa_outputs`; none for a causal LM): fresh from a seed, in float32, never quantised,
    frozen as given.
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
    int8_embeddings: bool = False,
    compute_dtype: str | None = None,
) -> Backbone:
    """Load the backbone that `name_or_path` stands for (see `resolve_backbone`).

    A task's head always starts from `head_seed`, also where the checkpoint brings one.
    `attention` is transformers' `attn_implementation`; double backward needs "eager". Whatever is
    not quantised is float32. `compute_dtype`, "float32" or "bfloat16", is what NF4, FP4 and INT8
    layers multiply in: by default float32 on a CPU, bfloat16 on CUDA (INT8: what comes in). The
    global torch generator is left as it was.

    A folder of `pf2lora-client quantize` is read as it is, never through float weights; its
    embeddings are what they were written as, whatever `int8_embeddings` says.

    Raises:
        BackboneError: not found, incomplete, of a kind without that task, or the proof failed: one
            forward and backward must bring a finite, non-zero gradient to the input embeddings,
            and for a causal LM none from a token to those after it.
        SchemeError: no such scheme or compute dtype, nothing to quantise, weights that it cannot
            hold, or the folder is quantised in another scheme.
        MissingExtraError: the scheme needs bitsandbytes, and it is not installed.
    """
    scheme = Scheme.parse(scheme)
    product = parse_compute_dtype(compute_dtype, scheme)
    kind, place = _task(task, label_count), _device(device)
    folder = resolve_backbone(name_or_path)
    model: Any  # the methods of nn.Module lose their types in PreTrainedModel
    if is_quantized(folder):
        model, head_modules = read_quantized(
            folder, kind, label_count, attention, scheme, place, product
        )
        _start_head(model, head_modules, head_seed)
    else:
        model, head_modules = read_model(folder, kind, label_count, attention)
        _start_head(model, head_modules, head_seed)
        _forbid_stacks(model, scheme)
        model.float()
        keep = (*head_modules, *output_embeddings(model))
        quantize_linears(model, scheme, place, keep, product)
        if int8_embeddings:
            quantize_embeddings(model, product)
    tokenizer = read_tokenizer(folder)
    _check_vocabulary(folder, model, tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(place).requires_grad_(False).eval()
    what = f"{name_or_path!r}, scheme {scheme.value}, device {place}"
    what += ", int8 embeddings" if int8_embeddings else ""
    _prove(model, tokenizer, kind, what)
    found = fingerprint_of(folder, digest_of(tokenizer))
    return Backbone(model, tokenizer, found, scheme, kind, head_modules, place)


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


def _check_vocabulary(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of another model, or one that was given a pad token and the model none."""
    count = embedding_count_of(model)
    ids = [*tokenizer(_PROOF_TEXTS[0])["input_ids"], tokenizer.pad_token_id]
    if max(ids) >= count:
        token = tokenizer.convert_ids_to_tokens(max(ids))
        raise BackboneError(
            f"{folder}: the tokenizer's {token!r} has id {max(ids)}, and the model has {count} "
            "embeddings; take the tokenizer that belongs to it, or give the model more embeddings"
        )


def _forbid_stacks(model: nn.Module, scheme: Scheme) -> None:
    names = [] if scheme is Scheme.NONE else stacked_weights(model)
    if names:
        raise SchemeError(
            f"scheme {scheme.value}: {len(names)} weights such as {names[0]!r} are stacks of "
            "matrices (experts) and not linear layers: they would stay in float32; use scheme none"
        )


def _start_head(model: nn.Module, head_modules: tuple[str, ...], seed: int) -> None:
    """Give the head the values that every device starts from, as seeded.head_start has them."""
    for name, parameter in model.named_parameters():
        if is_below(name, head_modules):
            start = head_start(name, tuple(parameter.shape), seed)
            parameter.data = torch.from_numpy(start)


def _prove(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: TaskKind, what: str
) -> None:
    """Run forward and backward once: what cannot train must fail now, not in the first round."""
    try:
        gradient = _embedding_gradient(model, tokenizer)
    except Exception as error:  # whatever kernels and architectures raise
        raise BackboneError(f"{what}: the forward and backward failed: {brief(error)}") from error
    if not bool(torch.isfinite(gradient).all()):
        raise BackboneError(f"{what}: the gradient of the input embeddings is not finite")
    if not bool(gradient.any()):
        raise BackboneError(f"{what}: the gradient of the input embeddings is zero")
    if kind is TaskKind.CAUSAL_LM and _sees_ahead(model, tokenizer):
        raise BackboneError(
            f"{what}: {model.config.model_type} sees the tokens after the one it foretells; "
            "causal-lm needs a model that was trained to go on from a text"
        )


def proof_logits(backbone: Backbone) -> Tensor:
    """The logits of two short texts, for comparing backbones bit by bit."""
    with torch.no_grad():
        batch = _proof_batch(backbone.model, backbone.tokenizer, _PROOF_TEXTS)
        return logits_of(backbone.model(**batch), batch["attention_mask"])


def logits_of(output: Any, attention_mask: Tensor) -> Tensor:
    """The logits in what a model gave; of question answering [b, 2, t], start and end.

    An answer neither starts nor ends in padding, however long the batch was padded to.
    """
    if "logits" in output:
        logits: Tensor = output.logits
        return logits
    both = torch.stack([output.start_logits, output.end_logits], dim=1)
    return both.masked_fill(attention_mask[:, None] == 0, _NEVER)


def _proof_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Any:
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    return batch.to(model.device)


def _sees_ahead(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the first token's logits depend on those after it, as they do in a masked LM.

    Such a model would read what it is to foretell.
    """
    return bool(_embedding_gradient(model, tokenizer, slice(1))[:, 1:].any())


def _embedding_gradient(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, at: slice = slice(None)
) -> Tensor:
    """Of the logits (at some places of the text), to the embeddings [1, t, n] of a short text."""
    embedded: list[Tensor] = []

    def want_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        embedded.append(output.requires_grad_())

    # One row: its activations are part of the peak at load.
    batch = _proof_batch(model, tokenizer, _PROOF_TEXTS[:1])
    handle = model.get_input_embeddings().register_forward_hook(want_gradient)
    try:
        with torch.enable_grad():
            logits = logits_of(model(**batch), batch["attention_mask"])
            loss = logits[:, at].float().square().mean()
            return torch.autograd.grad(loss, embedded[0])[0]
    finally:
        handle.remove()
