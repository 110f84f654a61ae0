"The registry: addresses as people write them, projects that are copied or moved, names, processes that die or run at once, and a real MLflow server."
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import pytest
from conftest import FULL, ROOT, one_line, wait_for
from mlkit.core import ConfigError, RegistryError, write_atomic, write_json
from mlkit.registry.bundle import BUNDLE, MANIFEST, write_bundle
from mlkit.registry.history import append, event, read_history
from mlkit.registry.store import CHAMPION, PUBLISHED, fetch, publish, register, versions_of
from mlkit.registry.verdict import MAX_NAME, VERDICT, verdict
from mlkit.training.store import experiment_id, has_artifact, local_store, mlflow_client, tracking_uri
from mlkit.training.track import Run

NAMES = ["digits", "my model", "a.b-c_1", "Модель 2", "हिन्दी", "モ" * MAX_NAME]
BAD_NAMES = ["it's", 'say "hi"', "50%", "a/b", "a\\b", "a:b", "../up", "a\nb", "", " ", "x" * (MAX_NAME + 1), "x" * 5000,
             "a😀", "a`b", "a;b", "a<b>"]


def a_verdict(bundle, value=0.97, name="digits", figure="accuracy"):
    return verdict({f"evaluate.{figure}": {"min": 0.5}}, {"evaluate": {figure: value}}, name, bundle, f"evaluate.{figure}")


class Shop:
    "A project as small as can be: values, a bundle and its verdict."

    def __init__(self, root):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "params.yaml").touch()

    def released(self, text, value=0.97, name="digits"):
        "The bundle and the verdict of a run whose model holds `text`."
        shutil.rmtree(self.root / "models", ignore_errors=True)
        source = self.root / "model.txt"
        source.write_text(text)
        identity = write_bundle(self.root / BUNDLE, {"model.txt": source}, {})
        write_json(self.root / VERDICT, a_verdict(identity, value, name))
        return self

    @property
    def verdict(self):
        return json.loads((self.root / VERDICT).read_text())

    def publish(self, uri=None, **options):
        return publish(self.root, self.root / BUNDLE, self.verdict, uri, **options)

    def got(self, wanted, uri=None, name="digits"):
        return (fetch(name, wanted, self.root / "got", uri, root=self.root) / "model.txt").read_text()

    def command(self, *args, **env):
        own = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "DVC_"))}
        command = [sys.executable, "-c", "from mlkit.cli import main; main()", *args]
        return subprocess.run(command, cwd=self.root, env=own | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True, timeout=600)


def files(folder):
    "path: hash, of all in a folder."
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.rglob("*")) if f.is_file()}


def aliases(uri, name="digits"):
    return {k: str(v) for k, v in mlflow_client(uri).get_registered_model(name).aliases.items()}


