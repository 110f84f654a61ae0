"Training from shards: killed in mid-epoch it goes on there; under torchrun each process has its own half."
import json, os, subprocess, sys

import cv2, numpy as np
import pytest
from conftest import BIN, ROOT, sha256

TRAIN = """
import sys, time
from pathlib import Path
from mlkit.training.checkpoint import Checkpoint
from mlkit.inputs.image import Image
from mlkit.targets.classes import Classes
from mlkit.task import Task
from mlkit.training.feed import feeds
from mlkit.training.fit import Training, fit, make_fabric
from mlkit.training.model import make_model, save_model
data, out, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
class Waiting(Checkpoint):
    "Waits to be killed after its last state."
    def save(self, *state):
        global last
        super().save(*state); last -= 1
        if not last: print("kept", flush=True); time.sleep(600)
task = Task(Image((12, 12, 3), (0.5,) * 3, (0.25,) * 3), Classes("label", ("0", "1")))
spec = {"name": "small_cnn", "width": 4, "dropout": 0.3}
fabric, net = make_fabric("cpu", "32-true", 1, 0), make_model(spec, task)
_, both = feeds(task, data, data / "shards", "stream", fabric.device, 4, 1)
training = Training(4, 4, {"name": "adamw", "lr": 0.01}, augment={"name": "shift", "pixels": 1})
for record in fit(fabric, net, task, both, training, Waiting(out.parent / "kept", 0)): print("epoch", record["epoch"], record["loss"], flush=True)
save_model(out, net, spec, task)
"""

RANKS = """
import json, os, sys
from pathlib import Path
import numpy as np, polars as pl, torch.distributed as dist
from mlkit.data.shards import read_index
from mlkit.data.stream import Loader, Whole
dist.init_process_group("gloo")
shards = Path(sys.argv[1]) / "shards"
index = read_index(shards)
loader = Loader(shards, index, np.arange(len(index)), Whole((12, 12, 3)), 4, seed=3)
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, [y.tolist() for epoch in (0, 1) for _, y in loader.batches(loader.order(epoch), 4, epoch)])
if dist.get_rank() == 0: Path(sys.argv[1], "seen.json").write_text(json.dumps(seen))
dist.destroy_process_group()
"""

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "80 images in shards, and their splits as `prepare` leaves them."
    from mlkit.data.shards import Sample, write_shards
    from mlkit.data.split import Split
    from mlkit.inputs.image import Image, infer_contract
    folder, random = tmp_path_factory.mktemp("stream"), np.random.default_rng(0)
    def image(i): return cv2.imencode(".jpg", cv2.resize(random.integers(0, 256, (5, 5, 3), dtype=np.uint8), (20 + i % 9, 24), interpolation=cv2.INTER_CUBIC))[1].tobytes()
    index = write_shards((Sample(str(i), image(i), "jpg", str(i % 2)) for i in range(80)), folder / "shards", 30)
    split = Split({"train": 0.6, "validation": 0.2, "test": 0.2}, method="stratified")
    Image.prepare(folder / "shards", infer_contract(index), folder, split, image_size=12)
    return folder

def start(script, *args, **kw):
    return subprocess.Popen([sys.executable, "-c", script, *map(str, args)], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, **kw)

def test_killed_in_mid_epoch(data, tmp_path):
    "`kill -9` in the fifth step of the third epoch: the next run says what an undisturbed one says, and has its weights."
    for name in ("whole", "killed"): (tmp_path / name).mkdir()
    kept = tmp_path / "killed/kept"
    killed = start(TRAIN, data, tmp_path / "killed/model.safetensors", 11 * 2 + 5)
    try: said = [next(killed.stdout) for _ in range(3)]
    finally: killed.kill(); killed.communicate(timeout=300)
    assert [l.split()[0] for l in said] == ["epoch", "epoch", "kept"] and len(list(kept.iterdir())) == 1
    runs = [start(TRAIN, data, tmp_path / name / "model.safetensors", 0) for name in ("whole", "killed")]
    whole, again = (r.communicate(timeout=900)[0] for r in runs)
    assert whole.count("epoch") == 4 and again == whole and whole.startswith("".join(said[:2]))
    assert sha256(tmp_path / "killed/model.safetensors") == sha256(tmp_path / "whole/model.safetensors")
    assert not list(kept.iterdir())

def test_two_processes(data):
    "Through torchrun, on loopback: two disjoint halves of every epoch, in as many batches."
    run = subprocess.run([BIN / "torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--no-python", sys.executable, "-c", RANKS, data],
                         env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = json.loads((data / "seen.json").read_text())
    assert [len(x) for x in a] == [len(x) for x in b] == [4] * 20
    first, second = ([{i for batch in half[e:e + 10] for i in batch} for half in (a, b)] for e in (0, 10))
    for one, two in (first, second): assert not one & two and one | two == set(range(80))
    assert first[0] != second[0], "every epoch has halves of its own"
