"""The daemon's log: for people, or a JSON object a line with the ids as fields of their own."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Final

FORMATS: Final = ("human", "json")
# What a line may be about; given to the log's calls as `extra`.
FIELDS: Final = ("federation", "round", "attempt", "device", "code")


class JsonLines(logging.Formatter):
    """One JSON object a log line, its time in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: vars(record)[name] for name in FIELDS if vars(record).get(name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class FederationLog(logging.LoggerAdapter[logging.Logger]):
    """A log whose lines are all of one federation."""

    def __init__(self, log: logging.Logger, federation: str) -> None:
        super().__init__(log.getChild(federation), {"federation": federation})

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": {**(self.extra or {}), **kwargs.get("extra", {})}}


def set_up_log(log_format: str) -> None:
    """Write the log to standard error in one of FORMATS."""
    handler = logging.StreamHandler(sys.stderr)
    human = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else human)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for talkative in ("websockets", "alembic", "uvicorn"):  # of every connection, of every step
        logging.getLogger(talkative).setLevel(logging.WARNING)
