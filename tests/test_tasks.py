"""Tasks by name, their splits and verifiers, verification with a time limit, conversations with a tool.

FUZZ in the environment says how many odd texts each verifier sees: 1,500 by default (a third of them where one takes milliseconds);
FUZZ_SEED which ones. FUZZ=100000 is the long run."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from oddities import ANGLES_THAT_DIFFER, FORMULAS_THAT_DIFFER, SAME_ANGLES, SAME_FORMULAS, survive
from reasoning_gym.factory import DATASETS

from offpolicy_rl.llm import model as llm_model
from offpolicy_rl.llm import tasks as llm_tasks
from offpolicy_rl.llm.engine import HFEngine, token_logps
from offpolicy_rl.llm.equality import antiderivative, is_formula, polynomial, same, same_polynomial
from offpolicy_rl.llm.formula import formula
from offpolicy_rl.llm.gym import EVALUATES, HASH_ORDERED, OURS, Gym, is_finite, is_literal, is_sum, is_tame, makes
from offpolicy_rl.llm.model import ALPHABET, char_tokenizer, demonstrations, encode, load, warm_start_key
from offpolicy_rl.llm.rollouts import joined
from offpolicy_rl.llm.tasks import TURN, Countdown, Sort, Task, draw, family, held_out, settings, task
from offpolicy_rl.llm.tool import Calculator, Conversation, ToolTask, formula_value, reply_ids, respond, rollout
from offpolicy_rl.llm.verify import Judge, close_judges, verify_all
from offpolicy_rl.llm.word_math import MAGNITUDES, TextMath, final_answer, number, same_by_math_verify

FUZZ, FUZZ_SEED = int(os.environ.get("FUZZ", 1500)), int(os.environ.get("FUZZ_SEED", 0))
BASIC = "gym:basic_arithmetic,max_terms=2,max_digits=1,whitespace=no_space"


pytestmark = pytest.mark.usefixtures("models", "no_judges")


@pytest.fixture(scope="module")
def no_judges():
    "No process is left."
    yield
    close_judges()


@pytest.fixture
def names(monkeypatch):
    "The known tasks, put back afterwards."
    monkeypatch.setattr(llm_tasks, "_tasks", dict(llm_tasks._tasks))
    monkeypatch.setattr(llm_tasks, "_families", dict(llm_tasks._families))


def seeded(n: int) -> torch.Generator: return torch.Generator().manual_seed(n)


def word_problem(rng: random.Random) -> dict[str, str]:
    a, b, c = rng.randint(2, 30), rng.randint(2, 9), rng.randint(2, 12)
    who, what = rng.choice(["Ada", "Bela", "Chen"]), rng.choice(["apples", "stamps"])
    return dict(question=f"{who} has {a} {what} and buys {b} bags of {c}. How many {what} are these?",
        answer=f"{b}*{c}={b * c}, and {a} more.\n#### {a + b * c:,}")


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = random.Random(0)
    return jsonl(tmp_path_factory.mktemp("table") / "problems.jsonl", [word_problem(rng) for _ in range(80)])


@pytest.fixture(scope="module")
def formulas(tmp_path_factory):
    answers = ["x^2+2x+1", r"\frac{\sqrt{3}}{3}", r"\{1,2\}", r"\text{even}", r"[0,\infty)"]
    return jsonl(tmp_path_factory.mktemp("table") / "formulas.jsonl",
        [dict(question=f"Question {i}?", answer=rf"It is \boxed{{{a}}}.") for i, a in enumerate(answers)])


# names

def test_difficulty_is_part_of_a_name(names):
    assert task("sort12") == Sort(12) and task("countdown4") == Countdown(4) and task("calculator5") == Calculator(5) and task("calculator") == Calculator(3)
    assert task(BASIC) is task(BASIC) and task(task(BASIC).name) == task(BASIC)
    family("half", lambda rest: Sort(int(rest) // 2))
    assert task("half8") == Sort(4)


@pytest.mark.parametrize("name, message", [
    ("chess", "unknown task 'chess': known are .*calculator, countdown, gym, math, sort"), ("sortx", "unknown task 'sortx': expected a number after sort"),
    ("sort1", "n must be between 2 and 64, got 1"), ("sort٣", "expected a number after sort"), ("countdown9", "n must be between 2 and 5"),
    ("gym", "expected gym:NAME"),
    ("gym:spiral_matrx", "no task 'spiral_matrx' .* such as spiral_matrix"), ("gym:composite", "no task 'composite'"),
    ("gym:chain_sum,min_terms", "expected key=value"),
    ("gym:chain_sum,terms=3", "no setting terms; it has min_terms"), ("gym:chain_sum,max_terms=0", "refuses .*max_terms must be"),
    ("gym:chain_sum,max_terms=many", "refuses"), ("gym:chain_sum,size=0", "size: expected an integer of at least 8, got 0"),
    ("gym:chain_sum,tags=1", "tags: expected true or false, got 1"),
    ("gym:acre,level=1", "gym:acre has no curriculum"), ("math", "expected math:DATA"),
    ("math:x.jsonl,columns=3", "no setting columns; there are config, question"), ("calculatorx", "expected a number")])
def test_what_no_name_means_is_said(name, message, names):
    with pytest.raises(ValueError, match=message): task(name)


@given(st.text("abc=,.-e019_()'[] ", max_size=20))
def test_settings_are_numbers_flags_or_text(text):
    try: first, found = settings(text)
    except ValueError: return
    assert first == text.split(",")[0] and all(type(x) in (int, float, str) for x in found.values())
    assert all(str(x) in text or float(x) == float(text.split(f"{k}=")[1].split(",")[0]) for k, x in found.items())


# splits and demonstrations

@pytest.mark.parametrize("name", ["sort12", "countdown4", "calculator", "calculator5", BASIC, "gym:chain_sum,level=2", "math"])
def test_no_problem_stands_in_both_splits_and_demonstrations_are_right(name, table):
    t = TextMath(table) if name == "math" else task(name)
    assert isinstance(t, Task) and isinstance(t, ToolTask) == name.startswith("calculator")
    rng = random.Random(0)
    train, held = draw(t, 100, rng), draw(t, 20, rng, "held_out")
    assert not {t.problem(p) for p in train} & {t.problem(p) for p in held} and all(held_out(t, p) for p in held)
    shown = [t.demonstrate(p, rng) for p in train]
    assert verify_all(t, train, shown) == ([1.0] * 100, 0) and [t.verify(p, x) for p, x in zip(train, shown)] == [1.0] * 100
    assert draw(t, 5, random.Random(3)) == draw(t, 5, random.Random(3))
    for p, x in zip(train, shown): assert t.verify(p, "") < 1 and t.verify(p, x[:-1]) < 1


@given(st.integers(0, 2**32))
def test_a_calculators_problem_is_free_of_order(seed):
    rng, t = random.Random(seed), Calculator(5)
    prompt = t.prompt(rng)
    terms = [(sign or "+", term.split("*")) for sign, term in re.findall(r"(^|[+-])([0-9*]+)", prompt[:-1])]
    first = rng.choice([i for i, (sign, _) in enumerate(terms) if sign == "+"])
    rest = [x for i, x in enumerate(terms) if i != first]
    rng.shuffle(rest)
    again = "".join(sign + "*".join(rng.sample(term, len(term))) for sign, term in [terms[first], *rest])[1:] + "="
    assert t.problem(again) == t.problem(prompt) and formula_value(again[:-1]) == formula_value(prompt[:-1])


@given(terms=st.lists(st.integers(0, 9999), min_size=1, max_size=7), signs=st.lists(st.sampled_from("+-*"), min_size=7, max_size=7))
def test_a_formula_is_worth_what_python_says(terms, signs):
    text = "".join(f"{sign if i else ''}{x}" for i, (sign, x) in enumerate(zip(signs, terms)))
    assert formula_value(text) == eval(text)      # digits and signs that this test wrote


# the embedded model's alphabet

def test_the_models_of_sort_and_countdown_are_the_ones_they_were():
    if not torch.__version__.startswith("2.13.0"): pytest.skip("the keys below are those of torch 2.13.0")
    assert [warm_start_key(t, 0) for t in (Sort(), Countdown(), Sort(7))] == ["68a3baf7764512b0", "c65b2f3a460888c8", "72a2b0a9fc26ff80"]


def test_a_task_may_bring_its_alphabet():
    t = Gym("basic_arithmetic", (("max_digits", 1), ("max_terms", 2)), warm_steps=1)
    assert len(set(t.alphabet)) == len(t.alphabet) and set("Calculate\n .é") - set(t.alphabet) == {"é"}
    model, tokenizer = load("embedded", t, 7)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == len(t.alphabet) + 3
    prompts = draw(t, 50, random.Random(0)) + ["a\n\n b"]
    assert llm_model.decode(tokenizer, encode(tokenizer, prompts)) == prompts
    assert warm_start_key(t, 0) != warm_start_key(Gym("basic_arithmetic", (("max_digits", 2), ("max_terms", 2)), warm_steps=1), 0)
    assert llm_model.alphabet_of(Sort()) == ALPHABET
    with pytest.raises(ValueError, match="alphabet: expected every character once"): char_tokenizer("abca")


# reasoning-gym

def in_another_process(code: str, **env) -> str:
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=120 + FUZZ / 50)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gym_problems_are_the_same_in_every_process():
    "Also where the generator uses global random numbers (list_functions, codeio), and whatever the hash seed, but for one that makes its problems from a set."
    code = """
