"""Run main(FOLDER) of a worker file that saves checkpoints: start.py WORKER.py FOLDER.

Megatron-Core's checkpoint writer spawns processes, and each of them imports the main module again: this one is light.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    from halfbyte.training import environment

    environment.set_process_environment()
    environment.quiet_libraries()
    runpy.run_path(sys.argv[1])["main"](Path(sys.argv[2]))
