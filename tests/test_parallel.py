"Runs in two real processes (gloo, on the CPU), started by torchrun."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from offpolicy_rl.llm.checkpoint import checkpoints, load_checkpoint, set_weights
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.model import load
from offpolicy_rl.llm.record import read_record
from offpolicy_rl.llm.train import Trainer

pytestmark = pytest.mark.usefixtures("models")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SMALL = dict(task="sort", prompts_per_step=5, group_size=4, eval_prompts=9, eval_every=6, lr=1e-3, warmup=0)
RUN = ["train", "--recipe", "ppo", "--staleness", "3", "--steps", "30", "--save-every", "2", "--save-model", "--track", "jsonl", "--keep-rollouts", "10",
       *(word for name, x in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(x)))]
NAME = "sort-ppo-k3-s0"
USUAL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)
ARCHITECTURES = dict(gpt2=dict(n_embd=32, n_layer=2, n_head=4, n_positions=64), llama=dict(**USUAL, tie_word_embeddings=False),
                     gemma2=dict(**USUAL, head_dim=8), qwen3_moe=dict(**USUAL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def wait_for(what, seconds: float = 100):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


WITHIN = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from pathlib import Path
from offpolicy_rl.llm import cli, parallel
from offpolicy_rl.llm.checkpoint import checkpoints, weights
from offpolicy_rl.llm.config import TrainConfig
from offpolicy_rl.llm.learner import Learner
from offpolicy_rl.llm.parallel import everywhere, place
from offpolicy_rl.llm.shard import whole
from offpolicy_rl.llm.train import Trainer, save_pretrained
small, command, out = json.loads(sys.argv[1]), json.loads(sys.argv[3]), {}
written = []
def note(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & 3 and str(args[0]).startswith(sys.argv[2].removesuffix("within0")): written.append(args[0])
sys.addaudithook(note)
leave, parallel.leave = parallel.leave, lambda: None        # two commands in one process
for folder, *more in json.loads(sys.argv[4]): assert cli.main([*command, "--out", folder, *more]) == 0
asked, seeds = [], []                      # prompts that this process answered, and what with
hows = dict(recipe="ppo", staleness=3), dict(recipe="dapo"), dict(recipe="topr", replay=64), dict(recipe="topr", old="snapshot", mode="lag", staleness=2)
for i, how in enumerate(hows):
    trainer = Trainer(TrainConfig(**small, **how, steps=4))
    trainer.generator.manual_seed(i)
    sample = trainer.schedule.engine.sample
    def spy(prompts, n, *args, **more):
        if n > 1: asked.append(list(prompts)), seeds.append(more["generator"].initial_seed())
        return sample(prompts, n, *args, **more)
    trainer.schedule.engine.sample = spy
    rows = [trainer.advance() for _ in range(4)]
    r = trainer.fresh[-1]
    mine = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    numbers = [[x for name, x in row.items() if not name.endswith("seconds")] for row in rows]
    right = [trainer.task.verify(r.prompts[g], text) for g, text in zip(r.group.tolist(), r.texts)] == r.reward.tolist()
    out[how["recipe"] + str(len(out))] = dict(
        equal=all(torch.equal(mine, other) for other in everywhere(mine)), alike=everywhere(numbers)[0] == everywhere(numbers)[1], right=right,
        asked=everywhere(asked[-1]), seeds=sum(everywhere(seeds), []), prompts=r.prompts, group=r.group.tolist(),
        differ=len({tuple(x) for x in everywhere(r.texts)}))
    if len(out) == 1: evaluated, kept = trainer.evaluate(), {name: p.clone() for name, p in weights(trainer.model).items()}
    trainer.close()
for name in ("reinforce", "self_normalised_is", "topr"):        # a batch of one response: the second process has nothing to read
    learner = Learner(TrainConfig(**small, recipe=name))
    one = r.take(torch.tensor([3]))
    one.reward, one.logp_mu = torch.ones(1), one.logp_mu - 0.1
    learner.backward(one)
    shared, given = [p.grad.clone() for p in learner.trained], learner.given(one)
    policy = learner.policy(one)
    alone = torch.autograd.grad(learner.loss(policy, given)[0], learner.trained)
    out["few " + name] = dict(apart=max((a - b).norm().item() for a, b in zip(shared, alone)), norm=sum(a.norm().item() for a in alone),
                              read=(learner.read(learner.model, one)[0] - policy["logp"]).abs().max().item())
answers = Trainer(TrainConfig(**small, recipe="reinforce", seed=3)).sample()        # the batch for what follows
architectures = json.loads(sys.argv[5])
with parallel.in_turn():
    for kind, how in architectures.items():
        if not (folder := Path(sys.argv[2]) / kind).exists():
            torch.manual_seed(0)
            ends = dict(pad_token_id=trainer.tokenizer.pad_token_id, eos_token_id=trainer.tokenizer.eos_token_id, bos_token_id=None)
            AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(trainer.tokenizer), **ends, **how)).save_pretrained(folder)
            trainer.tokenizer.save_pretrained(folder)
hows = {kind: dict(recipe="ppo", model=str(Path(sys.argv[2]) / kind), micro_batch=8) for kind in architectures}
hows |= dict(reference=dict(recipe="grpo_k3", micro_batch=8), packed=dict(recipe="grpo_k3", pack=64, micro_batch=5),
            passes=dict(recipe="self_normalised_is", logp_chunk=11, micro_batch=7),
            adapter=dict(recipe="reinforce", lora=4, gradient_checkpointing=True), critic=dict(recipe="vtrace"))
for name, how in hows.items():
    found = []
    for shard in (False, True):
        learner = Learner(TrainConfig(**small, **how, shard=shard))
        one = answers.take(torch.tensor([3]))
        one.reward, one.logp_mu = torch.ones(1), one.logp_mu - 0.1
        learner.backward(one)
        few = torch.cat([whole(p.grad).flatten() for p in learner.trained])
        mine = sum((p.to_local() if shard else p).numel() for p in learner.trained)
        rows = [learner.update(answers) for _ in range(3)]
        grads, weights_ = (torch.cat([whole(x).detach().flatten() for x in xs]) for xs in ([p.grad for p in learner.trained], learner.trained))
        found.append((few, grads, weights_, torch.tensor([list(row.values()) for row in rows]), mine))
    out["shard " + name] = dict(norms=[x.norm().item() for x in found[0][:2]], parts=everywhere(found[1][4]), all=found[0][4],
                                apart=[((a - b).norm() / b.norm()).item() for a, b in zip(found[1][:4], found[0][:4])])
out["held"] = {}
hows = dict(recipe="decoupled_ppo", mode="lag", staleness=2, old="snapshot", engine_dtype="bfloat16", steps=9, keep_checkpoints=2)
for shard in (False, True):
    config, folder = TrainConfig(**small, **hows, shard=shard), Path(sys.argv[2]) / f"held-{shard}"
    trainers = [Trainer(config)]
    for step in range(5):
        rows = [[x for name, x in trainer.advance().items() if not name.endswith("seconds")] for trainer in trainers]
        if step == 2:
            trainers[0].save(folder)
            parallel.meet()
            trainers.append(Trainer(config))
            trainers[1].restore(checkpoints(folder)[-1])
    ends = [torch.cat([whole(p).detach().flatten() for p in trainer.trained]) for trainer in trainers]
    out["held"][str(shard)] = rows[0] == rows[1] and torch.equal(*ends)
    save_pretrained(trainers[1], Path(sys.argv[2]) / f"saved-{shard}")
trainer = Trainer(TrainConfig(**{**small, "eval_every": 1}, recipe="decoupled_ppo", old="snapshot", shard=True, steps=3))
out["evaluated in parts"] = []
for _ in range(3):      # after each evaluation the engine still hears of the new version
    trainer.advance()
    out["evaluated in parts"].append((trainer.fresh[-1].version.unique().tolist(), sorted(trainer.old.kept), trainer.record["steps"]["kl"][-1]))
for name, how in dict(prompts_per_step=dict(prompts_per_step=1), eval_prompts=dict(eval_prompts=1), compile=dict(shard=True, compile=True),
                      shard=dict(shard=True, dtype="bfloat16")).items():
    try: Trainer(TrainConfig(**{**small, **how}))
    except ValueError as error: out[name] = str(error)
trainer = Trainer(TrainConfig(**small, staleness="offline", out=sys.argv[2]))
trainer.advance()
with torch.no_grad(): trainer.trained[0].fill_(float("nan"))
try: trainer.advance()
except (FloatingPointError, ValueError) as error: out["stopped"] = everywhere(str(error))
out["written"] = everywhere(len(written))
if place()[0] == 0:
    save_file(kept, sys.argv[2] + "/kept.safetensors")
    json.dump(dict(out, evaluated=evaluated), open(sys.argv[2] + "/out.json", "w"))
leave()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, models):
    "A run of the command that is killed; then, in two more processes, the same resumed and uninterrupted, and what WITHIN looks at."
    killed, whole, within = (tmp_path_factory.mktemp(name) for name in ("killed", "whole", "within"))
    process = subprocess.Popen([*TORCHRUN, "-m", "offpolicy_rl", *RUN, "--out", str(killed)], stderr=subprocess.DEVNULL)
    saved = killed / f"{NAME}.checkpoints"
    wait_for(lambda: process.poll() is not None or sorted(saved.glob("step-*"))[-1:] >= [saved / "step-000004"])
    os.kill(children(process.pid)[-1], signal.SIGKILL)       # the one that only computes: the other waits for it, and must not wait forever
    code, left = process.wait(timeout=60), sorted(path.name for path in killed.iterdir())
    (within / "script.py").write_text(WITHIN)
    rest = {k: v for k, v in SMALL.items() if k != "lr"}
    asked = [*map(json.dumps, (rest, RUN, [[str(killed), "--resume"], [str(whole)]], ARCHITECTURES))]
    done = subprocess.run([*TORCHRUN, str(within / "script.py"), asked[0], str(within), *asked[1:]], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((within / "out.json").read_text())
    return SimpleNamespace(killed=killed, whole=whole, left=left, code=code, said=done.stdout, folder=within, found=found)


def test_when_one_process_dies_the_others_end_too_and_leave_a_checkpoint(runs):
    assert runs.code != 0 and f"{NAME}.checkpoints" in runs.left and f"{NAME}.model" not in runs.left


def test_a_killed_run_of_two_processes_ends_with_the_same_bits(runs):
    killed, whole = runs.killed, runs.whole
    weights = [(folder / f"{NAME}.model" / "model.safetensors").read_bytes() for folder in (killed, whole)]
    assert weights[0] == weights[1]
    one, other = (read_record(folder / f"{NAME}.json") for folder in (killed, whole))
    for key in ("evaluations", "samples", "config", "recipe", "updates"): assert one[key] == other[key]
    for name in one["steps"].keys() | other["steps"].keys():
        if not name.endswith("seconds"): assert one["steps"][name] == other["steps"][name], name


def test_one_process_writes_and_speaks(runs):
    whole, said = runs.whole, runs.said
    assert sorted(path.name for path in whole.iterdir()) == [f"{NAME}.{kind}" for kind in ("json", "jsonl", "model", "rollouts")]
    assert said.count("record: ") == 2      # two runs
    assert runs.found["written"][0] > 10 and runs.found["written"][1] == 0
    rows = [json.loads(line)["step"] for line in (whole / f"{NAME}.jsonl").read_text().splitlines()]
    assert rows == list(range(31))
    assert sorted(path.name for path in (whole / f"{NAME}.rollouts").iterdir()) == [f"step-{i:06d}.jsonl" for i in (10, 20, 30)]
    record = read_record(whole / f"{NAME}.json")
    assert record["updates"] == 30 and record["config"]["device"] == "cpu" and len(record["samples"]) == 8


@pytest.mark.parametrize("run", ["ppo0", "dapo1", "topr2", "topr3"])
def test_both_processes_have_the_same_batch_and_end_with_equal_weights(runs, run):
    found = runs.found[run]
    assert found["equal"] and found["alike"] and found["right"] and found["differ"] == 1
    assert [len(share) for share in found["asked"]] == ([1, 2] if run == "topr2" else [2, 3])
    assert len(set(found["seeds"])) == len(found["seeds"])       # no process draws what another does, nor what it drew before
    assert [p for share in found["asked"] for p in share] == found["prompts"]
    assert found["group"] == [g for g in range(len(found["prompts"])) for _ in range(4)]


def test_greedy_evaluation_is_that_of_one_process(runs):
    folder, found = runs.folder, runs.found
    trainer = Trainer(TrainConfig(**SMALL, recipe="ppo"))
    set_weights(trainer.model, load_file(folder / "kept.safetensors"))
    entry, answers = trainer.evaluate()
    assert found["evaluated"][0]["greedy"] == entry["greedy"]
    assert [(a["prompt"], a["greedy"]) for a in found["evaluated"][1]] == [(a["prompt"], a["greedy"]) for a in answers]
    assert len({a["greedy"]["text"] for a in answers}) > 4


@pytest.mark.parametrize("field,expected", [("prompts_per_step", "2 processes, got 1"), ("eval_prompts", "2 processes, got 1"),
                                            ("compile", "False with shard, got True"),
                                            ("shard", "dtype='float32', with autocast='bfloat16' or without, got 'bfloat16'")])
def test_what_several_processes_cannot_do_is_said(runs, field, expected):
    assert runs.found[field].startswith(f"{field}: ") and expected in runs.found[field]


def test_a_run_that_stops_leaves_its_batch_once(runs):
    folder, found = runs.folder, runs.found
    assert all(error.startswith("step 1: ") and error.endswith(f"{folder}/sort-topr-offline-s0.stopped.jsonl") for error in found["stopped"])
    assert len((folder / "sort-topr-offline-s0.stopped.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("recipe", ["reinforce", "self_normalised_is", "topr"])
def test_a_batch_may_have_fewer_responses_than_there_are_processes(runs, recipe):
    found = runs.found[f"few {recipe}"]
    assert found["read"] == 0 and found["norm"] > 1e-3 and found["apart"] <= 1e-6 * found["norm"]


@pytest.mark.parametrize("case", ["reference", "packed", "passes", "adapter", "critic", *ARCHITECTURES])
def test_with_weights_in_parts_updates_are_those_with_whole_ones(runs, case):
    "Gradients of a batch and of a single response, the weights after three updates and what these report: equal but for the order of float32 sums."
    found = runs.found[f"shard {case}"]
    assert min(found["norms"]) > 1e-3 and max(found["apart"]) < 1e-5
    assert sum(found["parts"]) == found["all"] and max(found["parts"]) < 0.52 * found["all"]


@pytest.mark.parametrize("shard", ["False", "True"])
def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(runs, shard):
    assert runs.found["held"][shard]


def test_checkpoint_and_saved_model_do_not_tell_that_weights_were_in_parts(runs):
    (tensors, _), (other, _) = (load_checkpoint(checkpoints(runs.folder / f"held-{shard}")[-1]) for shard in (True, False))
    assert tensors.keys() == other.keys() >= {"model", "optimizer", "lag-000002", "old-000000"}
    for file, named in other.items():
        assert tensors[file].keys() == named.keys()
        for name, x in named.items(): assert tensors[file][name].shape == x.shape and (tensors[file][name] - x).norm() <= 1e-5 * x.norm(), (file, name)
    mine, plain = (dict(load(str(runs.folder / f"saved-{shard}"))[0].named_parameters()) for shard in (True, False))
    assert mine.keys() == plain.keys() and all((mine[name] - x).norm() < 1e-5 * x.norm() for name, x in plain.items())


def test_an_evaluation_leaves_the_engine_its_version(runs):
    "On-policy with weights in parts the engine that evaluates is the one that samples: its samples are the policy's and their weights are stored."
    for step, (versions, stored, kl) in enumerate(runs.found["evaluated in parts"]): assert versions == [step] and step in stored and abs(kl) < 1e-5


def test_weights_in_parts_need_several_processes():
    with pytest.raises(ValueError, match="shard: expected several processes .* got one"): Trainer(TrainConfig(**SMALL, shard=True))
