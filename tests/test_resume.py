"""What an existing run allows to change when it goes on."""

import copy

from halfbyte.training import rules
from halfbyte.training.resolve import resolve, resume_problems


def test_resume_allows_what_does_not_touch_the_past():
    """Every leaf is either free to change or reported; the free ones are written out here a second time."""
    free = {"description", "run.dir", "run.name", "run.project", "run.wandb", "model.fetch", "model.config"}
    free |= {"train.steps", "train.micro_batch", "train.recompute", "train.distributed_optimizer"}
    free |= {"train.cuda_graphs", "train.micro_batches_at_once"}  # bit for bit the same steps
    free |= {"evaluate.tokens_per_batch"}
    groups = ("parallel.", "checkpoint.", "gate.", "export.", "verify.", "sensitivity.", "generate.", "launch.")
    groups += ("telemetry.",)
    old = resolve("tiny", [])
    for key, value in rules.leaves(old):
        new = copy.deepcopy(old)
        *path, last = key.split(".")
        owner = new
        for name in path:
            owner = getattr(owner, name)
        other = ([] if value else ["x"]) if isinstance(value, list) else f"{value}x"
        setattr(owner, last, other)
        found = resume_problems(old, new)
        if key in free or key.startswith(groups):
            assert found == [], key
        else:
            assert len(found) == 1, key
            assert found[0].startswith(f"{key} = ")
            assert "new run.dir" in found[0]
    assert resume_problems(old, copy.deepcopy(old)) == []


def test_a_run_does_not_go_back_behind_its_checkpoint(tmp_path):
    """Refused before resolved.yaml takes the new number: the folder would contradict itself."""
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    old, fewer, more, fewest = (resolve("tiny", [f"run.dir={tmp_path}", f"train.steps={n}"]) for n in (9, 2, 3, 1))
    remedy = "give at least 3, or choose a new run.dir"
    said = f"train.steps = 2: the run at {tmp_path} has a checkpoint after step 3; {remedy}"
    assert resume_problems(old, fewer) == [said]
    assert resume_problems(old, more) == []
    assert resume_problems(fewest, copy.deepcopy(fewest)) == []  # can still be looked at
