"""What exactness costs: time of `exact` against the number of sequences, against Monte Carlo at equal error, and of the explorer's redraws.

    python bench/lab.py

Everything is timed in this process, the median of several calls; ratios are printed, nothing is asserted."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from collections.abc import Callable

import torch

from offpolicy_rl.lab.atlas import atlas
from offpolicy_rl.lab.exact import exact
from offpolicy_rl.lab.explore import PARTS, explore
from offpolicy_rl.ratios.importance import sequence_ratio
from offpolicy_rl.reinforce.reinforce import reinforce
from offpolicy_rl.reinforce.topr import topr_loss
from offpolicy_rl.toys.toy import stale
from offpolicy_rl.toys.tree import TokenTree


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    "Median time of a call after one that warms up."
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def small() -> None:
    "The two sizes that the lab is used at most."
    tree, group = TokenTree(3, 4), TokenTree(2, 3)
    print(f"exact, 81 sequences, one response           {1e3 * seconds(lambda: exact(topr_loss, tree)):8.1f} ms   (to stay under 30)")
    print(f"exact, 8 sequences, groups of 4 (330 draws) {1e3 * seconds(lambda: exact(reinforce, group, group_size=4)):8.1f} ms   (to stay under 200)")
    print(f"the whole atlas                             {seconds(atlas, 1):8.2f} s    (to stay under 60)")


def growth() -> None:
    """Time against the number of sequences, and the Monte Carlo that would be as good.

    Equal error: enumeration is exact to rounding, so Monte Carlo is given the draws that bring its standard error to 1 % of the gradient's length."""
    print(f"\n{'sequences':>10s}{'exact, ms':>12s}{'us each':>10s}{'draws for 1 %':>16s}{'their time, s':>15s}{'Monte Carlo / exact':>21s}")
    for length in (1, 2, 3, 4, 5):
        toy = stale(TokenTree(10, length, hidden=8), 2, lr=0.1)
        took = seconds(lambda toy=toy: exact(sequence_ratio, toy), 3)
        needed = exact(sequence_ratio, toy).relative_variance / 0.01 ** 2
        each = seconds(lambda toy=toy: exact(sequence_ratio, toy, limit=0, samples=20_000), 3) / 20_000
        print(f"{len(toy):10d}{1e3 * took:12.1f}{1e6 * took / len(toy):10.2f}{needed:16.3g}{needed * each:15.3g}{needed * each / took:21.3g}")


def explorer() -> None:
    "Time that each part of the explorer computes after the age of the data has been moved."
    print(f"\n{'explorer, ms a redraw':32s}" + "".join(f"{part:>14s}" for part in PARTS))
    for name, fn in (("topr_loss", topr_loss), ("recipe reinforce, groups of 4", reinforce)):
        took = []
        for part in PARTS:
            ages, view = iter(range(1, 17)), explore(fn)
            took.append(1e3 * seconds(lambda view=view, ages=ages, part=part: view.compute(parts=(part,), mu_age=next(ages))))
        print(f"{name:32s}" + "".join(f"{t:14.1f}" for t in took))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    small()
    growth()
    explorer()