import hashlib, json, random
from offpolicy_rl.llm.gym import Gym
for name in ("chain_sum", "list_functions", "codeio", "syllogism", "pool_matrix", "knights_knaves", "polynomial_multiplication"):
    t = Gym(name, size=64)
    made = [[(e := t.entry(i))["question"], e["answer"]] for i in (range(63, 31, -1) if random.random() < 0.5 else range(32, 64))]
    print(name, hashlib.sha256(json.dumps(sorted(made)).encode()).hexdigest())"""
    one, two = (in_another_process(code, PYTHONHASHSEED=seed).splitlines() for seed in "12")
    assert one[:-1] == two[:-1] and one[-1] != two[-1]


def test_gym_problems_that_depend_on_the_hash_seed_ask_for_one(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="PYTHONHASHSEED=0"): task("gym:ransom_note")
    assert "ransom_note" in HASH_ORDERED and in_another_process("from offpolicy_rl.llm.tasks import task; print(task('gym:ransom_note').name)",
        PYTHONHASHSEED="0") == "gym:ransom_note\n"


def test_gym_finds_a_problem_again_and_leaves_no_trace_in_random_numbers():
    t = Gym("pool_matrix", size=200)
    random.seed(1)
    np.random.seed(1)
    before = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    prompt = t.prompt(random.Random(5))
    other = pickle.loads(pickle.dumps(t))
    assert len(pickle.dumps(t)) < 300 and other == t and not other.memory[0] and other.facts(prompt) == t.facts(prompt)
    assert (random.random(), np.random.rand()) == before
    with pytest.raises(ValueError, match="none of the 200 problems of 'gym:pool_matrix,size=200' asks 'What"): other.facts("What?")


def test_gym_answers_may_stand_between_tags():
    t = task("gym:chain_sum,tags=true,level=0")
    prompt = t.prompt(random.Random(0))
    right = t.facts(prompt)["answer"]
    assert prompt.endswith("<answer> and </answer>.") and t.max_tokens == 512 and t.demonstrate(prompt, random) == f"<answer>{right}</answer>"
    assert t.verify(prompt, f"<answer>0</answer> no, <answer>\n{right} </answer> it is") == t.verify(prompt, right) == t.verify(prompt, f"<answer>{right}") == 1
    assert t.verify(prompt, f"<answer>{right}</answer> or <answer>x</answer>") < 1 and t.problem(prompt) == t.facts(prompt)["question"]


def test_gym_levels_get_harder():
    lengths = [np.mean([len(Gym("chain_sum", level=level, size=32).entry(i)["question"]) for i in range(32)]) for level in (0, 3, 9)]
    assert lengths[0] < lengths[1] < lengths[2]
    assert "7" in Gym("chain_sum", (("min_terms", 7),), level=9).name and Gym("chain_sum", (("max_terms", 40),), level=9).source.config.max_terms == 40


def test_gym_says_where_it_has_no_answer_to_show():
    t = Gym("rush_hour", size=8)
    with pytest.raises(ValueError, match="knows no answer to show"): t.demonstrate(t.entry(0)["question"], random)


@pytest.mark.parametrize("name", [*EVALUATES, *OURS])
def test_gym_scorers_that_evaluate_get_only_what_is_harmless(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    t, file = Gym(name, size=8), tmp_path / "run"
    e = t.entry(0)
    shout = f"__import__('pathlib').Path({str(file)!r}).touch()"
    t.source.score_answer(shout, e)
    if file.exists(): file.unlink()
    else: t.source.score_answer(f"[{shout}]", e)      # what would be run without the guard
    file.unlink(missing_ok=True)
    for text in (shout, f"[{shout}]", f"({shout},)", f"<answer>{shout}</answer>", "9**9**9", "(9**99)**99**9", "x.__class__", f"{e['answer']} or {shout}"):
        assert t.mark(e, text) < 1 and not file.exists()
    assert t.mark(e, str(e["answer"])) == 1 and t.mark(e, f"<answer>\n{e['answer'].strip()}</answer>") > 0


def test_gym_refuses_a_scorer_that_evaluates_and_is_not_known(monkeypatch):
    from reasoning_gym.arithmetic.chain_sum import ChainSumConfig, ChainSumDataset
    from reasoning_gym.factory import DATASETS

    class New(ChainSumDataset):
        def score_answer(self, answer, entry): return float(eval(answer) == entry["answer"])
    monkeypatch.setitem(DATASETS, "new", (New, ChainSumConfig))
    with pytest.raises(ValueError, match="its scorer evaluates what a model wrote"): assert Gym("new").source


@pytest.mark.parametrize("text, literal, plain_sum, plain_formula", [
    ("[[1, 2], [3, 4]]", 1, 0, 0), ("['a', 'b']", 1, 0, 0), ("1 2 3", 0, 1, 0), ("6*(98 - 54) - 34", 0, 1, 1), ("-9*x**8/10 + 3*x**4/2 + C", 0, 0, 1),
    ("2*(2 - 8*x)**(3/2)/3", 0, 0, 1), ("exp(x)*sin(2*x)", 0, 0, 1), ("9**9**9", 0, 0, 1), ("9^9^9", 0, 0, 0), ("7//2", 0, 0, 1), ("x.y", 0, 0, 0),
    ("x/x", 0, 0, 1), ("2x", 0, 0, 0), ("x2", 0, 0, 0), ("(x)2", 0, 0, 0), ("log2", 0, 0, 0), ("log (x)", 0, 0, 1),
    ("(x)y", 0, 0, 0), ("f(x)", 0, 0, 0), ("S(1)", 0, 0, 0), ("pi(1)", 0, 0, 0), ("x(1)", 0, 0, 0), ("(1)(2)", 0, 1, 0),
    ("1e99", 1, 0, 0), ("0x1", 1, 0, 0), ("Integral(x, x)", 0, 0, 0), ("x if x else y", 0, 0, 0), ("x[0]", 0, 0, 0), ("[" * 30, 0, 0, 0), ("9" * 20, 1, 0, 1),
    ("9" * 15, 1, 1, 1), ("2.5", 1, 1, 1), ("5!", 0, 0, 0), ("1+" * 200 + "1", 0, 0, 1), ("(" * 51, 0, 0, 1), ("٣", 0, 0, 0), ("1,2", 1, 0, 0), ("", 0, 1, 1)])
def test_what_a_scorer_may_evaluate(text, literal, plain_sum, plain_formula):
    assert (is_literal(text), is_sum(text), is_formula(text)) == (literal, plain_sum, plain_formula)


@pytest.mark.parametrize("text, tame", [
    ("1e9999", 0), ("-1.5E+0012", 0), (".5e-9999", 0), ("1e9,9,9,9", 0), ("1_0e1_000", 0), ("1e 9 999", 0), ("1e٩٩٩٩", 0), ("1E1" + ",1" * 60, 0),
    ("1e999", 1), ("-1.5e10", 1), ("Move 1000", 1), ("see 2024", 1), ("e1234", 1), ("1234,5678", 1), ("0xe12", 1)])
def test_long_exponents_are_not_read(text, tame):
    t = Gym("coin_flip", size=8)
    e = t.entry(0)
    start = time.thread_time()
    assert is_tame(text) == tame and (tame or t.mark(e, text) == 0) and time.thread_time() - start < 0.05


def test_deep_brackets_are_not_read():
    t = Gym("propositional_logic", size=8)
    e, took = t.entry(0), []
    for n in (3000, 9000, 3000):
        start = time.thread_time()
        assert t.mark(e, "(" * n + "A" + ")" * n) == 0
        took.append(time.thread_time() - start)
    assert sorted(took)[1] < 0.05 and t.mark(e, e["metadata"]["example_answer"]) > 0.2


SOLUTIONS = dict(
    countdown=dict(answer="6*(98 - 54) - 34 - 66", metadata=dict(numbers=[6, 98, 54, 34, 66], target=164)),
    puzzle24=dict(answer="1*3*5 + 9", metadata=dict(numbers=[1, 3, 5, 9])),
    polynomial_multiplication=dict(answer="x**2 - 1", metadata={}))
MARKED_ALIKE = dict(
    countdown=[
        "6*(98-54)-34-66", "(98 - 54)*6 - (34 + 66)", "-(34 + 66 - ((6))*(98 - 54))", "6*98 - 6*54 - 34 - 66", "164", "6*(98 - 54) - 34", "328/2", "2.5",
        "6*(98 - 54) - 34 - 66.", "6*(98 - 54) - 34 - 66 = 164", "", " ", "\n6*(98 - 54) - 34 - 66 ", "6*(98 - 54)\n - 34 - 66", "(6*(98 - 54)\n - 34 - 66)",
        "abc", "x + 1", "1/0", "6*(98", "6(98 - 54) - 34 - 66", "(6)(98)", "6 98", "006", "--164", "6*(98 − 54) - 34 - 66", "6×98", "[164]", "(164,)",
        "164 = 164", "9" * 15, "1+" * 150 + "1", "((((((((((((6))))))))))))*(98 - 54) - 34 - 66", "1...2", "..."],
    puzzle24=[
        "9 + 5*3*1", "(9 - 1)*3*(5 - 5 + 1)", "24", "8*3", "12*2*1*1", "9 + 5*3*1 = 24", "9 + 5*3*(1", "9 + 5*3*0", "", "abc", "1/0",
        "9 + 5*3*x", "(9)(3)", "9 5 3 1", "1*3*5 + 9.", " 1*3*5 + 9 ", "99*99*99*99"],
    polynomial_multiplication=[
        "-1+x**2", "x*x - 1", "2*(x**2 - 1)/2", "(2*x**2 - 2)/2", "-(1 - x**2)", "x**(1 + 1) - 1", "x**3/x - 1", "(x**2 - 1)**1", "x**2 - 1 + y - y",
        "(x*x) - (1)", "x**2 - 1**9", "x*(x + 1 - 1) - 1", "x**2 - 1\n", "(x**2 -\n1)", "x**2 - 1 + 0*(y + 1)", "2**3*x**2/8 - 1", "(x**-1)**-2 - 1",
        "(x/y)**2*y**2 - 1", "--x**2 + -1", "(x**2/3 - 1/3)*3", "x**2 - (x - x + 1)", "0**0*x**2 - 1", "1/(1/x**2) - 1", "x**(4/2) - 1",
        "x**2 - 1 + 0*x*(y + 1)", "x**2 - y**0", "x**2 - (y + 1)**0",
        "(x + 1)*(x - 1)", "(x - 1)*(x + 1)*1", "x*(x - 1/x)", "x^2 - 1", "X**2 - 1", "x**2 - 1.0", "0.5*x**2*2 - 1", "x**2 - 01", "x**2 - 1/0", "x**2 - 1;",
        "x**2 - 1 = 0", "x**2 - 1 == 0", "(x**2 - 1,)", "x**2 - True", "xx**2 - 1", "x² - 1", "x**2 − 1", "(x)(x) - 1", "x**2 1", "x**2 - 1e0", "lambda: 1",
        "x**2", "x**2 + 1", "2*x", "", "x**2 - 1)", "x.y", "x**y*x**(2 - y) - 1"])
# What the library takes besides, and these questions do not ask for. Its mark, our mark, texts.
MARKED_OTHERWISE = dict(
    countdown=[(1, 0.01, ["abs(34 + 66 - 6*(98 - 54))", "6*(98 - 54) - 34 - 66 # ok"]),
        (0.05, 0.01, ["2**3", "7//2", "7%2", "5!", "sqrt(4)", "pi", "0x10", "164 or 1", "9" * 16, "1+" * 200 + "1"])],
    puzzle24=[(1, 0, ["6*4*1*1", "5*5 - 1/2", "3*(9 - 5/5)", "3*8/(2 - 1)"]),
        (1, 0.01, ["2**3*3*1", "sqrt(9)*8*1*1", "4!*1*1*1", "7//2*8*1", "9 + 5*3*1 # ok", "abs(1 - 5*5*1)", "9 + 5*3*1 or x"])],
    polynomial_multiplication=[(1, 0, [
        "x**2 - 1!", "x**2 + I**2", "sqrt(x)**4 - 1", "x**2 - 8**(1/3) + 1", "x**2 - cos(0)", "x**2 - S(1)", "x**2 - E/E", "x**2 - 3//3", "x**2 - 3%2",
        "x**2 - 0x1", "x**2 - 1_0 + 9", "x**2 - 1 # ok", "~1 + x**2 + 1", "x**2 - 1 or 2", "x**2 - 1 if x else 0", "x**2 - 1**x", "x**2 - 1**10000",
        "(x**2 - 1)*(x + 1)/(x + 1)", "y*(x**2 - 1)/y", "x*(y + 1) - x*(y + 1) + x**2 - 1"])])


def library_mark(t: Gym, entry: dict, text: str) -> float:
    "What the library's own scorer says."
    return min(1.0, max(0.0, float(t.source.score_answer(text, entry))))


@pytest.mark.parametrize("name", SOLUTIONS)
def test_marks_are_the_librarys_but_for_what_is_named(name, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    t, e = Gym(name, size=8), SOLUTIONS[name]
    for text in [e["answer"], *MARKED_ALIKE[name]]: assert t.mark(e, text) == library_mark(t, e, text), text
    for theirs, mine, texts in MARKED_OTHERWISE[name]:
        for text in texts: assert (library_mark(t, e, text), t.mark(e, text)) == (theirs, mine), text
    assert {t.mark(e, text) for text in MARKED_ALIKE[name]} == dict(countdown={1, 0.05, 0.01}, puzzle24={1, 0.01}).get(name, {1, 0})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", SOLUTIONS)
def test_marks_of_generated_problems_are_the_librarys(name, seed, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    t, rng, marks = Gym(name, size=8, seed=seed), random.Random(seed), []
    for i in range(8):
        e = t.entry(i)
        right = e["answer"]
        terms = re.sub(r" ([+-]) (?![^(]*\))", r"|\1", right).split("|")
        texts = [right.replace(" ", ""), f"({right})", f" {right}\n", f"0 + {right}", f"-(0 - ({right}))", f"2*({right})/2",
            " ".join(rng.sample(terms, len(terms))), f"{right} + 1", f"2*({right})", right[:-1], right[1:], f"{right})", f"{right} =", f"= {right}",
            right.translate(str.maketrans("12345", "23456")), e["metadata"].get("polynomial_expr", "1"), right.replace("**", "^"), "*".join(right.split())]
        for text in texts: assert t.mark(e, text) == library_mark(t, e, text), (right, text)
        marks += [t.mark(e, text) for text in texts]
    assert marks.count(1) >= 16 and sum(mark < 1 for mark in marks) >= 40


JUNK = ["nan", "-inf", "nan+nanj", "n an", "[NaN, NaN, NaN]", "banana", "0", "1", "-1", "2", "0.5", "0.0001", "", " ", "?", "None", "True", "False", "[]",
    "{}", "()", "yes", "no", "A", "a, b", "1, 2", "1/2", "9" * 400, "1e999"]


def says(text: str, answer: str | None) -> bool:
    "True where a text is an answer, or the same number."
    if answer is None or text.strip().lower() == answer.strip().lower(): return answer is not None
    try: return Fraction(text) == Fraction(answer)
    except (ValueError, ZeroDivisionError): return False


@pytest.mark.parametrize("name", sorted({*DATASETS} - {"composite"}))
def test_no_junk_is_right_and_the_answer_is(name, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    t = Gym(name, size=8)
    for e in map(t.entry, range(4)):
        for text in [*JUNK, e["question"]]: assert t.mark(e, text) < 1 or says(text, e["answer"]), (text[:80], e["answer"])
        assert e["answer"] is None or t.mark(e, e["answer"]) == 1


def off_by_one(e: dict) -> str: return json.dumps([str(float(x) + 0.9) for x in e["metadata"]["sorted_numbers"]])


CALLED_RIGHT = dict(                                  # by the library
    game_of_life_halting=lambda e: "banana", complex_arithmetic=lambda e: " N an", coin_flip=lambda e: e["answer"][:2],
    word_sorting=lambda e: e["answer"] + ", x",
    number_sorting=off_by_one, puzzle24=lambda e: "5*5 - 1/2", letter_jumble=lambda e: e["answer"] + " and more")


@pytest.mark.parametrize("name", CALLED_RIGHT)
def test_a_full_mark_needs_a_second_check(name):
    t, given_away = Gym(name, size=40), 0
    for e in map(t.entry, range(40)):
        wrong, right = CALLED_RIGHT[name](e), e["answer"]
        if says(wrong, right): continue
        given_away += library_mark(t, e, wrong) == 1
        assert t.mark(e, wrong) < 1 and t.mark(e, f"<answer> {right}\n</answer>") == 1, (wrong, right)
    assert given_away >= 10


def test_second_checks_read_numbers():
    e = dict(answer="['-1.5', '2']", metadata=dict(direction="ascending", sorted_numbers=["-1.5", "2"]))
    assert [Gym("number_sorting", size=8).mark(e, x) for x in ('["-1.5", "2"]', "[-1.50, 2.0]", "[NaN, NaN]", "[-1.5, 2.5]", "[-1, 2]")] == [1, 1, 0, 0, 0]
    e = dict(answer="0.0001220703125", metadata={})
    assert [Gym("coin_flip", size=8).mark(e, x) for x in ("1/8192", "0.000122", "1.22e-4", "0.0001", "0", "0.0002")] == [1, 1, 1, 0, 0, 0]
    e = dict(answer="0.5", metadata={})
    assert [Gym("coin_flip", size=8).mark(e, x) == 1 for x in ("1/2", ".5", "0.50009", "0.51", "0.59", "5")] == [True, True, True, False, False, False]
    e = dict(answer="", metadata={})
    assert [Gym("polynomial_equations", size=8).mark(e, x) for x in ("", '""', "banana", "nan", "1e9999")] == [1, 1, 0, 0, 0]
    assert all(map(is_finite, ("banana", "CAN,NAN", "1e5", "2+3j"))) and not any(map(is_finite, ("nan", "-INF", "(infinity)", "nanj")))
    assert makes("8/(3 - 8/3)", [3, 3, 8, 8], 24) and not makes("5*5 - 1/2", [1, 2, 5, 5], 24) and not makes("2.5*10 - 1", [1, 2, 5, 10], 24)


def test_long_polynomials_are_read_and_bounded(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    t = Gym("polynomial_multiplication", (("max_degree", 12), ("max_polynomials", 6), ("max_terms", 9), ("min_polynomials", 6), ("min_terms", 9)), size=8)
    right = t.entry(0)["answer"]
    terms = right.replace("- ", "+ -").split(" + ")
    assert len(right) > 500 and same_polynomial(right, " + ".join(terms[::-1])) and not same_polynomial(right, " + ".join(terms[:-1]))
    assert same_polynomial(right, f"7*({right})/7") and not same_polynomial(right, f"({right})*({right})")
    for text in ("+".join(f"x**{i}/{i + 1}" for i in range(550)), "2*(" * 190 + "x" + ")" * 190, "*".join("abcxyz" * 400), "1/7+" * 1400 + "1",
                 "x**999*" * 800 + "x"):
        took = []
        for _ in range(3):                             # the least of three: another test's garbage may be collected in between
            polynomial.cache_clear()
            start = time.thread_time()
            assert polynomial(text) is None or len(text) < 6000
            took.append(time.thread_time() - start)
        assert min(took) < 0.05, text[:40]


# word problems

@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_word_problems_are_read_from_files(kind, tmp_path):
    import datasets
    rng = random.Random(1)
    rows = [word_problem(rng) for _ in range(40)]
    if kind == "folder":
        jsonl(tmp_path / "train.jsonl", rows[:30])
        jsonl(tmp_path / "test.jsonl", rows[25:])
        t = TextMath(str(tmp_path))
        own = {row["question"] for row in rows[25:]}
        assert all(t.problem(p) in own for p in draw(t, 30, rng, "held_out")) and not {t.problem(p) for p in draw(t, 200, rng)} & own
        assert not set(t.rows[0]) & own and len(TextMath(str(tmp_path), held="hash").rows[0]) == len({row["question"] for row in rows[:30]})
        with pytest.raises(ValueError, match="split: .* has train, test, got 'dev'"): assert TextMath(str(tmp_path), split="dev").rows
        with pytest.raises(ValueError, match="held: expected hash or one of train, test, got 'dev'"): assert TextMath(str(tmp_path), held="dev").rows
    else:
        path = tmp_path / f"data.{kind}"
        if kind == "jsonl": jsonl(path, rows)
        else: getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(str(path))
        t = TextMath(str(path))
        assert len(t.rows[0]) == len({row["question"] for row in rows})
    prompt = t.prompt(rng)
    assert r"\boxed{}" in prompt and t.verify(prompt, t.demonstrate(prompt, rng)) == 1


def test_word_problems_that_cannot_be_read(tmp_path, table, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for data, how, message in ((table, dict(question="q"), "question: .* has the columns question, answer, got 'q'"),
        ("no/such-data", {}, "is not a file, a folder or a data set of the hub"),
                               (str(tmp_path / "x.txt"), {}, "is not a file"),
                               (jsonl(tmp_path / "empty.jsonl", [dict(question=" ", answer="1")]), {}, "no row with a question and an answer")):
        with pytest.raises(ValueError, match=message): assert TextMath(data, **how).rows
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match="ends with .jsonl"): assert TextMath(str(tmp_path / "x.txt")).rows
    with pytest.raises(ValueError, match="does not ask 'What"): TextMath(table).worked("What?")


@pytest.mark.parametrize("text, answer", [
    (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{7} and \boxed{8", "7"), ("5*8=40\n#### 40\nDone", "40"), ("#### 1\n#### 2", "2"),
    ("<answer> 3 </answer>", "3"),
    ("The answer is: **42**.", "42"), ("Answer: 12 km.", "12 km"), ("The answer is 5. Really, the answer is 6.\nBye", "6"), ("ANSWER = 7", "7"),
    ("the answer is", ""),
    ("from 1 to 12,345.50", "12,345.50"), ("It costs 5 million.", "5 million"), ("some 3 1/2 cups", "3 1/2"), ("about 1 000 km", "1 000"),
    ("that is 50%", "50%"),
    (r"so 50\% it is", r"50\%"), ("rows of 2020 300 apples", "300"), ("12 apples or 4", "4"), ("2 dozen eggs", "2 dozen"), (".5 or .25", ".25"), ("", ""),
    ("none", ""),
    (r"\boxed{}", ""), ("#### ", ""), ("minus -3/4", "-3/4")])
def test_what_a_text_answers(text, answer): assert final_answer(text) == answer


@pytest.mark.parametrize("right, answer, same", [
    ("42", "42", 1), ("42", "42.0", 1), ("42", "$42$", 1), ("42", r"42\text{ apples}", 1), ("42", "42 big apples.", 1), ("42", "84/2", 1), ("42", "43", 0),
    ("42", "4 2", 0), ("42", "٤٢", 0),
    ("1,234", "1234", 1), ("50", r"50\%", 1), ("0.5", r"50\%", 1), ("0.5", "50", 0), ("5", r"5\text{ squared}", 0), ("5", r"5\text{ thousand}", 0),
    ("3 1/2", r"\frac{14}{4}", 1), ("3 1/2", r"3\frac12", 1), ("3 1/2", r"\sqrt{49}/2", 1), ("5 million", r"5\cdot 10^6", 1), ("2 m", "2 m", 1),
    ("3 4 5", "345", 0), ("1/2", r"\frac{2}{4}", 1), ("1/2", r"\dfrac12", 1),
    ("x^2+2x+1", "(x+1)^2", 1), ("x^2+2x+1", "(x+1)^3", 0),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", 1), (r"\{1,2\}", r"\{2, 1\}", 1), ("(1,2)", "(2,1)", 0), ("[0,1)", "[0,1]", 0), ("5", "x=5", 1),
    (r"\text{even}", r"\text{even}", 1),
    ("1024", "2^{10}", 1), ("42", "9^{9^{9}}", 0), ("42", "99999!", 0), ("42", r"\sum_{i=1}^{99999999} i", 0), ("42", "nan", 0)])
def test_when_two_answers_are_the_same(right, answer, same, tmp_path):
    t = TextMath(jsonl(tmp_path / "one.jsonl", [dict(question="Q?", answer=f"#### {right}")]), ask=False)
    assert t.verify("Q?", rf"It is \boxed{{{answer}}}.") == same


# right, answer, ours; `MORE`: math-verify calls them different
NUMBERS = [("3 1/2", "31/2", 0), ("31/2", "3 1/2", 0), ("-3 1/2", "-2.5", 0), ("3 5/4", "17/4", 0), ("5", "5 thousand", 0), ("5", "$5 million", 0),
    ("5 million", "5 million", 1), ("5k", "5000", 0), ("5M", "5000000", 0), ("50%", "5000", 0), ("50%", "50", 1), ("50%", "0.5", 1), ("50", "50%", 1),
    ("0.5", "50%", 1),
    ("50", "0.5%", 0), ("50", "5000%", 1), ("0.5", "0.5%", 0), ("5000", "50%", 0), ("3 1", "31", 0), ("31", "3 1", 0), ("12", "1 2", 0), ("1,00", "100", 0),
    ("1,000", "1000", 1), ("1{,}000", "1000", 1), (r"3\frac{1}{2}", "3.5", 1), (r"3 \frac{1}{2}", "7/2", 1), ("5 cm", "5", 1), ("5", "5 apples", 1),
    ("5", "$5.00", 1),
    ("12,5", "12.5", 0), ("five", "5", 0), ("10:30", "1030", 0), ("5", "5 or six", 0), ("0.12", "12%", 1), ("12%", "0.12", 1), ("12", "1200", 0)]
MORE = [("3 1/2", "3.5"), ("2 100/200", "2.5"), ("3 1/2", "7/2"), ("-3 1/2", "-3.5"), ("3 4/5", "19/5"), ("3 1/2 hours", "3.5"), ("3 and 1/2", "3.5"),
    ("5000", "5 thousand"),
    ("5000000", "$5 million"), ("500000", "1/2 million"), ("2 dozen", "24"), ("3 hundred thousand", "300000"), ("1 000", "1000"), (r"1\,000", "1000"),
    ("1 000 000", "1,000,000")]


def by_ours(right: str, answer: str) -> float:
    t = TextMath("none", ask=False)
    t.__dict__["rows"] = {"Q?": rf"\boxed{{{right}}}"}, {}, False
    return t.verify("Q?", rf"\boxed{{{answer}}}")


def test_numbers_are_the_same_where_math_verify_finds_them_so_but_for_words_mixed_numbers_and_blanks():
    assert [(x, y) for x, y, equal in NUMBERS if by_ours(x, y) != equal] == [(x, y) for x, y in MORE if by_ours(x, y) != 1] == []
    assert [(x, y) for x, y, equal in NUMBERS if same_by_math_verify(x, y) != equal] == [(x, y) for x, y in MORE if same_by_math_verify(x, y)] == []


@given(whole=st.integers(0, 10**9), top=st.integers(0, 99), bottom=st.integers(1, 99), magnitude=st.sampled_from(["", *MAGNITUDES]),
    sign=st.sampled_from(["", "-"]))
def test_a_number_is_read_however_it_is_written(whole, top, bottom, magnitude, sign):
    value = (whole + Fraction(top % bottom, bottom)) * MAGNITUDES.get(magnitude, 1) * (-1 if sign else 1)
    grouped = [f"{whole:,}", f"{whole:,}".replace(",", " "), f"{whole:,}".replace(",", r"\,"), f"{whole}"]
    for text in grouped: assert number(f"{sign}{text} {magnitude}") == (-whole if sign else whole) * MAGNITUDES.get(magnitude, 1)
    assert number(f"{sign}{whole} {top % bottom}/{bottom} {magnitude and magnitude + 's'}") == value
    assert number(rf"{sign}{whole}\frac{{{top % bottom}}}{{{bottom}}}\text{{ {magnitude} }}") == value and number(f"{whole} {top}") is None


def test_numbers_are_exact_and_long_sums_are_not_read():
    assert same("1+" * 99 + "1", "100") and formula("1+" * 100 + "1") is None
    assert number("0.1") * 3 == number("0.3") and number("1" * 30) != number("1" * 29 + "2") and number("1" * 41) is None


# verification with a time limit

@dataclass(frozen=True)
class Does(Sort):
    "Its verifier does what it reads."
    inline = False
    where: str = ""

    def verify(self, prompt, response):
        if response == "hang": pow(9, 9**9)
        if response == "sleep": time.sleep(60)
        if response == "eat": bytes(3 * 2**30)      # which no page of memory is touched for
        if response == "die": os.kill(os.getpid(), signal.SIGKILL)
        if response == "exit": sys.exit(3)
        if response == "deep": return self.verify(prompt, response)
        if response == "fail": raise KeyError("lost")
        if response == "write": Path(self.where).write_text("x")
        return float(response == "right")


@pytest.mark.parametrize("away", [True, False], ids=["fresh", "forked"])
def test_what_hangs_or_dies_costs_one_reward(away):
    class Local(Does): "Not known to another process."
    t = Does() if away else Local()
    said = ["right", "hang", "right", "wrong", "eat", "die", "exit", "sleep", "deep", "right"]
    start = time.perf_counter()
    assert verify_all(t, ["1="] * 10, said, timeout=1.0) == ([1, 0, 1, 0, 0, 0, 0, 0, 0, 1], 6)
    assert time.perf_counter() - start < 30
    with pytest.raises(RuntimeError, match="task 'sort': its verifier failed on 'fail', an answer to '1=', with KeyError: 'lost'"): verify_all(t, ["1="] * 2,
        ["right", "fail"])
    assert verify_all(t, ["1="], ["right"]) == ([1], 0)
    close_judges()


def test_several_workers_keep_the_order():
    judge = Judge(Does(), 3)
    said = [random.Random(i).choice(["right", "wrong"]) for i in range(200)]
    said[7] = said[100] = said[101] = "hang"
    marks, late = judge(["1="] * 200, said, 1.0)
    assert late == 3 and marks == [float(x == "right") for x in said]
    judge.number += 1
    judge.pipe.send((judge.number, [("1=", "sleep")] * 5, 100.0))      # a batch that was interrupted before its answers came
    assert judge(["1="] * 3, ["right", "wrong", "right"], 5.0) == ([1, 0, 1], 0)
    judge.process.kill()
    assert judge(["1="], ["right"], 5.0) == ([1], 0)                      # another one took over
    judge.close()


def test_a_sealed_verifier_cannot_write(tmp_path):
    class Sealed(Does): sealed = True
    path = tmp_path / "written"
    for t, done in ((Sealed(where=str(path)), False), (Does(where=str(path)), True)):
        if done: verify_all(t, ["1="], ["write"])
        else:
            with pytest.raises(RuntimeError, match="PermissionError: a sealed verifier tried open"): verify_all(t, ["1="], ["write"])
        assert path.exists() == done
    assert Gym.sealed and TextMath.sealed


def test_workers_end_with_their_parent():
    code = """
