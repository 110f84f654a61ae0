"`mlkit serve`'s own server: asked by real clients, sent what no server should be sent, killed at its parts, overloaded."
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from threading import Thread

import numpy as np
import psutil
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from mlkit.core import RegistryError, ServeError
from mlkit.registry.bundle import read_manifest, write_bundle
from mlkit.triton_server.client import Client
from mlkit.serving.front import Front
from mlkit.serving.hosted import private_copy
from mlkit.export.fuse import write_fused
from mlkit.triton_server.load import measure_load
from mlkit.triton_server.repository import write_repository
from mlkit.export.signature import Signature, Signatures, Tensor, arrays

CONTRACT = {
    "task": "classification", "target": {"name": "left", "dtype": "category", "categories": ["no", "yes"]},
    "inputs": [{"name": "age", "dtype": "float64", "range": [0, 120], "unit": "years", "median": 40}, {"name": "income", "dtype": "float64", "nullable": True},
               {"name": "town", "dtype": "category", "categories": ["Bonn", "Ulm"]}]}
ROW = {"age": 41, "income": 2000, "town": "Bonn"}


def hashes(bundle): return {f: e["sha256"] for f, e in read_manifest(bundle)["files"].items()}


def shop(out, model=None, spoil=None):
    """A bundle in `out` of a table's model: who is older than 50 leaves; a year in Ulm counts double.

    `model(helper, TensorProto)` gives other nodes and weights from `x` to `s`; `spoil(repository)` damages the files before they are listed."""
    import onnx
    from onnx import TensorProto, helper
    export = out / "export"
    export.mkdir(parents=True)
    def info(name, kind, width): return helper.make_tensor_value_info(name, kind, ["batch", width])
    def save(name, nodes, inputs, output, constants):
        graph = helper.make_graph(nodes, "g", inputs, [output], constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), export / f"{name}.onnx")
    constants = [helper.make_tensor("ulm", TensorProto.STRING, [1], ["Ulm"]), helper.make_tensor("one", TensorProto.DOUBLE, [1], [1.0])]
    save("preprocess", [helper.make_node("Equal", ["town", "ulm"], ["there"]), helper.make_node("Cast", ["there"], ["t"], to=TensorProto.DOUBLE),
                        helper.make_node("Add", ["t", "one"], ["factor"]), helper.make_node("Mul", ["age", "factor"], ["years"]),
                        helper.make_node("Cast", ["years"], ["x"], to=TensorProto.FLOAT)],
         [info("age", TensorProto.DOUBLE, 1), info("income", TensorProto.DOUBLE, 1), info("town", TensorProto.STRING, 1)], info("x", TensorProto.FLOAT, 1), constants)
    nodes, weights = model(helper, TensorProto) if model else older_than(50)(helper, TensorProto)
    save("model", [*nodes, helper.make_node("Softmax", ["s"], ["probabilities"])], [info("x", TensorProto.FLOAT, 1)], info("probabilities", TensorProto.FLOAT, 2), weights)
    x = Tensor("x", "float32", (1,))
    columns = tuple(Tensor(n, d, (1,)) for n, d in (("age", "float64"), ("income", "float64"), ("town", "str")))
    Signatures({"preprocess": Signature(columns, (x,)), "model": Signature((x,), (Tensor("probabilities", "float32", (2,)),))}, ("no", "yes")).save(export / "signatures.json")
    write_fused(export)
    (out / "contract.json").write_text(json.dumps(CONTRACT))
    repository = write_repository(export, out / "repository", "shop", max_batch_size=16)
    if spoil:
        spoil(repository)
    write_bundle(out / "bundle", {"contract.json": out / "contract.json", "model_repository": repository}, {})
    return out / "bundle"


def older_than(years):
    def model(helper, kinds):
        weights = [helper.make_tensor("w", kinds.FLOAT, [1, 2], [-0.1, 0.1]), helper.make_tensor("b", kinds.FLOAT, [2], [years / 10, -years / 10])]
        return [helper.make_node("MatMul", ["x", "w"], ["z"]), helper.make_node("Add", ["z", "b"], ["s"])], weights
    return model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory): return shop(tmp_path_factory.mktemp("gateway"))


@pytest.fixture(scope="module")
def front(bundle):
    with Front(bundle, hashes(bundle), "v1") as f:
        Thread(target=lambda: f.watch(lambda line: None), daemon=True).start()
        yield f


