"""What is added to a classifier's logits, so that it answers for one mix of labels or another.

The balanced softmax (arXiv 2007.10740) adds the log of the labels' shares in the loss, so that the
model need not learn them; they are added to answers for the device's own mix, and left out of those
for an even one. Without it a head of the device's own learns them, and they are taken out of its
answers for an even mix: post-hoc logit adjustment (arXiv 2007.07314).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_client.backends.base import LabelMix
from edge_client.errors import ConfigurationError
from protocol.federation import Loss, Task


class LabelOffset:
    """`now` [labels] is added to logits at present, in the loss and in answers; None is nothing."""

    def __init__(self, task: Task, *, head_is_personal: bool) -> None:
        self._task = task
        self._is_balanced = task.loss is Loss.BALANCED_SOFTMAX
        self._head_is_personal = head_is_personal
        self.forget()

    def forget(self) -> None:
        """Know of no rows."""
        self._log_shares: NDArray[Any] | None = None
        self.now: NDArray[Any] | None = None

    def learn(self, log_shares: NDArray[Any] | None) -> None:
        """Take over the log of the labels' shares of this device's rows, if its task has labels."""
        self._log_shares = log_shares
        self.now = log_shares if self._is_balanced else None

    def answering(self, mix: LabelMix) -> contextlib.AbstractContextManager[None]:
        """Within the block answers are for that mix.

        Raises:
            ConfigurationError: the model cannot answer for it.
        """
        if mix is LabelMix.OWN:
            return self._being(self._counted() if self._is_balanced else None)
        if not self._task.labels:
            problem = f"{self._task.kind.value} has no labels to be even"
            raise ConfigurationError("label_mix", problem, LabelMix.OWN.value)
        if self._is_balanced:
            return self.left_out()
        if not self._head_is_personal:
            problem = "a head that all devices share has learned no device's own shares of labels"
            use = f'task.loss = "{Loss.BALANCED_SOFTMAX.value}" in the federation'
            raise ConfigurationError("label_mix", problem, use)
        return self._being(-self._counted())

    def left_out(self) -> contextlib.AbstractContextManager[None]:
        """Within the block nothing is added."""
        return self._being(None)

    def _counted(self) -> NDArray[Any]:
        if self._log_shares is None:
            raise RuntimeError("nobody has counted this device's labels: personalise first")
        return self._log_shares

    @contextlib.contextmanager
    def _being(self, offset: NDArray[Any] | None) -> Iterator[None]:
        before, self.now = self.now, offset
        try:
            yield
        finally:
            self.now = before

    def added_to(self, logits: NDArray[Any]) -> NDArray[Any]:
        """Logits [b, labels] with what is added now."""
        return logits if self.now is None else logits + self.now

    def or_zeros(self) -> NDArray[Any]:
        """What is added now, [labels], for whom cannot do with nothing."""
        return np.zeros(len(self._task.labels), np.float32) if self.now is None else self.now
