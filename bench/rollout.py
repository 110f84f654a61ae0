"""False alarms of a rollout, and the requests that a bad version needs until it is stopped.

Usage: python bench/rollout.py [--rollouts 1000] [--faults 200] [--requests 1000] [--every 5] [--seed 0] [--only SCENARIO]. No server:
the same tests as `mlkit rollout`, on simulated traffic. A rollout has four steps of so many requests for the baseline and the candidate
together; the tests are looked at every so many requests, and half of all requests are mirrored. Prints two tables in Markdown.
"""
import argparse, math, random, time
from dataclasses import dataclass
from multiprocessing import Pool
from statistics import median

from mlkit.rollout.evidence import Evidence, Fault, Unlabelled, observed, record, record_mirrored, should_stop

N_STEPS = 4


@dataclass(frozen=True)
class World:
    "What the load is like; it hits both versions."
    name: str
    tail: float = 1.5 # Pareto's exponent: below 2 the variance is infinite, below 1 the mean too
    spikes: float = 0.0 # share of requests that begin a spike, which lasts some 100 requests
    sawtooth: int = 0 # requests in which the latency rises threefold, then falls at once
    outages: float = 0.0 # share of requests that begin an outage: 40 requests fail at half
    errors: float = 0.001
    classes: tuple[float, ...] = (0.9, 0.08, 0.02)
    drift: float = 0.0 # share of requests at which the mix of classes turns
    users: int = 0 # 0: each request is drawn; else Zipf's users, each with its latency, errors and class, stay in their group


WORLDS = [
    World("calm, two classes", tail=3.0, classes=(0.5, 0.5)),
    World("infinite variance", tail=1.2),
    World("infinite mean", tail=0.8),
    World("load spikes, 20 times as slow", spikes=0.005),
    World("sawtooth of the latency", tail=8.0, sawtooth=50),
    World("outages that hit both", outages=0.003, spikes=0.003),
    World("no errors, one class in 1,000", errors=0.0, classes=(0.999, 0.001)),
    World("200 classes whose mix turns", classes=tuple(1 / (k + 1) for k in range(200)), drift=0.01),
    World("2,000 sticky users, Zipf 0.8", users=2000),
]
FAULTS = {
    "20 % errors": Fault(errors=0.2), "5 % errors": Fault(errors=0.05), "NaN in each answer": Fault(nan=1.0), "NaN in 10 %": Fault(nan=0.1),
    "wrong shape (each fails)": Fault(errors=1.0), "5 times as slow": Fault(slower=5.0), "2 times as slow": Fault(slower=2.0),
    "10 points worse": Fault(wrong=0.10), "20 points worse": Fault(wrong=0.20)}


def users(world, rng): # [(group, latency, errors, class)], cumulative weights
    kinds = [("baseline" if rng.random() < 0.5 else "candidate", math.exp(rng.gauss(0, 0.5)), world.errors * rng.expovariate(1),
              rng.choices(range(len(world.classes)), world.classes)[0]) for _ in range(world.users)]
    total, cumulative = 0.0, []
    for i in range(world.users):
        total += 1 / (i + 1) ** 0.8
        cumulative.append(total)
    return kinds, cumulative


def requests(world: World, rng: random.Random, n: int): # group, load, errors, truth
    load, outage, weights = 1.0, 0, list(world.classes)
    kinds, cumulative = users(world, rng) if world.users else ((), ())
    for i in range(n):
        load = 20.0 if rng.random() < world.spikes else 1 + 0.97 * (load - 1)
        outage = 40 if rng.random() < world.outages else max(0, outage - 1)
        if rng.random() < world.drift: rng.shuffle(weights)
        saw = 1 + 2 * (i % world.sawtooth) / world.sawtooth if world.sawtooth else 1.0
        errors, truth = (0.5 if outage else world.errors), rng.choices(range(len(weights)), weights)[0]
        group, own = rng.choice(("baseline", "candidate")), 1.0
        if kinds:
            group, own, errors, usual = rng.choices(kinds, cum_weights=cumulative)[0]
            truth = usual if rng.random() < 0.5 else truth
        yield group, load * saw * own, errors, truth


