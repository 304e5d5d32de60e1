"""Which source this package is, where it is a git checkout."""

import subprocess
from pathlib import Path


def revision(digits: int) -> str | None:
    """Commit of halfbyte's source (`-dirty`: files differ from it); None outside a checkout of it or without git.

    Args:
        digits: Of the commit's hash, at least.
    """
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:  # an installed copy may lie inside somebody else's repository, which does not track this file
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True, timeout=60)
        asked = [*git, "describe", "--always", f"--abbrev={digits}", "--dirty", "--exclude=*"]
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
