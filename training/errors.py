"""Errors that a user can act on, and the exit codes that scripts rely on."""

OK = 0
FAILED = 1
USAGE = 2
GATE_FAILED = 3
GATE_INCONCLUSIVE = 4
HUNG = 5
LOST = 6
FINAL = GATE_INCONCLUSIVE
"""Up to this code the same command would only end the same way; beyond it the next start may well go on."""
CAUSE = "cause"
"""File in a run's errors folder: exit code of the first process that knew why it ended; srun has the highest of all."""


class UserError(Exception):
    """A problem that the user can solve: shown as one line without a traceback.

    Args:
        message: One line that names the field or file, the value and the remedy.
        code: Exit code: USAGE (2) for bad usage or a bad recipe, FAILED (1) for anything that goes wrong later.
    """

    def __init__(self, message: str, code: int = FAILED):
        super().__init__(message)
        self.code = code


class StoppedTogether(UserError):
    """Every rank stops at the same place: what needs all of them can still be completed."""


class RecipeError(UserError):
    """A bad recipe or command line: all problems at once, exit code 2."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems), USAGE)
        self.problems = problems
