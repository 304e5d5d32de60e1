"""W&B's server out of reach: one warning line, and the run is logged offline."""

import pytest

from halfbyte.training.config import Recipe, Wandb


@pytest.mark.slow
def test_a_server_out_of_reach_is_one_line(tmp_path, monkeypatch, capfd):
    from halfbyte.training import experiment

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")  # as every run has it
    monkeypatch.setattr(experiment, "WANDB_S", 1.0)
    recipe = Recipe()
    recipe.run.dir, recipe.run.wandb = str(tmp_path), Wandb.online
    capfd.readouterr()  # what the imports said
    assert experiment.reach_wandb(recipe) is False
    said = capfd.readouterr().err
    assert said.startswith("warning: W&B cannot be reached (")
    assert said.endswith(f"): logging offline to {tmp_path}/wandb; `wandb sync` sends it later\n")
    assert said.count("\n") == 1
    assert not list((tmp_path / "wandb").glob("run-*"))
    run = experiment._report_run(recipe)
    assert run.offline
    run.finish()
