"""Each rule gives the gradient that torch gives; what has no rule is refused by its name."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="needs the extra export: make test-export")
onnxruntime = pytest.importorskip("onnxruntime")

import torch  # noqa: E402 - where onnx is, torch is
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from torch.nn import functional  # noqa: E402

from quantization.errors import ArtifactError  # noqa: E402
from quantization.onnx.lowering import lower  # noqa: E402
from quantization.onnx.recompute import recompute_late  # noqa: E402

MICROSOFT = "com.microsoft"
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def model_of(nodes, inputs, outputs, constants=None):
    """A model with inputs of the arrays' types and shapes."""
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in inputs.items()
    ]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    initializers = [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()]
    graph = helper.make_graph(nodes, "test", values, results, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def run(model, inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, inputs)


def lowered(operator, inputs, outputs=("dx",), constants=None, **attributes):
    """What the lowered form of one operator computes, all inputs in order."""
    names = [*inputs, *(constants or {})]
    order = attributes.pop("order", names)
    node = helper.make_node(operator, order, outputs, "node", domain=MICROSOFT, **attributes)
    model = model_of([node], inputs, outputs, constants)
    lower(model)
    return run(model, inputs)


def by_torch(function, dy, *arrays):
    tensors = [torch.from_numpy(a).requires_grad_() for a in arrays]
    return [
        g.numpy() for g in torch.autograd.grad(function(*tensors), tensors, torch.from_numpy(dy))
    ]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_softmax():
    x, dy = draw(2, 3, 5), draw(2, 3, 5)
    y = functional.softmax(torch.from_numpy(x), -1).numpy()
    (expected,) = by_torch(lambda x: functional.softmax(x, -1), dy, x)
    close(lowered("SoftmaxGrad_13", {"dy": dy, "y": y}, axis=-1)[0], expected)


def test_layer_norm_with_its_weights():
    x, weight, bias, dy = draw(2, 3, 8), draw(8), draw(8), draw(2, 3, 8)
    mean = x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    inputs = {"dy": dy, "x": x, "weight": weight, "mean": mean, "inverse": inverse}
    expected = by_torch(lambda x, w, b: functional.layer_norm(x, (8,), w, b), dy, x, weight, bias)
    found = lowered("LayerNormalizationGrad", inputs, ("dx", "dw", "db"), axis=-1)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_of_the_form_that_was_run_forward(form):
    x, dy = draw(4, 6), draw(4, 6)
    nodes = [
        helper.make_node("Gelu", ["x"], ["y"], "gelu", approximate=form),
        helper.make_node("GeluGrad", ["dy", "x"], ["dx"], "node", domain=MICROSOFT),
    ]
    inputs = {"dy": dy, "x": x}
    model = model_of(nodes, inputs, ["dx", "y"])
    lower(model)
    found = run(model, inputs)
    (expected,) = by_torch(lambda x: functional.gelu(x, approximate=form), dy, x)
    close(found[0], expected)


def test_gelu_without_its_forward_node_is_refused():
    with pytest.raises(ArtifactError, match="which form of Gelu"):
        lowered("GeluGrad", {"dy": draw(2), "x": draw(2)})


@pytest.mark.parametrize(
    ("operator", "function"),
    [("TanhGrad", torch.tanh), ("SigmoidGrad", torch.sigmoid), ("ReluGrad", torch.relu)],
)
def test_activations(operator, function):
    x, dy = draw(4, 6), draw(4, 6)
    y = function(torch.from_numpy(x)).numpy()
    close(lowered(operator, {"dy": dy, "y": y})[0], by_torch(function, dy, x)[0])


@pytest.mark.parametrize("ignored", [[], [0], [1, 3]])
def test_cross_entropy_passes_over_ignored_targets(ignored):
    logits, targets = draw(5, 7), RNG.integers(0, 7, 5)
    targets[ignored] = -100
    log_probabilities = functional.log_softmax(torch.from_numpy(logits), -1).numpy()
    dloss = np.array(1.5, np.float32)
    inputs = {"dloss": dloss, "log": log_probabilities, "targets": targets}
    found = lowered("SoftmaxCrossEntropyLossGrad", inputs, reduction="mean", ignore_index=-100)
    wanted = torch.from_numpy(targets)
    close(found[0], by_torch(lambda x: functional.cross_entropy(x, wanted), dloss, logits)[0])
    assert not found[0][ignored].any()


@pytest.mark.parametrize("index", [0, 2, -1])
def test_gather_of_one_index(index):
    x, dy = draw(2, 4, 3), draw(2, 3)
    inputs = {"dy": dy}
    constants = {"shape": np.array(x.shape), "index": np.array(index)}
    found = lowered(
        "GatherGrad", inputs, constants=constants, order=["shape", "index", "dy"], axis=1
    )
    close(found[0], by_torch(lambda x: x[:, index], dy, x)[0])


def test_gather_of_many_indices_adds_up():
    x, index, dy = draw(4, 3), np.array([1, 3, 1]), draw(3, 3)
    found = lowered(
        "GatherGrad",
        {"index": index, "dy": dy},
        constants={"shape": np.array(x.shape)},
        order=["shape", "index", "dy"],
        axis=0,
    )
    close(found[0], by_torch(lambda x: x[torch.from_numpy(index)], dy, x)[0])


def test_gather_nd():
    x, dy = draw(3, 4, 2), draw(3, 2)
    indices = np.array([[0, 1], [1, 3], [0, 1]])
    found = lowered(
        "GatherNDGrad",
        {"indices": indices, "dy": dy},
        constants={"shape": np.array(x.shape)},
        order=["shape", "indices", "dy"],
    )
    rows, columns = (torch.from_numpy(i) for i in indices.T)
    close(found[0], by_torch(lambda x: x[rows, columns], dy, x)[0])


@pytest.mark.parametrize(("start", "end"), [(0, 2), (1, 4), (-3, -1), (2, 2**62), (-9, 9)])
def test_slice(start, end):
    x = draw(2, 5, 3)
    dy = draw(*x[:, start:end].shape)
    constants = {
        "shape": np.array(x.shape),
        "starts": np.array([start]),
        "ends": np.array([end]),
        "axes": np.array([1]),
        "steps": np.array([1]),
    }
    found = lowered("SliceGrad", {"dy": dy}, constants=constants)
    close(found[0], by_torch(lambda x: x[:, start:end], dy, x)[0])


def test_a_slice_between_transposes():
    """onnxruntime moves transposes past what they surround; the result must not change."""
    x, dy = draw(2, 5, 3), draw(3, 2, 2)
    nodes = [
        helper.make_node("Transpose", ["dy"], ["ty"], perm=[1, 2, 0]),
        helper.make_node(
            "SliceGrad", ["ty", "shape", "starts", "ends", "axes"], ["tx"], domain=MICROSOFT
        ),
        helper.make_node("Transpose", ["tx"], ["dx"], perm=[2, 0, 1]),
    ]
    constants = {"shape": x.shape, "starts": [1], "ends": [3], "axes": [1]}
    model = model_of(
        nodes, {"dy": dy}, ["dx"], {n: np.array(value) for n, value in constants.items()}
    )
    ranked = helper.make_tensor_value_info("ty", TensorProto.FLOAT, [2, 2, 3])
    model.graph.value_info.append(ranked)
    lower(model)
    (expected,) = by_torch(lambda x: x[:, 1:3].permute(2, 0, 1), dy, x)
    close(run(model, {"dy": dy})[0], expected.transpose(2, 0, 1))


def test_slice_with_steps_is_refused():
    constants = {name: np.array([2]) for name in ("shape", "starts", "ends", "axes", "steps")}
    with pytest.raises(ArtifactError, match=r"SliceGrad \(node\): only with steps of one"):
        lowered("SliceGrad", {"dy": draw(2)}, constants=constants)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)])
