"""The LightningModule: one training_step is one global batch through Megatron's schedule and one optimizer step."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from torch.utils.data import DataLoader, IterableDataset

from halfbyte.training import companions, gradients, graphs, lora, losses, lsq, side_by_side, stage_graphs
from halfbyte.training.config import Method, Recipe
from halfbyte.training.corpus import PackedDataset
from halfbyte.training.data import MicroBatch, StepStream
from halfbyte.training.distillation import Distillation
from halfbyte.training.errors import StoppedTogether, UserError
from halfbyte.training.fake_quant import unquantized
from halfbyte.training.fast_path import weights_once
from halfbyte.training.files import write_json
from halfbyte.training.freeze import freeze
from halfbyte.training.graph_rules import captures
from halfbyte.training.optimizer import MegatronOptimizer, uses_distributed_optimizer
from halfbyte.training.runtime import Runtime
from halfbyte.training.saturation import clip_weight_gradients
from halfbyte.training.schedule import Loss, StepLoss, step_loss, train_batch
from halfbyte.training.teacher_files import TeacherFiles


def wrap(model: GPTModel, recipe: Recipe) -> DistributedDataParallel:
    """Megatron's DDP around one pipeline stage: contiguous gradient buffers, FP32 except in float64 runs."""
    device = next(model.parameters()).device
    sharded, early = uses_distributed_optimizer(recipe), reduces_early(model, recipe, device)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.train.dtype != "float64",
        use_distributed_optimizer=sharded,
        overlap_grad_reduce=early,
    )
    model.config.finalize_model_grads_func = companions.finalize(model)
    ddp = DistributedDataParallel(model.config, config, model)
    if early:
        model.config.no_sync_func = ddp.no_sync  # the schedule then says which micro-batch is the last
    if config.grad_reduce_in_fp32:
        gradients.fuse(model)
    return ddp


def reduces_early(model: GPTModel, recipe: Recipe, device: torch.device) -> bool:
    """Whether gradients are summed over data-parallel ranks bucket by bucket, beside the last backward pass.

    Companions read a weight's gradient of this rank when the pass is over, and a graph's replay tells no hook which
    gradients are ready: there the sum is taken at the end.
    """
    replayed = device.type == "cuda" and captures(recipe)
    return recipe.parallel.data > 1 and companions.of(model) is None and not replayed


class _Unsized(IterableDataset):
    """A stream whose length Lightning does not see: it would take what is left after a resume for a whole epoch."""

    def __init__(self, stream: StepStream):
        self.stream = stream

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return iter(self.stream)


@dataclass
class Progress:
    """What happened so far, saved with every checkpoint."""

    losses: list[float] = field(default_factory=list)
    """Mean loss per token of every step, FP64."""
    tokens: list[int] = field(default_factory=list)
    """Tokens with loss of every step."""


