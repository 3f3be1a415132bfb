"""Seconds an update of each schedule on this machine, beside what the simulator makes of the seconds that sampling and training take.

What is measured apart, before any schedule runs: sampling, training and handing over in one process; sampling alone in the engine's process, training
alone, both at once without a word between them (how much two processes slow each other), and quarters of a batch. The schedules themselves, and
their speed-ups, are predicted from that alone.
Usage: python bench/schedules.py [--updates 60] [--rounds 3] [--out records/schedules.json]. One thread a process; needs two idle cores.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import statistics
import time
import warnings
from pathlib import Path

import torch

from offpolicy_rl.llm import simulate as sim
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.record import git_commit, machine, rounded, versions, write_atomically
from offpolicy_rl.llm.rollouts import Rollouts
from offpolicy_rl.llm.train import Trainer

# the policy stands still: else a schedule that learns faster has other responses to train on, and is timed on another task
BASE = TrainConfig(recipe="reinforce", task="sort", prompts_per_step=32, threads=1, lr=1e-12, steps=10**6, eval_every=10**6, eval_prompts=8)
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


def train_on(run: Trainer, batches: list[Rollouts]):
    "One update as a schedule has it, but for the samples: marks, loss, step, metrics, and the next prompts drawn. Batch follows upon batch."
    coming = itertools.cycle(batches)

    def work():
        run.requests()
        run.update(run.rewarded(next(coming)))
        run.fresh.clear()
    return work


def in_turn(count: int) -> dict[str, float]:
    "Mean seconds of sampling, training and handing over where one process does all of it."
    run = trainer(mode="lag", staleness=2)
    engine = run.schedule.engine
    batches = [run.answers(engine) for _ in range(5)]
    coming = itertools.cycle(batches)

    def sample():
        run.fresh.clear()
        run.answers(engine)
    works = dict(sampling_here=sample, training_here=lambda: run.update(next(coming)), sync_here=lambda: run.hand_over(engine, run.step))
    for work in works.values(): seconds(work, 5)
    return {name: mean(seconds(work, count)) for name, work in works.items()}


def apart(count: int) -> dict[str, float]:
    "Mean seconds of each side alone, of both at once, and of handing weights over, for a batch and for a quarter of it."
    run, found = trainer(mode="async", staleness=2), {}
    engine = run.schedule.engine

    def ask(size): engine.submit(**run.requests(size)[0])

    def sample(size):
        ask(size)
        return engine.collect()
    for name, size in (("quarter", BASE.prompts_per_step // 4), ("batch", None)):
        sampling = functools.partial(sample, size)
        work = train_on(run, [sampling()[1] for _ in range(count)])
        seconds(work, 5), seconds(sampling, 5)
        found[f"training_{name}"], found[f"sampling_{name}"] = mean(seconds(work, count)), mean(seconds(sampling, count))
    found["sampling_alone"] = mean(sampling()[2] for _ in range(count))  # as the engine's process counts, without the way to it and back
    found["sync"] = mean(seconds(lambda: engine.sync(run.model, run.step), count))
    for _ in range(4 * count): ask(None)  # more than the trainer below can outlast
    engine.collect()
    answered, training = [], []
    while len(training) < count:
        training += seconds(work, 1)
        while engine.waiting(): answered.append(engine.collect()[2])
    found["training_both"], found["sampling_both"] = mean(training), mean(answered)
    engine.close()
    return found


def predictions(found: dict[str, float]) -> dict[str, float]:
    "Seconds an update of each schedule, by the simulator."
    slow = found["sampling_both"] / found["sampling_alone"], found["training_both"] / found["training_batch"]
    batch = sim.Times(found["sampling_batch"], found["training_batch"], found["sync"])
    quarter = lambda name: torch.full((1, 4), found[f"{name}_quarter"])
    quarters = sim.Times(quarter("sampling"), quarter("training"), found["sync"])
    here = sim.Times(found["sampling_here"], found["training_here"], found["sync_here"])
    live = dataclasses.replace(here, sync=0.0)  # on-policy in one process the engine has the policy's own weights
    named = {"sync": (live, sim.sync()), "stale, 4": (here, sim.stale(4)), "lag, 2": (here, sim.lag(2)),
             "async, 1": (batch, sim.asynchronous(1)), "async, 2": (batch, sim.asynchronous(2)),
             "periodic": (quarters, sim.periodic())}
    return {name: sim.predict(times, schedule, 200, slow).seconds for name, (times, schedule) in named.items()}


SCHEDULES = {"sync": {}, "stale, 4": dict(staleness=4), "lag, 2": dict(mode="lag", staleness=2), "async, 1": dict(mode="async", staleness=1),
             "async, 2": dict(mode="async", staleness=2), "periodic": dict(mode="periodic")}


def measured(updates: int) -> dict[str, float]:
    "Seconds an update of each schedule, as it runs."
    found = {}
    for name, how in SCHEDULES.items():
        run = trainer(**how)
        found[name] = wall(run, updates)
        run.schedule.engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60, help="timed updates of each schedule in a round (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="how often all is measured, one after the other (default 3)")
    parser.add_argument("--out", type=Path, help="a JSON file to keep the result in")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rounds = [(in_turn(args.updates // 2) | apart(args.updates // 2), measured(args.updates)) for _ in range(args.rounds)]
    found, took = ({name: statistics.median(one[name] for one in column) for name in column[0]} for column in zip(*rounds))
    expected = predictions(found)
    ms = {name: f"{1e3 * x:.1f} ms" for name, x in found.items()}
    print(f"in one process: sampling {ms['sampling_here']}, training {ms['training_here']}, handing over {ms['sync_here']}")
    print(f"alone: sampling {ms['sampling_batch']}, training {ms['training_batch']}, handing over {ms['sync']}; at once: sampling "
          f"{found['sampling_both'] / found['sampling_alone']:.2f} times, training {found['training_both'] / found['training_batch']:.2f} times as long")
    for name, x in took.items():
        each = [1e3 * one[name] for _, one in rounds]
        print(f"{name:12s} {1e3 * x:7.1f} ms an update (rounds {min(each):.1f} to {max(each):.1f}), predicted {1e3 * expected[name]:.1f} "
              f"({100 * (x / expected[name] - 1):+.0f} %); speed-up {took['sync'] / x:.2f}, predicted {expected['sync'] / expected[name]:.2f}")
    if args.out is not None:
        kept = dict(command=f"python bench/schedules.py --updates {args.updates} --rounds {args.rounds}", commit=git_commit(), machine=machine(),
                    versions=versions(), date=datetime.date.today().isoformat(), apart=found, measured=took, predicted=expected,
                    rounds=[dict(apart=one, measured=other) for one, other in rounds])
        write_atomically(args.out, json.dumps(rounded(kept), indent=1) + "\n")


if __name__ == "__main__": main()
