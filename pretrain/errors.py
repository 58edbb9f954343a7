"""What a program tells its user: UserError, and the exit codes that queues read."""


class UserError(ValueError):
    """Something only the user can put right: what, where and what to do, in a line (exit code 2)."""


DONE, DEFECT, USER_ERROR, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
"""Exit codes: the budget is spent; a defect; the user must change something; stopped early on request, start
me again; a tool was ended by Ctrl-C."""
