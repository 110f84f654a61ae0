"`mlkit serve` where root starts it: its workers are another user's, and what other users of the machine try comes to nothing. Users for real."
import json
import os
import shutil
import subprocess
import sys
import tempfile
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import psutil
import pytest

from conftest import wait_for
from mlkit.serving.door import Access
from mlkit.serving.front import Front, serve_until_told, sweep
from mlkit.serving.hosted import Tuning, known, may_become
from mlkit.serving.request_log import LogSettings
from mlkit.serving.tls import CERT, KEY, self_signed
from mlkit.serving.worker import ids_of
from mlkit.serving.tokens import TOKENS, add_token, write_private
import test_gateway
from test_gateway import ROW, hashes, workers

bundle = test_gateway.bundle # the fixture
NOBODY, STRANGER = "nobody" if known("nobody") else "65534", "64998"

pytestmark = pytest.mark.skipif(os.geteuid() != 0 or not may_become(STRANGER), reason="not run: only root can act as other users")

ATTACK = '''
import json, os, signal, socket, sys
import mlkit.serving.worker as worker
from http.client import HTTPConnection
told = json.load(sys.stdin)
if told["user"] != "root":
    worker.become(told["user"])
got = []

def attempt(what, act, *args):
    try:
        act(*args)
        got.append(what)
    except OSError:
        pass

def written(path):
    with open(path, "r+b"):
        pass

def planted(folder):
    path = os.path.join(folder, "planted")
    with open(path, "xb"):
        pass
    os.unlink(path)

def connected(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)

def read(path):
    with open(path, "rb") as f:
        return f.read(1)

for path in told["secret"]:
    attempt(f"list {path}" if path in told["folders"] else f"read {path}", os.listdir if path in told["folders"] else read, path)
for path in told["kept"]:
    attempt(f"write {path}", planted if path in told["folders"] else written, path)
    attempt(f"mode of {path}", lambda: os.chmod(path, os.stat(path).st_mode & 0o7777))
for path in told["sockets"]:
    attempt(f"connect {path}", connected, path)
for pid in told["pids"]:
    for name in "environ", "mem", "maps":
        attempt(f"{name} of {pid}", os.open, f"/proc/{pid}/{name}", os.O_RDONLY)
    attempt(f"files of {pid}", os.listdir, f"/proc/{pid}/fd")
for pid in told["mortal"]:
    attempt(f"signal {pid}", os.kill, pid, 0)
print(json.dumps(got))
'''


