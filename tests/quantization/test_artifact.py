"""An artifact is refused, with a clear error, before any runtime sees what is wrong with it."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantization.artifact import gradient_name, load_artifact, loss_inputs
from quantization.errors import ArtifactError
from quantization.graph_file import ExternalData, read_outline
from quantization.manifest import FILES, MANIFEST, WEIGHTS, manifest_bytes, read_manifest
from tests.quantization.sample_artifact import (
    SAMPLE,
    WEIGHT_BYTES,
    gradient_graph,
    graph,
    message,
    number,
    sample_inputs,
    tensor,
    value,
    write_sample,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_sample(tmp_path)
    return tmp_path


def refusal(folder: Path, digest: str = "") -> str:
    with pytest.raises(ArtifactError) as caught:
        load_artifact(folder, digest)
    return str(caught.value)


def edit_manifest(folder: Path, **changes) -> None:
    table = json.loads((folder / MANIFEST).read_text()) | changes
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))


def test_a_whole_artifact_is_loaded(tmp_path):
    digest = write_sample(tmp_path)
    artifact = load_artifact(tmp_path, digest)
    assert artifact.digest == digest
    assert replace(artifact.manifest, files=()) == SAMPLE
    assert [path.name for path in (artifact.gradient_graph, artifact.evaluation_graph)] == list(
        FILES[:2]
    )


def test_the_trainable_arrays_are_named_as_in_the_model():
    assert SAMPLE.trainable(8, 2) == {
        "bert.query.A": (8, 4),
        "bert.query.B": (3, 8),
        "bert.query.C": (2, 4),
        "bert.query.D": (3, 2),
        "classifier.bias": (2,),
        "classifier.weight": (2, 3),
    }


def test_loading_needs_neither_numpy_nor_a_runtime(folder):
    code = (
        "import sys, pathlib\n"
        "from quantization.artifact import load_artifact\n"
        "load_artifact(pathlib.Path(sys.argv[1]))\n"
        "heavy = {'numpy', 'torch', 'onnx', 'onnxruntime'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env={**os.environ})


def test_no_artifact_there(tmp_path):
    assert "manifest.json cannot be read" in refusal(tmp_path)


def test_another_artifact_than_the_one_wanted(folder):
    assert "another artifact" in refusal(folder, "sha256:" + "1" * 64)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_absent(folder, name):
    (folder / name).unlink()
    assert name in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    assert "truncated" in refusal(folder)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_any_file(folder, data):
    name = data.draw(st.sampled_from(FILES))
    before = (folder / name).read_bytes()
    at = data.draw(st.integers(0, len(before) - 1))
    changed = bytearray(before)
    changed[at] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(changed)
    try:
        assert name in refusal(folder)
    finally:
        (folder / name).write_bytes(before)


def test_a_link_in_a_file_s_place(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "weights.bin"
    elsewhere.write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(elsewhere)
    assert "plain file" in refusal(folder)


def test_a_foreign_file(folder):
    (folder / "libcustom.so").write_bytes(b"")
    assert "'libcustom.so' is no file of an artifact" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "format 2 is not known here: this version reads 4"),
        ({"format": ...}, "format is missing"),
        ({"scheme": "int2"}, "'int2' is none of none, int8, int4, nf4"),
        ({"task": "regression"}, "'regression' is none of"),
        ({"label_count": -1}, "label_count: -1 is negative"),
        ({"label_count": True}, "wrong type"),
        ({"fingerprint": "sha256:0"}, "64 hex digits"),
        ({"layers": []}, "layers: there are none"),
        (
            {"layers": [{"name": "q", "outputs": 3, "inputs": 4}]},
            "layers[0]: transposed is missing",
        ),
        ({"head": [{"name": "w", "shape": [0]}]}, "not sizes"),
        ({"files": []}, "each once"),
        ({"batch_inputs": ["input_ids", "input_ids"]}, "each once"),
        ({"surprise": 1}, "'surprise' is not known here"),
    ],
)
def test_a_manifest_that_does_not_match(folder, changes, problem):
    edit_manifest(folder, **changes)
    assert problem in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000])
def test_a_manifest_that_is_no_manifest(folder, text):
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in refusal(folder)


def test_a_manifest_is_read_as_it_was_written(folder):
    manifest = read_manifest((folder / MANIFEST).read_bytes())
    assert manifest_bytes(manifest) == (folder / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    "location",
    ["../weights.bin", "/etc/passwd", "", "other.bin", "*/_ORT_MEM_ADDR_/*", "./weights.bin"],
)
def test_a_graph_that_names_other_data(tmp_path, location):
    write_sample(tmp_path, gradient_graph(message(5, tensor(location))))
    assert f"names data in {location!r}" in refusal(tmp_path)


WHERE = {
    "a constant": lambda t: message(1, message(5, message(5, t))),
    "constants": lambda t: message(1, message(5, message(10, t))),
    "a branch": lambda t: message(1, message(5, message(6, message(5, t)))),
    "branches": lambda t: message(
        1, message(5, message(11, message(1, message(5, message(5, t)))))
    ),
    "a sparse initializer": lambda t: message(15, message(1, t)),
    "a sparse constant": lambda t: message(1, message(5, message(22, message(2, t)))),
}


@pytest.mark.parametrize("where", WHERE)
def test_other_data_is_found_wherever_it_hides(tmp_path, where):
    write_sample(tmp_path, gradient_graph(WHERE[where](tensor("../secret"))))
    assert "'../secret'" in refusal(tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        message(25, message(7, message(5, message(5, tensor("/a"))))),
        message(20, message(1, message(5, tensor("/a")))),
    ],
)
def test_other_data_is_found_in_functions_and_training_graphs(tmp_path, field):
    write_sample(tmp_path, gradient_graph() + field)
    assert "'/a'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("offset", "length"), [(1, WEIGHT_BYTES), (0, WEIGHT_BYTES + 1), (-1, 1), (0, -1)]
)
def test_a_graph_that_names_data_outside_the_weights(tmp_path, offset, length):
    write_sample(tmp_path, gradient_graph(message(5, tensor(offset=offset, length=length))))
    assert "beyond the end" in refusal(tmp_path)


def test_a_location_given_twice(tmp_path):
    twice = tensor() + message(13, message(1, "location"), message(2, "/etc/passwd"))
    write_sample(tmp_path, gradient_graph(message(5, twice)))
    assert "twice" in refusal(tmp_path)


def test_a_graph_with_other_inputs(tmp_path):
    write_sample(tmp_path, gradient_graph(message(11, value("surprise", (2,)))))
    assert "inputs are not the manifest's: [('surprise', (2,))]" in refusal(tmp_path)


def test_an_input_given_twice(tmp_path):
    write_sample(tmp_path, gradient_graph(message(11, value("scale", ()))))
    assert "'scale' goes in or out twice" in refusal(tmp_path)


def test_sizes_that_are_not_the_graph_s(folder):
    layer = {"name": "bert.query", "outputs": 4, "inputs": 3, "transposed": False}
    edit_manifest(folder, layers=[layer])
    assert "('bert.query.A', (0, 3))" in refusal(folder)


def test_a_graph_with_other_outputs(tmp_path):
    write_sample(tmp_path, graph(sample_inputs() | loss_inputs(SAMPLE), ["loss"]))
    missing = sorted(map(gradient_name, SAMPLE.trainable()))[0]
    assert "outputs are not the manifest's" in refusal(tmp_path)
    assert missing in refusal(tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        message(8, message(1, "com.example"), number(2, 1)),
        message(7, message(1, message(4, "Leak"), message(7, "com.example"))),
    ],
)
def test_a_graph_with_operators_of_one_maker(tmp_path, field):
    write_sample(tmp_path, gradient_graph() + field)
    assert "'com.example'" in refusal(tmp_path)


def test_a_graph_nested_beyond_measure(tmp_path):
    nested = b""
    for _ in range(64):
        nested = message(1, message(5, message(6, nested)))
    write_sample(tmp_path, gradient_graph(nested))
    assert "nested deeper" in refusal(tmp_path)


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_graph_are_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    with contextlib.suppress(ArtifactError):  # and nothing else
        read_outline(path)


def test_an_outline_tells_what_the_graph_says(folder):
    outline = read_outline(folder / "gradient.onnx")
    assert outline.external == [ExternalData(WEIGHTS, 0, WEIGHT_BYTES)]
    assert outline.domains == {""}
    assert outline.inputs == {**sample_inputs(), "targets": (0,), "label_offset": (2,)}
    assert outline.inputs["bert.query.B"] == (3, 0)
