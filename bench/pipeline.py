"""How long the default pipeline takes: cold, with nothing to do, and as a bare script.

Usage: python bench/pipeline.py [--repeats 3]. Every variant works on a fresh copy of this checkout, all of them in turn
within a repeat, so that a slow minute of the machine is shared. Prints a table in Markdown: median, smallest and largest
seconds, and the ratio to the bare script of the same repeat.
"""
import argparse, os, platform, shutil, statistics, subprocess, sys, tempfile, time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def machine(*packages: str) -> str:
    "What figures are worth nothing without."
    return ", ".join([platform.machine(), f"{len(os.sched_getaffinity(0))} cores", f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)])


def copy(to: Path) -> Path:
    "A copy of the tracked files, as a git repository of its own, with an empty cache."
    for f in subprocess.check_output(["git", "ls-files", "-z"], cwd=HERE, text=True).split("\0")[:-1]:
        if (HERE / f).exists() and f != "dvc.lock":
            (to / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / f, to / f)
    subprocess.run(["git", "init", "-q"], cwd=to, check=True)
    return to


def seconds(command: list, cwd: Path) -> float:
    "Wall-clock seconds of a command that must succeed."
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(cwd)}
    start = time.perf_counter()
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


def end_warm_parent():
    "So that the next run starts without one: a parent whose socket is gone ends."
    from mlkit.warm import socket_path
    for s in socket_path().parent.glob("warm-*.sock"): s.unlink()
    time.sleep(3)


def repeat(folder: Path) -> dict[str, float]:
    "Every variant once."
    times = {}
    def project(name): return copy(folder / name.replace(" ", "_"))
    times["one process, no DVC, no papermill"] = seconds([sys.executable, HERE / "bench/one_process.py", "."], project("script"))
    end_warm_parent()
    cold = project("cold")
    times["mlkit repro, first of the day"] = seconds([BIN / "mlkit", "repro"], cold)
    times["mlkit repro, warm parent there"] = seconds([BIN / "mlkit", "repro"], project("warm"))
    times["mlkit repro -j 2, warm parent there"] = seconds([BIN / "mlkit", "repro", "-j", "2"], project("two"))
    dvc = project("dvc")
    times["dvc repro (plain)"] = seconds([BIN / "dvc", "repro", "-q"], dvc)
    times["mlkit repro, nothing to do"] = seconds([BIN / "mlkit", "repro"], cold)
    times["dvc repro, nothing to do"] = seconds([BIN / "dvc", "repro", "-q"], dvc)
    return times


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--repeats", type=int, default=3)
    repeats = args.parse_args().repeats
    runs = []
    for i in range(repeats):
        with tempfile.TemporaryDirectory() as d: runs.append(repeat(Path(d)))
        print(f"repeat {i + 1} of {repeats}: {', '.join(f'{k} {v:.1f}' for k, v in runs[-1].items())}", file=sys.stderr)
    print(f"{machine('dvc', 'papermill', 'torch', 'mlflow', 'evidently')}; {repeats} repeats, in turn\n")
    print("| | median s | min | max | against the bare script |\n|---|---|---|---|---|")
    base = next(iter(runs[0]))
    for k in runs[0]:
        t, ratio = [r[k] for r in runs], statistics.median(r[k] / r[base] for r in runs)
        print(f"| {k} | {statistics.median(t):.1f} | {min(t):.1f} | {max(t):.1f} | {ratio:.2f} |")


if __name__ == "__main__": main()