import os, sys
sys.path.insert(0, "tests")
from test_tasks import Does
from offpolicy_rl.llm.verify import Judge
judge = Judge(Does(), 2)
assert judge(["1="] * 2, ["right"] * 2, 5.0)[0] == [1, 1]
print(judge.process.pid, flush=True)
judge.pipe.send((9, [("1=", "sleep")] * 2, 500.0))
input()"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    pid = int(parent.stdout.readline())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 2 and all(map(running, [pid, *children]))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(map(running, [pid, *children])) and time.monotonic() < deadline: time.sleep(0.05)
    assert not any(map(running, [pid, *children]))


def running(pid) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def test_what_verify_all_refuses():
    with pytest.raises(ValueError, match="responses: expected one for each of 2 prompts, got 1"): verify_all(Sort(), ["1=", "2="], ["1"])
    with pytest.raises(ValueError, match="timeout: expected a positive number"): verify_all(Sort(), [], [], 0)
    with pytest.raises(ValueError, match="processes: expected at least 1"): Judge(Does(), 0)


# conversations

@dataclass(frozen=True)
class Echo(Sort):
    "Sorts what it is told, again and again."
    max_turns: int = 3
    def reply(self, transcript): return None if transcript[-1].startswith("0") else "31="


@pytest.fixture(scope="module")
def engine():
    model, tokenizer = load("embedded", "sort", 0)
    return HFEngine(model.double(), tokenizer)


