"What needs an NVIDIA GPU. From a bare checkout: PYTHONPATH=. pytest -m cuda tests/gpu, with torch, Fabric, NumPy, safetensors and pytest."
import numpy as np
import pytest
import torch

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no NVIDIA GPU")]

def stripes(n=512, seed=0):
    "Images whose bright half is their class."
    y = np.arange(n) % 4
    X = np.random.default_rng(seed).integers(0, 120, (n, 16, 16, 3), dtype=np.uint8)
    for i, k in enumerate(y):
        X[i, :, 4 * k:4 * k + 4] += 120
    return X, y

SPEC = {"name": "small_cnn", "width": 16, "dropout": 0.0}

def task():
    from mlkit.inputs.image import Image
    from mlkit.targets.classes import Classes
    from mlkit.task import Task
    return Task(Image((16, 16, 3), (0.3,) * 3, (0.3,) * 3), Classes("stripe", tuple("abcd")))

def trained(precision, seed=0, n_epochs=4):
    from mlkit.training.feed import Memory
    from mlkit.training.fit import Training, fit, make_fabric
    from mlkit.training.model import make_model
    fabric = make_fabric("cuda", precision, 1, seed)
    net = make_model(SPEC, task())
    feeds = tuple(Memory(*stripes(n, s), fabric.device) for n, s in ((512, 0), (256, 1)))
    training = Training(n_epochs, 64, {"name": "adamw", "lr": 0.005}, seed=seed)
    return net, list(fit(fabric, net, task(), feeds, training))

@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_train_learns_and_repeats(precision):
    (a, history), (b, _) = trained(precision), trained(precision)
    assert history[-1]["validation_accuracy"] > 0.98
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())), "the same seed gives the same weights"

def test_cuda_and_cpu_agree(tmp_path):
    "What was trained on the GPU says the same on the CPU."
    from mlkit.evaluation.evaluate import predict
    from mlkit.training.model import load_model, save_model
    net, _ = trained("32-true")
    again, _, same = load_model(save_model(tmp_path / "m.safetensors", net, SPEC, task()))
    X, _ = stripes(128, 2)
    net.eval()
    front = task().input.front().cuda()
    with torch.no_grad():
        on_gpu = net(front(torch.from_numpy(X).cuda())).softmax(1).cpu().numpy()
    assert same == task() and np.abs(on_gpu - predict(again, same, X)).max() < 1e-3

def test_doctor_finds_it():
    from mlkit.jobs import choose
    from mlkit.device import find
    found = find()
    chosen = choose("train", found=found)
    expected = "bf16-mixed" if found.gpus[0].capability >= (8, 0) else "16-mixed"
    assert found.gpus and (chosen.engine, chosen.options["precision"]) == ("cuda", expected)

@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_plan_agrees(tmp_path, package):
    "A plan compiled here says what torch says."
    pytest.importorskip(package, reason=f"not run: {package} is not installed")
    from mlkit.evaluation.evaluate import predict
    from mlkit.export.tensorrt import Plan, build_plan
    from mlkit.export.chain import OnnxChain, export_onnx
    net, _ = trained("32-true")
    net = net.cpu().eval()
    X, _ = stripes(32, 2)
    signatures = export_onnx(net, task(), tmp_path, 20)
    x = OnnxChain(tmp_path)(X, steps=1)
    onnx = (tmp_path / "model.onnx").read_bytes()
    plan = Plan(package, build_plan(package, onnx, signatures.steps["model"], 32))
    assert np.abs(plan(x) - predict(net, task(), X)).max() < 1e-2
