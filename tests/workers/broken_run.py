"""A run of the tiny recipe whose workers break (faults.py), under the real supervision: broken_run.py key=value ..."""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(options: list[str]) -> int:
    """As `halfbyte run tiny`, in workers that are forks."""
    from halfbyte.launch import pipeline, start
    from halfbyte.training.resolve import resolve, save

    recipe = resolve("tiny", options)
    save(recipe, Path(recipe.run.dir) / start.RESOLVED)
    entry = runpy.run_path(str(HERE / "nursery.py"))["open_nursery"]()
    return start.launch(recipe, pipeline.STAGES, entry=[*entry, str(HERE / "faults.py")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
