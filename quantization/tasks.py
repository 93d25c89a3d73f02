"""What a backbone is fine-tuned for; no torch here."""

from __future__ import annotations

from enum import Enum


class TaskKind(Enum):
    """What the backbone is given a head for. The value is what settings say."""

    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"
