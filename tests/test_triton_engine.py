"`mlkit serve --engine triton`: the gateway with Tritons behind it. What clients see is what they see of ONNX Runtime."
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from threading import Thread

import psutil
import pytest

from mlkit.core import RegistryError, SetupError
from mlkit.serving.front import Front
from mlkit.serving.hosted import Tuning
from mlkit.serving.triton_worker import SHM
from mlkit.triton_server.install import install_serving
from test_gateway import ROW, ask, bundle, hashes, load, older_than, predict, shop, tensors, workers # noqa: F401

pytest.importorskip("grpc")


def serve(bundle, **how): return Front(bundle, hashes(bundle), "v1", tuning=Tuning(engine="triton"), **how)
def shared_memory(pids): return [f for pid in pids for f in Path("/dev/shm").glob(f"{SHM}{pid}-*")]


def named(front, name):
    "Its processes of that name; a process may end while it is looked at."
    found = []
    for p in workers(front):
        with suppress(psutil.NoSuchProcess):
            if name in p.name():
                found.append(p)
    return found


@pytest.fixture(scope="module")
def front(bundle):
    install_serving()
    with serve(bundle) as f:
        Thread(target=lambda: f.watch(lambda line: None), daemon=True).start()
        yield f
        family = workers(f)
    assert not psutil.wait_procs(family, timeout=10)[1] and not shared_memory(p.pid for p in family)


def ready(front):
    with urllib.request.urlopen(front.metrics_url, timeout=10) as r:
        lines = r.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("mlkit_ready_workers{"))


def wait_ready(front, n=2):
    end = time.monotonic() + 60
    while ready(front) != n:
        assert time.monotonic() < end, ready(front)
        time.sleep(0.05)


def requests():
    "Rows, tensors in JSON and in binary, and what the contract refuses."
    batch = [ROW | {"age": age, "town": town, "income": None} for age in range(8) for town in ("Bonn", "Ulm")]
    for rows in (ROW, [ROW], batch, ROW | {"age": 400}, [], {"age": 1}):
        yield "/predict", json.dumps(rows).encode(), {}
    for n in (1, 3, 16, 17):
        yield "/v2/models/shop/infer", json.dumps(tensors(n)).encode(), {}
    binary = {"outputs": [{"name": "answer", "parameters": {"binary_data": True}}]}
    yield "/v2/models/shop/infer", json.dumps(tensors(2) | binary).encode(), {}
    yield "/v2/models/shop/infer", b'{"inputs": []}', {}


def test_both_engines_give_the_same_bytes(front, bundle):
    with Front(bundle, hashes(bundle), "v1") as other:
        for path, body, headers in requests():
            expected = ask(other, "POST", path, body, headers)
            assert ask(front, "POST", path, body, headers) == expected, body[:200]
        for path in ("/v2", "/v2/models/shop", "/v2/models/shop/config", "/v2/models/shop/contract", "/v2/health/ready"):
            (status, said), (_, expected) = ask(front, "GET", path), ask(other, "GET", path)
            assert status == 200 and json.loads(said) == json.loads(expected)


def test_nobody_else_reaches_triton(front):
    "No port but those of the gateway, and sockets in a folder of the user's own."
    wait_ready(front)
    assert len(named(front, "tritonserver")) == 2
    assert [c for p in workers(front) for c in p.net_connections("inet")] == []
    own = [c.laddr.port for c in psutil.Process(front.process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert sorted(own) == sorted(s.getsockname()[1] for s in front.sockets)
    sockets = [f for f in front.bundled.folder.rglob("*") if f.is_socket()]
    assert len(sockets) == 4 and {oct(f.parent.stat().st_mode & 0o777) for f in sockets} == {"0o700"}


VICTIMS = ("tritonserver", "kill"), ("stub", "kill"), ("python", "kill"), ("stub", "suspend")


@pytest.mark.parametrize("victim, how", VICTIMS)
def test_a_killed_or_stopped_process_costs_no_request(front, victim, how):
    "One that is stopped is noticed by its silence, and a Triton that is up without its stub by its errors."
    wait_ready(front)
    before, statuses = {p.pid for p in named(front, "tritonserver")}, []
    def replaced():
        getattr(named(front, victim)[0], how)()
        while len({p.pid for p in named(front, "tritonserver")} - before) < 1 or ready(front) < 2:
            time.sleep(0.05)
    thread = Thread(target=replaced)
    thread.start()
    while thread.is_alive():
        statuses += load(front, 0.5)
    thread.join()
    assert len(statuses) > 100 and set(statuses) == {200}, {s: statuses.count(s) for s in set(statuses)}
    after = {p.pid for p in named(front, "tritonserver")}
    assert len(after) == 2 and len(before & after) == 1 # one was replaced, and nothing of it is left
    assert len(named(front, "stub")) == 2 == len(shared_memory(p.pid for p in workers(front)))


def test_nothing_is_left_of_a_supervisor(bundle):
    code = ("import sys, json; from pathlib import Path; from mlkit.serving.front import Front, serve_until_told; from mlkit.serving.hosted import Tuning; "
            "front = Front(Path(sys.argv[1]), json.loads(sys.argv[2]), 'v1', tuning=Tuning(engine='triton')); "
            "serve_until_told(front, lambda line: print(line, flush=True))")
    command = [sys.executable, "-c", code, str(bundle), json.dumps(hashes(bundle))]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert "(Triton, 2 workers)" in p.stdout.readline()
        family = psutil.Process(p.pid).children(recursive=True)
        assert len([f for f in family if f.name() == "tritonserver"]) == 2 == len(shared_memory(f.pid for f in family))
        p.kill()
        p.wait()
        assert not psutil.wait_procs(family, timeout=10)[1]
        assert shared_memory(f.pid for f in family) == []
    finally:
        p.kill()
        p.wait()


def test_a_changed_bundle_is_not_served(bundle, tmp_path):
    changed = tmp_path / "bundle"
    shutil.copytree(bundle, changed)
    (changed / "model_repository/shop/config.pbtxt").write_text("")
    with pytest.raises(RegistryError, match="was changed after the bundle was verified"):
        Front(changed, hashes(bundle), "v1", tuning=Tuning(engine="triton"))


def test_a_triton_that_answers_wrongly_gets_no_request(front, tmp_path):
    "The server's own copy is changed, and a Triton reads it when it is started anew. The last test of this server."
    wait_ready(front)
    other = shop(tmp_path / "other", older_than(20)) / "model_repository/shop/1/model.onnx"
    expected, seen = predict(front, ROW), {p.pid for p in named(front, "tritonserver")}
    os.replace(other, front.bundled.model)
    named(front, "tritonserver")[0].kill()
    end = time.monotonic() + 60
    while len(seen) < 4: # two, one that answers wrongly, and the next
        assert predict(front, ROW) == expected and time.monotonic() < end
        seen |= {p.pid for p in named(front, "tritonserver")}
    assert ready(front) == 1


def test_a_machine_without_triton_is_told_what_to_do(bundle, monkeypatch):
    monkeypatch.setenv("MLKIT_SERVING", "/nowhere")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SetupError, match="^the engine triton: /nowhere: no serving environment.*'mlkit setup' makes it$"):
        serve(bundle)
