"The command line: what a newcomer types, and what happens when it cannot be done."

import contextlib
import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from offpolicy_rl.core import catalogue
from offpolicy_rl.llm import record as llm_record, tasks as llm_tasks
from offpolicy_rl.llm.cli import COMMANDS, config_values, main, parse
from offpolicy_rl.llm.model import embedded_path
from offpolicy_rl.llm.record import read_record
from offpolicy_rl.llm.tasks import Sort
from offpolicy_rl.recipes import recipes, systems

SMALL = "--steps 4 --prompts-per-step 4 --group-size 4 --eval-prompts 16 --eval-every 2"


pytestmark = pytest.mark.usefixtures("models")


@pytest.fixture
def offpolicy(capsys):
    "Run a command line in this process: exit code, stdout, stderr."
    def run(line: str):
        code = main(shlex.split(line))
        return code, *capsys.readouterr()
    return run


def start(line: str, **more) -> subprocess.Popen:
    "Start a command line as a process of its own, with its children in a group."
    return subprocess.Popen([sys.executable, "-m", "offpolicy_rl", *shlex.split(line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


def test_list_shows_everything(offpolicy):
    code, out, err = offpolicy("list")
    assert code == 0 and all(row.name in out for row in catalogue())
    code, out, err = offpolicy("list --recipes")
    assert code == 0 and all(f"\n{name} " in out for name in recipes())
    code, out, err = offpolicy("list --systems")
    assert code == 0 and len(out.splitlines()) == len(systems()) + 1


@pytest.mark.parametrize("line, words", [("--help", "train compare report list"), ("train --help", "--recipe --staleness --task --out --neg-cap"),
                                         ("train --recipe ppo --help", "--eps-low --eps-high within"), ("compare --help", "--recipes --seeds --jobs"),
                                         ("report --help", "report.html"), ("list --help", "--systems")])
def test_help_says_what_there_is(line, words, capsys):
    with pytest.raises(SystemExit) as stop: main(shlex.split(line))
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in out for word in words.split())


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_has_its_knobs_as_flags(name):
    for knob, x in recipes()[name].knobs.items():
        if x.range is None or not isinstance(x.default, float): continue
        flag = "--" + knob.replace("_", "-").replace(".", "-")
        assert vars(parse(["train", "--recipe", name, flag, str(x.default)]))[f"knob:{knob}"] == x.default


@pytest.mark.parametrize("line, message", [
    ("train --recipe nonesuch", "topr"), ("compare --recipes topr nonesuch", "topr"), ("train --task chess", "unknown task 'chess': known are"),
    ("train --model /no/such/model", "model '/no/such/model' is not 'embedded'"), ("train --neg-cap much", "--neg-cap"),
    ("train --neg-cap -1", "neg_cap: expected a number in [0, inf], got -1.0"), ("train --group-size 1", "group_size: recipe 'topr' compares"),
    ("train --staleness 0", "expected a number of updates of at least 1, or offline"),
    ("train --steps 0", "steps: expected a number of at least 1"), ("train --lr -1", "lr: expected a positive number"), ("train --device cuda:77", "cuda:77"),
    ("train --recipe ppo --neg-cap 1", "--neg-cap"), ("train --engine vllm --engine-options max_len", "expected NAME=VALUE, got 'max_len'"),
    ("compare --jobs 0", "jobs: expected at least 1"), ("compare --seeds 0 0", "two runs have the same"),
    ("report /no/such/folder", "no run records"), ("fly", "invalid choice: 'fly'"), ("", "required")])
def test_what_a_user_can_put_right_is_one_line(line, message, offpolicy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = offpolicy(line)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("offpolicy: ") and message in err
    assert os.listdir(tmp_path) in ([], ["runs"]) and not list(tmp_path.rglob("*.json"))


class Fragile(Sort):
    "Its verifier does not survive the first response, and says so at length."
    name, inline = "fragile", False
    def verify(self, prompt, response): raise KeyError("no answer is known,\nneither here\nnor there")


def test_options_of_an_engine_are_read_by_name():
    line = "train --engine vllm --engine-options max_len=4096 gpu_memory_utilization=0.3 eager=true quantization=fp8"
    values = config_values(parse(line.split()))
    assert values["engine_options"] == dict(max_len=4096, gpu_memory_utilization=0.3, eager=True, quantization="fp8")


def test_a_verifier_that_raises_an_error_is_one_line(offpolicy, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_tasks, "_tasks", {**llm_tasks.tasks(), "fragile": Fragile()})
    code, out, err = offpolicy(f"train --task fragile --model {embedded_path(Sort())} {SMALL} --out {tmp_path}")
    assert (code, out, os.listdir(tmp_path)) == (1, "", []) and err.count("\n") == 1 and err.startswith("offpolicy: task 'fragile': its verifier failed on '")
    assert "an answer to '" in err and "KeyError" in err and "nor there" in err


def engines() -> list[int]:
    "Processes of engines that this one has started."
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):       # it has ended meanwhile
            found += [int(pid) for pid in path.read_text().split() if b"llm.worker import serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc")
def test_an_engine_that_dies_again_and_again_is_one_line(offpolicy, tmp_path):
    killed, over = [], threading.Event()
    def kill():
        while not over.wait(0.01):
            for pid in engines():
                with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    thread = threading.Thread(target=kill)
    thread.start()
    try: code, out, err = offpolicy(f"train --mode periodic {SMALL} --out {tmp_path}")
    finally:
        over.set()
        thread.join()
    assert (code, out) == (1, "") and err.startswith("offpolicy: the engine's process died 3 times in a row, the last time with SIGKILL; its log ends:")
    assert err.count("\n") == 1 and len(set(killed)) == 3 and not engines() and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_keeps_its_traceback(offpolicy, monkeypatch, error):
    def broken(args, command): raise error
    monkeypatch.setitem(COMMANDS, "list", broken)
    with pytest.raises(type(error), match="a bug"): offpolicy("list")


def test_a_device_name_that_is_none_is_one_line(offpolicy, tmp_path):
    code, out, err = offpolicy(f"train --device toaster --out {tmp_path}")
    assert code == 2 and err.count("\n") == 1 and "toaster" in err


def test_train_writes_a_record_once(offpolicy, tmp_path):
    line = f"train --recipe topr --neg-cap 2 --staleness 2 {SMALL} --out {tmp_path}"
    code, out, err = offpolicy(line)
    path = tmp_path / "sort-topr-k2-s0.json"
    assert code == 0 and str(path) in out and "topr" in out
    record = read_record(path)
    assert record["command"] == f"offpolicy {line}" and record["recipe"]["knobs"]["neg_cap"] == 2 and record["updates"] == 4
    when = path.stat().st_mtime_ns
    assert offpolicy(line)[0] == 0 and path.stat().st_mtime_ns == when  # finished: not run again
    code, out, err = offpolicy(line.replace("--neg-cap 2", "--neg-cap 3"))
    assert code == 2 and "belongs to another configuration" in err and path.stat().st_mtime_ns == when
    assert offpolicy(line + " --afresh")[0] == 0 and path.stat().st_mtime_ns > when


def test_compare_ends_with_a_table_and_a_report(offpolicy, tmp_path):
    line = f"compare --recipes reinforce topr --staleness 1 offline --seeds 0 --jobs 2 {SMALL} --out {tmp_path}"
    process = start(line)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    names = [f"sort-{r}-{k}-s0.json" for r in ("reinforce", "topr") for k in ("k1", "offline")]
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "report.html"])
    assert out.strip().endswith(f"report: {tmp_path}/report.html") and out.count("\n") == 1 + 4 + 1
    (tmp_path / names[0]).unlink()
    whole = {name: (tmp_path / name).stat().st_mtime_ns for name in names[1:]}
    assert offpolicy(line)[0] == 0
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in names[1:]} == whole and (tmp_path / names[0]).exists()
    assert read_record(tmp_path / names[0])["config"]["threads"] == 1


