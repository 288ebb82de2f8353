"""What a run leaves in its workdir besides rows and checkpoints: run.json and its student."""

import json
import math
import shutil
import time
from pathlib import Path

import jax

from gopd_jax import card, hub, processes, sharding
from gopd_jax import config as settings
from gopd_jax.checkpoint import EXPORT
from gopd_jax.models import hf, lora
from gopd_jax.models.params import table
from gopd_jax.setup import Run
from gopd_jax.types import TrainState

SOURCE = "source"  # below the workdir: config, tokenizer and dtypes of what it started from


def whole(this: Run, state: TrainState):
    """All of the student's parameters."""
    return lora.join(state.params, this.frozen.base)


def export(workdir: Path, this: Run, state: TrainState) -> Path:
    """Write the student as a Hugging Face directory; every process helps to gather it.

    Adapters are merged, or written as PEFT keeps them.
    """
    cfg, params = this.student.decoder.cfg, whole(this, state)
    text = None
    if jax.process_index() == 0:
        for half_written in workdir.glob(f".{EXPORT}.*"):  # by a start that was killed here
            shutil.rmtree(half_written)
        text = card.text(workdir, int(state.step))
    if cfg.lora is not None and this.config.lora.export == "adapter":
        adapters = processes.whole(state.params)
        if jax.process_index() == 0:
            base, revision = hub.named(this.student.path)
            lora.save_adapter(
                workdir / EXPORT, cfg, adapters, base_model=base, revision=revision, card=text
            )
        return workdir / EXPORT
    merged = params if cfg.lora is None else lora.merge(cfg, params)
    hf.export(workdir / EXPORT, merged, workdir / SOURCE, card=text)
    return workdir / EXPORT


def write_run(workdir: Path, this: Run) -> None:
    """workdir/run.json: what the report and a reader need to know of the run; workdir/source."""
    workdir.mkdir(parents=True, exist_ok=True)
    for half_written in workdir.glob(f".{SOURCE}.*"):
        shutil.rmtree(half_written)
    ends = None if this.config.sampling.stop is None else this.recipe.eos_ids
    hf.keep(this.student.directory, workdir / SOURCE, eos_ids=ends)
    models = {
        name: {
            "path": role.path,
            "digest": role.digest,
            "parameters": sum(
                math.prod(row.shape(role.decoder.cfg)) for row in table(role.decoder.cfg)
            ),
        }
        for name, role in this.roles.items()
    }
    described = {
        "config": settings.to_dict(this.config),
        "identity": this.identity,
        "environment": {
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "mesh": sharding.shape(this.mesh),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
        "models": models,
        "formula": this.recipe.objective.formula,
    }
    part = workdir / f"{card.RUN}.part"
    part.write_text(json.dumps(described, indent=1) + "\n")
    part.replace(workdir / card.RUN)
