"""What a backbone is fine-tuned for; no torch here."""

from __future__ import annotations

from enum import Enum
from typing import Final

# torch's cross entropy passes over targets of this value, and so does everything here.
IGNORED: Final = -100


class TaskKind(Enum):
    """What the backbone is given a head for. The value is what settings say."""

    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"
    QUESTION_ANSWERING = "question-answering"

    def outputs(self, label_count: int) -> int | None:
        """How many numbers the head gives; None where the checkpoint's own head is used."""
        match self:
            case TaskKind.SEQUENCE_CLASSIFICATION:
                return label_count
            case TaskKind.CAUSAL_LM:
                return None
            case TaskKind.QUESTION_ANSWERING:
                return 2  # that the answer starts at a token, and that it ends there

    def target_shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """The shape of a batch's targets: one a row, one a token, or an answer's two ends."""
        match self:
            case TaskKind.SEQUENCE_CLASSIFICATION:
                return (rows,)
            case TaskKind.CAUSAL_LM:
                return rows, tokens
            case TaskKind.QUESTION_ANSWERING:
                return rows, 2
