"""Wrong set-ups, each with what loading or preflight says of it.

    python -m benchmarks.wrong_setups --out=docs/wrong_setups.md

Every case breaks a copy of the microworld's ExOPD run on purpose. tests/test_preflight.py holds
that each is refused for the reason that it names here.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from configs import exopd
from gopd_jax import microworld, sampler, step, train
from gopd_jax.config import Config, Evaluation
from gopd_jax.microworld import tasks
from gopd_jax.models import hf

MODELS = ("base", "teacher_math", "teacher_code")
EMBED = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """break_it(root, config) changes files or settings, and may return a context to run in."""

    name: str
    break_it: Callable
    says: str  # a pattern that the refusal has


def build(root: Path) -> Config:
    """Copies of the shipped models, a few problems, and the ExOPD run on them."""
    for name in MODELS:
        shutil.copytree(microworld.path(name), root / name)
    for split in tasks.SPLITS:
        made = [tasks.problem(task, 0, i, split=split) for i in range(12) for task in tasks.TASKS]
        rows = [
            {
                "messages": list(p.messages),
                "task": p.task,
                "answer": p.answer,
                "verifier": p.verifier,
                "completion": p.right,
            }
            for p in made
        ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = exopd.get_config()
    c.workdir = str(root / "run")
    c.student.path = c.reference.path = str(root / "base")
    for task, model in c.teachers.items():
        model.path = str(root / f"teacher_{task}")
    c.data.train, c.data.test = str(root / "train.jsonl"), str(root / "test.jsonl")
    c.batch.prompts, c.batch.microbatches = 16, 1
    c.evaluation = Evaluation(problems=4, samples=1)
    return c


def refusal(case: Case | None, root: Path) -> str | None:
    """What the run says before its first step, or None where it would start."""
    c = build(root)
    with (case.break_it(root, c) if case else None) or contextlib.nullcontext():
        try:
            train.check(train.begin(c))
        except ValueError as error:
            return str(error).replace(f"{root}/", "")
    return None


# --- ways to break it


def weights(change: Callable[[dict], None], name="teacher_math") -> Callable:
    """Change the tensors of a checkpoint."""

    def break_it(root, _):
        file = root / name / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return break_it


def config_json(**changes) -> Callable:
    def break_it(root, _):
        file = root / "teacher_math" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return break_it


def settings(**changes) -> Callable:
    """Dotted settings as keywords, with __ for the dots."""

    def break_it(_, c):
        for key, value in changes.items():
            *above, name = key.split("__")
            section = c
            for part in above:
                section = section[part] if isinstance(section, dict) else getattr(section, part)
            if isinstance(section, dict):
                section[name] = value
            else:
                setattr(section, name, value)

    return break_it


def each(change: Callable) -> Callable[[dict], None]:
    """Apply change(name, tensor) to every tensor in place."""

    def all_of(tensors):
        for name in tensors:
            tensors[name] = np.asarray(change(name, tensors[name]), tensors[name].dtype)

    return all_of


def random(name, x):
    draw = np.random.default_rng(len(name)).normal(0, 0.02, x.shape)
    return np.ones(x.shape) if "norm" in name else draw


def shuffled(tensors):
    order = np.random.default_rng(0).permutation(len(tensors[EMBED]))
    tensors[EMBED] = tensors[EMBED][order]


def template(text: str) -> Callable:
    return lambda root, _: (root / "teacher_math" / "chat_template.jinja").write_text(text) and None


def swap(root, c):
    math, code = c.teachers["math"], c.teachers["code"]
    math.fingerprint, code.fingerprint = (
        hf.weights_digest(model.path)[:12] for model in (math, code)
    )
    math.path, code.path = code.path, math.path


def other_ids(root, _):
    file = root / "teacher_math" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[-2:]
    vocabulary[a], vocabulary[b] = j, i
    file.write_text(json.dumps(content))


def other_end(root, _):
    """The student stops at another token than its teachers write at an end."""
    end, base = "<|endoftext|>", root / "base"
    for file in (base / "tokenizer_config.json", base / "special_tokens_map.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": end}))
    added = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
    ids = [token["id"] for token in added if token["content"] == end]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))


def truncate(root, _):
    file = root / "teacher_math" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickle(root, _):
    file = root / "teacher_math" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))


def shifted_mask(_, __):
    whole = sampler.assemble

    def shifted(prompts, tokens_BC, mask_BC, logp_BC, ended_B):
        return whole(prompts, tokens_BC, mask_BC, jnp.roll(logp_BC, 1, axis=1), ended_B)

    return mock.patch.object(sampler, "assemble", shifted)


def other_temperature(_, __):
    head = step._head
    return mock.patch.object(step, "_head", lambda recipe: head(recipe) | {"temperature": 1.3})


def padding_attended(_, __):
    hidden = step.scoring.lm.hidden

    def careless(decoder, params, tokens_BL, valid_BL):
        return hidden(decoder, params, tokens_BL, jnp.ones_like(valid_BL))

    return mock.patch.object(step.scoring.lm, "hidden", careless)


CASES = (
    Case(
        name="teacher with zeroed weights",
        break_it=weights(each(lambda n, x: np.zeros(x.shape))),
        says=r"teacher:math: entropy, nats a token is 6\.238",
    ),
    Case(
        name="teacher with random weights (loader left them uninitialised)",
        break_it=weights(each(random)),
        says="teacher:math: entropy.*knows nothing",
    ),
    Case(
        name="student with random weights",
        break_it=weights(each(random), "base"),
        says="student: entropy.*knows nothing",
    ),
    Case(
        name="a NaN in the teacher's weights",
        break_it=weights(
            each(lambda n, x: np.where(np.arange(x.size).reshape(x.shape), x, np.nan))
        ),
        says="teacher:math: .*NaN or infinite",
    ),
    Case(
        name="the teacher's base in the teacher's place (an adapter that was not merged)",
        break_it=lambda root, c: setattr(c.teachers["math"], "path", str(root / "base")),
        says="teacher:math: other than the student is no",
    ),
    Case(
        name="teachers swapped, with fingerprints to insist on",
        break_it=swap,
        says="teacher:math: teacher_code has the fingerprint",
    ),
    Case(
        name="embedding rows in another order",
        break_it=weights(shuffled),
        says="teacher:math: log-prob of",
    ),
    Case(
        name="layers of another checkpoint",
        break_it=weights(each(lambda n, x: random(n, x) if "layers.2" in n else x)),
        says="teacher:math: log-prob of the data",
    ),
    Case(
        name="rope base 100 instead of 10,000",
        break_it=config_json(rope_theta=100.0, rope_parameters=None),
        says="teacher:math: log-prob of the data",
    ),
    Case(
        name="another chat template in the teacher's directory",
        break_it=template("{% for m in messages %}{{ m.content }}\n\n{% endfor %}"),
        says="teacher:math: log-prob of the data",
    ),
    Case(
        name="no generation prompt at the end of the teacher's template",
        break_it=template(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "<|im_end|>\n{% endfor %}"
        ),
        says="teacher:math: log-prob of the data",
    ),
    Case(
        name="template option that the template does not know",
        break_it=settings(teachers__math__template="enable_thinking=False"),
        says=r"uses none of \['enable_thinking'\]",
    ),
    Case(
        name="another tokenizer: two ids swapped",
        break_it=other_ids,
        says=r"teacher_math .* differ in 2 ids \(id \d+: student",
    ),
    Case(
        name="student and teachers end with different tokens",
        break_it=other_end,
        says=r"mass on '<\|im_end\|>'.*lengths would run away",
    ),
    Case(
        name="end token that the student does not have",
        break_it=settings(sampling__stop=("</s>",)),
        says=r"sampling.stop has \['</s>'\]",
    ),
    Case(name="truncated shard", break_it=truncate, says="truncated or corrupt"),
    Case(name="pickled weights", break_it=pickle, says="pickles and can run code"),
    Case(
        name="weights stored in 8 bits",
        break_it=weights(lambda t: t.update({EMBED: t[EMBED].astype(np.int8)})),
        says="stored as I8",
    ),
    Case(
        name="config.json of another size",
        break_it=config_json(num_hidden_layers=5),
        says="the weights lack",
    ),
    Case(
        name="config.json that asks for mathematics that is not implemented",
        break_it=config_json(hidden_act="relu"),
        says="hidden_act = 'relu'",
    ),
    Case(
        name="unsupported architecture",
        break_it=config_json(model_type="mamba"),
        says="'mamba' is not supported; there are",
    ),
    Case(
        name="untied head that is not stored",
        break_it=config_json(tie_word_embeddings=False),
        says="the weights lack.*lm_head",
    ),
    Case(
        name="the teacher as its own reference",
        break_it=lambda root, c: setattr(c.reference, "path", c.teachers["math"].path),
        says="teacher:math: other than the reference is no",
    ),
    Case(
        name="lambda without a reference",
        break_it=settings(reference=None),
        says="objective.lam is 1.25 and there is no reference",
    ),
    Case(
        name="a task that is routed to a teacher that is not there",
        break_it=settings(routes={"math": "maths"}),
        says=r"tasks \['math'\] of data.tasks have no teacher",
    ),
    Case(
        name="prompts longer than their limit",
        break_it=settings(data__prompt_length=20),
        says="prompts are longer than data.prompt_length = 20",
    ),
    Case(
        name="a context that the data do not have",
        break_it=settings(teachers__math__context="context"),
        says="the row has no 'context'",
    ),
    Case(
        name="log-probs shifted by one position",
        break_it=shifted_mask,
        says="student: sampler - scorer",
    ),
    Case(
        name="sampler and scorer at different temperatures",
        break_it=other_temperature,
        says="student: sampler - scorer",
    ),
    Case(
        name="padding attended to in scoring",
        break_it=padding_attended,
        says="student: sampler - scorer",
    ),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the table there, as Markdown")
    parser.add_argument("--only", help="cases whose name has this")
    args = parser.parse_args()
    lines = ["| set-up | what the run says before its first step |", "|---|---|"]
    for case in CASES:
        if args.only and args.only not in case.name:
            continue
        with tempfile.TemporaryDirectory() as root:
            said = refusal(case, Path(root))
        first = (said or "nothing: it starts").removeprefix("- ").splitlines()[0]
        expected = said is not None and re.search(case.says, said, re.DOTALL)
        lines.append(f"| {case.name} | {first.replace('|', chr(92) + '|')} |")
        print(lines[-1] if expected else f"UNEXPECTED {lines[-1]}", flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
