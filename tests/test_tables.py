"Rows of a table through a real Triton: text, numbers and dates, good rows beside bad ones."
import json, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import numpy as np, polars as pl, pytest, torch
from torch import nn

from mlkit.core import DataError
from mlkit.export.chain import OnnxChain, export_onnx
from mlkit.export.parity import parity
from mlkit.inputs.columns import Category, Date, Number
from mlkit.inputs.rows import Rows
from mlkit.targets.classes import Classes
from mlkit.targets.value import Value
from mlkit.task import Task
from mlkit.triton_server.load import measure_load
from mlkit.triton_server.server import Triton
from mlkit.triton_server.install import install_serving
from mlkit.triton_server.repository import write_repository
from mlkit.export.signature import arrays

CITIES = ["Köln", "Bonn", 'quo"ted', "two words", "日本"]
NAMES = {"age": "age in years", "city": "city $ name", "seen": "seen", "value": "value", "x": "x"} # 'x' and 'value' are names of the chain's own tensors

def make_task(classes):
    columns = (Number(NAMES["age"], "float64", fill=40.0, mean=41.0, std=12.0, flag=True), Category(NAMES["city"], "category", tuple(CITIES)),
               Date(NAMES["seen"], "datetime", fill=1.7e9, mean=1.7e9, std=1e7, flag=True, parts=("day", "week", "year")),
               Number(NAMES["value"], "float64"), Category(NAMES["x"], "category"))
    return Task(Rows(columns), Classes("y", ("no", "yes")) if classes else Value("y", 100.0, 20.0))

def make_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    start = datetime(1969, 6, 1, tzinfo=timezone.utc)
    def maybe(v, p=0.1): return None if rng.random() < p else v
    return [{NAMES["age"]: maybe(float(rng.normal(40, 12))), NAMES["city"]: maybe(str(rng.choice([*CITIES, "elsewhere", ""]))),
             NAMES["seen"]: maybe(start + timedelta(seconds=float(rng.random() * 3e9))), NAMES["value"]: float(rng.choice([0, -0.0, 3e38, -3e38, 5e-324, rng.normal()])), NAMES["x"]: str(i)} for i in range(n)]

def frame(rows): return pl.DataFrame(rows, schema={NAMES["age"]: pl.Float64, NAMES["city"]: pl.String, NAMES["seen"]: pl.Datetime("us", "UTC"), NAMES["value"]: pl.Float64, NAMES["x"]: pl.String})

class Net(nn.Module):
    "Small, with an embedding, as a table's network has it."
    def __init__(self, task):
        super().__init__()
        torch.manual_seed(0)
        self.codes = list(task.input.codes)
        self.embed = nn.ModuleList([nn.Embedding(c, 4) for c in task.input.codes.values()])
        self.body = nn.Sequential(nn.Linear(len(task.input.features) + 4 * len(self.codes), 16), nn.SiLU(), nn.Linear(16, task.target.n_outputs))

    def forward(self, x): return self.body(torch.cat([x, *[e(x[:, i].long()) for i, e in zip(self.codes, self.embed)]], 1))

def python_answers(net, task, rows):
    with torch.no_grad(): return task.target.answer()(net(torch.from_numpy(task.input.encode(frame(rows))))).numpy()

@pytest.fixture(scope="module", params=[True, False], ids=["classification", "regression"])
def served(request, tmp_path_factory):
    task, out = make_task(request.param), tmp_path_factory.mktemp("tables")
    net = Net(task).eval()
    export_onnx(net, task, out / "export", 20)
    install_serving()
    with Triton(write_repository(out / "export", out / "repository", "people", max_batch_size=16)) as server: yield server, net, task, OnnxChain(out / "export")

def test_raw_rows_give_the_answers_of_python(served):
    server, net, task, chain = served
    rows = make_rows(200)
    expected, answers = python_answers(net, task, rows), server.client.predict_rows(rows)
    same = parity(task, expected, answers)
    assert same.max_difference < 1e-5 and same.agreement == 1, same
    assert np.array_equal(answers, chain(rows)) or parity(task, chain(rows), answers).max_difference < 1e-6
    assert np.array_equal(server.client.predict_rows(frame(rows)), answers) and np.array_equal(server.client.predict_rows(frame(rows).to_dict(as_series=False)), answers)
    assert len(np.unique(answers[:, 0])) > 150 # the inputs matter

def good_request(server, row): # KServe v2, as any client in any language sends it
    sent = server.client.signature.pack(arrays(server.client.signature, [row]))
    return {"inputs": [{"name": t.name, "shape": list(a.shape), "datatype": d, "data": a.ravel().tolist()}
                       for t, a, d in zip(server.signatures.wire.inputs, sent, ("FP64", "BYTES", "INT64"))]}

def post(server, request):
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    try:
        with urllib.request.urlopen(f"http://{server.url}/v2/models/{server.name}/infer", body, timeout=30) as r: return json.loads(r.read())["outputs"][0]["data"]
    except urllib.error.HTTPError as e: return f"{e.code} {e.read().decode()}"

