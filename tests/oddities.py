"Texts that a verifier may meet and should survive."

import random
import string

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
        lambda: rng.choice(HUGE), lambda: rng.choice(LATEX),
                        lambda: rng.choice(CHARS) * rng.choice([100, 5000, 50_000])], [20, 6, 40, 12, 12, 8, 2])[0]()
    if rng.random() < 0.1: made += near(rng, right)
    return rng.choice(WRAPS).replace("?", made)
