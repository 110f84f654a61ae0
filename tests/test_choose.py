"What is served is still the same model: variants of a network are compared on held-out samples, and one that is over the budget is not taken."
from dataclasses import replace
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np, onnx, polars as pl, pytest
from onnx import numpy_helper

from mlkit.core import ExportError
from mlkit.data.prepared import load_split
from mlkit.evaluation.slices import Slice, slices_of
from mlkit.export.chain import OnnxChain, export_onnx
from mlkit.export.chosen import BUDGET, MOVES, may_serve, over_budget, take_chosen
from mlkit.export.judged import HeldOut, Judged, compared, held_out, judge_all, scored
from mlkit.export.signature import Signatures
from mlkit.export.speed import speeds
from mlkit.export.variants import VARIANTS, Network, training_samples, variant, variant_specs
from mlkit.inputs.columns import Category, Date, Number
from mlkit.inputs.rows import Rows
from mlkit.triton_server.repository import parse_config, write_repository
from mlkit.targets.classes import Classes
from mlkit.task import Task, load_task
from mlkit.training.model import make_model

TOLERANCE = 1e-4

class Digits:
    "The finished pipeline's network and its held-out samples."
    def __init__(self, root, export):
        self.prepared, self.export = root / "data/prepared", export
        for f in (root / "models/export").iterdir():
            (export / f.name).write_bytes(f.read_bytes())
        self.task, self.chain = load_task(self.prepared), OnnxChain(export)
        self.network = Network(export / "model.onnx", training_samples(self.task, self.prepared))
        self.held = held_out(self.task, self.prepared, self.chain, "accuracy", 10)

    def judge(self, work, *names, network=None):
        return judge_all([{"name": n} for n in names], self.export, network or self.network, work, self.held, TOLERANCE)

@pytest.fixture
def digits(finished, tmp_path):
    (tmp_path / "export").mkdir()
    return Digits(finished.root, tmp_path / "export")

@pytest.fixture
def own():
    "Registers variants, and takes them out again."
    known = set(VARIANTS)
    yield variant
    for name in set(VARIANTS) - known:
        del VARIANTS[name]

def test_variants_of_the_digits(digits, tmp_path):
    "Each is smaller, says what the network says, and does not look at its neighbours in the batch. Built again it is the same bytes."
    first, second = (digits.judge(tmp_path / w, "fp32", "fp16", "int8") for w in "ab")
    fp32, fp16, int8 = first
    assert [r.why for r in first] == ["", "", ""]
    assert fp32.n_bytes > 1.8 * fp16.n_bytes and fp32.n_bytes > 3 * int8.n_bytes
    assert fp32.differences["full"] == 0 < fp16.differences["full"] < 5e-3 < int8.differences["full"] < 0.2
    assert all(r.agreement > 0.98 and r.moves <= MOVES for r in first)
    assert "fp32" in may_serve(first, "accuracy", BUDGET)
    for a, b in zip(first, second):
        assert (a.folder / "fused.onnx").read_bytes() == (b.folder / "fused.onnx").read_bytes()
        assert replace(a, folder=None, build_s=0) == replace(b, folder=None, build_s=0)

def test_the_choice_is_what_is_served(digits, tmp_path):
    "The export's own files become the variant's: one by one, fused, and in Triton's repository."
    rows = digits.judge(tmp_path / "work", "fp32", "int8")
    raw = digits.task.input.raw(digits.prepared, "test")
    before = digits.chain(raw)
    take_chosen(rows, "int8", "accuracy", {"metric": 1, "slice": 1}, digits.export)
    chain = OnnxChain(digits.export)
    assert chain.signatures.variant == "int8" and 0 < np.abs(chain(raw) - before).max() < 0.2
    assert np.abs(chain(raw, steps=2) - chain(raw)).max() < MOVES # its steps, and the fused graph
    repository = write_repository(digits.export, tmp_path / "repository", "digits")
    assert (repository / "digits/1/model.onnx").read_bytes() == (rows[1].folder / "fused.onnx").read_bytes()
    assert Signatures.load(repository / "digits/1/signatures.json").variant == "int8"
    assert parse_config(repository / "digits/config.pbtxt").backend == "onnxruntime"
    y = load_split(digits.prepared / "test.safetensors")[1]
    assert scored(digits.task, "accuracy", 10, chain(raw), y) > scored(digits.task, "accuracy", 10, before, y) - 0.02

