"""The SDK that an app embeds: `from edge_client.client import EdgeClient`."""

import os

if os.name != "posix":
    raise ImportError("pf2lora runs on Linux and macOS: it locks its files as POSIX does")
