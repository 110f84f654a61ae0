"Who may ask `mlkit serve`, over what and how often, and what it writes down: real servers, real TLS, real curl."
import json
import re
import signal
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from threading import Event, Thread

import polars as pl
import psutil
import pytest

from conftest import one_line, wait_for
from mlkit.registry.bundle import write_bundle
from mlkit.serving.door import Access
from mlkit.serving.front import Front
from mlkit.serving.request_log import LogSettings, is_sampled
from mlkit.serving.tls import Certificate, self_signed
from mlkit.serving.tokens import add_token, remove_token, write_private
import test_gateway
from test_gateway import CONTRACT, ROW, hashes

bundle = test_gateway.bundle # the fixture

SECRET = 31415.926535 # an income, which is private
NAME = "Hieronymus Secretive" # what a client may send for it instead


@pytest.fixture(scope="module")
def private_bundle(bundle, tmp_path_factory):
    "The table's model, in whose contract incomes are private."
    out = tmp_path_factory.mktemp("private")
    contract = json.loads(json.dumps(CONTRACT))
    contract["inputs"][1]["private"] = True
    (out / "contract.json").write_text(json.dumps(contract))
    write_bundle(out / "bundle", {"contract.json": out / "contract.json", "model_repository": bundle / "model_repository"}, {})
    return out / "bundle"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "serve"


@contextmanager
def serving(bundle, access, **kw):
    "A server, and what it says."
    with Front(bundle, hashes(bundle), "v1", access=access, **kw) as front:
        front.lines, ended = [], Event()
        def watch():
            front.watch(front.lines.append)
            ended.wait(60) # a gateway ends with the thread that started it
        Thread(target=watch, daemon=True).start()
        yield front
    ended.set()


def ask(front, body=ROW, path="/predict", method="POST", **headers):
    "Status, headers and body of an answer."
    connection = HTTPConnection("127.0.0.1", front.port, timeout=30)
    try:
        connection.request(method, path, json.dumps(body).encode(), {k.replace("_", "-"): v for k, v in headers.items()})
        r = connection.getresponse()
        return r.status, dict(r.getheaders()), r.read()
    finally:
        connection.close()


def bearer(token): return {"Authorization": f"Bearer {token}"}


def metric(front, name):
    "The sum of a figure over its labels."
    port = int(front.metrics_url.rpartition(":")[2].partition("/")[0])
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"{name}[ {{]", line))


def logged(folder): return pl.concat([pl.read_parquet(f) for f in folder.glob("*/*/*.parquet")], how="diagonal").sort("time")


def test_only_a_right_token_is_let_in(bundle, folder):
    "Missing, wrong, cut, of another kind: 401 that says how, and nothing of the token in what the server says or keeps."
    token = add_token(folder / "tokens.json", "shop")
    with serving(bundle, Access(str(folder / "tokens.json"))) as front:
        assert ask(front, **bearer(token))[0] == 200
        wrong = [{}, {"Authorization": token}, bearer(token[:-1]), bearer(token + "0"), bearer(token.upper()), {"Authorization": f"Basic {token}"},
                 bearer(""), {"X-Api-Key": token}, bearer("ä" * 20)]
        for headers in wrong:
            status, answered, body = ask(front, **{k: v.encode("latin-1") for k, v in headers.items()})
            assert (status, answered["www-authenticate"].startswith("Bearer")) == (401, True) and "token" in json.loads(body)["error"]
            assert token.encode() not in body and answered["x-request-id"]
        for path, method in (("/v2", "GET"), ("/v2/health/live", "GET"), ("/v2/models/shop/infer", "POST"), ("/nothing", "GET"), ("/predict?token=" + token, "POST")):
            assert ask(front, path=path, method=method)[0] in (401, 429)
        said = b"".join(f.read_bytes() for f in folder.parent.rglob("*") if f.is_file()) + (Path(front.folder.name) / "log").read_bytes()
        assert token.encode() not in said and token not in str(front.lines)


