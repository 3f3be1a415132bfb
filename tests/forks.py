"Copies of the test process. They have torch and transformers, which take seconds to import, from the beginning."

import os
import traceback
from collections.abc import Callable

import torch


def fork(run: Callable[[], object]) -> int:
    "Start a copy of this process that only does `run`; returns its id."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        torch.set_num_threads(1)        # a copy has none of the other threads
        run()
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)


def ended(pid: int) -> int:
    "Waits for a copy's end: its exit status, or less than 0 the signal that killed it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
