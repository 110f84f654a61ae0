"Files that run code where somebody loads them, or that stop a machine: none is loaded by mlkit, each is refused within a second, at every door."
import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile

import joblib
import numpy as np
import pytest
from mlkit.registry.released import bundle_to_serve
from mlkit.core import RegistryError, write_json
from mlkit.registry.bundle import BUNDLE, write_bundle
from mlkit.registry.store import checked_bundle, fetch
from mlkit.registry.verdict import VERDICT
from onnx import TensorProto, helper
from test_registry import Shop, a_verdict, tables  # noqa: F401 (a fixture)


class Evil:
    "Leaves a file where it is unpickled."

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def pickled(canary):
    return pickle.dumps(Evil(canary))


def torch_zip(canary):
    "As `torch.save` writes it."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", pickled(canary))
    return out.getvalue()


def joblib_file(canary):
    out = io.BytesIO()
    joblib.dump(Evil(canary), out)
    return out.getvalue()


def numpy_objects(canary):
    out = io.BytesIO()
    np.save(out, np.array([Evil(canary)], object), allow_pickle=True)
    return out.getvalue()


def bomb(canary):
    "1 GB of zeros in 1 MB."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z, z.open("w", "w", force_zip64=True) as f:
        for _ in range(1000):
            f.write(bytes(1_000_000))
    return out.getvalue()


def external(location):
    def onnx(canary):
        w = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
        w.external_data.add(key="location", value=location)
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "xy")
        return helper.make_model(helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [w])).SerializeToString()
    return onnx


def tensors(header, length=None):
    text = json.dumps(header).encode()
    return struct.pack("<Q", length or len(text)) + text + bytes(64)


def tensor(*offsets):
    return {"dtype": "F32", "shape": [(offsets[1] - offsets[0]) // 4], "data_offsets": list(offsets)}


def mlmodel(canary):
    return b"flavors:\n  python_function:\n    loader_module: evil\n    code: code\n"


def module(canary):
    return f"import os\nos.system(\"touch '{canary}'\")\n".encode()


FILES = {
    "pickle as .pt": ("model.pt", pickled), "pickle as safetensors": ("model.safetensors", pickled), "pickle as an engine": ("model.engine", pickled),
    "PyTorch archive as ONNX": ("model.onnx", torch_zip), "joblib": ("model.joblib", joblib_file), "joblib as JSON": ("task.json", joblib_file),
    "NumPy with objects": ("model.npy", numpy_objects), "MLmodel with a loader": ("MLmodel", mlmodel), "module": ("model.py", module),
    "Python backend of Triton": ("config.pbtxt", lambda _: b'name: "m"\nbackend: "python"\n'),
    "configuration with ../": ("config.pbtxt", lambda _: b'backend: "onnxruntime"\ndefault_model_filename: "../../evil.onnx"\n'),
    "ONNX data at ../": ("model.onnx", external("../../../../etc/passwd")), "ONNX data at /": ("model.onnx", external("/etc/passwd")),
    "safetensors that overlap": ("model.safetensors", lambda _: tensors({"a": tensor(0, 64), "b": tensor(32, 64)})),
    "safetensors that lie outside": ("model.safetensors", lambda _: tensors({"a": tensor(0, 10**15)})),
    "safetensors with a huge header": ("model.safetensors", lambda _: tensors({}, 2**62)),
    "zip bomb": ("weights.zip", bomb), "zip bomb as safetensors": ("model.safetensors", bomb),
    "JSON without end": ("task.json", lambda _: b"[" * 5_000_000),
}


@pytest.fixture
def shop(tmp_path, tables, monkeypatch):  # noqa: F811
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    shop = Shop(tmp_path / "shop")
    monkeypatch.chdir(shop.root)
    shutil.copy(tables, shop.root / "mlflow.db")
    return shop


@pytest.mark.parametrize("kind", FILES)
def test_is_refused_and_runs_nothing(shop, monkeypatch, kind):
    "In a bundle whose list and verdict fit: when it is published, when it is served, and when a registry has it already."
    name, make = FILES[kind]
    canary = shop.root / "it ran"
    (shop.root / "in").write_bytes(make(canary))
    identity = write_bundle(shop.root / BUNDLE, {f"model_repository/m/{name}": shop.root / "in"}, {})
    write_json(shop.root / VERDICT, a_verdict(identity))
    with monkeypatch.context() as m: # a registry that somebody else has filled
        m.setattr("mlkit.registry.store.check_formats", lambda folder: None)
        shop.publish()
    doors = {
        "publish": lambda: checked_bundle(shop.root / BUNDLE, identity), "serve": lambda: bundle_to_serve(shop.root, None),
        "serve a version": lambda: fetch("digits", "1", shop.root / "got")}
    for door, enter in doors.items():
        start = time.monotonic()
        with pytest.raises(RegistryError) as e:
            enter()
        seconds = time.monotonic() - start
        assert name in str(e.value) and "may not hold it" in str(e.value) and "\n" not in str(e.value), door
        assert seconds < 1, (door, seconds)
    assert not canary.exists()


def test_the_canary_sings(tmp_path):
    "The pickles above do run code where they are loaded."
    for make, load in ((pickled, pickle.load), (joblib_file, joblib.load), (numpy_objects, lambda f: np.load(f, allow_pickle=True))):
        canary = tmp_path / make.__name__
        load(io.BytesIO(make(canary)))
        assert canary.exists()
