"""The training loop against a bare PyTorch loop, Lightning's Trainer and Hugging Face Accelerate: time a step, and what a training costs once.

Usage: python bench/step_time.py [--epochs 30] [--starts 5] [--only table digits photos] [--json FILE]. The peers, if they are
installed (`pip install lightning==2.6.6 accelerate==1.15.0`, in an environment of their own that sees the packages of this one);
else their rows say 'not run'.

All train the same network from the same weights, on the same batches in the same order, with AdamW and one cycle, and validate once
an epoch. They take their turns within an epoch, some steps each, the first of a round moves on each time, and a ratio is taken within a round. A time
counts only if all end with the weights of the bare loop, byte for byte. CPU time of the process stands beside wall time. Tables in
Markdown.
"""
import argparse
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "MLKIT_DEVICE": "cpu", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
BEGUN = time.process_time(), time.perf_counter()
import numpy as np
import torch
from torch.nn import functional as F


# The work

@dataclass(frozen=True)
class Work:
    "What is trained."
    title: str
    task: object
    model: dict
    X: np.ndarray
    y: np.ndarray
    batch_size: int
    n_steps: int # an epoch
    n_turn: int # steps between two ticks
    share: float = 1.0 # of the epochs that are asked for: a long step needs fewer

    def feeds(self, tick) -> tuple: # of training, and of one batch for validation
        from mlkit.training.feed import Memory
        n, device, n_turn = self.batch_size * self.n_steps, torch.device("cpu"), self.n_turn

        class Ticking(Memory):
            def batches(self, rows, batch_size):
                for i, batch in enumerate(super().batches(rows, batch_size)):
                    if i % n_turn == 0:
                        tick()
                    yield batch

        return Ticking(self.X[:n], self.y[:n], device), Memory(self.X[n:], self.y[n:], device)

    def net(self) -> torch.nn.Module:
        "The same weights each time."
        from mlkit.training.model import make_model
        torch.manual_seed(0)
        return make_model(self.model, self.task)


def make_work(name: str) -> Work:
    from mlkit.inputs.columns import Number
    from mlkit.inputs.image import Image
    from mlkit.inputs.rows import Rows
    from mlkit.targets.classes import Classes
    from mlkit.task import Task
    r, classes = np.random.default_rng(0), Classes("kind", tuple("abcdefghij"))
    def labels(k):
        return r.integers(0, 10, k)
    if name == "table":
        rows = Rows(tuple(Number(f"x{i}", "float64") for i in range(20)))
        X = r.normal(size=(101 * 256, 20)).astype(np.float32)
        model = {"name": "residual_mlp", "width": 64, "n_blocks": 2, "dropout": 0.0}
        return Work("table: 20 numbers, residual_mlp 64 wide, 256 a step", Task(rows, classes), model, X, labels(len(X)), 256, 100, 10)
    side, width, size, n_steps, n_turn = {"digits": (8, 24, 64, 50, 5), "photos": (32, 24, 64, 10, 1)}[name]
    channels = 1 if name == "digits" else 3
    image = Image((side, side, channels), (0.5,) * channels, (0.25,) * channels)
    X = r.integers(0, 256, ((n_steps + 1) * size, side, side, channels), np.uint8)
    model = {"name": "small_cnn", "width": width, "dropout": 0.0}
    share = 1.0 if name == "digits" else 0.25
    title = f"{name}: {side} × {side} × {channels}, small_cnn {width} wide, {size} a step"
    return Work(title, Task(image, classes), model, X, labels(len(X)), size, n_steps, n_turn, share)


def orders(n: int):
    "The order of each epoch, as the loop of mlkit draws it."
    g = torch.Generator().manual_seed(0)
    while True:
        yield torch.randperm(n, generator=g)


def made(work: Work, n_epochs: int, tick) -> tuple: # the front, the network, its optimizer and schedule, both feeds
    net = work.net().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.002, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.002], total_steps=work.n_steps * n_epochs)
    return work.task.input.front(), net, optimizer, schedule, *work.feeds(tick)


# The contenders: each trains with the feeds of the work, which call `tick`, and gives the network