def ask(front, method, path, body=b"", headers=None, timeout=30):
    connection = HTTPConnection(front.host, front.port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        r = connection.getresponse()
        return r.status, r.read()
    finally:
        connection.close()


def predict(front, row, **kw): return ask(front, "POST", "/predict", json.dumps(row).encode(), **kw)
def good(front): return predict(front, ROW) == (200, predict(front, ROW)[1])
def workers(front): return psutil.Process(front.process.pid).children(recursive=True)


def tensors(n=1, **change):
    rows = {"numbers": ("FP64", [n, 2], [41.0, 2000.0] * n), "texts": ("BYTES", [n, 1], ["Bonn"] * n)}
    inputs = [{"name": k, "datatype": d, "shape": s, "data": x} for k, (d, s, x) in rows.items()]
    inputs[0] |= change
    return {"inputs": inputs}


def test_rows_are_answered_as_they_stand(front):
    assert json.loads(predict(front, ROW)[1])["answer"] == "no"
    several = json.loads(predict(front, [ROW, ROW | {"town": " Ulm ", "age": "41"}, ROW | {"age": "55.5", "income": None}])[1])
    assert [a["answer"] for a in several] == ["no", "yes", "yes"] and several[0]["probabilities"].keys() == {"no", "yes"}


@pytest.mark.parametrize("row, said", [
    ({"age": 400}, "column 'age' is 400 years; the contract has 0 to 120 years"), ({"age": None}, "column 'age' is missing"), ({"age": "many"}, "column 'age' has 'many'"),
    ({"town": "Paris"}, "column 'town' is 'Paris', which is none of the contract's categories (Bonn, Ulm)"), ({"hat": 1}, "column 'hat' is none of the model's"),
    ({"age": float("inf")}, ""), ({"income": 1e400}, ""), ({"town": ["Bonn"]}, "column 'town' has ['Bonn']"), ({"age": -0.5}, "0 to 120")])
def test_the_contract_holds_on_every_request(front, row, said):
    status, body = predict(front, ROW | row)
    assert status == 400 and said in json.loads(body)["error"] and "\n" not in json.loads(body)["error"], body


def test_the_contract_holds_for_tensors_too(front):
    for data, said in (([400.0, 1.0], "'age' is 400 years"), ([None, 1.0], "'age' is missing"), ([41.0, None], "")):
        status, body = ask(front, "POST", "/v2/models/shop/infer", json.dumps(tensors(data=data)).encode())
        assert (status, said in body.decode()) == (400 if said else 200, True), body


def test_tritonclient(front):
    "NVIDIA's own client, JSON and binary, and what it says of errors."
    client = tritonclient.http.InferenceServerClient(front.url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("shop")
    assert [t["name"] for t in client.get_model_metadata("shop")["inputs"]] == ["numbers", "texts"]
    assert client.get_model_config("shop")["max_batch_size"] == 16
    for binary in (True, False):
        numbers = tritonclient.http.InferInput("numbers", [2, 2], "FP64").set_data_from_numpy(np.array([[41, 1.0], [90, 1.0]]), binary)
        texts = tritonclient.http.InferInput("texts", [2, 1], "BYTES").set_data_from_numpy(np.array([["Bonn"], ["Ulm"]], object), binary)
        outputs = [tritonclient.http.InferRequestedOutput(n, binary) for n in ("answer", "probabilities")]
        found = client.infer("shop", [numbers, texts], outputs=outputs, request_id="7")
        assert found.as_numpy("answer").ravel().tolist() in ([b"no", b"yes"], ["no", "yes"]) and found.as_numpy("probabilities").shape == (2, 2)
        assert found.get_response()["id"] == "7"
    with pytest.raises(InferenceServerException, match="no model 'other'"):
        client.infer("other", [numbers, texts])
    for change in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException):
            change("shop")
    with pytest.raises(InferenceServerException):
        client.register_system_shared_memory("a", "/a", 8)
    assert good(front)


def test_our_client_and_perf_analyzer(front):
    client = Client(front.url.removeprefix("http://"), "shop", Signatures.load(front.bundled.model.with_name("signatures.json")), 16)
    rows = [ROW | {"age": age, "town": town} for age in range(100) for town in ("Bonn", "Ulm")] # more than a batch
    assert [a["answer"] for a in client.answer_rows(rows)] == ["yes" if r["age"] * (1 + (r["town"] == "Ulm")) > 50 else "no" for r in rows]
    four, = measure_load(client, list(arrays(client.signature, rows[:20])), (4,), 0.9)
    assert four["n_requests"] > 50 and 0 < four["p50_ms"] <= four["p99_ms"]


def raw(front, data, wait=2.0):
    "Bytes over a plain connection; the head of what comes back, at most `wait` seconds later."
    with socket.create_connection((front.host, front.port), wait) as s:
        out = b""
        try:
            s.sendall(data)
            while b"\r\n\r\n" not in out and (part := s.recv(65536)):
                out += part
        except OSError:
            pass
        return out


@pytest.mark.parametrize("request_, status", [
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"), (b"nonsense\r\n\r\n", b"400"), (b"POST /predict HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 2\r\n\r\n{}", b"403"),
    (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n", b"413"), (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b"400"),
    (b"POST /v2/models/..%2f..%2fetc/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", b"404"),
    (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
    (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n", b"400"),
    (b"DELETE /v2/models/shop HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"), (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
    (b"POST /predict HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nContent-Length: 2\r\n\r\n{}", b"403")])
def test_strange_connections(front, request_, status):
    out = raw(front, request_)
    assert status in out.split(b"\r\n")[0] if status else True, out[:200]
    assert good(front)


def test_what_is_packed_cut_or_too_large(front):
    bomb = gzip.compress(b"[" * 50_000_000)
    assert ask(front, "POST", "/predict", bomb, {"Content-Encoding": "gzip"})[0] == 415
    assert ask(front, "POST", "/predict", b"{}", {"Content-Length": str(1 << 30)}, timeout=60)[0] == 413
    chunks = b"".join(b"1\r\n \r\n" for _ in range(100_000)) # a byte a piece
    began = time.monotonic()
    out = raw(front, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n", 20)
    assert (b" 400 " in out.split(b"\r\n")[0] or out == b"") and good(front) and time.monotonic() - began < 60


@pytest.mark.parametrize("deep", [300, 900, 990, 5000])
def test_what_is_nested_in_a_row(front, deep):
    for opened, closed in ((b'{"a":', b"}"), (b"[", b"]")):
        body = b'{"age":' + opened * deep + b"1" + closed * deep + b"}"
        status, said = ask(front, "POST", "/predict", body)
        assert status == 400 and len(said) < 1100 and good(front)


def load(front, seconds, n=8):
    "Good requests from `n` clients; statuses of the answers, and what else happened."
    end, statuses = time.monotonic() + seconds, []
    def client():
        connection = HTTPConnection(front.host, front.port, timeout=30)
        while time.monotonic() < end:
            connection.request("POST", "/predict", json.dumps(ROW).encode())
            answer = connection.getresponse()
            answer.read()
            statuses.append(answer.status)
        connection.close()
    with ThreadPoolExecutor(n) as pool:
        for f in [pool.submit(client) for _ in range(n)]:
            f.result()
    return statuses


def test_killed_and_stopped_workers_cost_no_request(front):
    "Under load one worker after another is killed, or stopped so that it is silent."
    killed = []
    def kill():
        for i in range(6):
            time.sleep(1)
            victims = workers(front)
            if victims:
                (victims[0].suspend if i == 3 else victims[i % len(victims)].kill)()
                killed.append(i)
    thread = Thread(target=kill)
    thread.start()
    statuses = load(front, 9)
    thread.join()
    assert len(killed) == 6 and len(statuses) > 100 and set(statuses) == {200}, {s: statuses.count(s) for s in set(statuses)}


def test_batches_and_waits_are_counted(front):
    "What the rules and dashboards of `mlkit monitor up` are made of."
    def figures():
        with urllib.request.urlopen(front.metrics_url, timeout=10) as r:
            lines = r.read().decode().splitlines()
        wanted = ("mlkit_batch_samples_sum", "mlkit_batch_samples_count", "mlkit_queue_seconds_count")
        return [sum(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in wanted]
    before = figures()
    assert predict(front, [ROW] * 7)[0] == 200
    assert [now - then for now, then in zip(figures(), before)] == [7, 1, 1]


def test_a_killed_gateway_is_replaced(front):
    old = front.process.pid
    os.kill(old, signal.SIGKILL)
    assert predict(front, ROW)[0] == 200 and front.process.pid != old
    assert not psutil.pid_exists(old) or psutil.Process(old).status() == "zombie"


def test_overload_is_told_at_once(bundle):
    "More comes than the model answers: what is beyond the queue gets 503 with Retry-After, the others their answer."
    with Front(bundle, hashes(bundle), "v1") as front:
        for worker in workers(front):
            worker.suspend()
        with ThreadPoolExecutor(64) as pool:
            bodies = [[ROW] * 16] * 40 # 640 rows where 256 may wait
            answers = list(pool.map(lambda b: predict(front, b), bodies))
        counts = {s: [a[0] for a in answers].count(s) for s in {a[0] for a in answers}}
        assert counts.get(503, 0) >= 20 and counts.get(200, 0) >= 10 and set(counts) == {200, 503}, counts # the stopped are replaced
        assert all(b"the model is busy" in body for status, body in answers if status == 503)


def test_who_goes_leaves_the_queue(bundle):
    "No worker computes for a client that has closed its connection."
    def waiting():
        with urllib.request.urlopen(front.metrics_url) as r:
            return next(float(line.split()[-1]) for line in r.read().decode().splitlines() if line.startswith("mlkit_waiting_samples{"))
    body = json.dumps([ROW] * 16).encode() # a batch, so that each goes alone
    text = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with Front(bundle, hashes(bundle), "v1") as front:
        for worker in workers(front):
            worker.suspend()
        clients = [socket.create_connection((front.host, front.port)) for _ in range(10)]
        for c in clients:
            c.sendall(text)
            time.sleep(0.02)
        end = time.monotonic() + 1
        while waiting() < 8 * 16 and time.monotonic() < end:
            time.sleep(0.02)
        before = waiting()
        for c in clients:
            c.close()
        end = time.monotonic() + 1 # the silent workers are replaced after two seconds, and would empty the queue
        while waiting() > 32 and time.monotonic() < end: # a worker holds one, and who came while nobody waited is not watched
            time.sleep(0.05)
        assert before >= 8 * 16 and waiting() <= 32


def test_sigterm_lets_what_is_under_way_end(bundle):
    with Front(bundle, hashes(bundle), "v1") as front:
        family = [psutil.Process(front.process.pid), *workers(front)]
        with ThreadPoolExecutor(32) as pool:
            asked = [pool.submit(predict, front, [ROW] * 16) for _ in range(32)]
            while answered(front) < 1:
                time.sleep(0.005)
            front.stop()
            statuses, gone = [], 0
            for f in asked:
                try:
                    statuses.append(f.result()[0])
                except (HTTPException, OSError): # it had not been taken yet
                    gone += 1
        assert set(statuses) <= {200, 503} and statuses.count(200) >= 1, (statuses, gone)
    assert not psutil.wait_procs(family, timeout=60)[1]


def answered(front): # requests so far
    with urllib.request.urlopen(front.metrics_url, timeout=10) as r:
        lines = r.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("mlkit_request_seconds_count"))


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_supervisor(bundle, tmp_path, signum):
    "Killed or told to end: no process stays, and the next start removes the folder."
    code = ("import sys, json; from pathlib import Path; from mlkit.serving.front import Front, serve_until_told; "
            "serve_until_told(Front(Path(sys.argv[1]), json.loads(sys.argv[2]), 'v1'), lambda line: print(line, flush=True))")
    p = subprocess.Popen([sys.executable, "-c", code, str(bundle), json.dumps(hashes(bundle))], stdout=subprocess.PIPE, text=True)
    try:
        assert "v1 at http" in p.stdout.readline()
        family = psutil.Process(p.pid).children(recursive=True)
        assert len(family) == 3
        p.send_signal(signum)
        p.wait(30)
        assert not psutil.wait_procs(family, timeout=60)[1]
    finally:
        p.kill()
        p.wait()


def test_only_its_user_reaches_the_workers(front):
    folder = front.bundled.folder
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert {oct(f.stat().st_mode & 0o777) for f in folder.iterdir() if f.is_socket()} == {"0o600"}
    listening = [c.laddr for p in [psutil.Process(front.process.pid), *workers(front)] for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert {a.ip for a in listening} == {"127.0.0.1"} and len({a.port for a in listening}) == 2


@pytest.mark.parametrize("file", ["contract.json", "model_repository/shop/1/model.onnx", "model_repository/shop/config.pbtxt", "model_repository/shop/1/signatures.json"])
def test_a_changed_file_is_not_served(bundle, tmp_path, file):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / file).write_bytes((copy / file).read_bytes() + b" ")
    with pytest.raises(RegistryError, match="was changed after the bundle was verified"):
        private_copy(copy, hashes(copy), "v1", tmp_path / "to")
    (copy / file).unlink()
    (copy / file).symlink_to(bundle / file)
    with pytest.raises(RegistryError):
        private_copy(copy, hashes(copy), "v1", tmp_path / "other")


def test_a_model_that_does_not_load_is_one_line(bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / "model_repository/shop/1/model.onnx").write_bytes(b"no model")
    parts = {"contract.json": copy / "contract.json", "model_repository": copy / "model_repository"}
    write_bundle(tmp_path / "broken", parts, {})
    with pytest.raises(ServeError) as e:
        Front(tmp_path / "broken", hashes(tmp_path / "broken"), "v1").start()
    assert "\n" not in str(e.value) and "model.onnx: ONNX Runtime cannot load it" in str(e.value), e.value


def test_memory_is_flat(front):
    gateway = psutil.Process(front.process.pid)
    load(front, 2)
    before = gateway.memory_info().rss
    n = len(load(front, 8))
    assert gateway.memory_info().rss - before < 20e6, (n, before, gateway.memory_info().rss)
