"""Other engines that run a trained network on a CPU, for benchmark.py --peers.

run     pip install onnx onnxscript onnxruntime openvino    and, for int8 by OpenVINO, nncf
        python tests/benchmark.py --peers
"""

from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch

import predict
from bert_multilabel_cls import load_model

names = ["input_ids", "attention_mask", "token_type_ids"]


def engines(model_path, texts):
    """Return {name: a function of three int64 arrays (B, T) that returns probabilities (B, C)}."""
    model = load_model(model_path)[0].eval()
    example = (torch.randint(5, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64), torch.zeros(2, 9).long())
    found = {}
    if find_spec("onnxruntime"):
        found |= onnx_engines(model, example)
    if find_spec("openvino"):
        found |= openvino_engines(model, example, texts)
    return found


def onnx_engines(model, example):
    """Return the network in ONNX Runtime: float32, and int8 with ranges measured as it runs."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    torch.onnx.export(
        model,
        example,
        "fp32.onnx",
        input_names=names,
        output_names=["probs"],
        dynamic_axes=axes,
        dynamo=False,
    )
    quantize_dynamic("fp32.onnx", "int8.onnx", weight_type=QuantType.QInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def engine(path):
        """Return the function that runs a file."""
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda *inputs: session.run(None, dict(zip(names, inputs)))[0]

    return {"onnx_fp32": engine("fp32.onnx"), "onnx_int8": engine("int8.onnx")}


def openvino_engines(model, example, texts):
    """Return the network in OpenVINO: in the precision it takes by itself, and int8 if nncf is there."""
    import openvino

    core, shape = openvino.Core(), openvino.PartialShape([-1, -1])
    inputs = [(shape, openvino.Type.i64)] * 3
    network = openvino.convert_model(model, example_input=example, input=inputs)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}

    def engine(network):
        """Return the function that runs a network."""
        compiled = core.compile_model(network, "CPU", settings)
        print("openvino computes in", compiled.get_property("INFERENCE_PRECISION_HINT"))
        return lambda *inputs: compiled(inputs)[0]

    found = {"openvino": engine(network)}
    if find_spec("nncf"):
        import nncf

        batches = list(input_batches(texts[:300]))
        kind = nncf.ModelType.TRANSFORMER
        found["openvino_int8"] = engine(nncf.quantize(network, nncf.Dataset(batches), model_type=kind))
    return found


def input_batches(texts):
    """Yield the three arrays of each batch that predict.predict makes of these texts."""
    seen = []
    with run_by(lambda *inputs: seen.append(inputs) or np.zeros((len(inputs[0]), 1), np.float32)):
        for _ in predict.iter_probs([(text, ()) for text in texts], *predict.get_model()):
            yield seen.pop()


@contextmanager
def run_by(engine):
    """Let predict.predict run its batches by another engine; tokens and batches stay the same."""

    def batches(_, dataloader):
        """Yield (probs, labels) of each batch, as predict_batches does."""
        for *inputs, labels in dataloader:
            yield torch.from_numpy(engine(*(tensor.numpy() for tensor in inputs))), labels

    real, predict.predict_batches = predict.predict_batches, batches
    try:
        yield
    finally:
        predict.predict_batches = real