def test_division_sums_back_to_the_operands(shape):
    a, b, dy = draw(*shape), draw(2, 3) + 3, draw(2, 3)
    found = lowered("DivGrad", {"dy": dy, "a": a, "b": b}, ("da", "db"))
    for one, other in zip(found, by_torch(torch.div, dy, a, b), strict=True):
        assert one.shape == other.shape
        close(one, other)


@pytest.mark.parametrize(("down", "expected"), [(1, 0.5), (0, 8.0)])
def test_scale_by_a_number_of_another_type(down, expected):
    found = lowered("Scale", {"x": np.full(3, 2, np.float32), "s": np.array(4)}, scale_down=down)
    assert found[0].tolist() == [expected] * 3


@pytest.mark.parametrize("shapes", [((2, 3), (3,)), ((2, 1), (1, 3)), ((), (2, 3)), ((4,), (4,))])
def test_broadcast_arguments_for_a_sum(shapes):
    a, b = (draw(*shape) for shape in shapes)
    dy = draw(*np.broadcast_shapes(*shapes))
    nodes = [
        helper.make_node("Shape", ["a"], ["sa"]),
        helper.make_node("Shape", ["b"], ["sb"]),
        helper.make_node("BroadcastGradientArgs", ["sa", "sb"], ["xa", "xb"], domain=MICROSOFT),
        helper.make_node("ReduceSum", ["dy", "xa"], ["ra"], keepdims=1),
        helper.make_node("Reshape", ["ra", "sa"], ["da"]),
        helper.make_node("ReduceSum", ["dy", "xb"], ["rb"], keepdims=1),
        helper.make_node("Reshape", ["rb", "sb"], ["db"]),
    ]
    inputs = {"a": a, "b": b, "dy": dy}
    model = model_of(nodes, inputs, ["da", "db"])
    lower(model)
    for one, other in zip(run(model, inputs), by_torch(torch.add, dy, a, b), strict=True):
        close(one, other)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_products_with_transposed_operands(left, right):
    a, b = draw(2, 3, 4), draw(2, 4, 5)
    inputs = {"a": a.swapaxes(1, 2) if left else a, "b": b.swapaxes(1, 2) if right else b}
    inputs = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    found = lowered("FusedMatMul", inputs, transA=left, transB=right, alpha=0.5)
    close(found[0], a @ b / 2)


