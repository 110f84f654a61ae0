"A real Triton: installed, asked, broken in every way that has been seen, and repaired."
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

import mlkit.triton_server.server
from mlkit.core import ServeError, SetupError
from mlkit.triton_server.client import Client
from mlkit.export.fuse import write_fused
from mlkit.triton_server.install import TRITONSERVER, find_triton, install_serving, serving_env
from mlkit.triton_server.load import measure_load
from mlkit.triton_server.repository import write_repository
from mlkit.export.signature import Signature, Signatures, Tensor
from mlkit.triton_server.server import Triton


def step(path, nodes, x, y, weights=()):
    def info(t):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype))
        return helper.make_tensor_value_info(t.name, kind, ["n", *t.shape])
    constants = [numpy_helper.from_array(w, n) for n, w in weights]
    graph = helper.make_graph(nodes, "g", [info(x)], [info(y)], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    "Three bytes that choose rows of a table (8 rows: a greater byte is an error), then a softmax."
    out = tmp_path_factory.mktemp("export")
    raw, x, p = Tensor("rows", "uint8", (3,)), Tensor("x", "float32", (3, 4)), Tensor("p", "float32", (3, 4))
    table = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    cast = helper.make_node("Cast", ["rows"], ["i"], to=TensorProto.INT64)
    gather = helper.make_node("Gather", ["table", "i"], ["x"])
    step(out / "preprocess.onnx", [cast, gather], raw, x, [("table", table)])
    step(out / "model.onnx", [helper.make_node("Softmax", ["x"], ["p"])], x, p)
    steps = {"preprocess": Signature((raw,), (x,)), "model": Signature((x,), (p,))}
    Signatures(steps, tuple("abcd")).save(out / "signatures.json")
    write_fused(out)
    return out


@pytest.fixture(scope="module")
def repository(export, tmp_path_factory):
    install_serving()
    return write_repository(export, tmp_path_factory.mktemp("serving") / "repository", "rows", max_batch_size=16)


@pytest.fixture(scope="module")
def server(repository):
    with Triton(repository) as s:
        yield s


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
    packages = ("nvidia-pytriton==0.7.0", "tritonclient==2.51.0", "numpy==0.0.1")
    monkeypatch.setattr("mlkit.triton_server.install.SERVING", packages)
    with pytest.raises(SetupError, match="cannot install numpy==0.0.1: .*") as e:
        install_serving(lambda _: None)
    assert "\n" not in str(e.value) and not (tmp_path / "s").exists()


def test_setup_says_what_it_installs(tmp_path):
    "Without a terminal: each line arrives when it is written. The slow part is replaced by one that waits to be seen."
    code = ("import sys, mlkit.triton_server.install as i\n"
            "def fill(env, progress): env.mkdir(); progress('  downloading toy 1.0, 3 MB'); sys.stdin.readline()\n"
            "i._fill = fill\n"
            "from mlkit.cli import main; sys.argv = ['mlkit', 'setup']; main()")
    env = os.environ | {"MLKIT_SERVING": str(tmp_path / "s"), "HOME": str(tmp_path)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    p = subprocess.Popen([sys.executable, "-c", code], env=env, cwd=tmp_path, **pipes)
    try:
        seen = [p.stdout.readline() for _ in range(2)] # while it still installs
        assert "installing nvidia-pytriton==0.7.0" in seen[0] and seen[1] == "  downloading toy 1.0, 3 MB\n", seen
        assert "ready after" in p.communicate("go on\n", timeout=300)[0]
    finally:
        p.kill()
        p.wait()


def test_server_agrees_with_onnxruntime(server, export):
    x = rows(50) # more than three batches
    y = x
    for name, k in (("preprocess", "rows"), ("model", "x")):
        y, = onnxruntime.InferenceSession(export / f"{name}.onnx").run(None, {k: y})
    assert np.abs(server.client.predict(x) - y).max() < 1e-6


def test_bad_sample_costs_only_its_sender(server):
    good, bad = rows(1), np.full((1, 3), 200, np.uint8)
    expected = server.client.predict(good)
    def ask(x):
        try:
            return server.client.predict(x)
        except ServeError as e:
            return str(e)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [good, bad] * 40))
    assert all(np.array_equal(a, expected) for a in answers[::2])
    assert all("out of data bounds" in a for a in answers[1::2])


def test_load(server):
    one, four = measure_load(server.client, [rows(20)], concurrency=(1, 4), measure_s=0.9)
    assert one["n_requests"] > 50 and four["n_requests"] > 50 and 0 < one["p50_ms"] <= one["p99_ms"]
    with pytest.raises(ServeError, match="out of data bounds"):
        measure_load(server.client, [np.full((4, 3), 200, np.uint8)], (2,), 0.6)
    with pytest.raises(ServeError, match="unknown model"):
        measure_load(Client(server.url, "x", server.signatures, 1), [rows(2)], (1,), 0.6)


def test_port_in_use_names_its_holder(server, repository):
    with pytest.raises(ServeError, match=f"port {server.port} is in use by tritonserver .process"):
        Triton(repository, port=server.port).start()


def test_a_port_that_another_has_just_taken(server, repository, monkeypatch):
    "Both found the same port free. The other's answer is not ours; where any port would do, another is taken."
    free, given, said = mlkit.triton_server.server.free_port, [], []
    def found_free(host, port):
        given.append(port)
        return server.port if len(given) == 1 else free(host, port)
    monkeypatch.setattr(mlkit.triton_server.server, "free_port", found_free)
    with Triton(repository, progress=said.append) as ours:
        assert len(given) == 4 and ours.port not in (0, server.port) and ours.id != server.id # HTTP and metrics, twice
        assert len(said) == 1 and "already in use" in said[0] and "started once more" in said[0]
        assert ours.client.predict(rows(1)).shape == server.client.predict(rows(1)).shape == (1, 3, 4)


