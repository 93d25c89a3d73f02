"""The quantisation schemes by name; no torch here."""

from __future__ import annotations

from enum import Enum
from typing import Final

from quantization.errors import SchemeError

# What the layers of NF4, FP4 and INT8 can multiply in.
COMPUTE_DTYPES: Final = ("float32", "bfloat16")


class Scheme(Enum):
    """How the frozen linear layers are stored. The value is what settings say.

    "double" quantises the absmax of NF4 and FP4 once more, to 8 bits (QLoRA, arXiv 2305.14314):
    4.127 bits a weight instead of 4.5.
    """

    NONE = "none"
    BF16 = "bf16"
    NF4 = "nf4"
    NF4_DOUBLE = "nf4-double"
    FP4 = "fp4"
    FP4_DOUBLE = "fp4-double"
    INT8 = "int8"

    @property
    def is_double(self) -> bool:
        return self.value.endswith("-double")

    @property
    def fixed_compute_dtype(self) -> str | None:
        """What its layers multiply in; None where there is a choice."""
        return {Scheme.NONE: "float32", Scheme.BF16: "bfloat16"}.get(self)

    @classmethod
    def parse(cls, value: Scheme | str) -> Scheme:
        """Return the scheme called `value`, or raise SchemeError naming those there are."""
        try:
            return cls(value)
        except ValueError:
            known = ", ".join(scheme.value for scheme in cls)
            raise SchemeError(f"no quantisation scheme {value!r}; there are: {known}") from None
