"""The quantisation schemes by name; no torch here."""

from __future__ import annotations

from enum import Enum

from quantization.errors import SchemeError


class Scheme(Enum):
    """How the frozen linear layers are stored. The value is what settings say."""

    NONE = "none"
    BF16 = "bf16"
    NF4 = "nf4"
    FP4 = "fp4"
    INT8 = "int8"

    @classmethod
    def parse(cls, value: Scheme | str) -> Scheme:
        """Return the scheme called `value`, or raise SchemeError naming those there are."""
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(scheme.value for scheme in cls)
            raise SchemeError(f"no quantisation scheme {value!r}; there are: {known}") from None