def test_report_again(offpolicy, tmp_path):
    assert offpolicy(f"train {SMALL} --out {tmp_path}")[0] == 0
    code, out, err = offpolicy(f"report {tmp_path} --to {tmp_path}/page.html")
    assert code == 0 and f"report: {tmp_path}/page.html" in out and (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_run_killed_in_the_middle_leaves_no_record(tmp_path):
    process = start(f"train --steps 100000 --save-every 5 --prompts-per-step 2 --group-size 4 --eval-prompts 16 --out {tmp_path}")
    folder, deadline = tmp_path / "sort-topr-k1-s0.checkpoints", time.monotonic() + 120
    while not (folder.is_dir() and any(folder.glob("step-*"))):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert sorted(os.listdir(tmp_path)) == [".sort-topr-k1-s0.lock", folder.name]       # nobody holds that lock


def test_a_folder_that_cannot_be_written(offpolicy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, out, err = offpolicy(f"train {SMALL} --out {tmp_path}/file/runs")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "file" in err
    if os.geteuid() == 0: return  # the superuser may write everywhere
    (tmp_path / "locked").mkdir(mode=0o555)
    code, out, err = offpolicy(f"train {SMALL} --out {tmp_path}/locked")
    assert code == 2 and "Permission denied" in err and os.listdir(tmp_path / "locked") == []


def test_a_full_disk(offpolicy, tmp_path, monkeypatch):
    def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(llm_record.os, "fsync", full)
    code, out, err = offpolicy(f"train {SMALL} --out {tmp_path}")
    assert code == 2 and err.strip().endswith("No space left on device") and os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_stdout_that_is_full_is_one_line():
    with open("/dev/full", "w") as full:
        process = subprocess.run([sys.executable, "-m", "offpolicy_rl", "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode != 0 and "Traceback" not in process.stderr


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.run(f"{shlex.quote(sys.executable)} -m offpolicy_rl list --systems | head -1", shell=True, capture_output=True, text=True)
    assert "family" in process.stdout and "Traceback" not in process.stderr


def test_records_are_json_without_a_temporary_file(offpolicy, tmp_path):
    assert offpolicy(f"train {SMALL} --out {tmp_path}")[0] == 0
    assert os.listdir(tmp_path) == ["sort-topr-k1-s0.json"]
    json.loads((tmp_path / "sort-topr-k1-s0.json").read_text())


@pytest.mark.parametrize("command", ["compare", "scale"])
def test_what_starts_processes_itself_is_started_once(command, offpolicy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = offpolicy(command)
    assert code != 0 and err == f"offpolicy: {command}: it starts processes itself; expected to be started once, got 2 times (WORLD_SIZE)\n"