def published_runs(client, name="digits"):
    "The runs of this name that hold a bundle."
    experiment = client.get_experiment_by_name(name)
    return client.search_runs([experiment.experiment_id], "tags.mlflow.runName LIKE 'release %'")


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    "A database with MLflow's tables, which take seconds to make."
    folder = tmp_path_factory.mktemp("tables")
    mlflow_client(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def shop(tmp_path, tables, monkeypatch):
    """A new project, in a folder with all that addresses stumble over; the working folder is below it, as in JupyterLab.
    Where this process makes a database, it takes a copy of one. Processes that a test starts make their own."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mlkit.training.store.make_database", lambda db: write_atomic(db, tables.read_bytes()))
    shop = Shop(tmp_path / "5% of a#b?c 'é'")
    (shop.root / "nbs").mkdir()
    monkeypatch.chdir(shop.root / "nbs")
    return shop.released("one")


@pytest.fixture
def ready(shop, tables):
    "The same, with a database."
    shutil.copy(tables, shop.root / "mlflow.db")
    return shop


# Addresses

@pytest.mark.parametrize("address, where", [
    (None, "mlflow.db"), ("sqlite:///rel.db", "rel.db"), ("sqlite:///sub/rel.db", "sub/rel.db"), ("sqlite:///{quoted}/abs.db", "abs.db"),
    ("mlruns", "mlruns/models"), ("./mlruns/", "mlruns/models"), ("file:mlruns", "mlruns/models"), ("{root}/runs", "runs/models"),
])
def test_local_addresses(shop, monkeypatch, address, where):
    "Relative ones start at the project, wherever the working folder is; artifacts lie beside the store, and nothing elsewhere."
    from urllib.parse import quote
    if address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(root=shop.root, quoted=quote(str(shop.root))))
    with Run("digits", {"lr": 0.1}) as run:
        run.log(0, loss=1.0)
    p = shop.publish()
    assert (p.version, p.champion, shop.publish(ask=True).new) == ("1", True, False)
    assert shop.got("champion") == "one"
    store = shop.root / where
    assert store.exists() and list((shop.root / "nbs").iterdir()) == []
    beside = store.parent if where.endswith(".db") else store.parent.parent
    assert len(list(beside.glob(f"mlartifacts/*/artifacts/bundle/{MANIFEST}"))) == 1
    assert run.client.get_run(run.run_id).data.metrics == {"loss": 1.0}


class Website(BaseHTTPRequestHandler):
    "A server that is no MLflow."

    def do_GET(self):
        self.send_error(404)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def strangers():
    "Addresses of servers that are no MLflow: one is silent, one does not speak HTTP, one is a website."
    silent, rude = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:
            try:
                connection, _ = rude.accept()
            except OSError:
                return
            connection.sendall(b"\x00\x01 what?\r\n")
            connection.close()

    Thread(target=answer, daemon=True).start()
    website = ThreadingHTTPServer(("127.0.0.1", 0), Website)
    Thread(target=website.serve_forever, daemon=True).start()
    yield {"silent": silent.getsockname()[1], "rude": rude.getsockname()[1], "website": website.server_port}
    website.shutdown()
    website.server_close()
    rude.close()
    silent.close()


@pytest.mark.parametrize("address, says", [
    ("http://127.0.0.1:9", "does not answer"), ("http://127.0.0.1:9/", "does not answer"), ("https://127.0.0.1:9", "does not answer"),
    ("http://nobody.invalid:5000", "does not answer"), ("postgresql://me:secret@127.0.0.1:9/runs", "does not answer"),
    ("http://127.0.0.1:{silent}", "no answer within"), ("http://127.0.0.1:{rude}", "does not answer"),
    ("http://127.0.0.1:{website}", "404"), ("https://127.0.0.1:{website}", "MLflow at"),
    ("localhost:5000", "write 'http://localhost:5000'"), ("my-host.org:5000/", "lacks its scheme"), ("http:///", "names no host"),
    ("http://me:secret@host:port", "write 'http://host:5000'"), ("postgresql://me:sec/secret@host/runs", "no valid host"),
    ("http://me:secret@127.0.0.1:{website}", "404"), ("sqlite://rel.db", "write 'sqlite:///mlflow.db'"), ("sqlite:///", "names no file"),
    ("file://mlruns", "write 'file:mlruns'"), ("sprocket://host", "sprocket"), ("mysql://me:secret@/runs", "install it"),
    ("sqlite:///damaged.db", "cannot open it"), ("sqlite:///folder.db", "cannot open it"), ("sqlite:///text.db", "cannot open it"),
])
def test_addresses_that_cannot_work(shop, monkeypatch, tables, strangers, address, says):
    "One line that says what is wrong, in some seconds; no password in it."
    (shop.root / "damaged.db").write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 20)
    (shop.root / "text.db").write_text("not a database")
    (shop.root / "folder.db").mkdir()
    monkeypatch.setattr("mlkit.training.store.WAIT", 2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address.format(**strangers))
    start = time.monotonic()
    for act in (shop.publish, lambda: Run("digits", {}).__enter__(), lambda: fetch("digits", "1", shop.root / "got")):
        with pytest.raises(RegistryError) as e:
            act()
        assert says in str(e.value) and "\n" not in str(e.value) and "secret" not in str(e.value)
    assert time.monotonic() - start < 60
    assert not (shop.root / CHAMPION).exists()


def test_a_bad_address_on_the_command_line(shop):
    one_line(shop.command("release", MLFLOW_TRACKING_URI="localhost:5000"), "lacks its scheme", "http://localhost:5000")
    start = time.monotonic()
    one_line(shop.command("release", MLFLOW_TRACKING_URI="http://127.0.0.1:9/"), "http://127.0.0.1:9 does not answer", "unset MLFLOW_TRACKING_URI")
    assert time.monotonic() - start < 60


# Names

@pytest.mark.parametrize("store", ["mlflow.db", "mlruns"])
def test_every_name_that_passes_works(shop, store):
    uri = f"sqlite:///{store}" if store.endswith("db") else store
    for name in NAMES:
        shop.released("one", name=name)
        assert (shop.publish(uri).version, shop.publish(uri, ask=True).new, shop.got("challenger", uri, name)) == ("1", False, "one"), name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_before_anything_is_published(shop, name):
    for act in (lambda: a_verdict("ab" * 32, name=name), lambda: fetch(name, "1", shop.root / "got")):
        with pytest.raises(ConfigError) as e:
            act()
        assert "cannot name a model" in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500
    old = json.loads((shop.root / VERDICT).read_text()) | {"model": name} # a verdict of before the rule
    write_json(shop.root / VERDICT, old)
    one_line(shop.command("release"), "cannot name a model") if name == "it's" else None
    with pytest.raises(ConfigError):
        shop.publish()
    assert not (shop.root / "mlflow.db").exists()


def test_figures_with_any_name_are_published(ready):
    "A metric may hold the name of a class."
    for i, figure in enumerate(["recall of 'dog' & co", 'a"b', "x/../y", "π ≥ 3", "a\nb", "y" * 1000]):
        ready.released(f"model {i}")
        write_json(ready.root / VERDICT, a_verdict(ready.verdict["bundle"], figure=figure))
        assert ready.publish().version == str(i + 1)


# Copies

def copied(shop, to):
    shutil.copytree(shop.root, to, symlinks=True)
    return Shop(to)


@pytest.mark.parametrize("address", ["sqlite:///mlflow.db", "mlruns"])
def test_a_copy_is_a_project_of_its_own(shop, tmp_path, monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    shop.publish()
    before = files(shop.root)
    copy = copied(shop, tmp_path / "a copy")
    monkeypatch.chdir(copy.root)
    assert copy.got("champion") == "one"
    assert copy.publish().new is False
    copy.released("two", 0.98)
    assert copy.publish().version == "2"
    with Run("digits", {"lr": 0.1}) as run:
        run.log_artifacts(copy.root / BUNDLE, "more")
    assert (copy.got("1"), copy.got("champion")) == ("one", "two")
    assert files(shop.root) == before
    monkeypatch.chdir(shop.root)
    assert shop.got("champion") == "one"


@pytest.mark.parametrize("address", ["sqlite:///mlflow.db", "mlruns"])
def test_a_moved_project_goes_on(shop, tmp_path, monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    shop.publish()
    moved = Shop(shop.root.rename(tmp_path / "moved"))
    monkeypatch.chdir(moved.root)
    assert (moved.got("champion"), moved.publish().new) == ("one", False)
    moved.released("two", 0.98).publish()
    assert (moved.got("1"), moved.got("2")) == ("one", "two")
    assert not shop.root.exists()


def old_store(shop, uri):
    "As before artifacts moved with the project: MLflow notes absolute paths."
    client, identity = mlflow_client(tracking_uri(uri)), shop.verdict["bundle"]
    location = (shop.root / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
    run = client.create_run(client.create_experiment("digits", location)).info.run_id
    client.log_artifacts(run, str(shop.root / BUNDLE), "bundle")
    client.create_registered_model("digits")
    client.create_model_version("digits", f"runs:/{run}/bundle", run, tags={"bundle": identity})
    client.set_registered_model_alias("digits", "champion", "1")


@pytest.mark.parametrize("address", ["sqlite:///mlflow.db", "mlruns"])
@pytest.mark.parametrize("act", [copied, lambda shop, to: Shop(shop.root.rename(to))], ids=["copied", "moved"])
def test_a_store_with_absolute_paths(shop, tmp_path, monkeypatch, address, act):
    "One of before goes on where it is; copied or moved, it writes and reads in its own folder."
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    old_store(shop, address)
    assert shop.publish().version == "1" and shop.got("champion") == "one"
    shop.released("two", 0.98).publish()
    shop.released("one") # the bundle of version 1 is at hand again
    before = files(shop.root)
    other = act(shop, tmp_path / "other")
    monkeypatch.chdir(other.root)
    assert (other.got("1"), other.got("champion")) == ("one", "two")
    if address.startswith("sqlite"): # what was lost in the move comes to the new folder, not to the old one
        shutil.rmtree(other.root / "mlartifacts")
        assert other.publish(ask=True).version == "1" and other.got("1") == "one"
    assert other.released("three", 0.99).publish().version == "3"
    with Run("digits", {}) as run:
        run.log_artifacts(other.root / BUNDLE, "more")
    assert other.got("3") == "three"
    if act is copied:
        assert files(shop.root) == before
    else:
        assert not shop.root.exists()
    names = {e.name for e in mlflow_client(tracking_uri()).search_experiments()}
    assert "digits" in names and any(n.startswith("digits @ ") for n in names)


# What people do in MLflow

@pytest.mark.parametrize("address", ["sqlite:///mlflow.db", "mlruns"])
def test_a_deleted_experiment_comes_back(shop, monkeypatch, address):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    shop.publish()
    uri = tracking_uri()
    client = mlflow_client(uri)
    client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
    with Run("digits", {}) as run:
        run.log(0, loss=1.0)
    assert run.client.get_run(run.run_id).info.status == "FINISHED"
    client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
    assert (shop.publish(ask=True).version, shop.got("1")) == ("1", "one")
    assert shop.released("two").publish().version == "2"


def test_what_mlflow_lost_is_published_again(ready):
    "The run, its artifacts, the version, the model, the database: each alone."
    uri = tracking_uri("sqlite:///mlflow.db")
    ready.publish()
    client = mlflow_client(uri)
    run = client.get_model_version("digits", "1").run_id
    client.delete_run(run)
    assert ready.publish().version == "1" and client.get_run(run).info.lifecycle_stage == "active"
    shutil.rmtree(ready.root / "mlartifacts")
    assert ready.publish().new and ready.got("1") == "one"
    client.delete_model_version("digits", "1")
    assert ready.publish().version == "2" and aliases(uri) == {"champion": "2", "challenger": "2"}
    client.delete_registered_model_alias("digits", "champion")
    assert ready.publish().new and aliases(uri) == {"champion": "2", "challenger": "2"}
    client.delete_registered_model("digits")
    assert ready.publish().version == "1" and aliases(uri) == {"champion": "1", "challenger": "1"}
    for f in ready.root.glob("mlflow.db*"):
        f.unlink()
    assert ready.publish().version == "1" and ready.got("champion") == "one"


def test_a_run_that_is_erased_for_good(ready):
    "The version cannot be repaired: the bundle gets a new one."
    uri = tracking_uri("sqlite:///mlflow.db")
    ready.publish()
    client = mlflow_client(uri)
    run = client.get_model_version("digits", "1").run_id
    client.delete_run(run)
    client._tracking_client.store._hard_delete_run(run) # what 'mlflow gc' calls
    assert ready.publish(ask=True).version == "2" and ready.got("champion") == "one"


def test_an_alias_moved_by_hand(ready):
    "`mlkit release` puts it back, and says so."
    uri = tracking_uri("sqlite:///mlflow.db")
    ready.publish()
    ready.released("two", 0.9).publish()
    assert aliases(uri) == {"champion": "1", "challenger": "2"}
    mlflow_client(uri).set_registered_model_alias("digits", "champion", "2")
    done = ready.command("release")
    assert "Registry: champion was version 2, is version 1" in done.stdout, done.stdout + done.stderr
    assert aliases(uri) == {"champion": "1", "challenger": "2"}


# The note of the last publication

def test_nobody_asks_mlflow_when_nothing_changed(ready, monkeypatch):
    ready.publish()
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None) # whoever asks MLflow fails
    assert ready.publish() == ready.publish()
    assert (ready.publish().version, ready.publish().new) == ("1", False)
    with pytest.raises(RegistryError):
        ready.publish(ask=True)


@pytest.mark.parametrize("change", ["note", "broken note", "store", "no store", "files", "champion", "history", "address", "verdict", "bundle"])
def test_mlflow_is_asked_when_something_changed(ready, monkeypatch, change):
    ready.publish()
    if change == "note":
        (ready.root / PUBLISHED).unlink()
    elif change == "broken note":
        (ready.root / PUBLISHED).write_text("{")
    elif change == "store":
        with Run("another", {}):
            pass
    elif change == "no store":
        (ready.root / "mlflow.db").unlink()
    elif change == "files":
        shutil.rmtree(ready.root / "mlartifacts")
    elif change == "champion":
        (ready.root / CHAMPION).unlink()
    elif change == "history":
        append(ready.root, [event("shadow", "digits", {"version": "1", "bundle": ready.verdict["bundle"]}, "", "promote")])
    elif change == "address":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "other.db")
    elif change == "verdict":
        write_json(ready.root / VERDICT, a_verdict(ready.verdict["bundle"], 0.9, figure="recall"))
    elif change == "bundle":
        ready.released("two")
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "mlflow.tracking", None)
        with pytest.raises(RegistryError):
            ready.publish()
    ready.publish()
    assert ready.publish().new is False


# Processes that die, or run at once

DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
from mlflow.tracking.client import MlflowClient
from mlkit.core import read_json
from mlkit.registry import store as registry
from mlkit.registry.bundle import BUNDLE
from mlkit.registry.verdict import VERDICT

base, out = map(Path, sys.argv[1:3])
moments = sys.argv[3:]
step = 0

def mortal(name, f, die_at):
    def run(*args, **options):
        for moment in ("before", "after"):
            global step
            step += moment in moments
            if step == die_at and moment in moments:
                print(die_at, moment, name, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "before":
                result = f(*args, **options)
        return result
    return run

def publish(root, die_at):
    calls = "create_experiment create_run log_batch set_terminated create_registered_model create_model_version set_registered_model_alias"
    for name in calls.split():
        setattr(MlflowClient, name, mortal(name, getattr(MlflowClient, name), die_at))
    Path.rename = mortal("rename", Path.rename, die_at)
    for name in ("write_json", "append"):
        setattr(registry, name, mortal(name, getattr(registry, name), die_at))
    os.chdir(root)
    registry.publish(root, root / BUNDLE, read_json(root / VERDICT))

for die_at in range(1, 100):
    root = Path(shutil.copytree(base, out / str(die_at)))
    if not (child := os.fork()): # a copy of this process, which has imported MLflow and opened nothing
        publish(root, die_at)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_killed_at_any_step(ready, tmp_path, monkeypatch):
    """Whatever a publication that died has left, the next one makes of it one version, one champion, and files that are whole.
    What lies on the disk after a step lies there before the next one: only a full run dies at both."""
    (tmp_path / "killed").mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", DRIVER, ready.root, tmp_path / "killed", "before", *(["after"] if FULL else [])], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    deaths = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:1].isdigit())
    for k, death in deaths.items():
        victim = Shop(tmp_path / "killed" / k)
        monkeypatch.chdir(victim.root)
        victim.publish()
        uri = tracking_uri()
        found = versions_of(mlflow_client(uri), "digits", victim.verdict["bundle"])
        assert [str(v.version) for v in found] == ["1"], death
        assert aliases(uri) == {"champion": "1", "challenger": "1"} and victim.got("champion") == "one", death
        assert json.loads((victim.root / CHAMPION).read_text())["bundle"] == victim.verdict["bundle"], death
        assert victim.publish(ask=True).new is False, death
        assert [e["what"] for e in read_history(victim.root)] == ["released", "challenger", "champion"], death
    steps = {death.split()[-1] for death in deaths.values()}
    assert steps >= {"create_run", "rename", "create_model_version", "set_registered_model_alias", "write_json", "append"} and len(deaths) >= (20 if FULL else 12), deaths


def at_once(shops, uri, n):
    "Publications of `n` processes, started together."
    code = f"""
import sys
from pathlib import Path
from mlkit.core import read_json
from mlkit.registry.store import publish
root = Path.cwd()
print(publish(root, root / '{BUNDLE}', read_json(root / '{VERDICT}'), sys.argv[1]).version)"""
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, uri]
    started = [subprocess.Popen(command, cwd=shops[i % len(shops)].root, **options) for i in range(n)]
    ended = [p.communicate(timeout=600) for p in started]
    assert all(p.returncode == 0 for p in started), [e for _, e in ended]
    return {out.strip() for out, _ in ended}


def test_several_processes_in_one_project(shop):
    "Also the database is made only once."
    uri = tracking_uri()
    assert at_once([shop], uri, 4 if FULL else 3) == {"1"}
    assert len(versions_of(mlflow_client(uri), "digits", shop.verdict["bundle"])) == 1
    assert aliases(uri) == {"champion": "1", "challenger": "1"} and shop.got("1") == "one"


def test_several_projects_with_one_store(ready, tmp_path):
    uri = tracking_uri()
    shops = [ready, copied(ready, tmp_path / "b"), copied(ready, tmp_path / "c")]
    assert len(at_once(shops, uri, 3)) == 1
    client = mlflow_client(uri)
    assert len(versions_of(client, "digits", ready.verdict["bundle"])) == 1
    assert len(set(aliases(uri).values())) == 1 and ready.got("champion", uri) == "one"


def test_two_versions_registered_at_the_same_moment(ready):
    "The older one stays; who made the younger removes it, with its run."
    uri = tracking_uri()
    ready.publish()
    client, bundle = mlflow_client(uri), ready.verdict["bundle"]
    run = client.create_run(experiment_id(client, uri, "digits")).info.run_id
    version = register(client, "digits", bundle, run, None)
    assert str(version.version) == "1" and len(versions_of(client, "digits", bundle)) == 1
    assert client.get_run(run).info.lifecycle_stage == "deleted"


# A real server

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "MLflow's own server, on the SQLite store of a project that was copied: (its address, the project)."
    start = Shop(tmp_path_factory.mktemp("server") / "first").released("local", name="local")
    start.publish(f"sqlite:///{start.root}/mlflow.db")
    home = copied(start, start.root.parent / "home")
    shutil.rmtree(start.root)
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db",
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    with open(home.root / "server.log", "w") as log:
        p = subprocess.Popen(command, cwd=home.root, env=env, stdout=log, stderr=log, start_new_session=True)

    def healthy():
        assert p.poll() is None, (home.root / "server.log").read_text()[-3000:]
        try:
            return urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_for(healthy, "MLflow's server")
        yield f"http://127.0.0.1:{port}", home
    finally:
        os.killpg(p.pid, signal.SIGKILL) # its workers too: the session is ours
        p.wait(60)


def test_publish_to_a_server(shop, server, capfd):
    "All that works on a local store works there, with the address as a browser shows it."
    uri, _ = server
    for address in (f"{uri}/", f"{uri}/#/models/digits"):
        p = shop.publish(address)
        assert (p.version, p.champion, p.new) == ("1", True, address.endswith("/"))
    assert shop.got("champion", uri) == "one"
    shop.released("two", 0.98)
    assert (shop.publish(uri).version, shop.publish(uri, ask=True).new) == ("2", False)
    assert (shop.got("1", uri), shop.got("champion", uri)) == ("one", "two")
    client = mlflow_client(uri)
    client.set_registered_model_alias("digits", "champion", "1")
    assert shop.publish(uri, ask=True).moved == {"champion": ("1", "2")}
    run = client.get_model_version("digits", "2").run_id
    assert has_artifact(client, uri, run, f"bundle/{MANIFEST}") and not has_artifact(client, uri, run, "bundle/x")
    client.delete_run(run)
    client.delete_experiment(client.get_experiment_by_name("digits").experiment_id)
    with Run("digits", {"lr": 0.1}, uri) as run:
        run.log(0, loss=1.0)
    assert shop.publish(uri, ask=True).version == "2" and len(published_runs(client)) == 2
    assert not (shop.root / "mlflow.db").exists() and not (shop.root / "mlartifacts").exists()
    assert uri not in "".join(capfd.readouterr()) # a page of a stage must not name it


def test_names_on_a_server(shop, server):
    uri, _ = server
    for name in NAMES[1:]:
        shop.released("one", name=name)
        assert (shop.publish(uri).version, shop.got("champion", uri, name)) == ("1", "one"), name


def test_several_projects_with_one_server(shop, server, tmp_path):
    uri, _ = server
    shop.released("one", name="at once")
    shops = [shop, copied(shop, tmp_path / "b"), copied(shop, tmp_path / "c")]
    assert len(at_once(shops, uri, 3)) == 1
    assert len(versions_of(mlflow_client(uri), "at once", shop.verdict["bundle"])) == 1
    assert len(set(aliases(uri, "at once").values())) == 1 and shop.got("champion", uri, "at once") == "one"


def test_a_server_shows_the_artifacts_of_a_local_store(server, monkeypatch):
    "What a project published without a server, and in another folder, the server delivers: `mlflow ui` in the project shows it."
    uri, home = server
    client = mlflow_client(uri)
    run = client.get_model_version("local", "1").run_id
    assert [f.path for f in client.list_artifacts(run, "bundle")] == [f"bundle/{MANIFEST}", "bundle/model.txt"]
    with urlopen(f"{uri}/get-artifact?path=bundle/model.txt&run_uuid={run}") as page:
        assert page.read() == b"local"
    assert home.got("champion", uri, "local") == "local"
    monkeypatch.chdir(home.root) # and what the server took, the project reads without it
    shop = Shop(home.root).released("through the server", name="local")
    assert shop.publish(uri).version == "2" and shop.got("2", f"sqlite:///{home.root}/mlflow.db", "local") == "through the server"


def test_a_server_that_goes_away_during_a_run(shop, server):
    "The user's own error is the one that is shown."
    uri, _ = server
    with pytest.raises(KeyError, match="mine"):
        with Run("digits", {}, uri) as run:
            run.log(0, loss=1.0)
            run.uri = "http://127.0.0.1:9"
            run.client = mlflow_client(f"sqlite:///{shop.root.parent}/elsewhere.db") # knows nothing of this run
            raise KeyError("mine")
    assert local_store(uri) is None