def bare(work: Work, n_epochs: int, tick) -> torch.nn.Module:
    front, net, optimizer, schedule, train, held = made(work, n_epochs, tick)
    order = orders(len(train.labels))
    for _ in range(n_epochs):
        net.train()
        total = 0.0
        for X, y in train.batches(next(order), work.batch_size):
            loss = F.cross_entropy(net(front(X)), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.detach() * len(y)
        total.item()
        net.eval()
        with torch.no_grad():
            output = net(front(held.X))
            F.cross_entropy(output, held.labels).item()
            (output.argmax(1) == held.labels).float().mean().item()
    return net


def by_mlkit(work: Work, n_epochs: int, tick) -> torch.nn.Module:
    from mlkit.training.fit import Training, fit, make_fabric
    fabric = make_fabric("cpu", "32-true", 1, 0)
    net = work.net()
    optimizer = {"name": "adamw", "lr": 0.002, "weight_decay": 0.01}
    training = Training(n_epochs, work.batch_size, optimizer, {"name": "one_cycle"}, seed=0)
    for _ in fit(fabric, net, work.task, work.feeds(tick), training):
        pass
    return net


class Batches:
    "The feed as a loader: what a peer goes through in an epoch."
    def __init__(self, feed, batch_size: int, shuffled: bool):
        self.feed, self.size = feed, batch_size
        self.order = orders(len(feed.labels)) if shuffled else None

    def __len__(self):
        return -(-len(self.feed.labels) // self.size)

    def __iter__(self): # Lightning asks twice in the first epoch; an order is drawn with the first batch
        rows = next(self.order) if self.order else torch.arange(len(self.feed.labels))
        yield from self.feed.batches(rows, self.size)


def by_lightning(work: Work, n_epochs: int, tick) -> torch.nn.Module:
    from lightning import pytorch as L
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    front, net, optimizer, schedule, train, held = made(work, n_epochs, tick)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, i):
            loss = F.cross_entropy(self.net(front(batch[0])), batch[1])
            self.log("loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]))
            return loss

        def validation_step(self, batch, i):
            output = self.net(front(batch[0]))
            self.log("validation_loss", F.cross_entropy(output, batch[1]), batch_size=len(batch[1]))
            self.log("validation_accuracy", (output.argmax(1) == batch[1]).float().mean(), batch_size=len(batch[1]))

        def configure_optimizers(self):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer = L.Trainer(max_epochs=n_epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer.fit(Module(), Batches(train, work.batch_size, True), Batches(held, work.batch_size, False))
    return net


def by_accelerate(work: Work, n_epochs: int, tick) -> torch.nn.Module:
    from accelerate import Accelerator
    front, net, optimizer, schedule, train, held = made(work, n_epochs, tick)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer, schedule = accelerator.prepare(net, optimizer, schedule)
    order = orders(len(train.labels))
    for _ in range(n_epochs):
        wrapped.train()
        total = 0.0
        for X, y in train.batches(next(order), work.batch_size):
            with accelerator.accumulate(wrapped):
                loss = F.cross_entropy(wrapped(front(X)), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            total += loss.detach() * len(y)
        total.item()
        wrapped.eval()
        with torch.no_grad():
            output = accelerator.gather_for_metrics(wrapped(front(held.X)))
            F.cross_entropy(output, held.labels).item()
            (output.argmax(1) == held.labels).float().mean().item()
    return net


CONTENDERS = {"bare PyTorch": (bare, None), "the same once more": (bare, None), "mlkit": (by_mlkit, None),
              "Lightning's Trainer": (by_lightning, "lightning"), "Accelerate": (by_accelerate, "accelerate")}
FIRST = "bare PyTorch"
IMPORTS = {"mlkit": "mlkit.training.run", "Lightning's Trainer": "lightning.pytorch", "Accelerate": "accelerate"}


def installed(name: str) -> bool:
    package = CONTENDERS[name][1]
    return package is None or importlib.util.find_spec(package) is not None


# Taking turns

class Turns:
    "A contender in a thread of its own, which trains some steps at a time."
    def __init__(self, train):
        self.go, self.done, self.net, self.error = threading.Semaphore(0), threading.Semaphore(0), None, None
        self.thread = threading.Thread(target=self.work, args=[train], daemon=True)
        self.thread.start()

    def tick(self):
        self.done.release()
        self.go.acquire()

    def work(self, train):
        torch.set_num_threads(1)
        self.go.acquire()
        try:
            self.net = train(self.tick)
        except Exception as e: # shown by who waits
            self.error = e
        self.done.release()

    def turn(self) -> tuple[float, float]: # seconds of the CPU, seconds
        begin = time.process_time(), time.perf_counter()
        self.go.release()
        self.done.acquire()
        if self.error:
            raise self.error
        return time.process_time() - begin[0], time.perf_counter() - begin[1]


WARM = 2 # epochs of each that do not count

def steps(work: Work, n_epochs: int) -> dict[str, np.ndarray]: # of each contender (turns, 2): milliseconds a step, of the CPU and in all
    "Raises where one did other work than the bare loop."
    names = [n for n in CONTENDERS if installed(n)]
    for n in IMPORTS.keys() & set(names):
        importlib.import_module(IMPORTS[n]) # not in its thread, whose memory it would scatter
    spent, a_turns = {n: [] for n in names}, work.n_steps // work.n_turn # an epoch
    turns = {n: Turns(partial(CONTENDERS[n][0], work, n_epochs + WARM)) for n in names}
    for i in range((n_epochs + WARM) * a_turns + 1): # the first has no steps, but what comes before them
        k = i % len(names)
        for n in names[k:] + names[:k]:
            spent[n].append(turns[n].turn())
    weights = turns[FIRST].net.state_dict()
    for n, t in turns.items():
        t.thread.join()
        if not all(torch.equal(v, weights[k]) for k, v in t.net.state_dict().items()):
            raise SystemExit(f"{work.title}: {n} has other weights than the bare loop, so its time says nothing")
    return {n: 1000 * np.array(s[1 + WARM * a_turns:]) / work.n_turn for n, s in spent.items()}


def whole(x) -> float:
    "The mean without the dearest tenth: epochs' ends are in it, moments in which the machine did other things are not."
    return float(np.sort(x)[:-len(x) // 10].mean())


def spread(x) -> str: # '1.02 (0.99 to 1.05)': the median, and the middle half
    low, middle, high = np.percentile(x, (25, 50, 75))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def step_table(work: Work, n_epochs: int) -> dict:
    found, rows = steps(work, n_epochs), {}
    n_turns = len(found[FIRST])
    print(f"\n### {work.title}\n\n{n_epochs} epochs of {work.n_steps} steps; a turn is {work.n_turn} steps, {n_turns} turns each.\n\n"
          "| | CPU ms a step | against bare, a turn, CPU | against bare, all turns, CPU | ms a step | against bare, a turn, wall |\n|---|---|---|---|---|---|")
    for n in CONTENDERS:
        if n not in found:
            print(f"| {n} | not run | | | | |")
            continue
        cpu, wall = found[n].T
        of_cpu, of_wall = (found[n] / found[FIRST]).T
        in_all = whole(cpu) / whole(found[FIRST][:, 0])
        rows[n] = {"cpu_ms": median(cpu), "wall_ms": median(wall), "cpu_ratio": median(of_cpu), "cpu_ratio_all": in_all, "wall_ratio": median(of_wall)}
        print(f"| {n} | {spread(cpu)} | {spread(of_cpu)} | {in_all:.3f} | {spread(wall)} | {spread(of_wall)} |", flush=True)
    return rows


# What is paid once

STARTED = [n for n in CONTENDERS if n != "the same once more"]

def start(name: str):
    "In a process of its own: imports, then a training of one step."
    work = make_work("digits")
    if name in IMPORTS:
        importlib.import_module(IMPORTS[name])
    imported = time.process_time(), time.perf_counter()
    small = replace(work, X=work.X[:128], y=work.y[:128], n_steps=1, n_turn=1)
    CONTENDERS[name][0](small, 1, lambda: None)
    ended = time.process_time(), time.perf_counter()
    print(json.dumps({"imports": np.subtract(imported, BEGUN).tolist(), "rest": np.subtract(ended, imported).tolist()}))


def start_table(n_starts: int) -> dict:
    found = {n: [] for n in STARTED if installed(n)}
    for _ in range(n_starts):
        for n in found:
            done = subprocess.run([sys.executable, __file__, "--start", n], capture_output=True, text=True, check=True)
            found[n].append(json.loads(done.stdout.splitlines()[-1]))
    print("\n### A training of one step, in a new process\n\n| | imports, CPU s | the rest, CPU s | the rest, s | min to max |\n|---|---|---|---|---|")
    rows = {}
    for n in STARTED:
        if n not in found:
            print(f"| {n} | not run | | | |")
            continue
        imports, rest = (np.array([f[k] for f in found[n]]) for k in ("imports", "rest"))
        rows[n] = {"imports_cpu_s": median(imports[:, 0]), "rest_cpu_s": median(rest[:, 0]), "rest_s": median(rest[:, 1])}
        print(f"| {n} | {median(imports[:, 0]):.2f} | {median(rest[:, 0]):.3f} | {median(rest[:, 1]):.3f} | {rest[:, 1].min():.3f} to {rest[:, 1].max():.3f} |", flush=True)
    return rows


# Tracking

EVERY = 10 # seconds between two batches of metrics, and between two samples of the system

def tracking_cost(folder: Path) -> dict: # seconds of the CPU
    "Of the record of an epoch; of sending those of ten seconds; of MLflow's system metrics, for each second."
    from mlkit.training.track import Run
    record = {"loss": 0.1, "validation_loss": 0.1, "validation_accuracy": 0.9, "lr": 0.01}
    def cpu(work, n):
        taken = []
        for i in range(n):
            begin = time.process_time()
            work(i)
            taken.append(time.process_time() - begin)
        return median(taken)
    def send(run, i):
        for k in range(100):
            run.batches.pending += waiting
        run.batches.flush()
    uri = f"sqlite:///{folder}/mlflow.db"
    with Run("bench", {}, uri, every=1e9) as run:
        log = cpu(lambda i: run.log(i, **record), 500)
        waiting = run.batches.pending[:4]
        sent = cpu(partial(send, run), 10)
    with Run("bench", {}, uri, system=True):
        begin = time.process_time()
        time.sleep(3 * EVERY + 1)
        system = (time.process_time() - begin) / (3 * EVERY + 1)
    return {"log": log, "send": sent, "system": system}


def tracking_table(cost: dict, epochs: dict[str, float]): # seconds of the CPU of an epoch
    print(f"\n### Tracking\n\nOne record of an epoch: {1e6 * cost['log']:.0f} µs. Sending a hundred of them, at most every {EVERY} s: "
          f"{1e3 * cost['send']:.1f} ms. System metrics: {1e3 * cost['system']:.2f} ms a second. All is CPU time, SQLite on disk.\n")
    print("| epochs of | tracking, share of the training |\n|---|---|")
    for title, seconds in epochs.items():
        share = cost["system"] + cost["send"] / EVERY + cost["log"] / seconds
        print(f"| {title}, {seconds:.2f} s | {share:.2%} |")


def machine() -> str:
    packages = [p for p in ("torch", "lightning-fabric", "lightning", "accelerate", "mlflow") if importlib.util.find_spec(p.replace("-", "_"))]
    named = ", ".join(f"{p} {version(p)}" for p in packages)
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {named}; load before: {load}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["table", "digits", "photos"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--start", choices=[*CONTENDERS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.start:
        start(args.start)
        raise SystemExit
    torch.use_deterministic_algorithms(True)
    print(machine())
    works = {name: make_work(name) for name in args.only}
    out = {"machine": machine(), "steps": {name: step_table(w, round(args.epochs * w.share)) for name, w in works.items()}}
    epochs = {w.title: out["steps"][name][FIRST]["cpu_ms"] / 1000 * w.n_steps for name, w in works.items()}
    with tempfile.TemporaryDirectory() as d:
        tracking_table(cost := tracking_cost(Path(d)), epochs)
    out |= {"tracking": cost, "starts": start_table(args.starts) if args.starts else {}}
    if args.json:
        args.json.write_text(json.dumps(out, indent=1))
