"""One worker of a run that breaks by itself: faults.py RESOLVED_YAML STAGE..., as launch/pipeline.py is called.

Each fault of FAULTS happens once, in its order: a file in the run folder says that it did. Judges nothing.
"""

import os
import signal
import sys
import time
from pathlib import Path

from halfbyte.launch import pipeline
from halfbyte.training import environment

RANK = environment.coordinates()[0]


def kill() -> None:
    """As the kernel's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """A process that waits for nobody."""
    time.sleep(600)


FAULTS = {
    "optimizer": (1, 1, kill),
    "forward": (0, 3, kill),
    "save": (0, 4, kill),
    "hang": (1, 4, hang),
}
"""Name -> (rank, after how many steps, what happens)."""


def strike(name: str, folder: Path, steps: int, before: set[str]) -> None:
    """Let a fault happen if it is its turn, place and time.

    Its turn comes when all earlier ones had happened before this process began: a rank that still trains while another
    one is being killed must not take the next fault with it.
    """
    rank, after, happen = FAULTS[name]
    order = list(FAULTS)
    if before == set(order[: order.index(name)]) and (rank, after) == (RANK, steps):
        (folder / f"fault.{name}").write_text(str(time.time()))
        happen()


def plant(folder: Path) -> None:
    """Hook the faults into the places that they are named after."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from halfbyte.training import checkpoint_memory, integrity, module

    done, before = {"steps": 0}, {name for name in FAULTS if (folder / f"fault.{name}").exists()}
    whole_pass, step, digests = module.Training._pass, module.MegatronOptimizer.step, integrity.digests
    layer, copy = TransformerLayer.forward, checkpoint_memory.HostMemory.copy

    def broken_pass(self, batch, quantizes):
        done["steps"] = len(self.progress.losses)
        strike("hang", folder, done["steps"], before)
        return whole_pass(self, batch, quantizes)

    def broken_layer(self, *args, **kwargs):
        strike("forward", folder, done["steps"], before)
        return layer(self, *args, **kwargs)

    def late_copy(self):  # of a save in the background: when forward and backward are long over
        time.sleep(0.3)
        copy(self)

    def broken_step(self, closure=None):
        strike("optimizer", folder, done["steps"], before)
        return step(self, closure)

    def broken_digests(path, names):
        if path.suffix == ".tmp":  # .step_NNNNNNNN.tmp, in a thread of its own while training goes on
            strike("save", folder, int(path.stem.removeprefix(".step_")), before)
        return digests(path, names)

    module.Training._pass, module.MegatronOptimizer.step = broken_pass, broken_step
    TransformerLayer.forward, integrity.digests = broken_layer, broken_digests
    checkpoint_memory.HostMemory.copy = late_copy


if __name__ == "__main__":
    environment.die_with_parent()
    environment.set_process_environment()
    environment.quiet_libraries()
    plant(Path(sys.argv[1]).parent)
    sys.exit(pipeline.worker(sys.argv[1:]))
