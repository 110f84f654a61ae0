"""`kill -9` of the whole group of `mlkit repro`, at independent random moments of the default pipeline.

Usage: python bench/kills.py [--moments 50] [--seed 0] [--jobs 2] [--resume kills.json]. Each moment has a fresh copy of this
checkout, with a cache of its own. After the kill nobody may outlive the run, and the next `mlkit repro` must complete and leave
what an uninterrupted run leaves: the same bytes, the same files, one version in the registry. Prints a line a kill and a table
in Markdown. Exit code 1 if one failed; its folder is kept. `--resume` keeps what is done in a file, and goes on from there.
"""
import argparse, json, os, random, shutil, signal, statistics, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import psutil
from peers import HERE, machine

sys.path.insert(0, str(HERE / "tests"))
from conftest import Project, checkout
from mlkit.core import write_json

MODEL = "models/model.safetensors"
KEPT = ".git/", ".dvc/", "mlartifacts/", "mlflow.db", ".mlkit/dvc.lock.broken" # changes with every run, or is set aside on purpose


def files(project: Project) -> set[str]:
    "All that lies there but what belongs to git, DVC, MLflow and Python."
    found = (f.relative_to(project.root).as_posix() for f in project.root.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return {f for f in found if not f.startswith(KEPT)}


def left(project: Project) -> dict:
    "What a run has to leave."
    return {"model": project.outputs()[MODEL], "same": project.same, "files": sorted(files(project))}


def at_work(text: str) -> str:
    "The stage that was under way, from what `mlkit repro` has printed."
    lines = [l.split()[:2] for l in text.splitlines() if l.startswith(("▸ ", "✓ "))]
    if not lines: return "before the first stage"
    mark, stage = lines[-1]
    return stage if mark == "▸" else "publishing" if stage == "index" else "between two stages"


def uninterrupted(folder: Path) -> tuple[dict, float]: # What is left, seconds
    project, start = checkout(folder), time.monotonic()
    with project.started("mlkit", "repro") as p:
        if p.wait(600): sys.exit(f"the pipeline fails with no kill:\n{p.out.read_text()[-2000:]}\n{p.err.read_text()[-2000:]}")
    return left(project), time.monotonic() - start


def kill(project: Project, moment: float) -> tuple[str, list[str]] | None: # The stage it hit, the processes that outlive it; None: the run was over
    "A run, and its end after `moment` seconds."
    with project.started("mlkit", "repro") as p:
        try: p.wait(moment); return None
        except psutil.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL)
        outliving = [" ".join(q.cmdline())[:80] for q in project.wait_idle(10)]
        return (at_work(p.out.read_text()), outliving) if p.wait(10) == -signal.SIGKILL else None


def faults_after(project: Project, done: subprocess.CompletedProcess, wanted: dict) -> list[str]:
    "What is not as it should be after the next run."
    if done.returncode: return [f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}"]
    got, check = left(project), project.mlkit("verify", timeout=300, rc=None)
    faults = [f"differs: {k}" for k in sorted(got["same"].keys() | wanted["same"].keys()) if got["same"].get(k) != wanted["same"].get(k)]
    faults += [f"stray: {f}" for f in sorted({*got["files"]} - {*wanted["files"]})] + [f"gone: {f}" for f in sorted({*wanted["files"]} - {*got["files"]})]
    if got["model"] != wanted["model"]: faults.append("another model")
    if "version 1, champion and challenger" not in done.stdout: faults.append("it is not version 1 and champion in the registry")
    if check.returncode: faults.append(f"mlkit verify: {check.stderr.strip()[-300:]}")
    return faults


