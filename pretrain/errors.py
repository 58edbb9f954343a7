"""What a program tells its user: UserError, and the exit codes that queues read."""

import signal


class UserError(ValueError):
    """Something only the user can put right: what, where and what to do, in a line (exit code 2)."""


DONE, DEFECT, USER_ERROR, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: the budget is spent; a defect; the user must change something; stopped early on request, start
me again; a tool was ended by Ctrl-C."""
_STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def was_stopped(code: int) -> bool:
    """Tell by the exit code of a program of ours that it was stopped, and is to be started again: it says so,
    or a signal to stop came before it was ready for one."""
    return code == STOPPED or any(code in (-number, 128 + number) for number in _STOPS)
