"""The shapes inside a graph, with names for sizes that are open.

The gradient builder compares the shapes of operands. Where it does not know them it writes
operators that find out while the graph runs, which costs time but changes no result.
"""

from __future__ import annotations

import logging
from typing import Any

import onnx
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

log = logging.getLogger("pf2lora.export")


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shape of every value, as far as it can be told."""
    tool = _Inference(int_max=2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
    try:
        return tool.infer(model)
    except Exception as error:  # asserts, type and key errors: a tool of many authors
        log.warning("shapes are not known before the graph runs (%s): it runs slower", error)
        return model


class _Inference(SymbolicShapeInference):  # type: ignore[misc]  # untyped
    """onnxruntime's tool, taught the present form of ReduceMean: axes are an input."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.dispatcher_["ReduceMean"] = self._infer_ReduceSum

    def infer(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """What `infer_shapes` does, without its writing a file where it fails."""
        self._preprocess(model)
        complete = False
        while self.run_:
            complete = self._infer_impl()
        self._update_output_from_vi()
        if not complete:
            raise ValueError("shape inference stopped half way")
        return self.out_mp_
