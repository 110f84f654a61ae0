"A real Triton: installed, asked, broken in every way that has been seen, and repaired."
import os, shutil, signal, subprocess, sys
from http.client import HTTPConnection

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlkit.core import ServeError, SetupError
from mlkit.serving.load import load_test
from mlkit.serving.client import Client
from mlkit.serving.triton import Triton
from mlkit.serving.install import find_triton, install_serving, serving_env
from mlkit.serving.supervise import probe, supervise
from mlkit.serving.repository import write_repository
from mlkit.serving.signature import Signature, Signatures, Tensor

def step(path, nodes, x, y, weights=()):
    def info(t): return helper.make_tensor_value_info(t.name, helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype)), ["n", *t.shape])
    graph = helper.make_graph(nodes, "g", [info(x)], [info(y)], [numpy_helper.from_array(w, n) for n, w in weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)

@pytest.fixture(scope="module")
def export(tmp_path_factory):
    "Three bytes that choose rows of a table (8 rows: a greater byte is an error), then a softmax."
    out = tmp_path_factory.mktemp("export")
    raw, x, p = Tensor("rows", "uint8", (3,)), Tensor("x", "float32", (3, 4)), Tensor("p", "float32", (3, 4))
    table = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    step(out / "preprocess.onnx", [helper.make_node("Cast", ["rows"], ["i"], to=TensorProto.INT64), helper.make_node("Gather", ["table", "i"], ["x"])], raw, x, [("table", table)])
    step(out / "model.onnx", [helper.make_node("Softmax", ["x"], ["p"])], x, p)
    Signatures({"preprocess": Signature((raw,), (x,)), "model": Signature((x,), (p,))}, tuple("abcd")).save(out / "signatures.json")
    return out

@pytest.fixture(scope="module")
def repository(export, tmp_path_factory):
    install_serving()
    return write_repository(export, tmp_path_factory.mktemp("serving") / "repository", "rows", max_batch_size=16)

@pytest.fixture(scope="module")
def server(repository):
    with Triton(repository) as s: yield s

def family(server): return psutil.Process(server.guard.pid).children(recursive=True)
def stubs(server): return [p for p in family(server) if "stub" in p.name()]
def shared_memory(pid): return [f for f in os.listdir("/dev/shm") if f.startswith(f"mlkit-{pid}-")]
def rows(n, seed=0): return np.random.default_rng(seed).integers(0, 8, (n, 3), np.uint8)

def test_install_is_idempotent():
    said = []
    install_serving()
    assert install_serving(said.append) == serving_env() and not said
    assert find_triton()[0].is_file()

def test_install_failure_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("MLKIT_SERVING", str(tmp_path / "s"))
    monkeypatch.setattr("mlkit.serving.install.SERVING", ("nvidia-pytriton==0.7.0", "tritonclient==2.51.0", "numpy==0.0.1"))
    with pytest.raises(SetupError, match="cannot install numpy==0.0.1: .*") as e: install_serving(lambda _: None)
    assert "\n" not in str(e.value) and not (tmp_path / "s").exists()

def test_server_agrees_with_onnxruntime(server, export):
    x = rows(50) # more than three batches
    y = x
    for name, k in (("preprocess", "rows"), ("model", "x")): y, = onnxruntime.InferenceSession(export / f"{name}.onnx").run(None, {k: y})
    assert np.abs(server.client.predict(x) - y).max() < 1e-6

def test_bad_sample_costs_only_its_sender(server):
    from concurrent.futures import ThreadPoolExecutor
    good, bad = rows(1), np.full((1, 3), 200, np.uint8)
    expected = server.client.predict(good)
    def ask(x):
        try: return server.client.predict(x)
        except ServeError as e: return str(e)
    with ThreadPoolExecutor(8) as pool: answers = list(pool.map(ask, [good, bad] * 40))
    assert all(np.array_equal(a, expected) for a in answers[::2]) and all("out of data bounds" in a for a in answers[1::2])

def test_load(server):
    one, four = load_test(server.client, [rows(20)], concurrency=(1, 4), measure_s=0.9)
    assert one["n_requests"] > 50 and four["n_requests"] > 50 and 0 < one["p50_ms"] <= one["p99_ms"]
    with pytest.raises(ServeError, match="out of data bounds"): load_test(server.client, [np.full((4, 3), 200, np.uint8)], (2,), 0.6)
    with pytest.raises(ServeError, match="unknown model"): load_test(Client(server.url, "x", server.client.signature, 1), [rows(2)], (1,), 0.6)

def test_port_in_use_names_its_holder(server, repository):
    with pytest.raises(ServeError, match=f"port {server.port} is in use by tritonserver .process"): Triton(repository, port=server.port).start()

def test_a_port_that_another_has_just_taken(server, repository, monkeypatch):
    "Both found the same port free. The other's answer is not ours; where any port would do, another is taken."
    import mlkit.serving.triton
    free, given = mlkit.serving.triton.free_port, []
    def found_free(host, port): given.append(port); return server.port if len(given) == 1 else free(host, port)
    monkeypatch.setattr(mlkit.serve, "free_port", found_free)
    with Triton(repository) as ours:
        assert len(given) == 4 and ours.port not in (0, server.port) and ours.id != server.id # HTTP and metrics, twice
        probe(ours); probe(server)

def test_listens_on_loopback_only(server, repository):
    listening = [c.laddr for p in family(server) for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert {a.port for a in listening} == {server.port, server.metrics_port} and {a.ip for a in listening} == {"127.0.0.1"}
    with pytest.raises(ServeError, match="only 127.0.0.1"): Triton(repository, host="0.0.0.0")

def test_names_are_no_paths(export, tmp_path):
    with pytest.raises(ServeError, match="no model name"): write_repository(export, tmp_path / "r", "../rows")
    assert not list(tmp_path.iterdir())

def test_dead_stub_is_repaired(server):
    watch = supervise(server, every=0.05)
    assert next(watch)["ok"]
    stubs(server)[0].kill()
    record = next(r for r in watch if not r["ok"])
    assert record["repair"] == "reloaded" and "not healthy" in record["error"]
    probe(server)

def test_dead_server_is_restarted(server):
    port = server.port
    next(p for p in family(server) if p.name() == "tritonserver").kill()
    record = next(r for r in supervise(server, every=0.05) if not r["ok"])
    assert record["repair"] == "restarted" and server.port == port
    probe(server)
    assert len(shared_memory(os.getpid())) == len(stubs(server)) # none is left of the dead ones

START = "import sys, time; from mlkit.serving.supervise import serve_forever; from mlkit.serving.triton import Triton; s = Triton(sys.argv[1]); "

@pytest.mark.parametrize("victim", ["parent", "guard"])
def test_server_dies_with_its_parent(repository, victim):
    p = subprocess.Popen([sys.executable, "-c", START + "s.start(); print('up', flush=True); time.sleep(60)", str(repository)], stdout=subprocess.PIPE, text=True)
    parts = []
    try:
        assert p.stdout.readline() == "up\n"
        parts = psutil.Process(p.pid).children(recursive=True)
        assert len(parts) == 4 # guard, tritonserver, two stubs
        (p if victim == "parent" else parts[0]).kill()
        assert not psutil.wait_procs([x for x in parts if x.pid != parts[0].pid], timeout=60)[1]
    finally:
        for x in (p, *(x for x in parts if x.is_running())): x.kill()
        p.wait()
    if victim == "parent": assert not psutil.wait_procs(parts, timeout=30)[1] and not shared_memory(p.pid)

def test_sigterm_ends_serve_forever_in_bounded_time(repository):
    "An open keep-alive connection would make Triton wait for as long as its client likes."
    p = subprocess.Popen([sys.executable, "-u", "-c", START + "serve_forever(s, every=0.2)", str(repository)], stdout=subprocess.PIPE, text=True)
    try:
        url, curl = p.stdout.readline(), p.stdout.readline().removeprefix("Try: ").split()
        assert url.startswith("rows at http://127.0.0.1:") and "ONNX Runtime" in url
        if shutil.which("curl"): assert '"name":"p"' in subprocess.run(curl, capture_output=True, text=True).stdout
        connection = HTTPConnection("127.0.0.1", int(curl[2].split(":")[2].split("/")[0]))
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read() == b""
        parts = psutil.Process(p.pid).children(recursive=True)
        p.send_signal(signal.SIGTERM)
        assert p.wait(120) == 0 and p.stdout.read() == "rows: stopped\n"
        assert not psutil.wait_procs(parts, timeout=30)[1]
    finally: p.kill(); p.wait()
