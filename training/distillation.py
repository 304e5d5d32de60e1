"""QAD: what of the teacher is kept, when it computes, and how the student is compared with it.

Without pipeline parallelism the teacher runs right before each micro-batch's loss, so that one micro-batch of its
logits is alive. A pipeline cannot stop between two micro-batches: there the teacher walks the whole global batch first
and the last stage keeps what it said, which distill.top_k makes small. With distill.teacher all of it comes from disk.
Shapes: B rows, S sequence, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from halfbyte.training import typed
from halfbyte.training.config_distill import Distill
from halfbyte.training.data import MicroBatch
from halfbyte.training.losses import compute_dtype, distillation
from halfbyte.training.schedule import Loss, collect, forward_only
from halfbyte.training.teacher_files import TeacherFiles
from halfbyte.training.topk import TopK, label_cross_entropy, top_k, top_k_distillation


@dataclass(frozen=True)
class Said:
    """What the teacher said about one micro-batch, on the last pipeline stage.

    Attributes:
        logits: [B, S, V/tp], or its likeliest tokens.
        hidden: [S, B, H] at every place that is compared (this rank's part of S under sequence parallelism).
    """

    logits: torch.Tensor | TopK
    hidden: tuple[torch.Tensor, ...] = ()


class Distillation:
    """The loss of QAD for one student under one layout.

    Args:
        student: This rank's GPTModel.
        teacher: The BF16 model, same layout, not changed; or what it said, from disk.
        distill: The recipe's section.
    """

    def __init__(self, student: GPTModel, teacher: GPTModel | TeacherFiles, distill: Distill):
        self.teacher, self.distill = teacher, distill
        self.sequence_parallel = student.config.sequence_parallel
        watched = bool(distill.hidden) and parallel_state.is_pipeline_last_stage()
        self.watched: dict[str, list[Caught]] = {"student": [], "teacher": []}
        if watched and not isinstance(teacher, TeacherFiles):
            for name, model in (("student", student), ("teacher", teacher)):
                self.watched[name] = [Caught(place) for place in places(model, distill.hidden_layers)]

    @property
    def group(self) -> Any:
        """The tensor-parallel group; another communicator of it while side_by_side.py captures."""
        return parallel_state.get_tensor_model_parallel_group()

    def loss(self, batches: Sequence[MicroBatch]) -> Loss:
        """The loss per token of one global batch; collective, to be called right before schedule.train_batch."""
        if isinstance(self.teacher, TeacherFiles):
            return self._from_files(self.teacher)
        pipeline = parallel_state.get_pipeline_model_parallel_world_size()
        return self.batch_by_batch(self.teacher) if pipeline == 1 else self.beforehand(batches)

    def _from_files(self, files: TeacherFiles) -> Loss:
        return lambda student, batch, index: self._compare(
            student, batch, Said(files.read(batch.windows, student.device))
        )

    def batch_by_batch(self, teacher: GPTModel) -> Loss:
        """The teacher computes inside the loss of each micro-batch."""
        return lambda student, batch, index: self._compare(student, batch, self._keep(forward_only(teacher, batch)))

    def after(self, logits: Sequence[torch.Tensor]) -> Loss:
        """The teacher has computed already: its logits [B, S, V/tp] of every micro-batch."""
        return lambda student, batch, index: self._compare(student, batch, self._keep(logits[index]))

    def beforehand(self, batches: Sequence[MicroBatch]) -> Loss:
        """The teacher walks all micro-batches now."""
        assert not isinstance(self.teacher, TeacherFiles)
        kept = dict(enumerate(collect(self.teacher, batches, lambda logits, index: self._keep(logits))))
        return lambda student, batch, index: self._compare(student, batch, kept.pop(index))

    def _keep(self, logits: torch.Tensor) -> Said:
        hidden = tuple(caught.take() for caught in self.watched["teacher"])
        k = self.distill.top_k
        return Said(logits if k is None else top_k(logits, k, self.distill.temperature, self.group), hidden)

    def _compare(self, student: torch.Tensor, batch: MicroBatch, said: Said) -> torch.Tensor:
        distill = self.distill
        if isinstance(said.logits, TopK):
            compare: Any = top_k_distillation
        else:
            compare = distillation
        loss = compare(student, said.logits, self.group, distill.temperature, distill.loss, distill.beta)
        if distill.cross_entropy:
            loss = loss + distill.cross_entropy * label_cross_entropy(student, batch.labels, self.group)
        for caught, teacher in zip(self.watched["student"], said.hidden, strict=True):
            error = hidden_error(caught.take(), teacher, sequence_parallel=self.sequence_parallel)
            loss = loss + distill.hidden / len(said.hidden) * error
        return loss


def places(model: GPTModel, layers: Sequence[int]) -> list[torch.nn.Module]:
    """The modules whose outputs are compared: layers by their number, or the last norm; of a pipeline's last stage."""
    return [typed.layers(model)[number] for number in layers] or [model.decoder.get_submodule("final_layernorm")]


class Caught:
    """Catches what a module gives in every forward pass."""

    def __init__(self, module: torch.nn.Module):
        self._caught: torch.Tensor | None = None
        module.register_forward_hook(self._catch)

    def _catch(self, module: torch.nn.Module, args: Any, out: Any) -> None:
        self._caught = out[0] if isinstance(out, tuple) else out  # a layer's second output is about cross-attention

    def take(self) -> torch.Tensor:
        """[S, B, H] of the newest forward pass; it is not held any longer."""
        caught, self._caught = self._caught, None
        assert caught is not None
        return caught


def hidden_error(student: torch.Tensor, teacher: torch.Tensor, *, sequence_parallel: bool) -> torch.Tensor:
    """Mean squared difference over H per token.

    Args:
        student: [S, B, H], this rank's part of S under sequence parallelism; carries the gradient.
        teacher: The same of the teacher, no gradient.
        sequence_parallel: Whether the tensor-parallel ranks hold parts of S.

    Returns:
        [B, S] with all of S on every rank; FP32, or FP64 for FP64 inputs.
    """
    error_SB = (student.to(compute_dtype(student)) - teacher).square().mean(-1)
    if sequence_parallel:  # every rank computes the whole loss, so a rank's part takes its gradient once, not tp times
        error_SB = gather_from_sequence_parallel_region(error_SB, tensor_parallel_output_grad=False)
    return error_SB.transpose(0, 1)