def test_a_token_comes_and_goes_while_the_server_runs(bundle, folder):
    file = folder / "tokens.json"
    with serving(bundle, Access(str(file))) as front:
        assert ask(front)[0] == 200 # on loopback, before there are tokens
        one, two = add_token(file, "one"), add_token(file, "two")
        time.sleep(0.2)
        assert [ask(front)[0], ask(front, **bearer(one))[0], ask(front, **bearer(two))[0]] == [401, 200, 200]
        remove_token(file, "one")
        time.sleep(0.2)
        assert [ask(front, **bearer(one))[0], ask(front, **bearer(two))[0]] == [401, 200]
        file.chmod(0o644) # others could let themselves in
        time.sleep(0.2)
        assert ask(front, **bearer(two))[0] == 401
        wait_for(lambda: any("nobody may ask" in line and "chmod 600" in line for line in front.lines), "the line", 60)
        file.unlink()
        time.sleep(0.2)
        assert ask(front)[0] == 401 # a file that is gone opens nothing


def test_a_token_has_its_rate(bundle, folder):
    "Samples count: a batch is let in and its samples are owed. Others are not slowed."
    slow, fast = add_token(folder / "tokens.json", "slow", "5/s"), add_token(folder / "tokens.json", "fast")
    with serving(bundle, Access(str(folder / "tokens.json"))) as front:
        assert [ask(front, **bearer(slow))[0] for _ in range(8)].count(429) >= 2
        time.sleep(1.1)
        assert ask(front, [ROW] * 16, **bearer(slow))[0] == 200
        status, headers, body = ask(front, **bearer(slow))
        assert (status, headers["retry-after"] in "23") == (429, True) and "token 'slow' may send 5/s" in json.loads(body)["error"]
        assert [ask(front, **bearer(fast))[0] for _ in range(20)] == [200] * 20
        assert metric(front, "mlkit_client_samples_total") >= 36 and metric(front, "mlkit_refused_callers_total") >= 3


def test_guessing_costs_others_nothing(bundle, folder):
    "Sixteen connections guess; a right token from the same address is answered at once."
    token = add_token(folder / "tokens.json", "shop")
    with serving(bundle, Access(str(folder / "tokens.json"))) as front:
        end, guesses = time.monotonic() + 2.5, []
        def guess():
            while time.monotonic() < end:
                guesses.append(ask(front, **bearer(f"mlkit_{len(guesses):048x}"))[0])
        slowest = 0.0
        with ThreadPoolExecutor(16) as pool:
            for _ in range(16):
                pool.submit(guess)
            while time.monotonic() < end:
                began = time.monotonic()
                assert ask(front, **bearer(token))[0] == 200
                slowest = max(slowest, time.monotonic() - began)
        assert slowest < 1 and len(guesses) < 80 and guesses.count(401) < 20, (slowest, len(guesses))


def test_private_columns_are_nowhere(private_bundle, folder):
    "Values that were answered, refused and sent as tensors: no byte of them is in the log, whatever the way and the status."
    log = folder / "requests"
    with serving(private_bundle, Access(log=LogSettings(str(log)))) as front:
        numbers = {"name": "numbers", "datatype": "FP64", "shape": [2, 2], "data": [41, SECRET, 42, None]}
        tensors = {"inputs": [numbers, {"name": "texts", "datatype": "BYTES", "shape": [2, 1], "data": ["Bonn", "Ulm"]}]}
        asked = [ROW | {"income": SECRET}, [ROW | {"income": str(SECRET)}] * 3, ROW | {"income": SECRET, "age": 400}, ROW | {"income": NAME}]
        statuses = [ask(front, body, **{"X-Request-Id": f"id-{i}"})[0] for i, body in enumerate(asked)]
        assert statuses == [200, 200, 400, 400] and ask(front, tensors, "/v2/models/shop/infer", **{"X-Request-Id": "tensors"})[0] == 200
        assert metric(front, "mlkit_log_dropped_rows_total") == 0
    rows = logged(log)
    assert rows["request_id"].to_list() == ["id-0"] + ["id-1"] * 3 + ["id-2"] + ["tensors"] * 2 # what no row could be made of is not there
    assert rows["row"].to_list() == [0, 0, 1, 2, 0, 0, 1] and rows["status"].to_list() == [200] * 4 + [400] + [200] * 2
    assert rows["input"].struct.unnest().to_dict(as_series=False) == {"age": [41.0] * 4 + [400, 41, 42], "town": ["Bonn"] * 6 + ["Ulm"]}
    assert rows["answer"].to_list() == ["no"] * 4 + [None, "no", "yes"] and rows["model"].unique().to_list() == ["shop"]
    files = [f for f in log.rglob("*") if f.is_file()]
    assert files and {oct(f.stat().st_mode & 0o777) for f in files} == {"0o600"}
    for f in files:
        plain = pl.read_parquet(f).write_ndjson().encode() + f.read_bytes()
        assert not any(word in plain for word in (b"income", b"31415.9", b"Secretive")), f


