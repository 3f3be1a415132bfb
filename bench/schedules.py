"""Seconds an update of each schedule on this machine, beside what the simulator makes of the seconds that sampling and training take.

What is measured apart, before any schedule runs: sampling alone (in the engine's process), training alone, both at once without a word between them
(how much two processes slow each other), and quarters of a batch. The schedules themselves are predicted from that alone.
Usage: python bench/schedules.py [--updates 60] [--out records/schedules.json]. One thread a process; needs two idle cores.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import statistics
import time
import warnings
from pathlib import Path

import torch

from offpolicy_rl.llm import simulate as sim
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.record import git_commit, machine, rounded, versions, write_atomically
from offpolicy_rl.llm.train import Trainer

BASE = TrainConfig(recipe="reinforce", task="sort", prompts_per_step=32, threads=1, steps=10**6, eval_every=10**6, eval_prompts=8)
mean = statistics.fmean


def trainer(**how) -> Trainer: return Trainer(dataclasses.replace(BASE, **how))


def wall(run: Trainer, updates: int, warm: int = 8) -> float:
    "Seconds an update of a trainer in progress."
    for _ in range(warm): run.advance()
    start = time.perf_counter()
    for _ in range(updates): run.advance()
    return (time.perf_counter() - start) / updates


def seconds(work, count: int) -> list[float]:
    "Seconds of each call."
    took = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return took


def train_on(run: Trainer, rollouts):
    "One update as a schedule has it, but for the samples: marks, loss, step, metrics, and the next prompts drawn."
    def work():
        run.requests()
        run.rewarded(rollouts)
        run.update(rollouts)
        run.fresh.clear()
    return work


def apart(count: int) -> dict[str, float]:
    "Mean seconds of each side alone, of both at once, and of handing weights over, for a batch and for a quarter of it."
    run, found = trainer(mode="async", staleness=2), {}
    engine = run.schedule.engine

    def ask(size): engine.submit(**run.requests(size)[0])

    def sample(size):
        ask(size)
        return engine.collect()[1]
    for name, size in (("batch", None), ("quarter", BASE.prompts_per_step // 4)):
        rollouts = run.rewarded(sample(size))
        work = train_on(run, rollouts)
        one_sampled = functools.partial(sample, size)
        seconds(work, 5), seconds(one_sampled, 5)
        found[f"training_{name}"], found[f"sampling_{name}"] = mean(seconds(work, count)), mean(seconds(one_sampled, count))
    rollouts = run.rewarded(sample(None))
    work = train_on(run, rollouts)
    for _ in range(4 * count): ask(None)  # more than the trainer below can outlast
    engine.collect()
    start, answered, training = time.perf_counter(), [], []
    while len(training) < count:
        training += seconds(work, 1)
        while engine.waiting(): answered.append(engine.collect()[2])
    found["training_both"] = mean(training)
    found["sampling_both"] = mean(answered)
    found["updates_while_both"], found["seconds_while_both"] = len(training), time.perf_counter() - start
    engine.close()
    run = trainer(mode="async", staleness=2)
    alone = [x for _ in range(count) for x in [sampled_alone(run)]]
    found["sampling_alone"] = mean(alone[3:])
    found["sync"] = mean(seconds(lambda: run.schedule.engine.sync(run.model, run.step), count))
    run.schedule.engine.close()
    return found


def sampled_alone(run: Trainer) -> float:
    "Seconds that the engine's process itself reports for a batch."
    run.schedule.engine.submit(**run.requests()[0])
    return run.schedule.engine.collect()[2]


def predictions(found: dict[str, float]) -> dict[str, float]:
    "Seconds an update of each schedule, by the simulator."
    slow = found["sampling_both"] / found["sampling_alone"], found["training_both"] / found["training_batch"]
    batch = sim.Times(found["sampling_batch"], found["training_batch"], found["sync"])
    quarter = lambda name: torch.full((1, 4), found[f"{name}_quarter"])
    quarters = sim.Times(quarter("sampling"), quarter("training"), found["sync"])
    named = {"async, 1": (batch, sim.asynchronous(1)), "async, 2": (batch, sim.asynchronous(2)), "periodic": (quarters, sim.periodic())}
    return {name: sim.predict(times, schedule, 200, slow).seconds for name, (times, schedule) in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60, help="timed updates of each schedule (default 60)")
    parser.add_argument("--out", type=Path, help="a JSON file to keep the result in")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    run = trainer()
    first = wall(run, args.updates)
    found = apart(args.updates // 2)
    expected = predictions(found)
    measured = {}
    for name, how in (("async, 1", dict(mode="async", staleness=1)), ("async, 2", dict(mode="async", staleness=2)), ("periodic", dict(mode="periodic"))):
        other = trainer(**how)
        measured[name] = wall(other, args.updates)
        other.schedule.engine.close()
    last = wall(run, args.updates)
    sync = (first + last) / 2
    ms = {name: f"{1e3 * found[name]:.1f} ms" for name in ("sampling_batch", "training_batch", "sync")}
    print(f"alone: sampling {ms['sampling_batch']}, training {ms['training_batch']}, handing over {ms['sync']}; at once: sampling "
          f"{found['sampling_both'] / found['sampling_alone']:.2f} times, training {found['training_both'] / found['training_batch']:.2f} times as long")
    print(f"{'sync':12s} {1e3 * sync:7.1f} ms an update (before {1e3 * first:.1f}, after {1e3 * last:.1f})")
    for name in expected:
        ours = f"{name:12s} {1e3 * measured[name]:7.1f} ms an update, predicted {1e3 * expected[name]:7.1f}"
        print(f"{ours}; speed-up {sync / measured[name]:.2f}, "
              f"predicted {sync / expected[name]:.2f} ({100 * (measured[name] / expected[name] - 1):+.0f} %)")
    if args.out is not None:
        kept = dict(command=f"python bench/schedules.py --updates {args.updates}", commit=git_commit(), machine=machine(), versions=versions(),
                    date=datetime.date.today().isoformat(), apart=found, sync=[first, last], measured=measured, predicted=expected)
        write_atomically(args.out, json.dumps(rounded(kept), indent=1) + "\n")


if __name__ == "__main__": main()