ROW = {NAMES["age"]: 30, NAMES["city"]: "Köln", NAMES["seen"]: "2020-02-29T12:00:00+05:30", NAMES["value"]: 1, NAMES["x"]: "a"}

def bad_requests(server):
    "name: (a request that only its sender pays for, words of the answer)"
    def change(i, **kw): r = good_request(server, ROW); r["inputs"][i] |= kw; return r
    yield "text for a number", change(0, datatype="BYTES", data=["thirty", "1"]), "numbers"
    yield "text under the name of a number", change(0, data=["thirty", 1]), "number"
    yield "a number for text", change(1, data=[3, "a"]), "string"
    yield "float32 for float64", change(0, datatype="FP32"), "numbers"
    yield "null", change(0, data=[None, 1]), "number"
    yield "another tensor", change(0, name="nubmers"), "nubmers"
    yield "two values for one", change(0, shape=[2, 2], data=[1, 2, 3, 4]), "batch"
    yield "too many rows", {"inputs": [i | {"shape": [17, *i["shape"][1:]], "data": i["data"] * 17} for i in good_request(server, ROW)["inputs"]]}, "16"
    yield "a flat shape", {"inputs": [i | {"shape": [1]} for i in good_request(server, ROW)["inputs"]]}, "shape"
    missing = good_request(server, ROW); missing["inputs"].pop()
    yield "a missing tensor", missing, "expected 3 inputs but got 2"
    extra = good_request(server, ROW); extra["inputs"].append(extra["inputs"][0] | {"name": "more"})
    yield "a tensor too many", extra, "expected 3 inputs but got 4"
    yield "no JSON", b"{nonsense", "parse"

def test_a_bad_request_costs_only_its_sender(served):
    server = served[0]
    expected = server.client.predict_rows([ROW])[0].tolist()
    bad = list(bad_requests(server))
    with ThreadPoolExecutor(8) as pool:
        asked = [r for _, request, _ in bad for r in (good_request(server, ROW), request)] * 3
        answers = list(pool.map(lambda r: post(server, r), asked))
    assert all(np.allclose(a, expected, atol=1e-5) for a in answers[::2])
    for (name, _, words), answer in zip(bad * 3, answers[1::2]):
        assert isinstance(answer, str) and answer[0] in "45" and words in answer and "\n" not in answer.strip() and "Traceback" not in answer, (name, answer)

def test_text_of_any_kind_is_an_answer(served):
    server = served[0]
    texts = ["", " ", "\x00", "a\x00b", "\n", "K\u00f6ln", "Ko\u0308ln", "\U0001f600", "x" * 10_000_000] # the second Köln is another string
    rows = [ROW | {NAMES["city"]: t, NAMES["seen"]: "2020-02-29T06:30:00Z"} for t in texts]
    answers = server.client.predict_rows(rows)
    unknown = server.client.predict_rows([ROW | {NAMES["city"]: None}])
    assert [bool(np.allclose(a, unknown[0])) for a in answers] == [t not in CITIES for t in texts]
    raw = good_request(server, ROW) # bytes that are no UTF-8
    raw["inputs"][1] = {"name": "texts", "shape": [1, 2], "datatype": "BYTES", "parameters": {"binary_data_size": 11}}
    head = json.dumps(raw).encode()
    request = urllib.request.Request(f"http://{server.url}/v2/models/{server.name}/infer", head + b"\2\0\0\0\xff\xfe" + b"\1\0\0\0a", {"Inference-Header-Content-Length": str(len(head))})
    with urllib.request.urlopen(request, timeout=30) as r: assert np.allclose(json.loads(r.read())["outputs"][0]["data"], unknown[0], atol=1e-5)

def test_what_is_missing_in_json(served):
    server = served[0]
    request = good_request(server, ROW | dict.fromkeys([NAMES["age"], NAMES["city"], NAMES["seen"]]))
    assert [i["data"] for i in request["inputs"][1:3]] == [["", "a"], [-2**63]] and '"data": [NaN, 1.0]' in json.dumps(request)
    assert np.allclose(post(server, request), server.client.predict_rows([ROW | dict.fromkeys([NAMES["age"], NAMES["city"], NAMES["seen"]])])[0], atol=1e-5)

@pytest.mark.parametrize("change, words", [({NAMES["age"]: "thirty"}, ["row 2", "age in years", "'thirty'"]), ({NAMES["city"]: [3]}, ["row 2", "city $ name", "text"]),
    ({NAMES["seen"]: "soon"}, ["row 2", "seen", "ISO 8601"]), ({"agee in years": 1}, ["row 2", "agee in years", "did you mean 'age in years'"]), (None, ["row 2", "'x' is missing"])])
def test_the_client_names_row_and_column(served, change, words):
    row = {k: v for k, v in ROW.items() if k != "x"} if change is None else ROW | change
    with pytest.raises(DataError) as e: served[0].client.predict_rows([ROW, row])
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), e.value

def test_load(served):
    server = served[0]
    one, four = measure_load(server.client, list(arrays(server.client.signature, make_rows(50))), (1, 4), 0.9)
    assert one["n_requests"] > 0 and four["n_requests"] > 0