class Training(pl.LightningModule):
    """Cross-entropy (QAT, BF16 control) or distillation (QAD) of one Megatron model.

    Args:
        model: This rank's GPTModel, quantized or not.
        teacher: For QAD the BF16 model, same layout, or its files; else None.
        recipe: The recipe.
        runtime: This process.
        data: Packed training windows.
    """

    def __init__(
        self,
        model: GPTModel,
        *,
        teacher: GPTModel | TeacherFiles | None,
        recipe: Recipe,
        runtime: Runtime,
        data: PackedDataset,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.recipe, self.runtime, self.data = recipe, runtime, data
        self.progress = Progress()
        self.saves: list[dict[str, float]] = []
        """Of every checkpoint that this start completed: step, seconds, stall_seconds of them in training's way, and
        wait_seconds of these, in which it waited for an old one's deletion, or the next save for it."""
        self.phase = "start"
        """What is being done, for the watchdog."""
        # Plain attributes in a list: Lightning must not walk, move or save these modules.
        lsq.attach(model, recipe)
        lora.attach(model, recipe)
        freeze(model, ["*"] if recipe.train.lora.rank else recipe.train.freeze, recompute=recipe.train.recompute)
        self._hidden = [model, wrap(model, recipe)]
        self._distillation = None
        if recipe.method == Method.qad:
            assert teacher is not None
            self._distillation = Distillation(model, teacher, recipe.distill)
        self.optimizer = MegatronOptimizer(self.ddp, recipe, runtime.dtype)
        lora.collect_gradients(model)
        self._replay = None
        if graphs.wanted(recipe, runtime):
            self._replay = graphs.Replay(side_by_side.open_lanes(recipe, runtime), self._distillation)
        self._stage = stage_graphs.StageReplay() if stage_graphs.wanted(recipe, runtime) else None
        self._rounded: dict[str, torch.Tensor] | None = {} if self._replay or self._stage else None

    @property
    def gpt(self) -> GPTModel:
        """This rank's part of the model."""
        return self._hidden[0]

    @property
    def ddp(self) -> DistributedDataParallel:
        """The same, with gradient buffers."""
        return self._hidden[1]

    def configure_optimizers(self) -> MegatronOptimizer:
        """The Megatron optimizer, stepped by hand in training_step."""
        return self.optimizer

    def train_dataloader(self) -> DataLoader:
        """One element per optimizer step: this data-parallel rank's micro-batches, from the step after the last."""
        train = self.recipe.train
        stream = StepStream(
            self.data,
            start_step=len(self.progress.losses),
            stop_step=train.steps,
            global_batch=train.global_batch,
            micro_batch=train.micro_batch,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            seed=train.seed,
        )
        return DataLoader(_Unsized(stream), batch_size=None)

    def transfer_batch_to_device(self, batch: list[MicroBatch], device: torch.device, dataloader_idx: int) -> Any:
        """Move every tensor of the micro-batches."""
        return [part.to(self.runtime.device) for part in batch]

    def training_step(self, batch: list[MicroBatch], batch_idx: int) -> None:
        """One global batch and one update.

        Raises:
            UserError: the loss or the gradient norm is not finite, or no token of the batch carries loss; the
                weights are those before the step.
        """
        step, self.phase = len(self.progress.losses), "forward and backward"
        optimizer = self.optimizers()
        optimizer.zero_grad()
        quantizes = step >= self.recipe.train.fake_quant_after_steps
        with ExitStack() as passes:
            if not quantizes:
                passes.enter_context(unquantized(self.gpt))
            passes.enter_context(weights_once(self.gpt, self._rounded))
            loss = self._pass(batch, quantizes)
        if loss.tokens == 0:
            raise UserError(f"step {step}: no token carries loss; check data.answer_only and data.train")
        if not math.isfinite(loss.mean):
            remedy = "lower train.learning_rate or start from an earlier checkpoint"
            self._stop(batch, loss, f"step {step}: loss is {loss.mean}: stopped before the update; {remedy}")
        if quantizes and self.recipe.quantize.clip_gradient and not self.recipe.train.lora.rank:
            clip_weight_gradients(self.gpt)
        rate, self.phase = self.optimizer.set_learning_rate(step), "optimizer step"
        try:
            optimizer.step()
        except UserError as error:
            self._stop(batch, loss, f"step {step}: {error}")
        self.progress.losses.append(loss.mean)
        self.progress.tokens.append(loss.tokens)
        self.log_dict(
            {"loss": loss.mean, "learning_rate": rate, "gradient_norm": self.optimizer.gradient_norm},
            batch_size=1,
            rank_zero_only=True,
        )

    def _stop(self, batch: list[MicroBatch], loss: StepLoss, message: str) -> NoReturn:
        """Leave the batch's windows, and the lines of data.train in each, in a file and stop; collective."""
        mine = {
            "data_parallel_rank": parallel_state.get_data_parallel_rank(),
            "finite_loss": bool(loss.own.isfinite()) if parallel_state.is_pipeline_last_stage() else None,
            "windows": [list(part.windows) for part in batch],
            "lines": {} if self.data is None else {w: self.data.lines(w) for part in batch for w in part.windows},
        }
        ranks: list[Any] = [None] * self.runtime.world
        dist.all_gather_object(ranks, mine)
        path = Path(self.recipe.run.dir) / "errors" / f"step_{len(self.progress.losses):08d}.json"
        if self.runtime.first:
            corpus = None if self.data is None else str(self.data.path)
            write_json(path, {"message": message, "corpus": corpus, "ranks": ranks})
        raise StoppedTogether(f"{message} (the batch's windows: {path})")

    def _pass(self, batch: list[MicroBatch], quantizes: bool) -> StepLoss:
        """Forward and backward of the global batch: replayed where that can be, else through Megatron's schedule."""
        loss, needs_logits = self._loss(batch), self._distillation is not None
        if self._replay is not None:
            total = self._replay.run(self.ddp, batch, loss, needs_logits=needs_logits, kind=quantizes)
            if total is not None:
                return step_loss(total)
        call = self._stage and self._stage.call(self.gpt, batch, needs_logits=needs_logits, kind=quantizes)
        return train_batch(self.ddp, batch, loss, needs_logits=needs_logits, call=call)

    def _loss(self, batches: list[MicroBatch]) -> Loss:
        return losses.cross_entropy if self._distillation is None else self._distillation.loss(batches)

    def on_train_end(self) -> None:
        """The end of training: graphs are freed here, and not whenever Python collects them."""
        for replay in filter(None, (self._replay, self._stage)):
            replay.close()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store losses and token counts, whose length is the data position, and which text it is a position in."""
        checkpoint["progress"] = {"losses": list(self.progress.losses), "tokens": list(self.progress.tokens)}
        checkpoint["text"] = None if self.data is None else self.data.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them back.

        Raises:
            UserError: data.train holds another text by now: going on would repeat parts of it and leave out others.
        """
        self.progress = Progress(**checkpoint["progress"])
        text = checkpoint.get("text")  # checkpoints of earlier versions do not say
        if text is not None and self.data is not None and text != self.data.digest:
            raise UserError(
                f"data.train = {self.data.path}: has changed since the checkpoint after step "
                f"{len(self.progress.losses)}; put the old file back, or choose a new run.dir"
            )
