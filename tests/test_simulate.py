"The simulator of training schedules against a clock that ticks, against its own record of events, and against formulas."

import json
import math
import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from offpolicy_rl.llm.record import add_step, new_record, read_record, thinned, write_record
from offpolicy_rl.llm.simulate import (
    Cluster,
    Schedule,
    Times,
    apart,
    asynchronous,
    gantt,
    lag,
    overlap,
    period,
    periodic,
    pipeline,
    predict,
    simulate,
    stale,
    sync,
    together,
)

SCHEDULES = [sync(), stale(2), stale(3), lag(1), lag(3), pipeline(1), pipeline(2), periodic(), asynchronous(0), asynchronous(1), asynchronous(3),
             asynchronous(1, partial=True), asynchronous(3, partial=True), Schedule("held 2, every 3", held=2, every=3),
             Schedule("a step ahead of weights held back", ahead=1, held=1, stream=True),
             Schedule("newest, every 2", ahead=2, every=2, newest=True, partial=True)]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


def whole_times(seed, updates=7):
    "Times in whole seconds: a clock that ticks once a second misses nothing."
    rng = random.Random(seed)
    pieces, slots = rng.choice([(1, 1), (1, 3), (3, 1), (4, 2), (3, 5)])
    table = lambda low, high: [[float(rng.randint(low, high)) for _ in range(pieces)] for _ in range(updates)]
    return Times(table(1, 9), table(1, 5), [float(rng.randint(0, 3)) for _ in range(updates)], float(rng.randint(0, 2)), slots)


def random_times(seed, updates=12, pieces=4, slots=2):
    "Exponential times."
    g = torch.Generator().manual_seed(seed)
    p, c = torch.rand(2, updates, pieces, dtype=torch.float64, generator=g).log().neg()
    return Times(p, c / 2, 0.3 * torch.rand(updates, dtype=torch.float64, generator=g), 0.2, slots)


