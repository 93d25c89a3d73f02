"""A federation that continues texts, over real sockets, from rows to what apps and PEFT read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from edge_client import cli
from edge_client.client import EdgeClient
from edge_client.errors import AdapterError, ConfigurationError, DataError
from tests.integration.test_federation import MINILM, _coordinator, _run_all, _write_config
from tests.integration.test_questions import CLASSIFY

STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K"
PROMPT = "the dog went to "


def _write_texts(path: Path, place: str) -> Path:
    rows = [{"text": PROMPT, "text_pair": f"the {place} number {n}"} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/weights/stories260K is not here")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_devices_learn_to_continue_and_the_app_and_peft_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write_config(tmp_path)
    task = 'kind = "causal-lm"\nmax_length = 24'
    path.write_text(path.read_text().replace(CLASSIFY, task).replace(MINILM, str(STORIES)))
    assert cli.main(["prepare", str(path)]) == 0
    data = [_write_texts(tmp_path / f"{p}.jsonl", p) for p in ("park", "shop")]
    with _coordinator(path) as address:
        clients = [EdgeClient(address, f, tmp_path / f.stem, scheme="none") for f in data]
        _run_all(clients)
    client = clients[0]
    said = client.generate(PROMPT, 8)
    assert said
    with pytest.raises(AdapterError, match="use generate"):
        client.predict([PROMPT])
    for wrong in (3, "a\ud800"):
        with pytest.raises(DataError, match="the texts given, line 1"):
            client.generate(wrong)  # type: ignore[arg-type]
    client.save_pretrained(tmp_path / "adapter")
    for one in clients:
        one.close()
    with pytest.raises(ConfigurationError, match="is closed"):
        client.generate(PROMPT)
    flags = ["--data", str(data[0]), "--state-dir", str(tmp_path / "park"), "--scheme", "none"]
    capsys.readouterr()
    assert cli.main(["evaluate", *flags, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    levels = [line for line in lines if "level" in line]
    assert len(levels) == 3
    for one in levels:
        assert set(one) == {"level", "rows", "loss", "accuracy", "perplexity"}
        assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))
    assert cli.main(["predict", PROMPT, *flags, "--label-mix", "even"]) == 1
    heard = capsys.readouterr()
    assert "label_mix: causal-lm has no labels to be even; use own" in heard.err
    assert cli.main(["predict", PROMPT, *flags, "--new-tokens", "8"]) == 0
    assert capsys.readouterr().out == said + "\n"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"text": PROMPT}) + '\n{"text": 7}')
    assert cli.main(["predict", *flags, "--rows", str(prompts)]) == 1
    heard = capsys.readouterr()
    assert f"{prompts}, line 2: expected text, got int" in heard.err
    assert heard.out == ""  # all are looked at before the first is gone on with
    prompts.write_text('\n\n{"prompt": "a"}')
    assert cli.main(["predict", PROMPT, *flags, "--rows", str(prompts)]) == 1
    assert f'{prompts}, line 3, field "text": is missing; the row' in capsys.readouterr().err
    base = AutoModelForCausalLM.from_pretrained(STORIES)
    model: Any = PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokenizer: Any = AutoTokenizer.from_pretrained(STORIES)
    asked = tokenizer(PROMPT, return_tensors="pt")
    found = model.generate(**asked, max_new_tokens=8, do_sample=False)[0]
    assert tokenizer.decode(found[asked["input_ids"].shape[1] :], skip_special_tokens=True) == said
    data[0].write_text("\n\n" + json.dumps({"text": "a " * 40, "text_pair": "b"}))
    with (
        EdgeClient("localhost:1", data[0], tmp_path / "park", scheme="none", held_out=0) as again,
        pytest.raises(
            DataError, match=r"park\.jsonl, line 3: .* within max_length 24, for its pro"
        ),
    ):
        again.generate(PROMPT)
