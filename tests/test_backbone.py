"A network that learned elsewhere: it is well ahead on few photos, `mlkit new` takes it where it can, and what is wrong is one line."
import hashlib, os, socket, subprocess, threading
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2, numpy as np, onnxruntime as ort, pytest, torch
from conftest import BIN, ROOT, sha256
from ruamel.yaml import YAML
from safetensors.torch import save_file

from mlkit.candidates.base import TRAIN, VALIDATION, Data, outputs_of
from mlkit.candidates.network import network
from mlkit.core import MlkitError
from mlkit.export.chain import torch_to_onnx
from mlkit.inputs.image import Image
from mlkit.layers import with_answer
from mlkit.targets.classes import Classes
from mlkit.task import Task
from mlkit.training.model import make_model

SEED = int(os.environ.get("BACKBONE_SEED", 0))
SIDE, CORNERS = 32, 7
BACKBONE, EPOCHS = "test_resnet", 6  # 0.4 million weights
TRAINED = {"schedule": {"name": "one_cycle"}, "augment": None, "loss": {}, "keep": "last", "seed": 0}


def photo(radii, random):
    "A bright outline on a dark, cloudy ground. A class is its radii; place, turn, proportions and colours are chance."
    x = cv2.resize(random.integers(0, 150, (5, 5, 3), np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    middle = SIDE * (0.5 + random.uniform(-0.1, 0.1, 2))
    angles = 2 * np.pi * np.arange(CORNERS) / CORNERS + random.uniform(-0.4, 0.4)
    r = 0.42 * SIDE * radii[:, None] * random.uniform(0.75, 1, (1, 2))
    corners = middle + r * np.stack([np.cos(angles), np.sin(angles)], 1)
    cv2.fillPoly(x, [corners.astype(np.int32)], random.integers(110, 256, 3).tolist(), cv2.LINE_AA)
    return np.clip(x + random.normal(0, 10, x.shape), 0, 255).astype(np.uint8)


def photos(classes, n, random):
    "n photos a class, and their classes."
    return np.stack([photo(radii, random) for radii in classes for _ in range(n)]), np.repeat(np.arange(len(classes)), n)


def learn(train, held_out, n_classes, **values):
    "A network, its task, and its accuracy on photos that it has not seen."
    (X, y), (V, v) = train, held_out
    task = Task(Image.fit(X), Classes("kind", tuple(f"{i:02d}" for i in range(n_classes))))
    data = Data(task, lambda _, split: {TRAIN: X, VALIDATION: V}[split], {TRAIN: y, VALIDATION: v})
    fitted = network(data, TRAINED | values)
    return fitted.net, task, float((outputs_of(fitted.net, task, V).argmax(1).numpy() == v).mean())


def adamw(lr):
    return {"name": "adamw", "lr": lr, "weight_decay": 0.05}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    "Weights of a network that learned thirty outlines; ten other outlines, 40 photos each; photos to judge by."
    random = np.random.default_rng(SEED)
    old, new = random.uniform(0.25, 1, (2, 30, CORNERS))
    net, _, accuracy = learn(photos(old, 60, random), photos(old, 5, random), len(old), model={"name": "timm", "backbone": BACKBONE},
                             optimizer=adamw(0.01), n_epochs=8, batch_size=64)
    path = tmp_path_factory.mktemp("weights") / "body.safetensors"
    save_file(net.net.state_dict(), path)
    return path, accuracy, photos(new[:10], 40, random), photos(new[:10], 40, random)



def named(path, backbone=BACKBONE, **more):
    "`train.model` with the weights of a file."
    return {"name": "timm", "backbone": backbone, "weights": str(path), "sha256": sha256(path)} | more


def test_few_photos_are_enough_for_what_has_learned_elsewhere(learned):
    "The same network, photos and steps; each with a learning rate that suits it. Then ONNX says the same."
    path, accuracy, train, held_out = learned
    from_scratch = {"name": "timm", "backbone": BACKBONE}
    scratch = learn(train, held_out, 10, model=from_scratch, optimizer=adamw(0.015), n_epochs=EPOCHS, batch_size=32)[2]
    model = named(path, frozen_epochs=1, layer_decay=0.8)
    net, task, tuned = learn(train, held_out, 10, model=model, optimizer=adamw(0.005), n_epochs=EPOCHS, batch_size=32)
    print(f"seed {SEED}: {accuracy:.3f} where it learned; from scratch {scratch:.3f}, with its weights {tuned:.3f}")
    assert accuracy > 0.85 and tuned > 0.9 and tuned > scratch + 0.08, (accuracy, scratch, tuned)
    whole = with_answer(net, task).eval()
    proto = torch_to_onnx(whole, {"x": ("float32", (3, SIDE, SIDE))}, ("probabilities", "float32", (10,)), 20)
    session = ort.InferenceSession(proto.SerializeToString())
    for n in (1, 7):
        x = task.input.front()(torch.from_numpy(held_out[0][:n]))
        with torch.no_grad():
            assert np.abs(session.run(None, {"x": x.numpy()})[0] - whole(x).numpy()).max() < 1e-5


GRAY = Task(Image((SIDE, SIDE, 1), (0.3,), (0.2,)), Classes("kind", ("a", "b")))


@pytest.mark.parametrize("change, says", [
    ({"sha256": "0" * 64}, "not 0000"),
    ({"sha256": "12"}, "64 hex digits"),
    ({"sha256": None}, "must be said; these have sha256: "),
    ({"backbone": "resnet81"}, "did you mean 'resnet"),
    ({"backbone": "test_vit"}, "of another network"),
    ({"backbone": "resnet10t"}, "of another network"),
    ({"weights": "/none/body.safetensors"}, "no file /none/body.safetensors"),
    ({"weights": "pickle"}, "no safetensors"),
    ({"weights": "some"}, "of another network"),
    ({"weights": "none://nowhere/x"}, "check the address"),
    ({"layer_decay": 2.0}, "train.model.layer_decay")])
def test_what_is_wrong_is_one_line(learned, tmp_path, monkeypatch, caplog, change, says):
    (tmp_path / "params.yaml").touch()
    monkeypatch.chdir(tmp_path)
    spec = named(learned[0]) | change
    whole = {k: v.clone() for k, v in make_model({"name": "timm", "backbone": BACKBONE}, GRAY).net.state_dict().items()}
    if spec["weights"] == "pickle":
        torch.save(whole, tmp_path / "pickle")
    if spec["weights"] == "some": # the first layers only: the others would be left as chance has made them
        save_file({k: v for k, v in whole.items() if not k.startswith("layer4")}, tmp_path / "some")
    if spec["weights"] in ("pickle", "some"):
        spec["sha256"] = sha256(tmp_path / spec["weights"])
    with pytest.raises(MlkitError) as e:
        make_model(spec, GRAY)
    assert says in str(e.value) and "\n" not in str(e.value) and not caplog.records


class Hub(BaseHTTPRequestHandler):
    "Answers for one file of every repository as the hub does, with the SHA-256 in a header."
    body = b"weights"
    def do_GET(self):
        part = self.body[:1] if self.headers["Range"] == "bytes=0-0" else self.body
        self.send_response(206 if len(part) == 1 else 200)
        said = {"X-Linked-Etag": f'"{hashlib.sha256(self.body).hexdigest()}"', "ETag": '"of the store"', "Content-Length": len(part)}
        for name, value in said.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_): pass


@contextmanager
def hub(kind):
    "An address: of a hub, of one that keeps silent, of none."
    if kind == "answers":
        with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
        return
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        if kind == "none":
            silent.close()
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Forty photos of two kinds, 80 pixels a side."
    random, top = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "photos"
    for kind in ("cat", "dog"):
        (top / kind).mkdir(parents=True)
        for i in range(20):
            cv2.imwrite(str(top / kind / f"{i}.png"), random.integers(0, 256, (80, 80, 3), np.uint8))
    return top


def new(out, source, address, *options, rc=0):
    "`mlkit new`, as a person runs it: the section `train`, and what was printed."
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HOME": str(out.parent / "hub"), "COLUMNS": "200"}
    env = {k: v for k, v in env.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_CACHE")}
    done = subprocess.run([BIN / "mlkit", "new", out, "--from", source, *options], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == rc, done.stdout + done.stderr
    return (YAML(typ="safe").load(out / "params.yaml"), done.stdout) if not rc else done.stderr


def test_a_project_takes_the_weights_of_the_hub(folder, tmp_path):
    with hub("answers") as address:
        params, said = new(tmp_path / "project", folder, address)
        model = params["train"]["model"]
    assert model == {"name": "timm", "backbone": "resnet18.a1_in1k", "weights": "hub", "sha256": hashlib.sha256(Hub.body).hexdigest(),
                     "frozen_epochs": 4, "layer_decay": 0.7}
    assert params["prepare"]["input"]["image_size"] == 64 and "pretrained: the weights of the hub" in said
    assert "\ntimm==" in (tmp_path / "project/requirements.txt").read_text()


@pytest.mark.parametrize("kind, why", [("none", "ConnectError"), ("silent", "no answer in 5 s")])
def test_without_a_hub_a_project_says_what_it_does_instead(folder, tmp_path, kind, why):
    with hub(kind) as address:
        params, said = new(tmp_path / "project", folder, address)
        asked = new(tmp_path / "asked", folder, address, "--backbone", "resnet18.a1_in1k", rc=1) if kind == "none" else ""
    line, = [line for line in said.splitlines() if line.lstrip().startswith("train.model ")]
    assert params["train"]["model"]["name"] == "small_cnn" and "timm" not in (tmp_path / "project/requirements.txt").read_text()
    assert "learns from scratch" in line and why in line and "To switch later: {name: timm, backbone: resnet18.a1_in1k, weights: hub}" in line
    assert kind == "silent" or asked.count("\n") == 1 and why in asked and not (tmp_path / "asked").exists()


def test_a_file_of_ones_own_is_taken_and_checked(learned, folder, tmp_path):
    "Without a network; the path is seen from the project."
    path = tmp_path / "body.safetensors"
    path.write_bytes(learned[0].read_bytes())
    with hub("none") as address:
        params, _ = new(tmp_path / "project", folder, address, "--backbone", BACKBONE, "--weights", path)
        wrong = new(tmp_path / "wrong", folder, address, "--backbone", "test_vit", "--weights", path, rc=1)
    assert params["train"]["model"]["weights"] == "../body.safetensors" and params["train"]["model"]["sha256"] == sha256(path)
    assert "of another network" in wrong and wrong.count("\n") == 1