class Ticking:
    "The rules of the schedules once more, a second at a time: what is left of each thing is counted down."

    def __init__(self, times, schedule):
        self.p, self.c, self.sync, self.load, self.slots = times.sampling.tolist(), times.training.tolist(), times.sync.tolist(), times.load, times.slots
        self.s, self.n, self.updates = schedule, times.sampling.shape[1], len(times.sampling)
        self.version, self.published, self.held, self.loading = 0, 0, 0, 0.0
        self.job, self.left, self.clock = None, 0.0, 0
        self.waiting = [(j, i) for j in range(self.updates) for i in range(self.n)]
        self.running, self.over, self.trained = {}, [], []      # running: (update, piece) -> seconds left
        self.versions = [[] for _ in range(self.updates)]       # of every sampled second

    def wish(self):
        "The weights that the sampler should have now, None while they are not there."
        j = self.waiting[0][0] if self.waiting else self.updates - 1
        if self.s.newest: return self.published
        v = max(j - self.s.ahead - self.s.held, 0)
        v -= v % self.s.every
        return v if v <= self.published else None

    def give_job(self):
        j = self.version
        due = [q for q in self.over if q[0] == j and q not in self.trained]
        old = j - self.s.held                                    # the version that goes out now
        if old > self.published and old % self.s.every == 0: return "sync", [], self.sync[old // self.s.every - 1]
        if self.s.stream and due: return "train", due[:1], self.c[j][due[0][1]]
        if not self.s.stream and len(due) == self.n: return "train", due, sum(self.c[j])
        return None

    def end_job(self):
        kind, pieces, _ = self.job
        self.job = None
        self.trained += pieces
        if kind == "sync": self.published = self.version - self.s.held
        elif sum(q[0] == self.version for q in self.trained) == self.n: self.version += 1

    def begin(self):
        while self.job is None and self.version < self.updates:
            self.job = self.give_job()
            if self.job is None: break
            self.left = self.job[2]
            if self.left == 0: self.end_job()
        wish = self.wish()
        if not self.loading and wish is not None and wish != self.held and (self.s.partial or not self.running): self.held, self.loading = wish, self.load
        while not self.loading and self.waiting and len(self.running) < self.slots and self.held == self.wish():
            j, i = self.waiting[0]
            oldest = j - self.s.ahead - self.s.held - (self.s.every - 1)
            if self.version < j - self.s.ahead or self.held < oldest: break
            self.running[self.waiting.pop(0)] = self.p[j][i]

    def tick(self):
        self.clock += 1
        if self.job is not None:
            self.left -= 1
            if self.left == 0: self.end_job()
        if self.loading: self.loading -= 1
        else:
            for q in list(self.running):
                self.versions[q[0]].append(self.held)
                self.running[q] -= 1
                if self.running[q] == 0: self.over.append(q)
                if self.running[q] == 0: del self.running[q]

    def run(self):
        while self.version < self.updates:
            self.begin()
            if self.version < self.updates: self.tick()
        return self


@each_schedule
def test_the_simulation_is_what_a_ticking_clock_counts(schedule):
    for seed in range(25):
        times = whole_times(seed)
        found, counted = simulate(times, schedule), Ticking(times, schedule).run()
        ages = [[j - v for v in versions] for j, versions in enumerate(counted.versions)]
        assert found.seconds == counted.clock, seed
        assert found.oldest == [max(a) for a in ages], seed
        assert found.staleness == pytest.approx([sum(a) / len(a) for a in ages], abs=1e-12), seed


def busy(events, kinds):
    "The intervals in which a side works, joined."
    out = []
    for start, end in sorted((e.start, e.end) for e in events if e.kind in kinds):
        if out and start <= out[-1][1]: out[-1][1] = max(end, out[-1][1])
        else: out.append([start, end])
    return out


def shared(a, b):
    "Seconds that lie in an interval of both lists."
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


@each_schedule
@pytest.mark.parametrize("slowdown", [(1.0, 1.0), (1.7, 1.3), (2.5, 1.0)], ids=str)
def test_every_piece_of_work_is_done_once_at_the_speed_it_should_have(schedule, slowdown):
    for seed in range(3):
        times = random_times(seed)
        found = simulate(times, schedule, slowdown=slowdown)
        sides = busy(found.events, ("sample", "load")), busy(found.events, ("train", "sync"))
        work = {}
        for e in found.events:
            side = 0 if e.kind in ("sample", "load") else 1
            together_for = shared([(e.start, e.end)], sides[1 - side])
            key = (e.kind, e.update, e.piece)
            work[key] = work.get(key, 0.0) + (e.end - e.start - together_for) + together_for / slowdown[side]
        updates, pieces = times.sampling.shape
        due = {("sample", j, i): times.sampling[j, i].item() for j in range(updates) for i in range(pieces)}
        if schedule.stream: due |= {("train", j, i): times.training[j, i].item() for j in range(updates) for i in range(pieces)}
        else: due |= {("train", j, -1): times.training[j].sum().item() for j in range(updates)}
        given = range(schedule.every, updates - schedule.held, schedule.every)
        due |= {("sync", j + schedule.held, -1): times.sync[j // schedule.every - 1].item() for j in given}
        due |= {key: 0.2 for key in work if key[0] == "load"}
        assert work.keys() == due.keys() and all(abs(work[key] - due[key]) < 1e-9 for key in due)


@each_schedule
def test_events_keep_the_rules_of_the_schedule(schedule):
    for seed in range(10):
        times = random_times(seed, slots=1 + seed % 4)
        found = simulate(times, schedule, slowdown=(1.0, 1.0) if seed % 2 else (1.4, 1.2))
        lanes = {}
        for e in found.events: lanes.setdefault((e.kind in ("train", "sync"), e.lane, e.kind == "load"), []).append((e.start, e.end))
        for spans in lanes.values(): assert all(b[0] >= a[1] - 1e-9 for a, b in pairwise(sorted(spans)))
        loads = busy(found.events, ("load",))
        assert shared(loads, busy(found.events, ("sample",))) < 1e-9          # nothing is sampled while weights are taken
        taken = {e.version for e in found.events if e.kind == "load"}
        assert schedule.newest or taken == {e.version for e in found.events if e.kind == "sample"} - {0}         # none is taken for nothing
        there = {0: 0.0} | {e.version: e.end for e in found.events if e.kind == "sync"}
        ready = {}
        for e in found.events:
            if e.kind != "sample": continue
            assert e.start >= there[e.version] and 0 <= e.update - e.version <= schedule.bound
            if not schedule.newest: assert e.version == schedule.wanted(e.update, 0)
            ready[e.update, e.piece] = max(ready.get((e.update, e.piece), 0.0), e.end)
        for e in found.events:
            if e.kind == "train": assert e.start >= max(t for (j, i), t in ready.items() if j == e.update and e.piece in (-1, i)) - 1e-9
        if schedule.ahead == 0: assert found.oldest == [j - max(j - schedule.held, 0) // schedule.every * schedule.every for j in range(12)]
        assert max(found.oldest) <= schedule.bound
        if schedule.ahead == 0 and not schedule.stream: assert shared(busy(found.events, ("sample",)), busy(found.events, ("train", "sync"))) == 0
        assert found.seconds == max(e.end for e in found.events if e.kind == "train") and all(0 < u <= 1 for u in found.utilisation)


def test_lag_is_exactly_k_behind_once_it_is_under_way():
    for run in (simulate(random_times(0), lag(3)), simulate(random_times(0), pipeline(3))):
        assert run.oldest == [0, 1, 2, *[3] * 9] and run.staleness == pytest.approx(run.oldest, abs=1e-12)
    assert simulate(random_times(0), stale(4)).staleness == [0, 1, 2, 3] * 3


def test_partial_rollouts_have_tokens_of_several_versions_and_do_not_wait():
    times = Times([[10.0, 1.0]], [[0.5, 0.5]], slots=2)
    run = simulate(times, asynchronous(3, partial=True), 8)
    versions = {}
    for e in run.events:
        if e.kind == "sample": versions.setdefault((e.update, e.piece), set()).add(e.version)
    assert max(map(len, versions.values())) > 1
    waits = simulate(times, asynchronous(3), 8)
    assert all(len({e.version for e in waits.events if (e.kind, e.update, e.piece) == ("sample", *key)}) == 1 for key in versions)
    assert run.seconds < waits.seconds


def test_staleness_of_k_is_worth_at_most_k_plus_one():
    for seed in range(10):
        times = replace(random_times(seed, 30, 5, slots=1 + seed % 5), load=0.0)
        for k in (0, 1, 2, 5):
            for schedule in (pipeline(k), asynchronous(k), asynchronous(k, partial=True)): assert predict(times, schedule).speedup <= (k + 1) * (1 + 1e-12)


def test_with_nothing_to_overlap_all_schedules_are_one():
    times = random_times(0, pieces=1)
    assert len({simulate(times, s).seconds for s in (sync(), stale(1), lag(0), pipeline(0), asynchronous(0), asynchronous(0, partial=True), periodic())}) == 1
    assert predict(times, sync(), slowdown=(3.0, 3.0)).speedup == 1


def test_lag_and_stale_take_turns_and_gain_only_what_is_not_handed_over():
    for seed in range(5):
        times = random_times(seed, pieces=1, slots=1)
        work, sync_seconds = (times.sampling + times.training).sum().item(), times.sync.tolist()
        for k in (1, 2, 5):
            for schedule, given in ((lag(k), 11 - k), (stale(k), 11 // k)):
                run = simulate(times, schedule, slowdown=(1.9, 1.7))           # nothing is done at once, so nothing is slowed
                assert run.seconds == pytest.approx(work + sum(sync_seconds[:given]) + 0.2 * given, abs=1e-9), schedule.name
                assert shared(busy(run.events, ("sample", "load")), busy(run.events, ("train", "sync"))) == 0
            assert simulate(times, pipeline(k)).seconds < simulate(times, lag(k)).seconds


@pytest.mark.usefixtures("models")
def test_the_trainers_modes_have_the_staleness_that_is_simulated():
    pytest.importorskip("transformers")
    from offpolicy_rl.llm.config import TrainConfig
    from offpolicy_rl.llm.train import train
    base = TrainConfig(recipe="reinforce", task="sort", steps=7, prompts_per_step=2, group_size=2, eval_every=7, eval_prompts=2, threads=1)
    for how, schedule in ((dict(mode="lag", staleness=2), lag(2)), (dict(staleness=3), stale(3)), (dict(), sync())):
        assert train(replace(base, **how))["steps"]["age"] == simulate(Times([1.0] * 7, [1.0]), schedule).staleness


def test_a_prediction_is_the_simulation_in_short():
    times = random_times(0)
    run, base, said = simulate(times, asynchronous(2), 20, (1.5, 1.2)), simulate(times, sync(), 20), predict(times, asynchronous(2), 20, (1.5, 1.2))
    assert said.seconds == run.seconds / 20 and run.throughput == 20 / run.seconds and said.speedup == base.seconds / run.seconds
    assert said[3:] == (*run.utilisation, sum(run.staleness) / 20, max(run.oldest)) and said.schedule == "async(2)"
    assert all(e.kind != "load" for e in simulate(replace(times, load=0.0), asynchronous(2)).events)


def test_training_given_by_update_is_shared_among_its_pieces():
    assert Times([[1.0, 2.0]], [3.0]).training.tolist() == [[1.5, 1.5]] and Times(1.0, 2.0).training.tolist() == [[2.0]]
    assert Times([1.0, 2.0], [3.0]).sampling.tolist() == [[1.0], [2.0]]


def test_overlap_is_the_flow_shop_by_brute_force():
    for seed in range(10):
        p, c = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        end = free = 0.0
        for a, b in zip(p.tolist(), c.tolist()):
            free += a
            end = max(end, free) + b
        assert overlap(p, c) == pytest.approx(end, abs=1e-12)
        assert simulate(Times(p[None], c[None]), periodic()).seconds == pytest.approx(end, abs=1e-12)


def test_period_of_constant_times():
    for p, c, s, k, slots in [(5, 1, 1, 2, 4), (5, 1, 1, 1, 4), (1, 1, 0, 1, 1), (2, 3, 1, 4, 1)]:
        few, many = (simulate(Times([float(p)], [float(c)], sync=float(s), slots=slots), asynchronous(k, partial=True), n).seconds for n in (60, 120))
        assert (many - few) / 60 == pytest.approx(period(p, c, s, k, slots), abs=1e-9)


def test_ten_thousand_updates_take_less_than_a_second():
    times = Times.drawn(10_000, tail=0.5, sync=0.05, load=0.02, generator=torch.Generator().manual_seed(0))
    for schedule in (sync(), pipeline(2), asynchronous(4, partial=True)):
        start = time.process_time()
        simulate(times, schedule)
        assert time.process_time() - start < 1


def test_split_and_spread_pay_what_eta_says():
    eta = lambda b: 1 + 4 / b
    times = Times([16.0], [32.0], sync=1.0, slots=3)
    parts = times.split(4, batch=8, eta_g=eta)
    assert parts.sampling.tolist() == [[16 / 4 * 3 / 1.5] * 4] and parts.training.tolist() == [[8.0] * 4] and parts.slots == 3 and parts.sync.item() == 1
    wide = times.spread(samplers=2, trainers=4, batch=8, eta_t=eta)
    assert wide.sampling.item() == 8 and wide.training.item() == 32 / 4 * 3 / 1.5
    with pytest.raises(ValueError, match="split: expected times of whole batches, got 4 pieces"): parts.split(2)


def test_drawn_times_are_seeded_and_have_the_mean_they_should():
    draw = lambda seed: Times.drawn(50, 4, sampling=2.0, tail=0.5, generator=torch.Generator().manual_seed(seed)).sampling
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    many = Times.drawn(40_000, sampling=2.0, tail=0.5, generator=torch.Generator().manual_seed(0)).sampling
    assert abs(many.mean() - 2) < 4.5 * 2 * math.sqrt(math.exp(0.25) - 1) / 200
    assert many.log().std().item() == pytest.approx(0.5, abs=4.5 * 0.5 / math.sqrt(80_000))


def a_record():
    record = new_record({}, {})
    for i in range(6): add_step(record, dict(sampling_seconds=1.0 + i, training_seconds=2.0, sync_seconds=0.5 if i % 3 == 0 else 0.0))
    return record


def test_times_of_a_record(tmp_path):
    write_record(tmp_path / "run.json", a_record())
    record = read_record(tmp_path / "run.json")
    times = Times.from_record(record)
    assert times.sampling.flatten().tolist() == [1, 2, 3, 4, 5, 6] and times.sync.tolist() == [0.5, 0.5]      # two hand-overs, not six
    assert predict(times, stale(3)).seconds == (21 + 12 + 0.5) / 6 and predict(times, sync()).seconds == (21 + 12 + 2.5) / 6
    assert Times.from_record(record, skip=2).sampling.flatten().tolist() == [3, 4, 5, 6]
    assert Times.from_record(thinned(record, 2)).sampling.flatten().tolist() == [1.5, 3.5, 5.5]
    assert Times.from_record(record, load=0.25).load == 0.25
    before = json.loads(json.dumps(record))
    del before["steps"]["sync_seconds"]
    assert Times.from_record(before).sync.tolist() == [0]
    before["steps"]["sampling_seconds"][1] = None
    assert Times.from_record(before).sampling.flatten().tolist() == [1, 3, 4, 5, 6]


def test_bad_input_is_named():
    good = Times([1.0], [1.0])
    for call, message in [
        (lambda: Times([], [1.0]), "sampling: expected finite seconds"), (lambda: Times([1.0, -1.0], [1.0]), "sampling: expected finite seconds .* -1.0"),
        (lambda: Times([1.0], [float("nan")]), "training: expected finite"), (lambda: Times(0.0, 1.0), "sampling: expected finite seconds > 0"),
        (lambda: Times([[1.0, 1.0]], [[1.0, 1.0, 1.0]]), r"training: expected .*\(updates, 2\).*3"),
        (lambda: Times([1.0], [1.0], [[1.0]]), "sync: expected"), (lambda: Times([1.0], [1.0], load=-1), "load: expected finite seconds >= 0"),
        (lambda: Times([1.0], [1.0], slots=0), "slots: expected a whole number >= 1, got 0"),
        (lambda: pipeline(-1), "ahead: expected a whole number >= 0, got -1"), (lambda: lag(-1), "held: expected a whole number >= 0, got -1"),
        (lambda: stale(0), "every: expected a whole number >= 1, got 0"), (lambda: lag(1.5), "held: .* got 1.5"),
        (lambda: simulate(good, sync(), 0), "updates: expected"),
        (lambda: simulate(good, sync(), slowdown=(1.0, 0.0)), "slowdown: expected two finite factors"),
        (lambda: Times.from_record(dict(steps=dict(sampling_seconds=[1.0], loss=[1.0]))), "record: expected training_seconds .*loss, sampling_seconds"),
        (lambda: Times.from_record({}), "record: expected sampling_seconds and training_seconds .* no steps"),
        (lambda: Times.from_record(a_record(), skip=6), "more than 6 updates"), (lambda: Times.from_record(a_record(), skip=-1), "skip: expected"),
    ]:
        with pytest.raises(ValueError, match=message): call()


def test_llamarl_example_and_where_its_theorem_ends():
    cluster = Cluster(lambda b: 1 + 4 / b, lambda b: 0.5 + 8 / b)
    s, a = together(cluster), apart(cluster)
    assert (round(s.seconds, 3), round(a.seconds, 3), round(a.theta, 3), round(s.seconds / a.seconds, 2)) == (8.325, 4.277, 0.7, 1.95)
    best = min(((5 + 0.05 * x + 0.1 * y) / 2 * (1.5 + 4 / x + 8 / y), x, y) for x in range(1, 257) for y in range(1, 257))
    assert best[1:] == (s.b_t, s.b_g) and best[0] == pytest.approx(s.seconds, abs=1e-12)
    assert a.theta == pytest.approx((1 + 4 / a.b_t) * a.m_t / a.seconds, abs=1e-12)      # both sides take the same
    alike = replace(cluster, scaling=1.0)
    assert together(alike).seconds == pytest.approx(apart(alike).seconds, abs=1e-12)
    small = Cluster(lambda b: 1 + 0 * b, lambda b: 0.5 + 0 * b, weights=0.01, whole=True)
    assert together(small).seconds == apart(small).seconds == 1.5 and together(small).m_t == apart(small).m_g == 1


def test_the_drawn_time_is_the_simulated_time():
    run = simulate(random_times(0), asynchronous(2, partial=True))
    fig = gantt([run, simulate(random_times(0), periodic())], updates=12)
    drawn = {bar.name: sum(bar.x) for bar in fig.data[:4]}
    assert drawn["sample"] == pytest.approx(sum(e.end - e.start for e in run.events if e.kind == "sample"), abs=1e-3 * len(fig.data[0].x))
    assert drawn["train"] == pytest.approx(random_times(0).training.sum().item(), abs=0.012)
    assert [bar.name for bar in fig.data] == ["sample", "train", "sync", "load"] * 2 and {*fig.data[0].y} == {"slot 1", "slot 2"}
