"""Every bound on what may come from outside, by name.

Units are in the names; anything over a bound is a protocol error before memory is taken for it.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

PROTOCOL_VERSIONS: Final = (3,)
VERSIONS_MAX: Final = 16

MESSAGE_BYTES_MAX: Final = 2 * MIB
CHUNK_BYTES_MIN: Final = 1 * KIB
CHUNK_BYTES_MAX: Final = 1 * MIB
CHUNK_BYTES_DEFAULT: Final = 256 * KIB
PAYLOAD_BYTES_MAX: Final = 1024 * MIB

TENSORS_MAX: Final = 8192
TENSOR_DIMENSIONS_MAX: Final = 4
TENSOR_NAME_BYTES_MAX: Final = 200
TENSOR_SIDE_MAX: Final = 1 << 28

NAME_BYTES_MAX: Final = 128
TEXT_BYTES_MAX: Final = 2 * KIB
KEY_BYTES: Final = 32  # Ed25519
SIGNATURE_BYTES: Final = 64
NONCE_BYTES: Final = 32
TOKEN_BYTES_MAX: Final = 128
METRICS_MAX: Final = 32
LABELS_MAX: Final = 1024
TARGET_MODULES_MAX: Final = 256
RANK_MAX: Final = 1024
SHARED_WIDTH_MAX: Final = 4096
SLOTS_MAX: Final = 256

ROUNDS_MAX: Final = 1_000_000
COHORT_MAX: Final = 100_000
STALENESS_MAX: Final = 10_000
EXAMPLES_MAX: Final = 1 << 20
STEPS_MAX: Final = 100_000
SECONDS_MAX: Final = 30 * 24 * 3600.0