PROMPTS = ["52918043=", "31=", "77120=", "99988777="]


def test_a_conversation_is_sampled_turn_by_turn(engine):
    r = rollout(engine, Echo(), PROMPTS, 8, 9, generator=seeded(0))
    own, real = r.mask.bool(), (r.mask.flip(1).cumsum(1).flip(1) > 0)
    assert r.turn.max() == 2 and {text.count(TURN) for text in r.texts} >= {0, 4} and (real & ~own).any()
    torch.testing.assert_close(token_logps(engine.model, r)[0], r.logp_mu, atol=1e-10, rtol=0)   # what each turn was sampled with, read in one pass
    assert (r.logp_mu[~own] == 0).all() and (r.turn[:, 1:] >= r.turn[:, :-1])[real[:, 1:]].all()
    for i, text in enumerate(r.texts):
        pieces = text.split(TURN)
        for turn, said in enumerate(pieces[::2]):
            ids = r.tokens[i][own[i] & (r.turn[i] == turn)].tolist()
            assert llm_model.decode(engine.tokenizer, [[x for x in ids if x != engine.tokenizer.eos_token_id]]) == [said]
        for turn, heard in enumerate(pieces[1::2]):
            assert llm_model.decode(engine.tokenizer, [r.tokens[i][real[i] & ~own[i] & (r.turn[i] == turn)].tolist()]) == [heard] == ["31="]
        assert len(pieces) == 5 or len(pieces) % 2 and (pieces[-1].startswith("0") or r.tokens[i][own[i]][-1] != engine.tokenizer.eos_token_id)
    again = rollout(engine, Echo(), PROMPTS, 8, 9, generator=seeded(0))
    assert torch.equal(again.tokens, r.tokens) and again.texts == r.texts