def once(folder: Path, seed: int, i: int, length: float, wanted: dict) -> dict:
    "Kill number `i`, and the run after it."
    for draw in range(20): # a run may be quicker than the one that was measured; then its length counts, and another moment is drawn
        project, moment, start = checkout(folder / f"{i}.{draw}"), random.Random(f"{seed}/{i}/{draw}").uniform(0, length), time.monotonic()
        if hit := kill(project, moment): break
        length = time.monotonic() - start
        shutil.rmtree(project.root)
    else: sys.exit(f"kill {i}: every run was over before its moment")
    stage, outliving = hit
    start = time.monotonic()
    try: done = project.mlkit("repro", timeout=900, rc=None)
    except subprocess.TimeoutExpired: done = subprocess.CompletedProcess([], 124, "", "the next run hangs")
    seconds = time.monotonic() - start
    faults = [f"outlived by {c}" for c in outliving] + faults_after(project, done, wanted)
    if not faults: shutil.rmtree(project.root)
    return {"kill": i, "moment": moment, "draws": draw + 1, "stage": stage, "seconds": seconds, "faults": faults, "folder": str(project.root),
            "healed": [l.removeprefix("healed: ") for l in done.stdout.splitlines() if l.startswith("healed: ")]}


def table(kills: list[dict]):
    print("| killed in | kills | left something to heal | next run, median s | completed, same bytes |\n|---|---|---|---|---|")
    order = list(dict.fromkeys(k["stage"] for k in sorted(kills, key=lambda k: k["moment"])))
    for name, rows in [*((s, [k for k in kills if k["stage"] == s]) for s in order), ("**all**", kills)]:
        print(f"| {name} | {len(rows)} | {sum(bool(k['healed']) for k in rows)} | {statistics.median(k['seconds'] for k in rows):.1f} | {sum(not k['faults'] for k in rows)} of {len(rows)} |")


def main():
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument("--moments", type=int, default=50)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--jobs", type=int, default=1, help="projects at once; each has one thread of work")
    a.add_argument("--resume", type=Path, help="a JSON file")
    a = a.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=HERE, text=True).strip()
    state = json.loads(a.resume.read_text()) if a.resume and a.resume.is_file() else {"commit": commit, "seed": a.seed, "jobs": a.jobs, "kills": []}
    if (state["commit"], state["seed"], state["jobs"]) != (commit, a.seed, a.jobs): sys.exit(f"{a.resume}: is of commit {state['commit']}, --seed {state['seed']}, --jobs {state['jobs']}; name another file")
    with ThreadPoolExecutor(a.jobs) as pool:
        if "length" not in state: # as many at once as there will be, so that the length is that of a run beside others
            runs = list(pool.map(uninterrupted, [folder / f"uninterrupted{j}" for j in range(a.jobs)]))
            if any(r[0] != runs[0][0] for r in runs): sys.exit("two uninterrupted runs differ")
            state |= {"left": runs[0][0], "length": max(s for _, s in runs)}
        print(f"commit {commit}, seed {a.seed}; an uninterrupted run takes {state['length']:.1f} s, {a.jobs} at once; its model is {state['left']['model']}", flush=True)
        have = {k["kill"] for k in state["kills"]}
        jobs = [pool.submit(once, folder, a.seed, i, state["length"], state["left"]) for i in range(a.moments) if i not in have]
        for job in as_completed(jobs):
            state["kills"].append(k := job.result())
            print(f"{len(state['kills']):3d} of {a.moments}: kill {k['kill']} at {k['moment']:5.1f} s in {k['stage']}; {'; '.join(k['healed']) or 'nothing to heal'}; "
                  f"next run {k['seconds']:.1f} s, {'same bytes' if not k['faults'] else 'FAILED, see ' + k['folder'] + ': ' + '; '.join(k['faults'])}", flush=True)
            if a.resume: write_json(a.resume, state)
    kills = [k for k in state["kills"] if k["kill"] < a.moments]
    failed = [k for k in kills if k["faults"]]
    print(f"\n{machine('dvc', 'papermill', 'torch', 'mlflow')}; seed {a.seed}, {a.jobs} projects at once, an uninterrupted run {state['length']:.1f} s\n")
    table(kills)
    if not failed: shutil.rmtree(folder, ignore_errors=True)
    sys.exit(bool(failed))


if __name__ == "__main__": main()
