"Trackers: what a run logs is read back with each library's own reader."

import gc
import json
import math
import resource
import shutil
import struct
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from offpolicy_rl.llm import trackers as llm_trackers
from offpolicy_rl.llm.record import add_step, new_record, read_record, thinned
from offpolicy_rl.llm.trackers import LIBRARIES, JSONLines, check_trackers, evaluation_row, read_rows, rows, tracker, trackers

ROOT = Path(__file__).resolve().parents[1]
RUN = "sort-topr-k8-s0"
CONFIG = dict(recipe="topr", lr=3e-4, knobs={}, micro_batch=None, betas=[0.9, 0.95])
HERE = [name for name, package in LIBRARIES.items() if package is None or find_spec(package)]


@pytest.fixture(autouse=True, scope="module")
def apart(tmp_path_factory):
    "Nothing goes to a network, to the user's account or into the user's folders."
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR"): patch.delenv(name, raising=False)
        values = dict(HOME=home, TRACKIO_DIR=home / "trackio", WANDB_CONFIG_DIR=home, WANDB_CACHE_DIR=home, WANDB_DATA_DIR=home, NETRC=home / "netrc",
                      WANDB_MODE="offline", WANDB_SILENT="true")
        for name, value in values.items(): patch.setenv(name, str(value))
        yield


def numbers(step: int) -> dict[str, float]: return dict(reward=step / 7, kl=1e-9 * step, **{"evaluation/sampled": step / 16})


def wandb_messages(path: Path) -> list:
    "wandb's own messages in an offline file, which has LevelDB's log format. Its process writes them: the last may come a moment after `finish`."
    from wandb.proto.wandb_internal_pb2 import Record
    for _ in range(100):
        data, at, message, messages = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7: at += 32768 - at % 32768
            _, size, kind = struct.unpack("<IHB", data[at:at + 7])
            message, at = message + data[at + 7:at + 7 + size], at + 7 + size
            if kind in (1, 4) and at <= len(data): messages, message = [*messages, Record.FromString(message)], b""
        if messages and messages[-1].HasField("exit"): return messages
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def wandb_parts(folder: Path) -> list[tuple[Any, dict[str, Any], list[dict]]]:
    "The run, the configuration and the rows of each part of an offline run, in the order of their start."
    parts = []
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        messages = wandb_messages(path)
        run = next(m.run for m in messages if m.HasField("run"))
        history = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in m.history.item} for m in messages if m.HasField("history")]
        parts.append((run, {i.key: json.loads(i.value_json) for i in run.config.update}, history))
    return sorted(parts, key=lambda part: part[0].start_time.ToNanoseconds())


def event_files(folder: Path) -> EventAccumulator:
    "A run's event files, read."
    return EventAccumulator(str(folder / f"{RUN}.tensorboard"), size_guidance=dict(scalars=0)).Reload()


def steps_and_rewards(name: str, folder: Path) -> list[tuple[int, float]]:
    "What the tracker's own reader says of the run, in the order of the steps that it shows."
    if name == "jsonl": return [(row["step"], row["reward"]) for row in read_rows(folder / f"{RUN}.jsonl")]
    if name == "tensorboard":
        found = [(e.step, e.value) for e in event_files(folder).Scalars("reward")]
        served = plugin_event_accumulator.EventAccumulator(str(folder / f"{RUN}.tensorboard"), tensor_size_guidance=dict(scalars=0)).Reload()
        assert [(e.step, e.tensor_proto.float_val[0]) for e in served.Tensors("reward")] == found, "TensorBoard's own server shows the same"
        return found
    if name == "wandb": return [(row["_step"], row["reward"]) for _, _, part in wandb_parts(folder) for row in part]
    from trackio.sqlite_storage import SQLiteStorage
    run = f"{RUN}-{(folder / f'{RUN}.trackio-id').read_text().strip()}"
    return [(row["step"], row["reward"]) for row in SQLiteStorage.get_logs(llm_trackers.PROJECT, run)]


def log(name: str, folder: Path, steps: range, start: int = 0, shift: int = 0) -> None:
    one = tracker(name, folder, RUN, CONFIG, start)
    for step in steps: one.log(step, numbers(step + shift))
    one.close()


@pytest.mark.parametrize("name", HERE)
def test_a_run_is_read_back(name, tmp_path):
    log(name, tmp_path, range(9))
    found = steps_and_rewards(name, tmp_path)
    assert [step for step, _ in found] == list(range(9))
    worst = dict(jsonl=5e-5, tensorboard=2.0**-24).get(name, 0)      # half a unit of the fifth digit; of single precision
    assert all(math.isclose(x, step / 7, rel_tol=worst) for step, x in found)