def attack(user, **told):
    "What `user` has got, of what there is to get."
    done = subprocess.run([sys.executable, "-c", ATTACK], input=json.dumps({"user": user} | told), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def root():
    "A project that everybody may look into, as in a container; a test's own folder is closed to others anyway."
    folder = Path(tempfile.mkdtemp(prefix="open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def served(root, bundle):
    "A server of that project, with a token, a key, a request log; and the token."
    shutil.copytree(bundle, root / "bundle")
    for path, text in zip((root / CERT, root / KEY), self_signed(["localhost"])):
        write_private(path, text)
    token = add_token(root / TOKENS, "web")
    access = Access(str(root / TOKENS), None, LogSettings(str(root / ".mlkit/serve/requests")))
    with Front(root / "bundle", hashes(root / "bundle"), "v1", access=access) as front:
        Thread(target=lambda: front.watch(lambda line: None), daemon=True).start()
        yield front, token


def ask(front, token=None, path="/predict", port=None, body=ROW, method="POST"):
    connection = HTTPConnection("127.0.0.1", port or front.port, timeout=30)
    try:
        connection.request(method, path, json.dumps(body), {"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    finally:
        connection.close()


def status_of(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: words.split() for name, _, words in (line.partition(":") for line in lines)}


def test_workers_are_nobodys(served, root):
    "Also those that come after a kill, and those of the next gateway: they have no right of root's left, and answer."
    front, token = served
    uid, gid = map(str, ids_of(NOBODY))
    def all_right():
        own = [status_of(p.pid) for p in workers(front)]
        return [s["Uid"] == [uid] * 4 and s["Gid"] == [gid] * 4 and s["Groups"] == [] and s["NoNewPrivs"] == ["1"] and
                {int(s[c][0], 16) for c in ("CapEff", "CapPrm", "CapInh")} == {0} for s in own] == [True, True]
    wait_for(all_right, "workers of nobody", 60)
    assert status_of(front.process.pid)["Uid"] == ["0"] * 4
    for victim in (*workers(front), psutil.Process(front.process.pid)):
        victim.kill()
        victim.wait(10)
        assert ask(front, token) == 200
        wait_for(all_right, "workers of nobody", 60)


def parts(front, root):
    "What there is to get."
    private, serve = Path(front.folder.name), root / ".mlkit/serve"
    wait_for(lambda: list(serve.rglob("*.parquet")), "the request log", 60)
    inside = sorted(p for folder in (private, serve) for p in (folder, *folder.rglob("*")))
    public = [root, *root.glob("bundle/**/*"), root / ".mlkit"]
    sockets, folders = [p for p in inside if p.is_socket()], [p for p in (*inside, *public) if p.is_dir()]
    files = [p for p in inside if p not in sockets and p != root / CERT]
    pids = [os.getpid(), front.process.pid, *(p.pid for p in workers(front))]
    texts = {"secret": files, "kept": [*files, *public], "sockets": sockets, "folders": folders}
    return {name: [str(p) for p in paths] for name, paths in texts.items()} | {"pids": pids, "mortal": pids}


@pytest.mark.parametrize("user", [STRANGER, NOBODY])
def test_another_user_gets_nothing(served, root, user):
    "No file of the private copy, no token, key or row of the log, no socket, no memory of a process; also who is nobody, as the workers are."
    front, token = served
    assert ask(front, token) == 200
    told = parts(front, root)
    names = {Path(p).name for p in told["secret"]}
    assert {"model.onnx", "contract.json", "tokens.json", "key.pem", "log"} <= names and len(told["sockets"]) == 2 and any(n.endswith(".parquet") for n in names)
    if user == NOBODY: # who has a worker's number may end it; it is replaced
        told["mortal"] = told["pids"][:2]
    assert attack(user, **told) == []
    assert ask(front, token) == 200


def test_the_attack_is_one(served, root):
    "A control: root gets all of it."
    told = parts(served[0], root)
    got = attack("root", **told)
    assert len(got) == len(told["secret"]) + 2 * len(told["kept"]) + len(told["sockets"]) + 4 * len(told["pids"]) + len(told["mortal"])


def test_what_a_local_port_gives(served):
    "Without a token no answer; the port of the metrics has figures, and controls nothing."
    front, token = served
    metrics = front.sockets[1].getsockname()[1]
    assert ask(front) == 401 and ask(front, path="/v2/models/shop", method="GET") in (401, 429)
    for path in ("/v2/repository/models/shop/load", "/v2/repository/index", "/v2/systemsharedmemory/region/a/register", "/v2/logging", "/predict", "/shutdown"):
        assert ask(front, token, path) in (200, 404) and (ask(front, token, path) == 404) == (path != "/predict")
        assert ask(front, path=path, port=metrics) in (404, 405)


def test_a_folder_that_another_user_has_left_is_no_lever(root):
    "What looks like the rest of a killed server, and leads elsewhere, is left alone."
    gone = subprocess.Popen(["true"])
    gone.wait()
    victim = root / "victim"
    (victim / "file").parent.mkdir()
    (victim / "file").write_text("kept")
    trap = Path(tempfile.gettempdir()) / f"mlkit-serve-{gone.pid}-trap"
    trap.symlink_to(victim)
    os.lchown(trap, int(STRANGER), int(STRANGER))
    try:
        sweep()
        assert (victim / "file").read_text() == "kept" and trap.is_symlink()
    finally:
        trap.unlink()


def test_files_that_change_after_the_start_are_not_loaded(served, root):
    "The project's bundle is damaged while its model is served; then each process is killed. What is served stays what was verified."
    front, token = served
    for path in (root / "bundle").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    for victim in (*workers(front), psutil.Process(front.process.pid)):
        victim.kill()
        victim.wait(10)
        assert ask(front, token) == 200


def test_another_user_can_be_named(bundle):
    "A number will do. The server says whose its workers are."
    lines = []
    class Once(Front):
        def watch(self, progress):
            lines.append([status_of(p.pid)["Uid"][0] for p in workers(self)])
            lines.append(test_gateway.predict(self, ROW)[0])
            raise KeyboardInterrupt
    serve_until_told(Once(bundle, hashes(bundle), "v1", tuning=Tuning(user="64999")), lines.append)
    assert "Workers run as the user 64999; the server itself as root" in lines and 200 in lines