@pytest.mark.parametrize("fault", [4.0, float("nan")])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_the_first_layer_that_parts_is_named(digits, own, tmp_path, which, fault):
    "A fault in the weights of any layer: the row names the tensor that this layer gives, and a choice of it ends with that name."
    computing = [n for n in digits.network.proto().graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(computing) == 4
    @own()
    def faulty(network):
        proto = network.proto()
        weights = next(t for t in proto.graph.initializer if t.name == computing[which].input[1])
        weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(fault), weights.name))
        return proto
    rows = digits.judge(tmp_path, "fp32", "faulty")
    assert rows[1].parts.startswith(f"'{computing[which].output[0]}' ({computing[which].op_type}) "), rows[1].parts
    if over_budget(rows[1], "accuracy", BUDGET):
        with pytest.raises(ExportError, match=f"export.choose is faulty.*'{computing[which].output[0]}'.*choose fp32"):
            take_chosen(rows, "faulty", "accuracy", BUDGET, digits.export)
    assert not np.isnan(fault) or rows[1].why == "an answer is not a number"

class Answers:
    "Stands in for a chain: it gives the answers that belong to the samples' numbers."
    def __init__(self, chain, p): self.signatures, self.p = chain.signatures, p
    def __call__(self, inputs): return self.p[np.clip(inputs["image"][:, 0, 0, 0].astype(int), 0, len(self.p) - 1)]

@pytest.mark.parametrize("size", [20, 25, 40])
def test_out_of_the_budget_on_one_slice_alone(digits, size):
    "A quarter of a small group gets a wrong answer. Over all it is one in a thousand, and the variant is refused all the same; in a group of chance it is taken."
    n, wrong = 250, size // 4
    numbers = np.arange(n, dtype=np.uint8)
    y, p = np.zeros(n, int), np.tile(np.eye(10, dtype=np.float32)[0], (n, 1))
    worse = p.copy()
    worse[:wrong] = np.eye(10)[1]
    inputs = {"image": np.broadcast_to(numbers[:, None, None, None], (n, 8, 8, 1)).copy()}
    group = Slice("city", "city = Bonn", numbers < size)
    held = HeldOut(digits.task, inputs, {"image": inputs["image"][-3:]}, y, [group], "accuracy")
    base = {"full": p, "odd": p[-3:]}
    budget = {"metric": 0.1, "slice": 0.02} # the metric alone would let it pass
    row = compared(Judged("small", "onnxruntime", folder=Path("x")), Answers(digits.chain, worse), held, base)
    assert 0 < row.loss < budget["metric"] and row.moves == 0
    found, = over_budget(row, "accuracy", budget)
    assert f"in the slice 'city = Bonn' the error grows by {wrong / size:.3g}" in found
    with pytest.raises(ExportError, match="city = Bonn"):
        take_chosen([Judged("fp32", "onnxruntime"), row], "small", "accuracy", budget, digits.export)
    assert digits.export.joinpath("signatures.json").read_text().count("variant") == 0 # nothing was put in place
    elsewhere = replace(held, slices=[Slice("city", "city = Ulm", numbers >= n - size)])
    assert not over_budget(compared(row, Answers(digits.chain, worse), elsewhere, base), "accuracy", budget)

@pytest.mark.parametrize("samples", [lambda n: np.zeros((0, 1, 8, 8), np.float32), lambda n: np.full((9, 1, 8, 8), np.nan, np.float32),
                                     lambda n: np.full((9, 1, 8, 8), np.inf, np.float32)], ids=["none", "not numbers", "infinite"])
def test_no_eight_bits_without_training_samples(digits, tmp_path, samples):
    rows = digits.judge(tmp_path, "fp32", "int8", network=replace(digits.network, samples=samples))
    assert rows[0].why == "" and "training samples" in rows[1].why and rows[1].folder is None
    with pytest.raises(ExportError, match="export.choose is int8, but .*training samples"):
        take_chosen(rows, "int8", "accuracy", BUDGET, digits.export)

def test_scales_of_each_batch_are_found_out(digits, own, tmp_path):
    "Dynamic quantization takes its scale from the batch, so a sample's answer hangs on the others. No budget allows that."
    @own()
    def dynamic(network):
        from onnxruntime.quantization import quantize_dynamic
        proto = network.proto()
        del proto.graph.value_info[:] # the quantizer turns weights round, and leaves their old shapes there
        onnx.save(proto, tmp_path / "plain.onnx")
        quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "dynamic.onnx")
        return onnx.load(tmp_path / "dynamic.onnx")
    row = digits.judge(tmp_path, "dynamic")[0]
    assert row.why == "" and row.moves > MOVES
    assert any("moves by" in why for why in over_budget(row, "accuracy", {"metric": 1, "slice": 1}))

