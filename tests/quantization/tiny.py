"""Backbones small enough to be made anew for a test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def write_gpt2(folder: Path, width: int = 16) -> Path:
    """A tiny random GPT-2: transposed layers, output embeddings tied to the input's."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=16, n_positions=32, n_embd=width, n_layer=2, n_head=2)
    config.bos_token_id = config.eos_token_id = 1
    GPT2LMHeadModel(config).save_pretrained(folder)
    words = {"<unk>": 0, "<end>": 1, "The": 2, "gradient": 3, "So": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder
