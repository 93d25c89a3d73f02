"""The graphs of an artifact, on whatever onnxruntime is installed, give torch's numbers."""

import os

import numpy as np
import pytest

from quantization.artifact import LOGITS, LOSS, SCALE, gradient_name, loss_inputs
from tests.quantization.compiled import FOLDER_VARIABLE, Case, cases

onnxruntime = pytest.importorskip("onnxruntime")
if FOLDER_VARIABLE not in os.environ:
    pytest.skip(f"{FOLDER_VARIABLE} names no artifacts: make test-export", allow_module_level=True)

CASES = cases()
LEVELS = [
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
]


def session(graph, level=LEVELS[1]):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run(graph, inputs, level=LEVELS[1]):
    opened = session(graph, level)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, inputs), strict=True))


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_every_backbone_and_scheme_is_there():
    assert {case.folder.name for case in CASES} >= {
        f"{name}-{scheme}"
        for name in ("minilm", "minilm-answers")
        for scheme in ("none", "int8", "int4", "nf4")
    }


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder.name)
def test_loss_and_every_gradient_are_those_of_torch(case: Case, level):
    expected = case.arrays("outputs")
    found = run(case.artifact.gradient_graph, case.arrays("inputs"), level)
    assert found.keys() == expected.keys() - {LOGITS}
    assert found[LOSS] == pytest.approx(expected[LOSS], rel=1e-6)
    errors = {name: error(found[name], expected[name]) for name in found}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, worst


def _for_evaluation(case: Case):
    left_out = loss_inputs(case.artifact.manifest)
    return {name: array for name, array in case.arrays("inputs").items() if name not in left_out}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.folder.name)
def test_logits_are_those_of_torch(case: Case):
    inputs = _for_evaluation(case)
    found = run(case.artifact.evaluation_graph, inputs)
    assert error(found[LOGITS], case.arrays("outputs")[LOGITS]) < 1e-5


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.folder.name)
def test_a_rank_of_zero_leaves_a_level_out(case: Case):
    graph, inputs = case.artifact.gradient_graph, case.arrays("inputs")
    zeroed = {n: np.zeros_like(a) if n.endswith(".D") else a for n, a in inputs.items()}
    without = dict(inputs)
    for layer in case.artifact.manifest.layers:
        without |= {
            n: np.zeros(s, np.float32) for n, s in layer.shapes(8, 0).items() if n[-1] in "CD"
        }
    found, expected = run(graph, without), run(graph, zeroed)
    assert found[LOSS] == expected[LOSS]
    for layer in case.artifact.manifest.layers:
        for letter in "AB":
            name = gradient_name(f"{layer.name}.{letter}")
            np.testing.assert_array_equal(found[name], expected[name])
        assert found[gradient_name(f"{layer.name}.C")].shape == (0, layer.inputs)


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.folder.name)
def test_ranks_may_differ_from_layer_to_layer(case: Case):
    inputs = case.arrays("inputs")
    layers = case.artifact.manifest.layers
    for rank, layer in enumerate(layers, 1):
        inputs |= {n: np.full(s, 0.01, np.float32) for n, s in layer.shapes(rank, 2).items()}
    found = run(case.artifact.gradient_graph, inputs)
    for rank, layer in enumerate(layers, 1):
        for name, shape in layer.shapes(rank, 2).items():
            assert found[gradient_name(name)].shape == shape


@pytest.mark.parametrize("case", CASES[:1], ids=lambda case: case.folder.name)
def test_a_scale_of_zero_is_the_backbone_alone(case: Case):
    inputs = _for_evaluation(case)
    other = {n: a * 2 if n.endswith((".B", ".D")) else a for n, a in inputs.items()}
    zero = {SCALE: np.zeros((), np.float32)}
    graph = case.artifact.evaluation_graph
    np.testing.assert_array_equal(
        run(graph, inputs | zero)[LOGITS], run(graph, other | zero)[LOGITS]
    )
