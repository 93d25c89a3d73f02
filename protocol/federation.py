"""What a federation is: the settings that the coordinator holds and every device obeys.

The same dataclasses are the sections of `federation.toml` and travel in the message `Joined`. The
methods are in methods.py, the coordinator's rules in aggregation.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Final

from protocol import limits
from protocol.aggregation import Aggregation, Average, Mean, MultiKrum, ServerStep
from protocol.compression import quantized_size, topk_size
from protocol.methods import Algorithm, FedDPA, HetLoRA, LearningRate, PF2LoRA, PFedLoRA
from protocol.scalars import Integer, Real, SchemaError, Text
from protocol.schema import Items, record_of

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
Name = Annotated[str, Text(limits.NAME_BYTES_MAX, 1, NAME_PATTERN)]
Label = Annotated[str, Text(limits.NAME_BYTES_MAX, 1)]
ModuleName = Annotated[str, Text(limits.TENSOR_NAME_BYTES_MAX, 1)]
Fingerprint = Annotated[str, Text(71, 71, r"sha256:[0-9a-f]{64}")]
Seconds = Annotated[float, Real(0.0, limits.SECONDS_MAX)]
Seed = Annotated[int, Integer(0, 2**32 - 1)]


class TaskKind(Enum):
    """What the backbone is fine-tuned for."""

    SEQUENCE_CLASSIFICATION = "sequence-classification"
    CAUSAL_LM = "causal-lm"
    QUESTION_ANSWERING = "question-answering"


class Loss(Enum):
    """What training lowers; for a classification it may be that of the balanced softmax.

    That one (Ren et al. 2020, arXiv 2007.10740) adds the log of the device's own label shares to
    the logits: what is learned then is what a text says, and not which labels the device has most.
    """

    CROSS_ENTROPY = "cross-entropy"
    BALANCED_SOFTMAX = "balanced-softmax"


class Group(Enum):
    """Which level a trainable tensor belongs to: only the common group is ever sent."""

    COMMON = "common"
    PERSONAL = "personal"


class Weighting(Enum):
    """How reports count in the average: alike (the paper's), or by their number of examples."""

    UNIFORM = "uniform"
    EXAMPLES = "examples"


class Mode(Enum):
    """Whether a round asks a cohort and waits for it, or devices report each in its own time."""

    SYNCHRONOUS = "synchronous"
    ASYNCHRONOUS = "asynchronous"


class Selection(Enum):
    """Whom a round asks: anyone alike, or first those who were asked longest ago."""

    UNIFORM = "uniform"
    LEAST_RECENT = "least-recent"


class OptimizerState(Enum):
    """Whether a device's optimizers remember their moments from round to round."""

    KEEP = "keep"
    RESET = "reset"


class Decay(Enum):
    """How learning rates fall over the federation's rounds: not, or to zero."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True)
class Backbone:
    """The frozen model and its tokenizer, by their digest: `pf2lora-client fingerprint NAME`."""

    name: Annotated[str, Text(limits.TEXT_BYTES_MAX, 1)]
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Task:
    """What is learned, and the longest input in tokens.

    Of question answering a longer context is read in windows of that length.
    """

    kind: TaskKind
    labels: Annotated[tuple[Label, ...], Items(limits.LABELS_MAX)] = ()
    max_length: Annotated[int, Integer(4, 1 << 20)] = 64
    loss: Loss = Loss.CROSS_ENTROPY

    def __post_init__(self) -> None:
        if self.kind is TaskKind.SEQUENCE_CLASSIFICATION:
            if len(self.labels) < 2:
                raise SchemaError("labels", f"{self.kind.value} needs two labels or more")
        elif self.labels:
            raise SchemaError("labels", f"{self.kind.value} takes no labels")
        elif self.loss is Loss.BALANCED_SOFTMAX:
            problem = f"must be 'cross-entropy': {self.kind.value} has no labels to balance"
            raise SchemaError("loss", problem)
        if len(set(self.labels)) != len(self.labels):
            raise SchemaError("labels", "a label is named twice")


@dataclass(frozen=True, slots=True)
class Adapter:
    """The two levels: `W0 + s (B A + D_k C_k)` with `s = alpha / rank`.

    `rank` is r of the common adapter, `personal_rank` r2 of each device's own; `target_modules` are
    PEFT's (suffixes, a regular expression, "all-linear"), or "query-value" for the attention query
    and value projections under whatever names the architecture gives them. `head` is the level that
    the task's head belongs to, if it has one and the method leaves a choice.
    """

    rank: Annotated[int, Integer(1, limits.RANK_MAX)] = 8
    personal_rank: Annotated[int, Integer(0, limits.RANK_MAX)] = 2
    alpha: Annotated[float, Real(1e-6, 1e6)] = 16.0
    target_modules: (
        Annotated[str, Text(limits.TEXT_BYTES_MAX, 1)]
        | Annotated[tuple[ModuleName, ...], Items(limits.TARGET_MODULES_MAX, 1)]
    ) = "query-value"
    head: Group = Group.PERSONAL


@dataclass(frozen=True, slots=True)
class Training:
    """One device's work in a round, the same for every algorithm; AdamW trains what is sent.

    `clip_norm` bounds each level's gradient (0: not at all). Rates rise over `warmup_rounds` and
    then follow `decay`. A batch is worked through `micro_batch_size` rows at a time (0: at once),
    shortest first and each part padded to its own longest, which saves memory and, where lengths
    differ, time; `gradient_checkpointing` saves memory for time. Neither changes anything else.
    """

    local_steps: Annotated[int, Integer(1, limits.STEPS_MAX)] = 10
    batch_size: Annotated[int, Integer(1, 4096)] = 16
    learning_rate: LearningRate = 1e-3
    weight_decay: Annotated[float, Real(0.0, 10.0)] = 0.0
    clip_norm: Annotated[float, Real(0.0, 1e6)] = 0.0
    warmup_rounds: Annotated[int, Integer(0, limits.ROUNDS_MAX)] = 0
    decay: Decay = Decay.CONSTANT
    optimizer_state: OptimizerState = OptimizerState.KEEP
    micro_batch_size: Annotated[int, Integer(0, 4096)] = 0
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class Rounds:
    """How rounds run.

    A round asks `cohort` devices of `minimum_examples` or more, ends when `report_goal` of them (0:
    all) have reported or after `deadline_s`, and counts if at least `minimum_reports` came;
    otherwise it is abandoned and tried again from the same base. A cohort over the goal is how a
    round does without its slowest devices: their reports are late, and where they are still busy
    the next round begins without them.

    Asynchronously (FedBuff) a device is asked as soon as it comes, if fewer than `cohort` are under
    way; `report_goal` reports make the next base version, `count` is how many are made. A report
    `s` base versions after its own counts `1 / sqrt(1 + s)`, up to `staleness_max`; `deadline_s` is
    each assignment's own, and `minimum_reports` what a buffer needs when the federation is stopped.
    """

    count: Annotated[int, Integer(1, limits.ROUNDS_MAX)] = 10
    cohort: Annotated[int, Integer(1, limits.COHORT_MAX)] = 4
    minimum_reports: Annotated[int, Integer(1, limits.COHORT_MAX)] = 1
    deadline_s: Annotated[float, Real(0.1, limits.SECONDS_MAX)] = 600.0
    weighting: Weighting = Weighting.EXAMPLES
    report_goal: Annotated[int, Integer(0, limits.COHORT_MAX)] = 0
    minimum_examples: Annotated[int, Integer(1, limits.EXAMPLES_MAX)] = 1
    selection: Selection = Selection.UNIFORM
    mode: Mode = Mode.SYNCHRONOUS
    staleness_max: Annotated[int, Integer(0, limits.STALENESS_MAX)] = 20

    def __post_init__(self) -> None:
        if self.mode is Mode.ASYNCHRONOUS:
            if not self.report_goal:
                problem = "must be given: how many reports make the next base version"
                raise SchemaError("report_goal", problem)
        elif self.report_goal > self.cohort:
            raise SchemaError("report_goal", f"is over the cohort of {self.cohort}")
        if self.minimum_reports > self.goal:
            what = "report goal" if self.report_goal else "cohort"
            raise SchemaError("minimum_reports", f"is over the {what} of {self.goal}")

    @property
    def goal(self) -> int:
        """How many reports end a round before its deadline."""
        return self.report_goal or self.cohort

    @property
    def reports_max(self) -> int:
        """How many reports a round can have."""
        return self.goal if self.mode is Mode.ASYNCHRONOUS else self.cohort


class WireDtype(Enum):
    """How an update's numbers travel; protocol/compression.py has the last three."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"
    TOPK = "topk"

    @property
    def is_plain(self) -> bool:
        """Whether every number travels by itself, near enough to what it was to forget the rest."""
        return self in (WireDtype.FLOAT32, WireDtype.FLOAT16, WireDtype.BFLOAT16)

    def bytes_of(self, count: int) -> int:
        """Size of a tensor of so many numbers."""
        match self:
            case WireDtype.FLOAT32:
                return 4 * count
            case WireDtype.FLOAT16 | WireDtype.BFLOAT16:
                return 2 * count
            case WireDtype.INT8 | WireDtype.INT4:
                return quantized_size(count, 8 if self is WireDtype.INT8 else 4)
            case WireDtype.TOPK:
                return topk_size(count)


class DownloadDtype(Enum):
    """How a base version's numbers travel; the coordinator keeps float32 whatever it is."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def wire(self) -> WireDtype:
        return WireDtype(self.value)


@dataclass(frozen=True, slots=True)
class FederationSettings:
    """One shared adapter and everything that a device must know to train it.

    The devices of pfedlora have each their own backbone, and the federation none.
    """

    name: Name
    backbone: Backbone | None
    task: Task
    adapter: Adapter = field(default_factory=Adapter)
    training: Training = field(default_factory=Training)
    algorithm: Algorithm = field(default_factory=PF2LoRA)
    rounds: Rounds = field(default_factory=Rounds)
    aggregation: Aggregation = field(default_factory=Mean)
    server_step: ServerStep = field(default_factory=Average)
    update_dtype: WireDtype = WireDtype.FLOAT32
    download_dtype: DownloadDtype = DownloadDtype.FLOAT32
    seed: Seed = 0

    @property
    def fingerprint(self) -> str:
        """The backbone's; empty where each device has its own."""
        return self.backbone.fingerprint if self.backbone else ""

    def __post_init__(self) -> None:
        _check_backbones(self)
        two_level = isinstance(self.algorithm, PF2LoRA | FedDPA | PFedLoRA)
        if two_level and self.adapter.personal_rank == 0:
            name = self.algorithm.NAME
            raise SchemaError("adapter.personal_rank", f"{name} needs a personal rank of 1 or more")
        highest = getattr(self.algorithm, "personal_rank_max", 0)
        if 0 < highest < self.adapter.personal_rank:
            raise SchemaError(
                "algorithm.personal_rank_max",
                f"is under the personal rank of {self.adapter.personal_rank}; 0 leaves it fixed",
            )
        if isinstance(self.algorithm, HetLoRA) and not isinstance(self.aggregation, Mean):
            raise SchemaError("aggregation.name", "must be 'mean': hetlora has weights of its own")
        if isinstance(self.algorithm, HetLoRA) and self.rounds.mode is Mode.ASYNCHRONOUS:
            problem = "must be 'synchronous': hetlora averages adapters of one base version"
            raise SchemaError("rounds.mode", problem)
        if isinstance(self.algorithm, HetLoRA) and not self.update_dtype.is_plain:
            raise SchemaError(
                "update_dtype",
                f"{self.update_dtype.value} needs updates of one size; hetlora's change",
            )
        if isinstance(self.aggregation, MultiKrum):
            least = 2 * self.aggregation.hostile + 3
            if self.rounds.minimum_reports < least:
                raise SchemaError(
                    "rounds.minimum_reports",
                    f"must be {least} or more for multi-krum to stand {self.aggregation.hostile} "
                    "hostile",
                )
        if isinstance(self.algorithm, HetLoRA) and self.algorithm.rank_min > self.adapter.rank:
            raise SchemaError("algorithm.rank_min", f"is over the rank of {self.adapter.rank}")


def _check_backbones(settings: FederationSettings) -> None:
    """That there is one backbone, or that nothing asks for one."""
    algorithm, adapter = settings.algorithm, settings.adapter
    if not isinstance(algorithm, PFedLoRA):
        if settings.backbone is None:
            raise SchemaError("backbone", "is missing; of the methods pfedlora alone does without")
        return
    if settings.backbone is not None:
        problem = "must be left out: each device of pfedlora has its own, and says --backbone"
        raise SchemaError("backbone", problem)
    if adapter.head is not Group.PERSONAL:
        problem = "must be 'personal': the heads of different backbones do not fit each other"
        raise SchemaError("adapter.head", problem)
    if algorithm.shared_width < adapter.rank:
        raise SchemaError("algorithm.shared_width", f"is under the rank of {adapter.rank}")
    if settings.training.local_steps < 2:
        problem = "must be 2 or more: pfedlora trains the device's own part, then the common one"
        raise SchemaError("training.local_steps", problem)


# Of the file that holds the first common adapter: `prepare` writes it, the coordinator reads it.
START_FORMAT: Final = "pf2lora-start-2"


def start_settings(settings: FederationSettings) -> dict[str, object]:
    """Those settings, as JSON has them, that say which tensors the first common adapter has."""
    table = record_of(FederationSettings).to_mapping(settings)
    names = (
        "task.kind",
        "task.labels",
        "adapter.rank",
        "adapter.target_modules",
        "adapter.head",
        "algorithm.name",
        "algorithm.shared_width",
        "algorithm.slots",
    )
    chosen = {}
    for name in names:
        section, key = name.split(".")
        if key in table[section]:  # not every method has every key
            chosen[name] = table[section][key]
    return dict(json.loads(json.dumps(chosen)))


def changed_settings(
    before: FederationSettings, after: FederationSettings
) -> dict[str, tuple[object, object]]:
    """The settings that both have and that differ, by dotted key: what was and what is."""
    old, new = _by_key(before), _by_key(after)
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def _by_key(settings: FederationSettings) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in record_of(FederationSettings).to_mapping(settings).items():
        section = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}.{key}".rstrip("."): one for key, one in section.items()}
    return found


def settings_to_json(settings: FederationSettings) -> str:
    """Settings by name, for files that a later version with more settings has to read."""
    return json.dumps(record_of(FederationSettings).to_mapping(settings))


def settings_from_json(text: str) -> FederationSettings:
    """What `settings_to_json` wrote; settings that it did not know take their defaults.

    Raises:
        SchemaError: it is no JSON, or holds what is no setting of this version.
    """
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError("settings", f"are no JSON: {error}") from None
    settings: FederationSettings = record_of(FederationSettings).from_mapping(table, "")
    return settings
