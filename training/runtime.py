"""Processes, devices, seeds.

A `Runtime` is opened once per process and passed along. On a machine without GPUs Megatron-Core runs on gloo: it names
CUDA in a few places, and `_use_host` answers those calls with their CPU counterparts. Nothing is patched where CUDA is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

from halfbyte.training import environment
from halfbyte.training.choices import FLOAT64_ON_GPU, Dtype
from halfbyte.training.config import Recipe
from halfbyte.training.errors import USAGE, UserError

DTYPES = {Dtype.float32: torch.float32, Dtype.bfloat16: torch.bfloat16, Dtype.float64: torch.float64}
TIMEOUT = timedelta(minutes=60)
"""Longest wait of one collective: rank 0 tokenizes a corpus or writes an export while the others wait."""


@dataclass(frozen=True)
class Runtime:
    """One process of the layout.

    Attributes:
        rank, world, local_rank, local_world: Process coordinates as torchrun and Slurm count them.
        device: Where parameters live.
        dtype: Compute type of the model.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    dtype: torch.dtype

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes JSON."""
        return self.rank == 0


def open_runtime(recipe: Recipe) -> Runtime:
    """Join the process group, build Megatron's parallel groups, seed every generator.

    Args:
        recipe: Resolved recipe; `parallel` must multiply to the number of processes.

    Returns:
        This process's Runtime.

    Raises:
        UserError: the number of processes or GPUs does not fit the layout, float64 on a GPU, bfloat16 on a CPU, or the
            rendezvous port is taken.
    """
    rank, world, local_rank, local_world = environment.coordinates()
    environment.order_kernels(side_by_side=recipe.train.micro_batches_at_once > 1)
    cuda = torch.cuda.is_available()
    problem = _layout_problem(recipe, world, local_world, torch.cuda.device_count() if cuda else None)
    if problem:
        raise UserError(problem, USAGE)
    dtype = DTYPES.get(recipe.train.dtype, torch.bfloat16 if cuda else torch.float32)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    _join(rank, world, "nccl" if cuda else "gloo", recipe.launch.port)
    if not cuda:
        _use_host()
    _seed(recipe)
    return Runtime(rank, world, local_rank, local_world, device, dtype)


def _layout_problem(recipe: Recipe, world: int, local_world: int, gpus: int | None) -> str | None:
    layout = recipe.parallel
    need = recipe.world_size
    if world != need:
        return (
            f"parallel = tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}: needs {need} "
            f"processes, {world} started; start {need} or change parallel"
        )
    if gpus is not None and local_world > gpus:
        return f"parallel: {local_world} processes on this machine need as many GPUs, {gpus} found; change parallel"
    if recipe.train.dtype == Dtype.float64 and gpus is not None:
        return FLOAT64_ON_GPU
    if recipe.train.dtype == Dtype.bfloat16 and gpus is None:
        return "train.dtype = bfloat16: no GPU found, and CPUs compute in float32; set train.dtype=auto"
    return None


def _join(rank: int, world: int, backend: str, port: int) -> None:
    where = environment.rendezvous(port)
    try:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"rendezvous at {where} failed ({reason}): choose a free port with launch.port") from error


def _seed(recipe: Recipe) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    layout = recipe.parallel
    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60)
    )
    torch.manual_seed(recipe.train.seed)
    model_parallel_cuda_manual_seed(recipe.train.seed)


def close_runtime() -> None:
    """Leave the process group; safe to call twice and after a failure."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def on_first_rank[T](runtime: Runtime, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and hand its (picklable) result to every rank.

    Raises:
        UserError: on every rank, when `work` raised one on rank 0: nobody is left waiting.
    """
    answer: list[Any] = [None, None]
    if runtime.first:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def on_every_rank[T](runtime: Runtime, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank and hand all (picklable) results, by rank, to every rank.

    Raises:
        UserError: on every rank, when `work` raised one on some: the one of the lowest rank.
    """
    mine: tuple[T | None, UserError | None]
    try:
        mine = work(), None
    except UserError as error:
        mine = None, error
    answers: list[Any] = [None] * runtime.world
    dist.all_gather_object(answers, mine)
    for _, failed in answers:
        if failed is not None:
            raise failed
    return [result for result, _ in answers]


def agree(*flags: bool) -> list[bool]:
    """Each flag True on every rank as soon as one rank says True (one MAX over all ranks)."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    votes = torch.tensor([int(flag) for flag in flags], device=device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def collectives_begun() -> dict[str, int]:
    """Name of every process group of this process -> how many collectives it has begun there (torch's own count)."""
    names = distributed_c10d._world.pg_names
    return {
        f"{names[group]} ({group.group_desc}, ranks {', '.join(map(str, dist.get_process_group_ranks(group)))})": (
            group._get_sequence_number_for_group()
        )
        for group in list(distributed_c10d._world.pg_map)
    }


class _HostDevice(TorchFunctionMode):
    """Send every 'cuda' device argument to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and args[0].dtype in _HOST_PARAMETERS:
            return "torch.cuda.FloatTensor"  # Megatron's optimizer tells FP32 parameters by this name
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


_HOST_PARAMETERS = (torch.float32, torch.float64)


def _use_host() -> None:
    """Make Megatron-Core 0.19 run without CUDA: TP, SP, PP, DDP and the distributed optimizer on gloo."""
    import megatron.core.tensor_parallel.random as megatron_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None
    cuda.empty_cache = lambda: None
    cuda.manual_seed = torch.manual_seed
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.get_rng_state = megatron_random._get_cuda_rng_state
    cuda.set_rng_state = megatron_random._set_cuda_rng_state
    cpu: Any = torch.cpu
    cpu.Stream.wait_stream = lambda self, other: None  # Megatron's DDP orders its reductions with streams
    cuda.current_stream, cuda.Stream, cuda.stream = cpu.current_stream, cpu.Stream, cpu.stream
    _HostDevice().__enter__()