def test_conversations_are_rollouts_like_any_other(engine):
    r = rollout(engine, Echo(), PROMPTS, 3, 9, generator=seeded(1), top_k=2)
    torch.testing.assert_close(token_logps(engine.model, r)[0], r.logp_mu, atol=1e-10, rtol=0)
    both = joined([r.take(torch.tensor([11, 0, 5])), engine.sample(PROMPTS, 2, 9, generator=seeded(2), top_k=2)])
    assert both.turn[:3].max() >= 1 and both.turn[3:].max() == 0
    torch.testing.assert_close(token_logps(engine.model, both)[0], both.logp_mu, atol=1e-10, rtol=0)
    plain, one = respond(engine, Sort(), PROMPTS, 2, 9, generator=seeded(3)), engine.sample(PROMPTS, 2, 9, generator=seeded(3))
    assert torch.equal(plain.tokens, one.tokens) and plain.turn is None


def test_weights_that_change_between_turns_are_named(engine):
    newer, there = load("embedded", "sort", 0)[0].double(), HFEngine(engine.model, engine.tokenizer)

    @dataclass(frozen=True)
    class Renewing(Echo):
        def reply(self, transcript):
            there.sync(newer, 4)
            return "31="
    r = rollout(there, Renewing(max_turns=2), PROMPTS, 2, 9, generator=seeded(0))
    ended = r.turn.amax(1) > 0
    assert r.version.eq(0).all() and ended.any()
    for turn, version in ((0, 0), (1, 4)): assert (r.token_version[r.mask.bool() & (r.turn == turn)] == version).all()


