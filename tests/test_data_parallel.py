"Runs in two real processes (gloo, on the CPU) whose engines are processes of their own."

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from offpolicy_rl.llm.checkpoint import checkpoints
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.train import Trainer

pytestmark = pytest.mark.usefixtures("models")

SMALL = dict(task="sort", prompts_per_step=5, group_size=4, eval_prompts=4, eval_every=100, lr=1e-4, warmup=0, threads=1)
WITHIN = """
import json, os, signal, sys
from pathlib import Path
import torch
from offpolicy_rl.llm import parallel
from offpolicy_rl.llm.checkpoint import checkpoints
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.parallel import everywhere, place
from offpolicy_rl.llm.shard import whole
from offpolicy_rl.llm.train import Trainer, train
small, folder, out = json.loads(sys.argv[1]), Path(sys.argv[2]), {}
untimed = lambda rows: str([[x for name, x in row.items() if not name.endswith("seconds") and name != "queue"] for row in rows])

def watch(trainer):
    "What this process's engine is asked."
    asked, engine = [], trainer.schedule.engine.engine
    submit = engine.submit
    def spy(prompts, *args, **more):
        asked.append([list(prompts), args[3]])
        return submit(prompts, *args, **more)
    engine.submit = spy
    return asked

def facts(trainer, rows, asked):
    mine = torch.cat([whole(p).detach().flatten() for p in trainer.trained])
    r = trainer.fresh[-1]
    return dict(equal=all(torch.equal(mine, other) for other in everywhere(mine)), rows=rows, asked=everywhere(asked), prompts=r.prompts,
                texts=everywhere(r.texts), alike=len({*everywhere(untimed(rows))}) == 1,
                marks=[trainer.task.verify(r.prompts[g], text) for g, text in zip(r.group.tolist(), r.texts)] == r.reward.tolist())

hows = dict(async_=dict(recipe="topr", mode="async", staleness=2), periodic=dict(recipe="reinforce", mode="periodic", micro_batch=4, shard=True))
for name, how in hows.items():
    trainer = Trainer(TrainConfig(**small, **how, steps=9))
    asked, rows = watch(trainer), []
    for step in range(5 if name == "async_" else 3):
        if name == "async_" and step == 2 and place()[0] == 1: os.kill(trainer.schedule.engine.engine.process.pid, signal.SIGKILL)
        rows.append(trainer.advance())
        if step == 3 and name == "async_":
            trainer.save(folder / "async")
            flying = [request["prompts"] for _, request in trainer.schedule.flying.values()]
    out[name] = facts(trainer, rows, asked)
    if name == "periodic":      # the gradient that came piece by piece, and that of the whole batch at once
        rollouts = trainer.sample()
        streamed = torch.cat([whole(g).flatten() for g in trainer.streamed[0]])
        trainer.streamed = None
        for p in trainer.trained: p.grad = None
        trainer.backward(rollouts)
        at_once = torch.cat([whole(p.grad).flatten() for p in trainer.trained])
        out[name] |= dict(apart=((streamed - at_once).norm() / at_once.norm()).item(), norm=at_once.norm().item())
    if name == "async_":
        parallel.meet()
        again = Trainer(TrainConfig(**small, **how, steps=9))
        mine = watch(again)
        again.restore(checkpoints(folder / "async")[-1])
        rows = [again.advance() for _ in range(2)]
        out["again"] = facts(again, rows, mine) | dict(flying=flying)
        again.close()
    trainer.close()

how = dict(recipe="topr", replay=60, replay_share=0.4, steps=9)
found = []
for memory in (None, 8):
    config = TrainConfig(**small, **how, replay_memory=memory, out=str(folder / str(memory)))
    trainer = Trainer(config)
    rows = [trainer.advance() for _ in range(4)]
    if memory:
        trainer.save(folder / "replay")
        parallel.meet()
        on_disk = sum(g.path is not None for g in trainer.buffer.groups), len(list(trainer.buffer.folder.iterdir()))
        parallel.meet()
        trainer = Trainer(config)
        trainer.restore(checkpoints(folder / "replay")[-1])
    rows += [trainer.advance() for _ in range(3)]
    found.append((untimed(rows), [p.detach().clone() for p in trainer.trained]))
out["replay"] = dict(rows=found[0][0] == found[1][0], weights=all(map(torch.equal, found[0][1], found[1][1])), on_disk=on_disk)
try: Trainer(TrainConfig(**{**small, "prompts_per_step": 1}, mode="async"))
except ValueError as error: out["refused"] = str(error)
if place()[0] == 0: (folder / "out.json").write_text(json.dumps(out))
parallel.leave()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(WITHIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "script.py")]
    done = subprocess.run([*command, json.dumps(SMALL), str(folder)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, **json.loads((folder / "out.json").read_text()))


@pytest.mark.parametrize("run", ["async_", "periodic", "again"])
def test_both_processes_have_the_same_batch_and_end_with_equal_weights(found, run):
    run = getattr(found, run)
    assert run["equal"] and run["alike"] and run["marks"] and run["texts"][0] == run["texts"][1]
    (one, seeds), (other, more) = (zip(*asked) for asked in run["asked"])
    assert len({*seeds, *more}) == len(seeds) + len(more)      # no engine draws what another does, nor what it drew before


def test_an_asynchronous_batch_is_made_of_a_share_of_each_engine(found):
    run = found.async_
    for one, other in zip(*run["asked"]): assert (len(one[0]), len(other[0])) == (2, 3) and not {*one[0]} & {*other[0]}
    assert any(run["prompts"] == one[0] + other[0] for one, other in zip(*run["asked"]))
    assert all(0 <= row["age"] <= 2 for row in run["rows"]) and run["rows"][-1]["age"] > 0


def test_an_engine_that_dies_is_started_again_by_its_process(found):
    assert [row["restarts"] for row in found.async_["rows"]][::4] == [0, 1]


def test_open_requests_are_in_the_checkpoint(found):
    shares = [one[0] + other[0] for one, other in zip(*found.again["asked"])]
    assert shares[:2] == found.again["flying"] and len(shares) == 4


def test_a_checkpoint_of_two_processes_goes_on_in_one(found):
    trainer = Trainer(TrainConfig(**SMALL, recipe="topr", mode="async", staleness=2, steps=9))
    try:
        trainer.restore(checkpoints(found.folder / "async")[-1])
        asked = [request["prompts"] for _, request in trainer.schedule.flying.values()]
        row = trainer.advance()
        assert trainer.fresh[-1].prompts == asked[0] and len(asked[0]) == 5 and 0 <= row["age"] <= 2
    finally: trainer.close()


def test_periodic_pieces_make_the_batchs_gradient(found):
    "Weights are in parts. Of five prompts each piece of two is answered one by one, and the last by the second process alone; all are on-policy."
    run = found.periodic
    assert [len(asked) for asked in run["asked"]] == [6, 9]
    assert run["norm"] > 1e-3 and run["apart"] < 1e-5 and all(abs(row["kl"]) < 1e-5 and row["age"] == 0 for row in run["rows"])


def test_replay_past_memory_is_what_it_is_in_memory(found):
    groups, files = found.replay["on_disk"]
    assert found.replay["rows"] and found.replay["weights"] and groups == files > 3


def test_too_few_prompts_are_refused(found):
    assert found.refused == "prompts_per_step: expected a fresh prompt for each of 2 processes, got 1"
