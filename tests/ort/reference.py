"""Where torch is: export what tests/ort runs on, and record what torch does from the same start.

    python -m tests.ort.reference FOLDER

`FOLDER/NAME` are artifacts, `FOLDER/NAME.tokens.json` ids by transformers, `FOLDER/CASE.npz` the
steps that torch takes, `FOLDER/federation` what a coordinator needs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.backends.torch_backend import load_trainer
from edge_client.backends.transformers_tokenizer import TransformersTokenizer
from quantization.backbone import load_backbone
from tests.ort.cases import CASES, MINILM, STORIES, follow, outlook, token_rows

FORETELL = ["--task", "causal-lm"]
ANSWER = ["--task", "question-answering"]
CLASSES = 'kind = "sequence-classification"\nlabels = ["bad", "good"]\nmax_length = 16'
QUESTIONS = 'kind = "question-answering"\nmax_length = 24'
CLASSIFY = ["--task", "sequence-classification", "--label-count", "2"]


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for scheme in ("none", "int8", "int4"):
        _export(folder / f"minilm-{scheme}", MINILM, scheme, "all-linear", CLASSIFY)
    for scheme in ("int8", "int4"):
        _export(folder / f"mixed-{scheme}", MINILM, scheme, "query-value", CLASSIFY)
    _prepare(folder / "federation", CLASSES, "query-value")
    _prepare(folder / "questions", QUESTIONS, "all-linear")
    _record_tokens(folder / "minilm-none.tokens.json", MINILM, "sequence-classification")
    _export(folder / "answers-none", MINILM, "none", "all-linear", ANSWER)
    cases = [case for case in CASES.values() if case.artifact != "stories-none"]
    if STORIES.exists():
        _export(
            folder / "stories-none", str(STORIES), "none", "all-linear", ["--task", "causal-lm"]
        )
        _record_tokens(folder / "stories-none.tokens.json", str(STORIES), "causal-lm")
        cases = list(CASES.values())
    for case in cases:
        print(f"torch: {case.name}", flush=True)
        trainer = load_trainer(
            case.settings, backbone=None, scheme="none", device="cpu", personal_seed=7
        )
        steps: dict[str, Any] = follow(trainer, case)
        np.savez(folder / f"{case.name}.npz", **steps)
        if case.name in ("minilm", "minilm-balanced", "stories", "answers"):
            found = outlook(trainer, case, folder / f"{case.name}.peft")
            (folder / f"{case.name}.json").write_text(json.dumps(found))


def _prepare(folder: Path, task: str, targets: str) -> None:
    """What a coordinator serves: three rounds of two devices."""
    folder.mkdir()
    path = folder / "federation.toml"
    path.write_text(f"""name = "test"
[backbone]
name = "{MINILM}"
[task]
{task}
[adapter]
rank = 2
personal_rank = 1
target_modules = "{targets}"
[training]
local_steps = 4
batch_size = 4
[rounds]
count = 3
cohort = 2
deadline_s = 120
[server]
port = 0
""")
    subprocess.run([sys.executable, "-m", "edge_client.cli", "prepare", str(path)], check=True)


def _export(out: Path, model: str, scheme: str, targets: str, task: list[str]) -> None:
    command = [sys.executable, "-m", "edge_client.cli", "export", model, "--scheme", scheme]
    command += ["--target-modules", targets, "--out", str(out), *task]
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def _record_tokens(path: Path, model: str, task: str) -> None:
    backbone = load_backbone(model, task=task, label_count=2 if task != "causal-lm" else 0)
    tokenizer = TransformersTokenizer(backbone.tokenizer, len(backbone.tokenizer))
    found = []
    for row in token_rows():
        ids, types = tokenizer.encode(row["text"], row["pair"], length_max=row["length_max"])
        plain, _ = tokenizer.encode(row["text"], special=False)
        found.append({"ids": ids, "types": types, "plain": plain, "text": tokenizer.decode(ids)})
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