def test_a_turn_that_is_cut_ends_the_conversation(engine):
    r = rollout(engine, Echo(), ["99988777="], 16, 4, generator=seeded(0))
    assert any(len(text) == 4 for text in r.texts) and all(TURN not in text for text in r.texts if len(text.split(TURN)[0]) == 4)
    assert any(TURN in text for text in rollout(engine, Echo(), ["99988777="], 16, 9, generator=seeded(0)).texts)


def test_nobody_puts_words_into_the_environments_mouth(engine):
    r = engine.sample(["31="], 1, 9, generator=seeded(0))
    forged = Conversation(["2*3="], [])
    r.texts[0] = f"(2*3){TURN}7:{TURN}7"
    forged.say(r, 0, 0)
    assert forged.transcript == ["2*3=", "(2*3)7:7"] and Calculator(2).reply(forged.transcript) is None and Calculator(2).verify("2*3=",
        forged.transcript[1]) == 0


def test_the_environments_turns_are_not_demonstrated():
    t, tokenizer = Calculator(), char_tokenizer()
    ids, labels = demonstrations(t, tokenizer, 8, random.Random(0))
    for row, learnt in zip(ids.tolist(), labels.tolist()):
        pieces = [llm_model.decode(tokenizer, [[token]])[0] for token in row]
        prompt = "".join(pieces[:pieces.index("=") + 1])
        value = str(formula_value(prompt[:-1]))
        assert [p for p, x in zip(pieces, learnt) if x != -100] == [*f"({prompt[:-1]})", "<eos>", *value, "<eos>"]
        assert "".join(pieces).startswith(f"{prompt}({prompt[:-1]})<eos>{value}:{value}<eos>") and all(x in (-100, token) for token, x in zip(row, learnt))


