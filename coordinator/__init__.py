"""The coordinator daemon: rounds, aggregation, store and WebSocket server. NumPy, never torch."""

import os

if os.name != "posix":
    raise ImportError("pf2lora runs on Linux and macOS: it locks its files as POSIX does")