def table_task(n_towns):
    start = datetime(2024, 1, 1)
    columns = (Number("age", "float64", fill=40.0, mean=40.0, std=10.0, flag=True), Category("town", "category", tuple(f"t{i}" for i in range(n_towns))),
               Date("seen", "datetime", fill=0.0, mean=1.7e9, std=1e7, flag=True, parts=("week",)))
    r = np.random.default_rng(0)
    frame = pl.DataFrame({"age": [None if r.random() < 0.1 else float(a) for a in r.normal(40, 10, 300)],
                          "town": [None if r.random() < 0.1 else f"t{i}" for i in r.integers(0, n_towns, 300)],
                          "seen": pl.Series([None if r.random() < 0.1 else start + timedelta(days=int(d)) for d in r.integers(0, 300, 300)]).dt.cast_time_unit("us").dt.replace_time_zone("UTC")})
    return Task(Rows(columns), Classes("kind", ("a", "b"))), frame

@pytest.mark.parametrize("network", ["residual_mlp", "tabm"])
def test_variants_of_a_table(tmp_path, network):
    "Text, dates and gaps: the columns are read as before, and only the network is built anew."
    task, frame = table_task(12)
    torch_net = make_model({"name": network}, task)
    export_onnx(torch_net, task, tmp_path / "export", 20)
    chain = OnnxChain(tmp_path / "export")
    inputs = {t.name: x for t, x in zip(chain.signatures.served.inputs, task.input.sent(frame).values())}
    y = chain(inputs).argmax(1)
    held = HeldOut(task, inputs, {k: x[:5] for k, x in inputs.items()}, y, slices_of(frame), "accuracy")
    source = Network(tmp_path / "export/model.onnx", lambda n: chain(inputs, steps=1)[:n])
    rows = judge_all(variant_specs(["fp16", "int8"], "fp32"), tmp_path / "export", source, tmp_path / "work", held, TOLERANCE)
    assert [(r.name, r.why) for r in rows] == [("fp32", ""), ("fp16", ""), ("int8", "")]
    assert all(r.moves <= MOVES and r.differences["full"] < 0.1 for r in rows)
    for r in rows:
        steps = OnnxChain(r.folder)
        assert np.array_equal(steps(inputs, steps=1), chain(inputs, steps=1), equal_nan=True)

def test_half_precision_does_not_mix_up_categories(tmp_path):
    "float16 counts to 2,048; a table with more towns than that gets no fp16, whichever towns the held-out rows hold."
    task, _ = table_task(3000)
    export_onnx(make_model({"name": "residual_mlp"}, task), task, tmp_path, 20)
    with pytest.raises(ExportError, match="looks up 3,00. categories"):
        VARIANTS["fp16"](Network(tmp_path / "model.onnx", None))

def test_trees_have_one_variant(digits, tmp_path):
    "What is for networks is a row with the reason, and a choice of it an error."
    def trees(network):
        proto = onnx.load(digits.export / "model.onnx")
        proto.graph.node.append(onnx.helper.make_node("Scaler", ["x"], ["unused"], domain="ai.onnx.ml"))
        return proto
    class Trees(Network):
        def proto(self): return trees(self)
    rows = digits.judge(tmp_path, "fp32", "fp16", "int8", network=Trees(digits.network.path, digits.network.samples))
    assert [("holds trees" in r.why, r.engine) for r in rows[1:]] == [(True, "onnxruntime")] * 2
    assert may_serve(rows, "accuracy", BUDGET)[0] == "fp32"
    with pytest.raises(ExportError, match="export.choose is fp16, but .*holds trees"):
        take_chosen(rows, "fp16", "accuracy", BUDGET, digits.export)

def test_openvino(digits, tmp_path):
    "Where it is not installed, a row says how to add it. Where it is, it computes in single precision, and names the answer."
    row, eight = digits.judge(tmp_path, "openvino", "openvino_int8")
    if find_spec("openvino"):
        assert row.why == eight.why == "" and row.differences["full"] < 1e-5 < eight.differences["full"] < 0.2
        found = speeds([digits.judge(tmp_path, "fp32")[0], row], digits.chain.signatures.served.pack(list(digits.held.inputs.values())), 8, 1, turns=1)
        assert set(found) == {"fp32", "openvino"}
    else:
        assert row.why == eight.why == "openvino is not installed; 'pip install openvino' adds it"
    assert may_serve([replace(row, name="fp32", engine="onnxruntime"), row, eight], "accuracy", BUDGET) == ["fp32"]