def test_listens_on_loopback_only(server, repository):
    listening = [c.laddr for p in family(server) for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert {a.port for a in listening} == {server.port, server.metrics_port}
    assert {a.ip for a in listening} == {"127.0.0.1"}
    with pytest.raises(ServeError, match="only 127.0.0.1"):
        Triton(repository, host="0.0.0.0")


def test_names_are_no_paths(export, tmp_path):
    with pytest.raises(ServeError, match="no model name"):
        write_repository(export, tmp_path / "r", "../rows")
    assert not list(tmp_path.iterdir())


STUB = "triton/pytriton/tritonserver/backends/python/triton_python_backend_stub"
LOCK = "terminate called after throwing an instance of 'boost::interprocess::lock_exception'"
ABORT = f'echo "{LOCK}" >&2; kill -ABRT $$'
KILL = "kill -KILL $$"
HANG = f'echo "{LOCK}" >&2; sleep 600'


def mirror(source, target, own):
    "A copy of a folder that has files of its own at the paths `own`; large files and other folders are links."
    target.mkdir(parents=True)
    for f in source.iterdir():
        inside = [Path(*p.parts[1:]) for p in own if p.parts[0] == f.name]
        if f.is_dir() and inside:
            mirror(f, target / f.name, inside)
        elif f.is_dir() or f.stat().st_size > 5e6:
            (target / f.name).symlink_to(f)
        else:
            shutil.copy2(f, target / f.name)


@pytest.fixture
def dying(repository, monkeypatch, tmp_path):
    "A serving environment in which a program dies at its nth start, in the way that a line of shell says."
    real, env = serving_env(), tmp_path / "environment"
    def make(program, nth, death):
        mirror(real, env, [Path(TRITONSERVER), Path(STUB)])
        (env / program).unlink()
        number = tmp_path / "start" # a folder a start, made by who comes first; the stub is also asked for its version
        (env / program).write_text(
            f'#!/bin/sh\n[ $# = 0 ] && exec {real / program}\n'
            f'n=1; while ! mkdir {number}$n 2>/dev/null; do n=$((n + 1)); done\n'
            f'if [ $n = {nth} ]; then {death}\nfi\nexec {real / program} "$@"\n')
        (env / program).chmod(0o755)
        monkeypatch.setenv("MLKIT_SERVING", str(env))
        return lambda: len(list(tmp_path.glob("start*"))) # how often it was started
    return make


@pytest.mark.parametrize("death", [ABORT, KILL, HANG], ids=["abort", "kill", "hang"])
def test_a_start_that_fails_by_chance_is_tried_once_more(dying, repository, death):
    starts, said = dying(TRITONSERVER, 1, death), []
    with Triton(repository, progress=said.append) as ours:
        assert ours.client.predict(rows(5)).shape == (5, 3, 4)
    assert starts() == 2 and len(said) == 1
    assert "Triton ended at its start" in said[0] and said[0].endswith("it is started once more") and "\n" not in said[0]
    assert not [f for f in shared_memory(os.getpid()) if f.startswith(ours.id)]


@pytest.mark.parametrize("nth", [1, 2], ids=["the model's check", "the model"])
def test_a_models_process_that_fails_by_chance(dying, repository, nth):
    "Triton waits for it for ever."
    dying(STUB, nth, ABORT)
    said = []
    with Triton(repository, progress=said.append) as ours:
        assert ours.client.predict(rows(5)).shape == (5, 3, 4)
    assert len(said) == 1 and f"Triton ended at its start: {LOCK}" in said[0] # not after a minute


def test_a_failure_that_lasts_ends_at_once(dying, export, tmp_path):
    starts, said = dying(TRITONSERVER, 0, "true"), []
    broken = write_repository(export, tmp_path / "broken", "rows")
    (broken / "rows/1/model.onnx").write_bytes(b"no model")
    with pytest.raises(ServeError, match="rows/1/model.onnx") as e:
        Triton(broken, progress=said.append).start()
    assert starts() == 1 and not said and "\n" not in str(e.value)


START = "import sys, time; from mlkit.triton_server.server import Triton; s = Triton(sys.argv[1]); "


def wait_for_line(p, start): # what a start says of chance comes before it
    return next(line for line in p.stdout if line.startswith(start))


@pytest.mark.parametrize("victim", ["parent", "guard"])
def test_server_dies_with_its_parent(repository, victim):
    code = START + "s.start(); print('up', flush=True); time.sleep(60)"
    p = subprocess.Popen([sys.executable, "-c", code, str(repository)], stdout=subprocess.PIPE, text=True)
    parts = []
    try:
        wait_for_line(p, "up")
        parts = psutil.Process(p.pid).children(recursive=True)
        assert len(parts) == 3 # guard, tritonserver, its stub
        (p if victim == "parent" else parts[0]).kill()
        assert not psutil.wait_procs([x for x in parts if x.pid != parts[0].pid], timeout=60)[1]
    finally:
        for x in (p, *(x for x in parts if x.is_running())):
            x.kill()
        p.wait()
    if victim == "parent":
        assert not psutil.wait_procs(parts, timeout=60)[1] and not shared_memory(p.pid)


def test_it_ends_with_an_open_connection(repository):
    "A keep-alive connection would make Triton wait for as long as its client likes."
    with Triton(repository) as ours:
        connection = HTTPConnection("127.0.0.1", ours.port)
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read() == b""
        parts = family(ours)
    assert parts and not psutil.wait_procs(parts, timeout=60)[1]
    connection.close()