@pytest.mark.parametrize("name", HERE)
def test_a_run_that_goes_on_is_one_run(name, tmp_path):
    "Killed after update 6, on again from the checkpoint of update 3; what the second part says of 4 to 6 differs, to tell which is kept."
    log(name, tmp_path, range(7))
    if name == "tensorboard": time.sleep(1.01)                       # event files are read in the order of the second in their name
    log(name, tmp_path, range(4, 9), start=3, shift=100)
    found = [(step, round(7 * x)) for step, x in steps_and_rewards(name, tmp_path)]
    again = [(step, step + 100) for step in range(4, 9)]
    if name == "wandb":                                              # offline a part knows nothing of the other: `wandb sync` joins them by their identity
        first, second = wandb_parts(tmp_path)
        assert first[0].run_id == second[0].run_id and found == [(step, step) for step in range(7)] + again
    elif name == "trackio": assert found == [(step, step) for step in range(7)] + again[3:]
    else: assert found == [(step, step) for step in range(4)] + again


@pytest.mark.parametrize("name", HERE)
def test_a_run_made_anew_is_another_run(name, tmp_path):
    log(name, tmp_path, range(7))
    log(name, tmp_path, range(3), shift=100)
    found = [(step, round(7 * x)) for step, x in steps_and_rewards(name, tmp_path)]
    if name == "wandb":
        first, second = wandb_parts(tmp_path)
        assert first[0].run_id != second[0].run_id
        found = found[7:]
    assert found == [(step, step + 100) for step in range(3)]


def test_wandb_has_name_project_and_configuration(tmp_path):
    pytest.importorskip("wandb")
    two = [tracker("wandb", tmp_path / x, RUN, CONFIG) for x in "ab"]    # open at one time
    for step in range(2): two[0].log(step, numbers(step))
    for one in two: one.close()
    (run, config, history), = wandb_parts(tmp_path / "a")
    assert wandb_parts(tmp_path / "b")[0][0].run_id != run.run_id
    assert (run.project, run.display_name) == ("offpolicy_rl", RUN)
    assert {name: config[name] for name in CONFIG} == CONFIG
    assert history[1]["evaluation/sampled"] == 1 / 16


def test_trackio_has_the_configuration(tmp_path):
    trackio = pytest.importorskip("trackio")
    log("trackio", tmp_path, range(2))
    name = f"{RUN}-{(tmp_path / f'{RUN}.trackio-id').read_text().strip()}"
    run, = [run for run in trackio.Api().runs("offpolicy_rl") if run.name == name]
    assert {name: run.config[name] for name in CONFIG} == CONFIG


def test_wandb_without_an_account_is_an_error_at_once(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()                                                 # it reads its environment once in a process
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ValueError, match="track: wandb did not start: No API key"): trackers(["jsonl", "wandb"], tmp_path, RUN, CONFIG)
    wandb.teardown()


def test_tensorboard_shows_the_configuration(tmp_path):
    log("tensorboard", tmp_path, range(2))
    text, = event_files(tmp_path).Tensors("config/text_summary")[0].tensor_proto.string_val
    assert json.loads(text) == CONFIG


def test_each_line_is_on_its_way_before_the_next(tmp_path):
    lines = JSONLines(tmp_path / "run.jsonl")
    for step in range(1, 4):
        lines.log(step, dict(reward=math.nan, kl=math.inf, loss=1 / 3))
        assert read_rows(tmp_path / "run.jsonl")[-1] == dict(step=step, reward=None, kl=None, loss=0.33333)


@pytest.mark.parametrize("cut", ['{"step":4,"rew', '{"step":4}', "\0\0\0"])
def test_a_line_that_a_crash_cut_short_is_left_out(cut, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step":3,"reward":1.0}\n' + cut)
    assert read_rows(path) == [dict(step=3, reward=1.0)]
    lines = JSONLines(path, step=3)
    lines.log(4, dict(reward=0.5))
    assert path.read_text() == '{"step":3,"reward":1.0}\n{"step":4,"reward":0.5}\n'


@pytest.mark.parametrize("line", ["x", "[1]", '{"reward":1}', '{"step":"4"}', '{"step":null}', ""])
def test_what_is_no_row_is_named(line, tmp_path):
    (tmp_path / "run.jsonl").write_text('{"step":1}\n' + line + '\n{"step":2}\n')
    with pytest.raises(ValueError, match="run.jsonl: line 2 is no row"): JSONLines(tmp_path / "run.jsonl", step=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread says it too
def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path):
    one = trackers(["jsonl", "tensorboard"], tmp_path, RUN, CONFIG)
    one.log(1, numbers(1))
    one.named["tensorboard"].writer.flush()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.warns(RuntimeWarning) as seen:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        try:
            for step in range(2, 300): one.log(step, numbers(step))
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = sorted(str(w.message) for w in seen)
    assert len(said) == 2 and "tracker jsonl did not log update 2 (OSError: [Errno 27] File too large); the run goes on" in said[0]
    assert "tracker tensorboard did not log update" in said[1]
    for step in (300, 301): one.log(step, numbers(step))
    one.close()
    lines = [step for step, _ in steps_and_rewards("jsonl", tmp_path)]
    assert lines[:3] == [1, 2, 3] and lines[-2:] == [300, 301] and len(lines) < 301, "a few rows wait in memory for the disk, the others are lost"
    assert steps_and_rewards("tensorboard", tmp_path)[0][0] == 1, "what was there before can be read"


def test_an_interrupt_is_not_swallowed():
    class Interrupted:
        def log(self, step, row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): llm_trackers.Trackers(dict(jsonl=Interrupted())).log(1, {})


def test_what_cannot_start_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="track: expected some of jsonl, tensorboard, wandb, trackio, got 'mlflow'"): check_trackers(["jsonl", "mlflow"])
    with pytest.raises(ValueError, match="track: expected a tuple of names, got 'jsonl'"): check_trackers("jsonl")
    for name in ("tensorboard", "wandb", "trackio"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match=f"needs the pip package {name}, which is not installed"): tracker(name, tmp_path, RUN, CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError): tracker("jsonl", tmp_path / "file", RUN, CONFIG)


