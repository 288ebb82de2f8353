"""Eight emulated devices for the whole suite, and the tiny models and prompts that tests share."""

import dataclasses
import functools
import gc
import itertools
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before JAX is imported, and for the processes tests start
os.environ["NPROC"] = "32"  # threads of the CPU backend: see gopd_jax/__init__.py

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from gopd_jax import command, processes, sharding, step
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import ModelConfig
from gopd_jax.objectives import objective
from gopd_jax.recipe import Frozen, Recipe, init_state
from gopd_jax.types import Prompts

jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for a device
if "xla_backend_optimization_level" not in (flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{tiny.CHEAP} {flags}".strip()  # read when the backend starts
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    jax.config.update("jax_compilation_cache_dir", str(caches / "gopd_jax_tests"))
# Compilation is most of the suite's time, and most of its programs are single operations.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# A tenth of a run went into looking again and again for garbage among what JAX keeps.
gc.set_threshold(50_000, 20, 100)

N_VOCAB = 61  # ids that can be sampled, of the 68 rows of the embedding


MODULES = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """After every eighth module: a process that keeps the whole suite's programs grows to 6 GB, and
    looking for what can go takes seconds."""
    yield
    if next(MODULES) % 8 == 0:
        jax.clear_caches()
        gc.collect()


@functools.cache
def _model(seed: int, architecture: str, n_layers: int):
    cfg = ModelConfig(
        architecture=architecture,
        vocab_size=68,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=architecture == "qwen3",
    )
    return Decoder(cfg), tiny.sizeable(cfg, seed)


@pytest.fixture(scope="session")
def n_vocab():
    return N_VOCAB


@pytest.fixture(scope="session")
def make_model():
    """make_model(seed, architecture, n_layers) -> (decoder, params), with sizeable logits."""

    def make(seed=0, architecture="qwen3", n_layers=2):
        return _model(seed, architecture, n_layers)

    return make


@pytest.fixture(scope="session")
def make_mesh():
    """make_mesh((data, fsdp, tensor)) over as many of the eight devices as that takes; behind these
    may stand the sizes of expert and sequence."""

    def make(shape):
        more = dict(zip(("expert", "sequence"), shape[3:]))
        devices = jax.devices()[: int(np.prod(shape))]
        return sharding.make_mesh(*shape[:3], **more, devices=devices)

    return make


@pytest.fixture(scope="session")
def make_prompts():
    """make_prompts(n_rows, width) -> Prompts of 2 to 5 random tokens, left-padded with -1."""

    def make(n_rows=8, width=5, task_B=None):
        length_B = 2 + np.arange(n_rows) % 4
        valid_BP = np.arange(width) >= width - length_B[:, None]
        rows_BP = np.random.default_rng(7).integers(0, N_VOCAB, (n_rows, 5))
        tokens_BP = np.pad(rows_BP, ((0, 0), (width - 5, 0)))
        return Prompts(
            tokens_BP=jnp.array(np.where(valid_BP, tokens_BP, -1), jnp.int32),
            valid_BP=jnp.array(valid_BP),
            task_B=jnp.zeros(n_rows, jnp.int32) if task_B is None else jnp.array(task_B, jnp.int32),
            group_B=jnp.arange(n_rows, dtype=jnp.int32) // 2,
            row_B=jnp.arange(n_rows, dtype=jnp.int32),
        )

    return make


GROUP_ROWS = (6, 10)  # of two tasks; neither is a multiple of the row shards of a mesh
# A large eps makes the update smooth in the gradient: Adam's sign would hide or magnify rounding.
ADAM = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.01, eps=0.01))


@pytest.fixture(scope="session")
def setting(make_model, make_mesh, make_prompts):
    """setting(mesh shape, lam=, advantage=, **what differs in the Recipe).

    Returns (recipe, the student's params, frozen, prompts) of a G-OPD step with two teachers, one
    of another architecture, laid out on the mesh.
    """

    def spread(mesh, model):
        decoder, params = model
        layout = sharding.shardings(mesh, lm_params.logical_axes(decoder.cfg))
        return jax.device_put(params, layout)

    def make(shape=(1, 1, 1), *, lam=1.25, advantage="gopd", **changes):
        mesh = make_mesh(shape)
        student, reference = make_model(0), make_model(3)
        teachers = make_model(1), make_model(2, "llama", 1)
        recipe = Recipe(
            mesh=mesh,
            student=student[0],
            teachers=tuple(decoder for decoder, _ in teachers),
            routes=((0, 1),),
            reference=reference[0],
            objective=objective.build(
                advantage=advantage, lam=lam, loss="policy_gradient", reduction="token_mean"
            ),
            optimizer=ADAM,
            learning_rate=lambda _: 0.01,
            source="student",
            group_rows=GROUP_ROWS,
            completion_length=6,
            temperature=0.8,
            eos_ids=tuple(range(12)),  # a completion ends after five tokens or so
            n_vocab=N_VOCAB,
            microbatches=2,
            head_chunk=2,
        )
        frozen = Frozen(
            teachers=tuple(spread(mesh, teacher) for teacher in teachers),
            reference=spread(mesh, reference),
        )
        task_B = np.repeat(np.arange(len(GROUP_ROWS)), GROUP_ROWS)
        prompts = processes.to_global(mesh, make_prompts(sum(GROUP_ROWS), 5, task_B))
        return dataclasses.replace(recipe, **changes), spread(mesh, student), frozen, prompts

    return make


@pytest.fixture(scope="session")
def first_step(setting):
    """(rollout, scores, state, metrics) of one step in stages, on one device with key 0."""
    recipe, params, frozen, prompts = setting()
    generate, score, update = step.staged(recipe)
    rollout = generate(params, frozen, prompts, jax.random.key(0))
    scores = score(frozen, rollout)
    return rollout, scores, *update(init_state(recipe, params), rollout, scores)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The directory of tiny.build; a module that adds to it has its own."""
    root = tmp_path_factory.mktemp("models")
    tiny.build(root)
    return root


@pytest.fixture(scope="module")
def model(root):
    """Its base on one device, as the commands on rows open it."""
    return command.open_model(root / "base", devices=jax.devices()[:1])
