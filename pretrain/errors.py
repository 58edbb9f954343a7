"""What a program tells its user: UserError, and the exit codes that queues read."""


class UserError(ValueError):
    """Something only the user can put right: what, where and what to do, in a line (exit code 2)."""


DONE, STOPPED = 0, 75
"""Exit codes: the budget is spent; stopped early on request, start me again."""