def test_a_folder_of_the_librarys_name_is_not_the_library(tmp_path, monkeypatch):
    "wandb writes a folder `wandb`, from which Python would import a package of nothing."
    (tmp_path / "nothing_of_that_name").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(LIBRARIES, "wandb", "nothing_of_that_name")
    with pytest.raises(ValueError, match="is not installed"): check_trackers(["wandb"])


@pytest.fixture
def all_closed():
    "Fails where a file was left open."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    assert not [str(w.message) for w in seen if issubclass(w.category, ResourceWarning)]


def test_those_before_a_failure_are_closed(tmp_path, all_closed):
    (tmp_path / f"{RUN}.tensorboard").write_text("in the way of the folder")
    with pytest.raises(OSError): trackers(["jsonl", "tensorboard"], tmp_path, RUN, CONFIG)


def test_a_name_asked_for_twice_is_one_tracker(tmp_path, all_closed):
    one = trackers(["jsonl", "jsonl"], tmp_path, RUN, CONFIG)
    one.log(1, numbers(1))
    one.close()
    assert len(read_rows(tmp_path / f"{RUN}.jsonl")) == 1


@pytest.mark.parametrize("window", [1, 3, 10])
def test_rows_of_a_record(window):
    record = new_record({}, {})
    for step in range(1, 8): add_step(record, dict(reward=float(step)) | (dict(late=1.0) if step > 5 else {}))
    record["evaluations"] = [dict(step=0, sampled=0.1), dict(step=5, sampled=0.2, greedy=0.3)]
    found = dict(rows(thinned(record, window)))
    assert evaluation_row(record, 5) == {"evaluation/sampled": 0.2, "evaluation/greedy": 0.3} and evaluation_row(record, 4) == {}
    assert found[0] == {"evaluation/sampled": 0.1} and found[5]["evaluation/greedy"] == 0.3 and list(found) == sorted(found)
    rewards = {step: row["reward"] for step, row in found.items() if "reward" in row}
    assert rewards == {1: dict(enumerate(map(float, range(1, 8)), 1)), 3: {3: 2.0, 6: 5.0, 7: 7.0}, 10: {7: 4.0}}[window]
    assert sum("late" in row for row in found.values()) == {1: 2, 3: 2, 10: 1}[window]


def test_a_recorded_run_can_be_shown(tmp_path):
    path = ROOT / "records" / "sort" / f"{RUN}.json"
    record = read_record(shutil.copy(path, tmp_path))
    one = trackers(["tensorboard"], tmp_path, RUN, record["config"])
    for step, row in rows(record): one.log(step, row)
    one.close()
    events = event_files(tmp_path)
    assert [e.step for e in events.Scalars("evaluation/sampled")] == [e["step"] for e in record["evaluations"]]
    assert [e.value for e in events.Scalars("reward")] == pytest.approx(record["steps"]["reward"], rel=2.0**-23)


def test_a_run_is_tracked_as_it_goes_and_a_resumed_one_is_one_run(models, tmp_path):
    from offpolicy_rl.llm.config import TrainConfig, record_path
    from offpolicy_rl.llm.train import train
    config = TrainConfig(task="sort", prompts_per_step=2, group_size=4, steps=6, eval_every=3, eval_prompts=4, save_every=2, out=str(tmp_path),
                         track=("jsonl",))

    class Killed(BaseException): pass

    def stop(step, row):
        if step == 5: raise Killed
    with pytest.raises(Killed): train(config, stop)
    train(config)
    logged = read_rows(tmp_path / "sort-topr-k1-s0.jsonl")
    kept = dict(rows(read_record(record_path(config))))
    assert [row["step"] for row in logged] == list(range(7)) == sorted(kept)
    for row in logged:
        name = "evaluation/sampled" if row["step"] in (0, 3, 6) else "reward"
        assert row[name] == pytest.approx(kept[row["step"]][name], rel=1e-4)
    with pytest.raises(ValueError, match="^track: expected a folder"): TrainConfig(track=("jsonl",))