def test_request_ids_and_a_share(bundle, folder):
    "A sane id comes back, another is made. The id alone decides what is logged."
    with serving(bundle, Access(log=LogSettings(str(folder), share=0.25))) as front:
        given = ["abc-1", "a/b.c:d=", "x" * 128, "x" * 129, "a b", "<script>", ""]
        answered = [ask(front, **{"X-Request-Id": id})[1]["x-request-id"] for id in given + [f"r{i}" for i in range(80)]]
        assert answered[:3] == given[:3] and all(re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{8,}", id) for id in answered[3:7]) and len(set(answered)) == 87
        status, headers, _ = ask(front, path="/nothing", **{"X-Request-Id": "lost"})
        assert (status, headers["x-request-id"]) == (404, "lost")
    assert logged(folder)["request_id"].to_list() == [id for id in answered if is_sampled(id, 0.25)]


@pytest.fixture
def full(tmp_path):
    "A folder for the log that cannot be written, what is said of it, and what mends it."
    path = tmp_path / "tiny"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", path], capture_output=True).returncode:
        (path / "log").write_text("no folder") # only root may mount a full disk
        yield path / "log", "exists", (path / "log").unlink
        return
    (path / "others").write_bytes(bytes(12_000))
    yield path / "log", "No space left", (path / "others").unlink
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_costs_rows_of_the_log_only(bundle, full):
    "Requests go on; one line and a metric tell, nothing is half-written, and what waits is written when it can be."
    folder, said, mend = full
    with serving(bundle, Access(log=LogSettings(str(folder)))) as front:
        for i in range(40):
            assert ask(front, [ROW | {"age": (i + j) % 100 + i / 1000} for j in range(16)])[0] == 200
        wait_for(lambda: metric(front, "mlkit_log_failed_writes_total"), "a failed write", 60)
        assert ask(front)[0] == 200
        wait_for(lambda: front.lines, "the line", 60)
        assert len(front.lines) == 1 and said in front.lines[0] and "requests are answered all the same" in front.lines[0]
        assert not [f for f in folder.rglob("*") if f.is_file()]
        mend()
    assert len(logged(folder)) == 641


def test_kill_costs_what_was_not_written_yet(bundle, folder):
    "The gateway is killed after some rows were written. Each file that is there is whole, and later rows come."
    with serving(bundle, Access(log=LogSettings(str(folder)))) as front:
        for i in range(30):
            assert ask(front, **{"X-Request-Id": f"r{i}"})[0] == 200
        wait_for(lambda: list(folder.glob("*/*/*.parquet")), "a file", 60)
        ask(front, **{"X-Request-Id": "lost"})
        front.process.kill()
        wait_for(lambda: any("SIGKILL" in line for line in front.lines), "the next gateway", 60)
        assert ask(front, **{"X-Request-Id": "last"})[0] == 200
    assert logged(folder)["request_id"].to_list() == [f"r{i}" for i in range(30)] + ["last"]
    assert not [f for f in folder.rglob("*") if f.name.endswith(".tmp")]


def test_the_operators_port(bundle, folder):
    "Metrics and health: on loopback, by GET, for no page of another origin. Nothing of it is on the clients' port."
    with serving(bundle, Access()) as front:
        port = int(front.metrics_url.rpartition(":")[2].partition("/")[0])
        def look(path, method="GET", **headers):
            connection = HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request(method, path, None, headers)
            answer = connection.getresponse()
            connection.close()
            return answer.status
        assert [look(p) for p in ("/metrics", "/v2/health/live", "/v2/health/ready", "/v2/models/shop", "/predict")] == [200, 200, 200, 404, 404]
        assert [look("/metrics", **h) for h in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"})] == [403] * 3
        assert [look("/metrics", m) for m in ("POST", "DELETE", "OPTIONS")] == [405] * 3
        assert ask(front, path="/metrics", method="GET")[0] == 404


@pytest.fixture
def certificate(folder):
    files = folder / "cert.pem", folder / "key.pem"
    for path, text in zip(files, self_signed(["localhost", "127.0.0.1"])):
        write_private(path, text)
    return Certificate(*map(str, files))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_other_machines_need_tls_and_a_token(bundle, folder, certificate):
    "On 0.0.0.0: TLS 1.2 or newer, no plain HTTP, any name, no foreign page; metrics stay on loopback."
    token = add_token(folder / "tokens.json", "shop")
    with serving(bundle, Access(str(folder / "tokens.json"), certificate), host="0.0.0.0") as front:
        def secure(context, **headers):
            connection = HTTPSConnection("127.0.0.1", front.port, timeout=10, context=context)
            try:
                connection.request("POST", "/predict", json.dumps(ROW).encode(), headers)
                return connection.getresponse().status
            finally:
                connection.close()
        trusting = ssl.create_default_context(cafile=certificate.cert)
        assert secure(trusting, **bearer(token)) == 200 and secure(trusting) == 401
        assert secure(trusting, Host="serve.example.org", **bearer(token)) == 200
        assert secure(trusting, Origin="http://evil.example", **bearer(token)) == 403
        with pytest.raises(ssl.SSLCertVerificationError):
            secure(ssl.create_default_context(), **bearer(token))
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode, old.maximum_version = False, ssl.CERT_NONE, ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            secure(old, **bearer(token))
        with socket.create_connection(("127.0.0.1", front.port), 5) as s: # plain HTTP
            s.sendall(b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            try:
                assert b"HTTP" not in s.recv(1000)
            except ConnectionError:
                pass
        listening = {c.laddr.port: c.laddr.ip for c in psutil.Process(front.process.pid).net_connections("inet") if c.status == "LISTEN"}
        assert listening.pop(front.port) == "0.0.0.0" and set(listening.values()) == {"127.0.0.1"}
        (folder / "tokens.json").unlink()
        time.sleep(0.2)
        assert secure(trusting, **bearer(token)) == 401


def test_from_the_command_line(project):
    "A person's way: refused, told what to do, done, asked with curl, taken back, stopped; the log has it."
    serve = "mlkit", "serve", "--host", "0.0.0.0", "--port", "0", "--metrics-port", "0"
    one_line(project.run(*serve, rc=None), "only over TLS and with a token", "'mlkit keys certificate'", "'mlkit keys add NAME'")
    project.mlkit("keys", "certificate", "--name", "serve.example.org")
    one_line(project.run(*serve, rc=None), "first 'mlkit keys add NAME'")
    token = project.mlkit("keys", "add", "web", "--rate", "100/s").stdout.strip()
    key = project / ".mlkit/serve/key.pem"
    key.chmod(0o644)
    one_line(project.run(*serve, rc=None), "has mode 644", "chmod 600")
    key.chmod(0o600)
    assert not subprocess.run(["git", "status", "--porcelain", ".mlkit"], cwd=project.root, capture_output=True).stdout
    with project.started(*serve) as p:
        said = wait_for(lambda: ("Try:" in p.out.read_text() or p.poll() is not None) and p.out.read_text() + p.err.read_text(), "the server", 300)
        port = re.search(r"at https://[^ ]+:(\d+),", said)[1]
        assert "requests are logged in" in said and "Asks for a token" in said and "--cacert" in said and "$TOKEN" in said
        image = re.search(r"@(\S+)", said)[1]
        curl = ["curl", "-s", "--cacert", project / ".mlkit/serve/cert.pem", f"https://localhost:{port}/predict", "--data-binary", f"@{image}"]
        assert "answer" in json.loads(subprocess.run([*curl, "-H", f"Authorization: Bearer {token}", "-H", "X-Request-Id: by-curl"], capture_output=True).stdout)
        project.mlkit("keys", "remove", "web")
        refused = json.loads(subprocess.run([*curl, "-H", f"Authorization: Bearer {token}"], capture_output=True).stdout)
        assert "may have been removed" in refused["error"]
        p.send_signal(signal.SIGTERM)
        assert p.wait(30) == 0
        assert token not in p.out.read_text() + p.err.read_text()
    rows = logged(project / ".mlkit/serve/requests")
    assert rows.select("request_id", "client", "status").rows() == [("by-curl", "web", 200)]
    assert len(rows["input"].struct.field("sha256")[0]) == 64 and rows["version"][0] == project.json("reports/verdict.json")["bundle"][:12]
    assert not any(token.encode() in f.read_bytes() for f in (project / ".mlkit/serve").rglob("*") if f.is_file())