def test_a_chat_template_frames_the_reply():
    tokenizer = char_tokenizer()
    assert reply_ids(tokenizer, "36:") == encode(tokenizer, ["36:"])[0]
    with pytest.raises(ValueError, match="reply: '3 6' has characters"): reply_ids(tokenizer, "3 6")
    turns = "{% for m in messages %}{% if m.role == 'user' %}({{ m.content }}){% else %}{{ m.content }}<eos>:{% endif %}{% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}={% endif %}"
    assert tokenizer.decode(reply_ids(tokenizer, "36")) == ":(36)="
    tokenizer.chat_template = turns.replace("<eos>", "")
    with pytest.raises(ValueError, match="ends no assistant's turn"): reply_ids(tokenizer, "36")


# hostile text

def made(name: str, table: str, formulas: str) -> SimpleNamespace:
    "A task, prompts, and a right answer to each."
    t = TextMath(dict(table=table, formulas=formulas)[name], ask=False) if name in ("table", "formulas") else task(name)
    if hasattr(t, "prepare"): t.prepare()
    prompts = [t.prompt(random.Random(i)) for i in range(20)]
    return SimpleNamespace(task=t, asked=[(p, t.demonstrate(p, random.Random(0))) for p in prompts])


QUICK = ["sort", "sort64", "countdown", "countdown5", "calculator", "calculator8", BASIC, "table", "formulas", "gym:simple_integration,size=16"]
SLOW = ["gym:countdown,size=16", "gym:puzzle24,size=16", "gym:spiral_matrix,size=16", "gym:n_queens,size=16", "gym:coin_flip,size=16",
    "gym:prime_factorization,size=16"]
