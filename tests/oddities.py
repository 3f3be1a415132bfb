"Texts that a verifier may meet and should survive."

import builtins
import gc
import os
import random
import string
import time
from collections.abc import Callable

PWN = "setattr(__import__('builtins'), 'pwned', 1)"
CODE = [
    PWN, f"[{PWN}]", f"({PWN},)", f"(lambda: {PWN})()", f"{{}}.fromkeys([{PWN}])", f"x if {PWN} else x", f"1 + ({PWN} or 1)",
    "__import__('builtins').__dict__.__setitem__('pwned', 1)",
    "open('FILE', 'w')", "exec(\"import os; os.mkdir('FILE')\")", "__import__('os').system('touch FILE')", "'+open('FILE', 'w').name+'",
    "S('open(\"FILE\",\"w\")')",
    "().__class__.__base__.__subclasses__()", "eval(chr(49))", "x.__class__", "print(globals())", "{0.__class__}", "%s%n%x", "$(touch FILE)", "`touch FILE`",
    "\\write18{touch FILE}",
]
HUGE = [
    "9**9**9", "9^9^9", "9^{9^{9}}", "1e999999999", "-1E+999999999", "1e9999", "99999!", "((9**999)**999)**999", "x**99999", "9" * 5000,
    "0." + "0" * 4000 + "1", "1/0",
    "0**-1", "2**-9999999", "factorial(99999)", "nan", "inf", "-infinity", "0x" + "f" * 999, "1_000", "1" + ",000" * 999, "exp(exp(exp(exp(9))))",
    "(x+y+z+t)**99", "sqrt(" * 40 + "2" + ")" * 40,
    "\\sqrt{" * 40 + "2" + "}" * 40, "10**10**10 - 10**10**10", "1" + "*9**9" * 60, "log(0)", "tan(pi/2)", "0/0*x", "a^b^c^d", "\\frac{1}{0}",
    "\\sum_{i=1}^{999999999} i",
    "\\prod_{i=1}^{10^9} i", "\\int_0^{\\infty} e^{-x^2} dx",
]
LATEX = [
    "\\boxed{}", "\\boxed{{}}", "\\boxed{", "\\boxed{\\boxed{1}}", "\\frac", "\\frac{}{}", "\\sqrt[3]{}", "\\left(1\\right.",
    "\\begin{pmatrix}1&2\\end{pmatrix}", "$$$", "\\text{", "\\pm\\pm1",
    "1\\%", "\\infty-\\infty", "\\{1,2", "x=y=z=1", "|x", "||", "\\circ", "\\log_0 1", "1<2>3", "[1,2)", "(1,2,3,4)", "\\%\\%", "\\cdot", "\\le",
    "\\mathrm{d}x", "x'", "\\ldots", "a,b,c,d,e,f,g",
]
FORMULAS = [
    "|1|" * 40, "(x+y+z+t+u+v)^99", "x^x" * 40, "\\sin 2" * 20, "exp(exp(exp(x)))", "\\tan(\\pi/2)", "[1,2]\\cup" * 12 + "[3,4]", "x<" * 20 + "1",
    "x=" * 20 + "1", "1," * 60 + "1",
    "\\frac{\\frac{1}{2}}{\\frac{3}{4}}" * 4, "\\begin{pmatrix}" + "\\\\".join(["x&y&z&1"] * 8) + "\\end{pmatrix}", "\\{" + "x," * 60 + "1\\}",
    "sin(x)*cos(x)*tan(x)*exp(x)*log(x)*" * 5 + "1",
    "((x+1)**2+1)**2", "2**(1/3)*x**(7/9)", "(x+1)**12*(x-1)**12", "\\binom{99}{50}", "50!" * 20, "\\log_{x}" * 15 + "2", "\\pm" * 40 + "1",
    "x/" * 90 + "x", "f(f(f(x)))", "x**(x/(x+1))**2",
    "asin(acos(atan(x)))", "log(x)**9*exp(x**99)", "sqrt(1+sqrt(1+sqrt(1+sqrt(x))))", "\\sqrt[99]{-x}", "(1+i)^{99}",
]
SAME_FORMULAS = [
    ('42', '42'), ('1/2', '0.5'),
    ('\\frac{1}{2}', '1/2'), ('\\frac{3}{4}', '0.75'),
    ('\\frac12', '\\dfrac{1}{2}'), ('1\\frac{1}{2}', '\\frac{3}{2}'),
    ('\\frac{1}{3}', '0.333333'), ('-\\frac{2}{3}', '\\frac{-2}{3}'),
    ('-\\frac{2}{3}', '-2/3'), ('\\sqrt{8}', '2\\sqrt{2}'),
    ('\\frac{\\sqrt{3}}{3}', '\\frac{1}{\\sqrt{3}}'), ('\\sqrt[3]{16}', '2\\sqrt[3]{2}'),
    ('\\sqrt2', '2^{1/2}'), ('3+2\\sqrt{2}', '(1+\\sqrt{2})^2'),
    ('\\frac{1+\\sqrt{5}}{2}', '\\frac{\\sqrt{5}+1}{2}'), ('\\frac{2}{\\sqrt{5}-1}', '\\frac{1+\\sqrt{5}}{2}'),
    ('2\\pi', '6.283185'), ('\\frac{\\pi}{3}', '\\pi/3'),
    ('\\frac{\\pi}{2}', '\\frac{2\\pi}{4}'), ('9\\pi', '\\pi\\cdot 9'),
    ('x^2+2x+1', '(x+1)^2'), ('x^2-1', '(x-1)(x+1)'),
    ('x^3-y^3', '(x-y)(x^2+xy+y^2)'), ('2x+3', '3+2x'),
    ('\\frac{x}{2}', '0.5x'), ('\\frac{x^2-1}{x-1}', 'x+1'),
    ('6a^2b', '6ba^2'), ('-x+5', '5-x'),
    ('e^{2x}', '(e^x)^2'), ('\\sin^2 x+\\cos^2 x', '1'),
    ('\\sin(2x)', '2\\sin x\\cos x'), ('\\tan x', '\\frac{\\sin x}{\\cos x}'),
    ('\\log_2 8', '3'), ('\\ln 4', '2\\ln 2'),
    ('\\frac{\\ln 3}{\\ln 2}', '\\log_2 3'), ('(1,2)', '(1, 2)'),
    ('\\left(3,\\frac{\\pi}{2}\\right)', '(3,\\pi/2)'), ('(1,-2,3)', '\\left(1,-2,3\\right)'),
    ('\\{1,2,3\\}', '\\{3,2,1\\}'), ('1,2', '2,1'),
    ('1,2', '\\{1,2\\}'), ('\\{1,-1\\}', '\\pm 1'),
    ('2 \\pm \\sqrt{3}', '2+\\sqrt{3},2-\\sqrt{3}'), ('[0,1)', '\\left[0,1\\right)'),
    ('(-\\infty,2]', '(-\\infty, 2]'), ('(-\\infty,0)\\cup(1,\\infty)', '(-\\infty,0)\\cup (1,+\\infty)'),
    ('(-\\infty,0)\\cup(1,\\infty)', '(1,\\infty)\\cup(-\\infty,0)'), ('[0,\\frac{1}{2}]', '[0,0.5]'),
    ('x=5', '5'), ('5', 'x=5'),
    ('y=2x+3', 'y=3+2x'), ('y=2x+3', '2x-y+3=0'),
    ('x^2+y^2=4', '4=x^2+y^2'), ('2x+4y=6', 'x+2y=3'),
    ('x<2', '2>x'), ('1<x<2', '2>x>1'),
    ('x\\ge 3', '3\\le x'), ('x\\in[0,1]', '[0,1]'),
    ('1<x<2', '(1,2)'), ('\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}', '\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}'),
    ('\\begin{pmatrix}1/2\\\\3\\end{pmatrix}', '\\begin{pmatrix}\\frac{1}{2}\\\\ 3\\end{pmatrix}'),
    ('\\begin{pmatrix}1&2\\end{pmatrix}', '\\begin{bmatrix}1&2\\end{bmatrix}'),
    ('30^\\circ', '30'), ('90^{\\circ}', '90^\\circ'),
    ('12\\text{ cm}', '12'), ('5\\sqrt{2}\\text{ cm}', '5\\sqrt{2}'),
    ('25\\pi\\text{ cm}^2', '25\\pi'), ('50\\%', '50'),
    ('\\text{even}', 'even'), ('\\text{Monday}', 'monday'),
    ('\\text{(A)}', 'A'), ('3+4i', '4i+3'),
    ('\\frac{1}{1+i}', '\\frac{1-i}{2}'), ('(1+i)^2', '2i'),
    ('|3|', '3'), ('|x-1|', '\\left|x-1\\right|'),
    ('2^{10}', '1024'), ('10^{-3}', '0.001'),
    ('3\\times 10^8', '300000000'), ('1.5\\cdot 10^3', '1500'),
    ('5!', '120'), ('\\binom{5}{2}', '10'),
    ('1,234', '1234'), ('12,345.5', '12345.5'),
    ('x_1+x_2', 'x_2+x_1'), ('\\frac{a+b}{c}', '\\frac{a}{c}+\\frac{b}{c}'),
    ('\\frac{1}{x}+\\frac{1}{y}', '\\frac{x+y}{xy}'), ('2^{x+1}', '2\\cdot 2^x'),
    ('\\emptyset', '\\varnothing'), ('f(x)=2x+1', 'f(x)=1+2x'),
    ('2n(n+1)', '2n^2+2n'), ('\\frac{n(n+1)}{2}', 'n(n+1)/2'),
    ('101_2', '101_{2}'), ('k', 'k'),
    ('\\cos 60^\\circ', '\\cos 60^\\circ'), ('e', 'e'),
    ('\\infty', '\\infty'), ('-\\infty', '-\\infty'),
    ('x\\neq 2', 'x \\ne 2'), ('\\{1,1,2\\}', '\\{1,2,2\\}'),
]
FORMULAS_THAT_DIFFER = [
    ('42', '43'), ('1/2', '2'),
    ('\\frac{1}{3}', '0.33'), ('\\sqrt{2}', '1.41'),
    ('\\sqrt{x^2}', 'x'), ('\\pi', '3.14'),
    ('\\pi', '22/7'), ('x^2', '2x'),
    ('x+1', 'y+1'), ('x+1', 'x-1'),
    ('(x+1)^2', 'x^2+1'), ('x^{99}+1', 'x^{99}'),
    ('(1,2)', '(2,1)'), ('[0,1)', '[0,1]'),
    ('(0,1)', '[0,1]'), ('\\{1,2\\}', '\\{1,2,3\\}'),
    ('1,2', '1'), ('(-\\infty,2)', '(-\\infty,3)'),
    ('(0,1)\\cup(2,3)', '(0,1)\\cup(2,4)'), ('y=2x+3', 'y=2x-3'),
    ('x<2', 'x>2'), ('x<2', 'x\\le 2'),
    ('1<x<2', '1<x<3'), ('\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}', '\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}'),
    ('\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{pmatrix}1&2\\end{pmatrix}'), ('\\text{even}', '\\text{odd}'),
    ('\\text{(A)}', 'B'), ('3+4i', '3-4i'),
    ('2^{10}', '1023'), ('10^{30}', '10^{30}+1'),
    ('10^{60}', '10^{60}+1'), ('\\sin x', '\\cos x'),
    ('\\ln 2', '\\log_2 2'), ('e^x', 'x^e'),
    ('\\frac{a}{b}', '\\frac{b}{a}'), ('x_1', 'x_2'),
    ('101_2', '101_3'), ('5\\sqrt{2}', '5\\sqrt{3}'),
    ('\\sin(2x)', '2\\sin x'), ('1,234', '1,235'),
    ('-\\infty', '\\infty'), ('x=5', 'x=6'),
    ('x=5', 'y=5'),
]
SAME_ANGLES = [
    ('\\cos 60^\\circ', '\\frac{1}{2}'), ('\\sin^2 30^{\\circ}', '1/4'),
    ('\\tan(45^\\circ)', '1'), ('2\\sin(x+30^\\circ)', '\\sqrt3\\sin x+\\cos x'),
    ('\\cos 60\\degree', '0.5'), ('90°', '90'),
    ('\\frac{\\sin 20^\\circ}{\\cos 20^\\circ}', '\\tan 20^\\circ'), ('x=30^\\circ', '30'),
    ('\\cos 60^\\circ+30^\\circ', '30.5'),
]
ANGLES_THAT_DIFFER = [
    ('\\cos 60^\\circ', '\\cos 60'),
    ('30^\\circ', '\\frac{\\pi}{6}'), ('\\arcsin\\frac12', '30^\\circ'),
    ('\\cos 60^\\circ', '\\cos 30^\\circ'), ('\\cos(60)^\\circ', '1/2'),
]
WRAPS = ["?", "?", "?", "?", "?", "\\boxed{?}", "#### ?", "<answer>?</answer>", "The answer is ?.", "[?]", "'?'", " ?\n", "?<eos>", "x = ?", "$?$", "?\u241e?"]
CHARS = string.digits + "+-*/^()=:,. _{}[]<>$%#\\&|!'\"\n\t" + string.ascii_letters
BRACKETS = ["()", "[]", "{}", "[)", "-(", "~~", "\\frac{1}{", "<answer>", "\\boxed{"]
HIDDEN = [*range(32), 127, 0x200B, 0x202E, 0xFEFF, 0xD800, 0xDFFF]      # control characters, marks without width, halves of surrogate pairs


