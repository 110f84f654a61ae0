"""A table larger than memory should allow: how much memory ingest and prepare take.

    python bench/large.py [--gb 10] [--limit 4]

Writes a CSV of so many gigabytes, makes a project for its first rows, points it at the whole, and runs `mlkit repro prepare`: ingest, audit and prepare. Prints each stage's
time and the peak memory of all processes that work for the project: all of it (RSS; pages of files that could be dropped count too), and what is truly held (anonymous).
Ends with 1 if more than `limit` gigabytes are held. Needs about three times the size on disk, in the folder for temporary files; leaves nothing."""
import argparse, os, platform, subprocess, sys, tempfile, threading, time
from collections import defaultdict
from pathlib import Path

import numpy as np, polars as pl, psutil

def write(path, size):
    "Numbers, whole numbers, words, dates, gaps, and a class: about 150 bytes a row."
    with open(path, "wb") as f:
        k = 0
        while f.tell() < size:
            r, n = np.random.default_rng(k), 200_000
            x = {f"x{j}": np.where(r.random(n) < 0.02, np.nan, r.normal(j, 2, n).round(6)) for j in range(8)}
            at = np.datetime64("2015-01-01T00:00:00") + r.integers(0, 10 * 365 * 86_400, n).astype("m8[s]")
            rest = {"visits": r.integers(0, 1000, n), "city": [f"city {v}" for v in r.integers(0, 200, n)], "plan": [f"plan {v}" for v in r.integers(0, 8, n)], "seen": at.astype(str)}
            label = np.where(x["x0"] + np.nan_to_num(x["x1"]) + r.normal(0, 2, n) > 1, "yes", "no")
            pl.DataFrame(x | rest | {"left": label}).fill_nan(None).write_csv(f, include_header=k == 0)
            k += 1
    return k * n

def held(folder):
    "Bytes (RSS, anonymous) of the processes in this folder: a kernel is no child of the command that asked for it."
    total = [0, 0]
    for p in psutil.process_iter():
        try:
            if p.cwd() != str(folder): continue
            lines = dict(l.split(":", 1) for l in Path(f"/proc/{p.pid}/status").read_text().splitlines())
            for i, key in enumerate(("VmRSS", "RssAnon")): total[i] += int(lines.get(key, "0 kB").split()[0]) * 1024
        except (psutil.Error, OSError): pass # it has just ended
    return total

def main():
    p = argparse.ArgumentParser(); p.add_argument("--gb", type=float, default=10); p.add_argument("--limit", type=float, default=4)
    a = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlkit-large-") as tmp:
        tmp = Path(tmp).resolve()
        n = write(tmp / "large.csv", a.gb * 1e9)
        with open(tmp / "large.csv", "rb") as f, open(tmp / "head.csv", "wb") as g: g.writelines(next(f) for _ in range(20_001))
        print(f"{n:,} rows, {(tmp / 'large.csv').stat().st_size / 1e9:.2f} GB", file=sys.stderr)
        subprocess.run(["mlkit", "new", tmp / "project", "--from", tmp / "head.csv", "--target", "left"], check=True, stdout=subprocess.DEVNULL)
        params = tmp / "project/params.yaml"
        params.write_text(params.read_text().replace("head.csv", "large.csv"))
        peaks, began, stage = defaultdict(lambda: [0, 0]), {}, "start"
        repro = subprocess.Popen(["mlkit", "repro", "prepare"], cwd=tmp / "project", stdout=subprocess.PIPE, text=True)
        def watch():
            while repro.poll() is None:
                peaks[stage] = [max(x) for x in zip(peaks[stage], held(tmp / "project"))]
                time.sleep(0.2)
        threading.Thread(target=watch, daemon=True).start()
        for line in repro.stdout:
            print(line, end="", file=sys.stderr)
            if line.startswith("▸ "): stage = line[2:].strip(); began[stage] = time.monotonic()
        if repro.wait(): sys.exit("'mlkit repro prepare' failed")
        began["end"] = time.monotonic()
        marks = list(began)
        print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, polars {pl.__version__}; a CSV of {(tmp / 'large.csv').stat().st_size / 1e9:.2f} GB, {n:,} rows\n")
    print("| stage | s | peak GB | of it anonymous |\n|---|---|---|---|")
    for s, after in zip(marks, marks[1:]): print(f"| {s} | {began[after] - began[s]:.0f} | {peaks[s][0] / 1e9:.2f} | {peaks[s][1] / 1e9:.2f} |")
    worst = max(x for _, x in peaks.values()) / 1e9
    if worst > a.limit: sys.exit(f"{worst:.2f} GB were held, more than {a.limit:g}")

if __name__ == "__main__": main()
