"""A small network with a teacher against the same network without, on data that scikit-learn bundles.

    nice python bench/teacher.py [--seeds 8] [--only digits diabetes]

A seed draws the split, the first weights and the order. Both networks have the same of all three, and both are
calibrated on the validation rows. Figures are of the test rows, which no teacher was asked about. The lead is the mean
over seeds with its 95 % interval (paired t). The report is Markdown.
"""
import argparse
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.stats import t

FIXED = {"schedule": {"name": "one_cycle"}, "augment": None, "batch_size": None, "device": "cpu", "n_threads": 1, "loss": {}}
SMALL_TABLE = {"model": {"name": "residual_mlp", "width": 4, "n_blocks": 1, "dropout": 0.0}, "n_epochs": 60, "keep": "best",
               "optimizer": {"name": "adamw", "lr": 0.01}}
SMALL_IMAGE = {"model": {"name": "small_cnn", "width": 2, "dropout": 0.0}, "n_epochs": 20, "keep": "last",
               "optimizer": {"name": "adamw", "lr": 0.01}}
LARGE_IMAGE = SMALL_IMAGE | {"model": {"name": "small_cnn", "width": 24, "dropout": 0.1}, "optimizer": {"name": "adamw", "lr": 0.005}}
LARGE = "a network 12 times as wide"
CROSSED, NAIVE, BLEND = {"of": "trees"}, "trees that have seen the rows", {"of": "blend"}
SETS = { # source: student, its teachers, score and loss
    "digits": (SMALL_IMAGE, {LARGE: LARGE_IMAGE}, ("accuracy", "log_loss")),
    "breast_cancer": (SMALL_TABLE, {"trees, crossed": CROSSED, NAIVE: CROSSED, "blend": BLEND}, ("accuracy", "log_loss")),
    "wine": (SMALL_TABLE, {"trees, crossed": CROSSED, NAIVE: CROSSED, "blend": BLEND}, ("accuracy", "log_loss")),
    "diabetes": (SMALL_TABLE, {"trees, crossed": CROSSED, NAIVE: CROSSED, "blend": BLEND}, ("r2", "rmse")),
}

def prepared_at(source: str, folder: Path, seed: int) -> Path:
    "What `ingest` and `prepare` make of it."
    from mlkit.component import checked_parameters
    from mlkit.data.split import Split
    from mlkit.inputs.base import find_input
    from mlkit.sources.registry import open_source
    from mlkit.task import Task, save_task
    found = open_source(source, folder)
    kind, shards, prepared = find_input(found.modality), folder / "shards", folder / "prepared"
    contract = kind.ingest(found, shards, None, getattr(found, "target", None)).contract
    split = Split.from_params({"shares": {"train": 0.7, "validation": 0.15, "test": 0.15}, "seed": seed, "method": "random", "golden": None}, folder)
    fitted, target, *_ = kind.prepare(shards, contract, prepared, split, **checked_parameters(kind.prepare, {}, "prepare.input"))
    save_task(Task(fitted, target), prepared)
    return prepared

def judged(fitted, data, prepared: Path, names: tuple[str, ...]) -> list[float]:
    "Scores on the test rows, calibrated on the validation rows."
    from mlkit.candidates.base import outputs_of
    from mlkit.data.prepared import load_split
    held = outputs_of(fitted.net, fitted.task, data.X("validation", fitted.task))
    target = fitted.task.target.calibrated(held, data.y["validation"])
    p = target.exact(target.answer()(outputs_of(fitted.net, fitted.task, fitted.task.input.stored(prepared, "test"))).detach().numpy())
    y = np.asarray(load_split(prepared / "test.safetensors")[1])
    return [float(target.scores()[n].of(p, y, np.ones((1, len(y))))[0]) for n in names]

def known_answers(large, data) -> dict[str, np.ndarray]: # see `training.teacher.Lesson`
    "What a fitted model says of both splits, calibrated on the validation rows."
    from mlkit.candidates.base import TRAIN, VALIDATION, outputs_of
    from mlkit.candidates.teacher import in_words
    said = {s: outputs_of(large.net, large.task, data.X(s, large.task)) for s in (TRAIN, VALIDATION)}
    task = replace(large.task, target=large.task.target.calibrated(said[VALIDATION], data.y[VALIDATION]))
    return {s: in_words(z, task, data.task) for s, z in said.items()}

def compared(source: str, seed: int) -> dict[str, list[float]]: # who: scores
    "One split: the student alone, each teacher, and the student of each."
    from mlkit.candidates.base import prepared_data
    from mlkit.candidates.network import network
    from mlkit.component import check_component
    from mlkit.task import load_task
    from mlkit.training.run import completed
    from mlkit.training.teacher import TEACHERS
    student, teachers, names = SETS[source]
    with tempfile.TemporaryDirectory() as d:
        prepared = prepared_at(source, Path(d), seed)
        task = load_task(prepared)
        values, data = FIXED | student | {"seed": seed, "teacher": None}, prepared_data(task, prepared, seed, 1)
        found = {"alone": judged(network(data, values), data, prepared, names)}
        for who, spec in teachers.items():
            own = {"name": "candidate"} | (spec if who != LARGE else {})
            full = completed(values | {"teacher": own})
            if who == LARGE:
                large = network(data, FIXED | spec | {"seed": seed})
            else:
                parameters = {k: v for k, v in full["teacher"].items() if k != "name"}
                large = TEACHERS["candidate"](**parameters).fitted(data, full)[0]
            if who in (LARGE, NAIVE): # asked about rows that it knows, as the bundle of a larger model is
                data.taught = known_answers(large, data)
                full |= {"teacher": check_component(TEACHERS, {"name": "bundle", "folder": "large"}, "train.teacher")}
            found[f"teacher: {who}"] = judged(large, data, prepared, names)
            found[f"student of {who}"] = judged(network(data, full), data, prepared, names)
    return found

def report(source: str, runs: list[dict[str, list[float]]]):
    "A row a model."
    names, lower = SETS[source][2], {"log_loss", "rmse"}
    for who in runs[0]:
        cells = []
        for i, name in enumerate(names):
            mine, alone = (np.array([r[k][i] for r in runs]) for k in (who, "alone"))
            lead = (mine - alone) * (-1 if name in lower else 1)
            half = t.ppf(0.975, len(lead) - 1) * lead.std(ddof=1) / len(lead) ** 0.5
            beside = f"{lead.mean():+.4f} ± {half:.4f}, {(lead > 0).sum()} of {len(lead)}" if who != "alone" else ""
            cells += [f"{mine.mean():.4f}", beside]
        print(f"| {source} | {who} |", " | ".join(cells), "|", flush=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", nargs="+", default=list(SETS))
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| data | model | accuracy, R² | lead over the student alone, seeds ahead | log loss, RMSE | lead, seeds ahead |\n|---|---|---|---|---|---|")
    for source in asked.only:
        report(source, [compared(source, seed) for seed in range(asked.seeds)])
