"""training/side_by_side.py on the CPU: no streams, and gloo in the place of copy engines; the walk is the real one."""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist

from halfbyte.training import side_by_side
from halfbyte.training.side_by_side import Turns


class Stream:
    """A CPU computes in the order in which it is told to."""

    def wait_stream(self, other) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self) -> None: ...


class Exchange:
    """copy_engines.Exchange over gloo, which counts."""

    def __init__(self, group, whole):
        self.group, self.numel, self.stream, self.count = group, whole.numel(), Stream(), 0

    def serves(self, whole) -> bool:
        return whole.numel() == self.numel

    def gather(self, whole, part) -> None:
        self.count += 1
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self.group)

    def scatter(self, part, whole) -> None:
        self.count += 1
        dist.reduce_scatter_tensor(part, whole, group=self.group)

    def settle(self) -> None: ...


@contextlib.contextmanager
def on_host():
    """Inside, lanes can be made and taken."""
    current = [Stream()]

    @contextlib.contextmanager
    def use(stream):
        before, current[0] = current[0], stream
        yield
        current[0] = before

    def mine(turns):  # a backward pass on a CPU knows no streams; its collectives do not overlap
        return turns._lanes.get(current[0]) or next(iter(turns._lanes.values()))

    with contextlib.ExitStack() as inside:
        for place, name, value in (
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "current_stream", lambda *_: current[0]),
            (torch.cuda, "stream", use),
            (torch.cuda, "can_device_access_peer", lambda *_: True),
            (dist, "ProcessGroupNCCL", mock.Mock(Options=lambda **_: None)),
            (side_by_side, "Exchange", Exchange),
            (Turns, "_mine", mine),
        ):
            inside.enter_context(mock.patch.object(place, name, value, create=True))
        yield