def answered(rng, world, fault, load, errors, truth): # status, seconds, class, confidence
    seconds = 0.004 * load * fault.slower * rng.paretovariate(world.tail)
    wrong = rng.random() < fault.wrong
    answer = (truth + 1) % len(world.classes) if wrong else truth
    confidence = math.nan if rng.random() < fault.nan else 0.5 + rng.random() / 2
    return (500 if rng.random() < max(errors, fault.errors) else 200), seconds, answer, confidence


def step(world, fault, rng, n, every, labels=None): # requests of the candidate until it was stopped, and why; None
    evidence, none, waiting = Evidence(), Fault(errors=0.0), Unlabelled()
    for i, (group, load, errors, truth) in enumerate(requests(world, rng, n)):
        ours, theirs = (fault, none) if group == "candidate" else (none, fault)
        own = answered(rng, world, ours, load, errors, truth)
        if labels is None: record(evidence, group, *own)
        if labels or rng.random() < 0.5:
            pair = observed(*own), observed(*answered(rng, world, theirs, load, errors, truth))
            stable, candidate = pair[::-1] if group == "candidate" else pair
            if labels is None: record_mirrored(evidence, stable, candidate)
            elif not stable.failed and not candidate.failed:
                evidence.groups["candidate"].n += 1
                waiting.add(str(i), *labelled(rng, labels, truth, len(world.classes)))
                waiting.label(evidence, str(i), truth)
        if i % every == 0 and (why := should_stop(evidence, N_STEPS)):
            return evidence.groups["candidate"].n, why
    return None


def labelled(rng, accuracies, truth, k): # both versions err on their own
    return [truth if rng.random() < a else (truth + 1) % k for a in accuracies]


def rollout(job): # identical versions: why it was stopped, or ''
    world, seed, n, every = job
    rng = random.Random(f"{world.name}{seed}")
    for _ in range(N_STEPS):
        if found := step(world, Fault(errors=0.0), rng, n, every): return found[1]
    return ""


def needed(job): # requests of the candidate
    world, fault, seed, n, labels = job
    found = step(world, fault, random.Random(seed), n, 1, labels)
    return found[0] if found else math.inf


def row(pool, name, world, fault, args, labels=None):
    got = sorted(pool.imap_unordered(needed, [(world, fault, seed, 20_000, labels) for seed in range(args.faults)], 5))
    at = lambda q: f"{got[int(q * (len(got) - 1))]:,.0f}"
    print(f"| {name} | {median(got):,.0f} | {at(0.9)} | {at(1)} |", flush=True)


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in ("rollouts", 1000), ("faults", 200), ("requests", 1000), ("every", 5), ("seed", 0), ("jobs", 1):
        parse.add_argument(f"--{name}", type=int, default=value)
    parse.add_argument("--only", default="", help="part of a scenario's name; 'faults': only the second table")
    args = parse.parse_args()
    began = time.monotonic()
    with Pool(args.jobs) as pool:
        print(f"| identical versions, {N_STEPS} steps of {args.requests:,} requests | rollouts | stopped | by |\n|---|---|---|---|", flush=True)
        for world in WORLDS:
            if args.only not in world.name: continue
            jobs = [(world, args.seed + i, args.requests, args.every) for i in range(args.rollouts)]
            why = [w.split(":")[0] for w in pool.imap_unordered(rollout, jobs, 10) if w]
            print(f"| {world.name} | {args.rollouts:,} | {len(why)} | {', '.join(sorted(set(why)))} |", flush=True)
        if args.only in "faults":
            print("\n| fault | requests of the candidate until it is stopped: median | 90 % | most |\n|---|---|---|---|", flush=True)
            usual = World("", spikes=0.005)
            for name, fault in FAULTS.items():
                row(pool, name, usual, fault, args)
            row(pool, "10 points worse, by labels (0.95 and 0.85)", usual, Fault(errors=0.0), args, (0.95, 0.85))
            row(pool, "10 points worse, by labels (0.80 and 0.70)", usual, Fault(errors=0.0), args, (0.80, 0.70))
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