@pytest.mark.parametrize(
    ("operator", "domain", "name"),
    [
        ("EinsumGrad", MICROSOFT, "com.microsoft::EinsumGrad"),
        ("SimplifiedLayerNormalization", "", "SimplifiedLayerNormalization"),
        ("Add", "com.example", "com.example::Add"),
    ],
)
def test_an_unknown_operator_is_refused_by_its_name(operator, domain, name):
    node = helper.make_node(operator, ["x"], ["y"], "strange", domain=domain)
    with pytest.raises(ArtifactError, match=rf"operator {name} \(strange\) is not standard ONNX"):
        lower(model_of([node], {"x": draw(2)}, ["y"]))


def test_an_unknown_operator_that_nothing_needs_is_dropped():
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Strange", ["x"], ["z"], domain=MICROSOFT),
    ]
    model = model_of(nodes, {"x": draw(2)}, ["y"])
    lower(model)
    assert [node.op_type for node in model.graph.node] == ["Relu"]


def test_what_is_cheap_is_computed_again_after_the_gradient_has_come():
    x, dy = draw(2, 3), draw(2, 3)
    nodes = [
        helper.make_node("Gelu", ["x"], ["y"], "gelu"),
        helper.make_node("Reshape", ["y", "flat"], ["rows"]),
        helper.make_node("Reshape", ["dy", "flat"], ["late"]),
        helper.make_node("Mul", ["late", "rows"], ["dw"]),
    ]
    inputs = {"x": x, "dy": dy}
    constants = {"flat": np.array([-1])}
    (expected,) = run(model_of(nodes, inputs, ["dw"], constants), inputs)
    model = model_of(nodes, inputs, ["dw", "y"], constants)
    recompute_late(model.graph, "dy")
    gelus = [node for node in model.graph.node if node.op_type == "Gelu"]
    assert len(gelus) == 2
    assert gelus[0].input[0] == "x"
    assert gelus[1].input[0] != "x"
    np.testing.assert_array_equal(run(model, inputs)[0], expected)