HASHED = ["gym:polynomial_multiplication,size=16"]


def texts(name: str) -> int: return FUZZ if name in QUICK or FUZZ > 10_000 else FUZZ // 3


@pytest.mark.parametrize("name", QUICK + SLOW)
def test_no_text_raises_hangs_or_is_run(name, table, formulas, tmp_path):
    m = made(name, table, formulas)
    survive(name, m.task.verify, m.asked, texts(name), FUZZ_SEED, str(tmp_path / "run"))


@pytest.mark.parametrize("name", HASHED)
def test_no_text_raises_hangs_or_is_run_where_problems_need_a_hash_seed(name, tmp_path):
    print(in_another_process(f"""
import random, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from oddities import survive
from offpolicy_rl.llm.tasks import task
t = task({name!r})
prompts = [t.prompt(random.Random(i)) for i in range(20)]
asked = [(p, t.demonstrate(p, random)) for p in prompts]
survive({name!r}, t.verify, asked, {texts(name)}, {FUZZ_SEED}, {str(tmp_path / "run")!r})""", PYTHONHASHSEED="0"), end="")


@pytest.mark.parametrize("right, answer", SAME_FORMULAS + SAME_ANGLES)
def test_formulas_that_are_the_same(right, answer): assert same(right, answer)


@pytest.mark.parametrize("right, answer", FORMULAS_THAT_DIFFER + ANGLES_THAT_DIFFER)
def test_formulas_that_differ(right, answer): assert not same(right, answer) and not same(answer, right)


READ_OTHERWISE = {("1<x<2", "2>x>1"), (r"\frac{1}{1+i}", r"\frac{1-i}{2}"), ("(1+i)^2", "2i"), (r"\emptyset", r"\varnothing"), ("101_2", "101_3")}


def test_formulas_are_the_same_where_math_verify_finds_them_so_but_for_five():
    pairs = SAME_FORMULAS + FORMULAS_THAT_DIFFER
    assert {pair for pair in pairs if same(*pair) != same_by_math_verify(*pair)} == READ_OTHERWISE


def test_math_verify_marks_where_it_is_asked_for(table):
    t = task(f"math:{table},by=math-verify")
    prompt = t.prompt(random.Random(0))
    right = t.facts(prompt)
    assert not t.inline and verify_all(t, [prompt] * 2, [rf"\boxed{{{right}\cdot 1}}", rf"\boxed{{{right}+1+x}}"]) == ([1.0, 0.0], 0)
    with pytest.raises(ValueError, match="by: expected formula or math-verify, got 'sympy'"): TextMath("data", by="sympy")


@pytest.mark.parametrize("name", ["simple_integration", "intermediate_integration"])
def test_antiderivatives_of_the_library_are_right(name):
    t = Gym(name, size=60)
    for i in range(60):
        e = t.entry(i)
        shifted = e["answer"].replace(" + C", " - 3")
        assert t.mark(e, e["answer"]) == 1 and t.mark(e, e["answer"] + " + " + e["metadata"]["variable"]) == 0
        if is_formula(shifted): assert t.mark(e, shifted) == t.mark(e, f"2*({shifted})/2") == t.mark(e, f"K - (-({shifted}))") == 1


@pytest.mark.parametrize("text, integrand, right", [
    ("x*log(x) - x", "log(x)", 1), ("x*(log(x) - 1) + C", "log(x)", 1), ("sin(x)**2/2", "sin(x)*cos(x)", 1), ("-cos(x)**2/2", "sin(x)*cos(x)", 1),
    ("-cos(2*x)/4 + 7", "sin(x)*cos(x)", 1), ("atan(x)", "1/(x**2 + 1)", 1), ("2*x**(3/2)/3", "sqrt(x)", 1), ("2*x*sqrt(x)/3", "sqrt(x)", 1),
    ("(x + 1)**3/3", "x**2 + 2*x + 1", 1), ("x**3/3 + x**2 + x", "(x + 1)**2", 1), ("log(5*x)", "1/x", 1), ("x**2 + E**2", "2*x", 1), ("x*sin(x)", "sin(x)", 0),
    ("sqrt(x**2)", "1", 0), ("x^2", "2*x", 0), ("x*x x", "2*x", 0), ("x, x", "1", 0), ("C", "1", 0), ("", "0", 0), ("1/(x - x)", "0", 0),
    ("exp(exp(exp(exp(9))))*x", "1", 0)])
def test_an_antiderivative_by_its_slope(text, integrand, right): assert antiderivative(text, integrand, "x") == right


@pytest.mark.parametrize("t", [Sort(), Countdown(), Calculator(), Calculator(8)], ids=lambda t: t.name)
@given(text=st.text() | st.text("0123456789+-*/=():" + TURN, max_size=24), seed=st.integers(0, 2**32))
def test_only_the_right_text_earns_a_reward(t, text, seed):
    prompt = t.prompt(random.Random(seed))
    right = t.demonstrate(prompt, random.Random(seed))
    assert t.verify(prompt, right) == 1 and t.verify(prompt, text) in (0.0, 1.0)
    assert t.verify(prompt, right + " ") == t.verify(prompt, right[:-1] + "x") == t.verify(prompt, right + "0") == 0


@given(text=st.text() | st.text(r"0123456789+-*/^(){}\xyz.,=!eE_ ", max_size=60))
def test_what_looks_harmless_is(text):
    assert same("x+1", text) in (True, False) and is_formula(text) in (True, False) and is_literal(text) in (True, False)
    if is_formula(text): assert "__" not in text and not {"'", '"', "["} & set(text)
