"""Lightning on Megatron-Core: the trainer's loop, callbacks and signals over Megatron's groups and checkpoints.

Process groups exist before the trainer does (runtime.py), DDP and optimizer are Megatron's (module.py); what is left
for the strategy is to answer Lightning's questions about ranks, and to send checkpoints through checkpoint.py.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import ParallelStrategy

from halfbyte.training import checkpoint
from halfbyte.training.quantize import refresh_scales
from halfbyte.training.runtime import Runtime


class Processes(ClusterEnvironment):
    """The processes that the runtime joined, in Lightning's words."""

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    @property
    def creates_processes_externally(self) -> bool:
        """Torchrun or srun started them."""
        return True

    @property
    def main_address(self) -> str:
        """Unused: the process group exists."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Unused: the process group exists."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Never chosen by detection, only by hand."""
        return False

    def world_size(self) -> int:
        """All processes."""
        return self.runtime.world

    def set_world_size(self, size: int) -> None:
        """Fixed by the runtime."""

    def global_rank(self) -> int:
        """Rank over all nodes."""
        return self.runtime.rank

    def set_global_rank(self, rank: int) -> None:
        """Fixed by the runtime."""

    def local_rank(self) -> int:
        """Rank on this node."""
        return self.runtime.local_rank

    def node_rank(self) -> int:
        """Which node this is."""
        return self.runtime.rank // self.runtime.local_world


class MegatronStrategy(ParallelStrategy):
    """Lightning strategy over an open Runtime."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Lightning asks: the optimizer must exist before its state is loaded."""
        return True

    def __init__(self, runtime: Runtime):
        super().__init__(
            parallel_devices=[torch.device(runtime.device.type, i) for i in range(runtime.local_world)]
            if runtime.device.type == "cuda"
            else [torch.device("cpu")] * runtime.local_world,
            cluster_environment=Processes(runtime),
        )
        self.runtime = runtime
        self.write: checkpoint.Write | None = None
        """The checkpoint that was begun last."""

    @property
    def root_device(self) -> torch.device:
        """This process's device."""
        return self.runtime.device

    @property
    def global_rank(self) -> int:
        """Rank over all nodes."""
        return self.runtime.rank

    @property
    def local_rank(self) -> int:
        """Rank on this node."""
        return self.runtime.local_rank

    @property
    def node_rank(self) -> int:
        """Which node this is."""
        return self.runtime.rank // self.runtime.local_world

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.runtime.world

    @property
    def is_global_zero(self) -> bool:
        """Whether this process prints and logs."""
        return self.runtime.first

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Unused: data.py deals out the windows itself."""
        return {"num_replicas": 1, "rank": 0}

    def model_to_device(self) -> None:
        """The model was built on its device."""

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks; a save that has begun needs no more of it."""
        if name != "Trainer.save_checkpoint":
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Any picklable object from `src` to all."""
        box = [obj]
        dist.broadcast_object_list(box, src=src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """What is logged is the same on every rank already."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """Stack one tensor per rank: [world, ...]."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor, group=group)
        return torch.stack(parts)

    def save_checkpoint(self, checkpoint_dict: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Begin to write Lightning's dictionary (loops, callbacks, ours) and Megatron's shards; saving.py finishes it.

        Args:
            checkpoint_dict: The dictionary.
            filepath: The checkpoint's folder.
            storage_options: HostMemory, or None; Lightning passes it through.
        """
        self.write = checkpoint.begin(self._trainable(), checkpoint_dict, Path(filepath), storage_options)

    def reserve(self, host: checkpoint.HostMemory) -> None:
        """Begin to take the memory that `save_checkpoint` will copy to; after the first step."""
        checkpoint.reserve(self._trainable(), host)

    def _trainable(self) -> checkpoint.Trainable:
        module = self.lightning_module
        return checkpoint.Trainable(module.gpt, module.optimizer.megatron)  # type: ignore[union-attr]

    def load_checkpoint(self, checkpoint_path: Any, *_: Any, **__: Any) -> dict[str, Any]:
        """Load the shards in place and return Lightning's dictionary."""
        module = self.lightning_module
        plain = checkpoint.load(self._trainable(), Path(checkpoint_path).resolve())
        refresh_scales(module.gpt, module.recipe.quantize)  # type: ignore[union-attr]
        return plain

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: the shards hold the weights."""
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Done by load_checkpoint."""

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Empty: the shards hold the optimizer."""
        return {}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Done by load_checkpoint."""

    def teardown(self) -> None:
        """The runtime outlives the trainer; Lightning's own teardown would move the model to the CPU."""