def noise(rng: random.Random) -> str:
    "Characters of one kind."
    n = rng.choice([0, 1, 2, 5, 12, 40])
    anywhere = lambda: chr(rng.randrange(0x110000))
    kinds = [anywhere, lambda: chr(rng.choice(HIDDEN)), lambda: rng.choice("0123456789+-*"), lambda: rng.choice("٣१２²½Ⅷ〇𝟘-−+×"), lambda: rng.choice(CHARS)]
    draw = rng.choice(kinds)
    return "".join(draw() for _ in range(n))


def brackets(rng: random.Random) -> str:
    "Brackets, closed or not, deep or not."
    n, b = rng.choice([3, 30, 3000]), rng.choice(BRACKETS)
    return b[0] * n + "1" + b[-1] * rng.choice([0, n]) if len(b) == 2 else b * min(n, 300)


def near(rng: random.Random, right: str) -> str:
    "A right answer after a few small accidents, or none."
    text = list(right)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        i = rng.randrange(len(text) + 1)
        length, put = rng.choice([(1, []), (0, [rng.choice(CHARS)]), (1, [rng.choice(CHARS)]), (0, text[:i][-3:]), (1, [chr(rng.randrange(0x3000))])])
        text[i:i + length] = put
    return "".join(text)


def odd(rng: random.Random, right: str, file: str) -> str:
    "One odd text. `right` is an answer that is right, `file` what some of the texts would write if they were run."
    made = rng.choices([lambda: noise(rng), lambda: brackets(rng), lambda: near(rng, right), lambda: rng.choice(CODE).replace("FILE", file),
        lambda: rng.choice(HUGE), lambda: rng.choice(LATEX), lambda: near(rng, rng.choice(FORMULAS)),
                        lambda: rng.choice(CHARS) * rng.choice([100, 5000, 50_000])], [20, 6, 40, 12, 12, 8, 8, 2])[0]()
    if rng.random() < 0.1: made += near(rng, right)
    return rng.choice(WRAPS).replace("?", made)


def survive(name: str, verify: Callable[[str, str], float], asked: list[tuple[str, str]], count: int, seed: int, file: str) -> None:
    "Show a verifier odd texts: none raises an error, takes 50 ms or is run."
    rng, longest, worst, slow = random.Random(seed), 0.0, "", 0
    gc.collect()
    gc.freeze()                                        # a verifier does not pay for what the other tests left behind
    for _ in range(count):
        prompt, right = rng.choice(asked)
        text = odd(rng, right, file)
        start = time.thread_time()                     # not a clock's time: other processes use this machine too
        reward = verify(prompt, text)
        took = time.thread_time() - start
        assert type(reward) is float and 0 <= reward <= 1, (text, reward)
        slow += took > 0.05
        if took > longest: longest, worst = took, text
    gc.unfreeze()
    print(f"{name}, seed {seed}, {count} texts: longest {1e3 * longest:.1f} ms, by {worst[:80]!r}; {slow} over 50 ms")
    assert not os.path.exists(file) and not hasattr(builtins, "pwned")
    assert longest < 0.05, worst[:200]
