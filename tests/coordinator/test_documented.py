"""What the documentation names is there, and what is there is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from coordinator import cli, config
from coordinator.admin.settings import AdminSettings
from coordinator.config import ServerSettings
from coordinator.errors import (
    AddressError,
    ConfigurationError,
    CoordinatorError,
    StoreError,
)
from coordinator.events import CloseRound, OpenRound
from coordinator.happenings import Acted, Called, Connected, Heard, Said
from protocol.errors import ErrorCode
from protocol.federation import FederationSettings
from protocol.messages import Joined, Receipt, ReceiptStatus, Refusal, Report
from protocol.schema import Tagged, record_of
from protocol.tensors import NamedTensors
from tests.coordinator.admin_port import AdminPort, admin_port
from tests.coordinator.busy_store import busy_settings, fill_store
from tests.coordinator.federation_file import FINGERPRINT, write_federation

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
SETTINGS = (DOCS / "settings.md").read_text()
KEYS = sorted(config.leaves())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_federation(tmp_path)


def _value(loaded: config.Configuration, key: str) -> Any:
    section, _, rest = key.partition(".")
    value: Any = loaded.federations[0].settings
    if section in ("server", "admin"):
        value, key = getattr(loaded, section), rest
    for name in key.split("."):
        value = getattr(value, name)
    return value


# A value other than the default for each key, as text, with the other keys that it needs.
OTHER = {
    "admin.enabled": "false",
    "admin.host": "::1",
    "admin.port": "7001",
    "admin.token_file": "token",
    "server.host": "localhost",
    "server.port": "7000",
    "server.hold_s": "3.5",
    "server.exit_when_finished": "true",
    "server.connections_max": "77",
    "server.insecure": "true",
    "server.enrolment": "required",
    "server.update_rms_max": "0.5",
    "server.examples_max": "99",
    "server.quarantine_after": "7",
    "rounds.count": "7",
    "rounds.cohort": "5",
    "rounds.deadline_s": "12.5",
    "rounds.minimum_reports": "2",
    "rounds.report_goal": "2",
    "rounds.minimum_examples": "3",
    "rounds.selection": "least-recent",
    "rounds.weighting": "uniform",
    "adapter.rank": "3",
    "seed": "11",
    "update_dtype": "int8",
}


@pytest.mark.parametrize("key", sorted(OTHER))
def test_a_key_can_be_set_by_flag_variable_and_file_alike(path: Path, key: str) -> None:
    (path.parent / "token").write_text("a token of some length")
    text = OTHER[key]
    before = _value(config.load(path, {}, {}), key)
    by_flag = _value(config.load(path, {key: text}, {}), key)
    variable = "PF2LORA_" + key.replace(".", "_").upper()
    by_variable = _value(config.load(path, {}, {variable: text}), key)
    assert by_flag == by_variable != before
    parsed = by_flag.value if hasattr(by_flag, "value") else by_flag
    if key == "admin.token_file":
        parsed = text
    shown = f'"{parsed}"' if isinstance(parsed, str) else str(parsed).lower()
    *section, name = key.split(".")
    toml = path.read_text()
    header = f"[{section[0]}]" if section else ""
    if not section:
        toml = f"{name} = {shown}\n{toml}"
    elif header in toml:
        toml = re.sub(rf"(?m)^{name} = .*\n", "", toml)
        toml = toml.replace(header, f"{header}\n{name} = {shown}")
    else:
        toml += f"\n{header}\n{name} = {shown}\n"
    path.write_text(toml)
    assert _value(config.load(path, {}, {}), key) == by_flag


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_flag_that_refuses_nonsense_by_name_and_a_variable_that_is_missed(
    path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = config.flag_of(key)
    nonsense = "\x00" * 5000  # over the bound of any text, and no number, word or list
    assert cli.main(["check-config", "--config", str(path), flag, nonsense]) == 2
    told = capsys.readouterr().err
    assert flag in told or key.rpartition(".")[0] in told
    variable = "PF2LORA_" + key.replace(".", "_").upper()
    misspelt = variable[:-2] + variable[-1] + variable[-2] + "X"
    with pytest.raises(ConfigurationError, match=rf"{misspelt}: is unknown; did you mean"):
        config.load(path, {}, {misspelt: "1"})


def _tables(of_methods: bool) -> dict[str, Any]:
    """One of the two files in settings.md: a whole federation.toml, and what its methods have."""
    return tomllib.loads(re.findall(r"(?s)```toml\n(.*?)```", SETTINGS)[of_methods])


def test_every_setting_is_documented_with_its_default(tmp_path: Path) -> None:
    table = _tables(of_methods=False)
    shown = {k: table.pop(k) for k in ("server", "admin")}
    shown_fingerprint = {"backbone": {**table["backbone"], "fingerprint": FINGERPRINT}}
    given = {k: table[k] for k in ("name", "task")} | shown_fingerprint
    given["task"] = {k: v for k, v in given["task"].items() if k in ("kind", "labels")}
    federation = record_of(FederationSettings)
    whole = federation.to_mapping(federation.from_mapping(given, ""))
    assert table | shown_fingerprint == _plain(whole)
    assert shown["server"] == _plain(record_of(ServerSettings).to_mapping(ServerSettings()))
    assert shown["admin"] == _plain(record_of(AdminSettings).to_mapping(AdminSettings()))


def test_settings_of_methods_are_documented_with_their_defaults() -> None:
    kinds = dict(record_of(FederationSettings).kinds)
    whole = _tables(of_methods=False)
    for section, shown in _tables(of_methods=True).items():
        kind = kinds[section]
        assert isinstance(kind, Tagged)
        by_name = {one["name"]: one for one in (*shown, whole[section])}
        if section == "server_step":
            by_name["fedyogi"] = {**by_name["fedadam"], "name": "fedyogi"}
        for name, _ in kind.records:
            default = kind.to_mapping(kind.from_mapping({"name": name}, ""))
            assert by_name.pop(name, {"name": name}) == _plain(default)
        assert by_name == {}


def _plain(value: Any) -> Any:
    """As TOML has it."""
    return json.loads(json.dumps(value))


def test_exit_codes_are_those_of_the_table() -> None:
    table = re.findall(r"(?m)^\| (\d) \| ", OPERATIONS)
    assert table == ["0", "1", "2", "3", "4"]
    codes = {cls.exit_code for cls in (ConfigurationError, StoreError, AddressError)}
    assert codes == {2, 3, 4}
    assert CoordinatorError.exit_code == 1
    for code in table:
        assert re.search(rf"\b{code} ", cli.EXIT_CODES)


def test_a_failure_that_nobody_foresaw_exits_with_1_and_its_trace(path: Path) -> None:
    code = (
        "import sys; from coordinator import cli\n"
        "def fail(_): raise RuntimeError('unforeseen')\n"
        "cli.serve = fail\n"
        "sys.exit(cli.main(['serve', '--config', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RuntimeError: unforeseen" in done.stderr


def test_usage_is_2_and_every_command_tells_the_exit_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = re.findall(r"pf2lora-coordinator ([a-z-]+)", OPERATIONS)
    for command in {*commands, "pause", "resume", "stop", "rollback"} - {"service"}:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert "exit codes: 0" in capsys.readouterr().out
    for wrong in (["serve", "--no-such-flag"], ["no-such-command"], []):
        with pytest.raises(SystemExit) as ended:
            cli.main(wrong)
        assert ended.value.code == 2


@pytest.fixture
def admin(tmp_path: Path) -> Any:
    fill_store(tmp_path / "s.sqlite", devices=30, rounds_done=2).close()
    with admin_port(f"sqlite:///{tmp_path}/s.sqlite") as port:
        yield port


def test_endpoints_are_those_of_the_table(admin: AdminPort) -> None:
    paths = re.findall(r"(?m)^\| `(/[a-z/]*)` \| ", OPERATIONS)
    routes = {route.path for route in admin.watch.app.routes}  # type: ignore[union-attr]
    assert set(paths) == routes - {"/page"}
    for path in set(paths) - {"/api/live"}:  # which does not end
        of_one = path in ("/api/rounds", "/api/devices")
        status, _, _ = admin.get(f"{path}?federation=reviews" if of_one else path)
        assert status == 200


def test_metrics_are_those_of_the_table(admin: AdminPort) -> None:
    payload = NamedTensors((), b"").payload()
    settings = busy_settings(2)
    admin.tell(
        Connected(),
        Said("reviews", "d", Joined(settings), 1),
        Heard("reviews", "d", Report("a", 1, bytes(32), 1, (), payload, bytes(64)), 1),
        Said("reviews", "d", Receipt("a", ReceiptStatus.LATE, ""), 1),
        Said("reviews", "d", Refusal(ErrorCode.TIMEOUT, "", 1.0), 1),
        Acted("reviews", OpenRound(9, 1, 9.0, ()), 0.1),
        Acted("reviews", CloseRound(9, 1, False, 0), 0.1),
        Called("load", 0.1),
    )
    _, _, body = admin.get("/metrics")
    found = set(re.findall(r"(?m)^# TYPE (pf2lora_[a-z_]+) ", body))
    table = set(re.findall(r"(?m)^\| `(pf2lora_[a-z_]+)` \| ", OPERATIONS))
    assert table == {name for name in found if not name.endswith("_created")}
    for name, labels in re.findall(r"(?m)^\| `(pf2lora_[a-z_]+)` \| ([a-z, ]*)\|", OPERATIONS):
        line = re.search(rf"(?m)^{name}(?:_count)?(?:{{(.*)}})? ", body)
        assert line is not None
        told = re.findall(r"([a-z]+)=", line[1] or "")
        assert sorted(told) == sorted(filter(None, map(str.strip, labels.split(","))))


def _links(page: Path) -> list[tuple[str, str]]:
    """File and anchor of each link of a page that stays within the project."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [one.partition("#")[::2] for one in targets if "://" not in one]


def _anchors(page: Path) -> set[str]:
    """What GitHub calls a page's headings."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


def test_every_link_leads_to_a_file_and_a_heading_that_are_there() -> None:
    root = DOCS.parent
    pages = [*root.glob("*.md"), *DOCS.glob("*.md"), *root.glob("benchmarks/**/*.md")]
    links = [(page, *link) for page in pages for link in _links(page)]
    assert len(links) > 50
    for page, file, anchor in links:
        target = page.parent / file if file else page
        assert target.exists(), f"{page}: {file}"
        assert not anchor or anchor in _anchors(target), f"{page}: {file}#{anchor}"
