"""Text to ids and back, and the chat template, from the files of a Hugging Face directory."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import tokenizers

from gopd_jax.models import chat_template

_AGAIN = (
    "copy it from where the model came from, or write it with transformers: "
    "AutoTokenizer.from_pretrained(...).save_pretrained(directory)"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """One model's ids and chat template.

    contents[id] is the token's text as the vocabulary spells it, None where no token has the id;
    eos_ids end a completion; end_id, one of them, is the one to append, as the template ends an
    assistant's turn; pad_id only fills: no mask is read off ids.
    """

    path: str
    contents: tuple[str | None, ...]
    eos_ids: tuple[int, ...]
    end_id: int
    pad_id: int
    template: str
    special: dict[str, str]  # bos_token, eos_token, ... as the template's variables
    backend: tokenizers.Tokenizer
    compiled: jinja2.Template
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # variables of the template

    @property
    def vocab_size(self) -> int:
        """Highest id + 1. A model's embedding may have more rows, never fewer."""
        return len(self.contents)

    def render(
        self,
        messages: Sequence[dict[str, str]],
        *,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Ids of a chat under the template; `options` are its variables, enable_thinking=False say.

        ValueError where the template refuses the messages, or writes today's date: the option
        strftime_now names the day, as a run that goes on tomorrow has to read the same prompts.
        """
        return self.encode(self.text(messages, add_generation_prompt, **options))

    def text(
        self, messages: Sequence[dict[str, str]], add_generation_prompt: bool, **options: Any
    ) -> str:
        """What `render` encodes."""
        variables = {"tools": None, "documents": None, **self.options, **options}
        if "strftime_now" in variables:
            variables["strftime_now"] = chat_template.day(variables["strftime_now"])
        try:
            return self.compiled.render(
                **self.special,
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except chat_template.UndatedError:
            raise ValueError(
                f"the chat template of {self.path} writes today's date, and a run that goes on "
                "tomorrow would read other prompts; name the day in the template's options: "
                "template=\"strftime_now='2024-07-26'\""
            ) from None
        except (jinja2.TemplateError, TypeError) as error:
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"the chat template of {self.path} refuses messages of roles {roles}: {error}"
            ) from error

    def fits(self, n_rows: int) -> list[str]:
        """What is wrong with an embedding of n_rows under these ids: a sentence, or nothing."""
        if self.vocab_size <= n_rows:
            return []
        return [
            f"{self.path}: the tokenizer has {self.vocab_size} ids and the embedding {n_rows} "
            "rows; the two files are not of one model"
        ]

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with nothing added: no token at its start or end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens and ids that name no token."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Sixteen hex digits of id -> content: equal where a completion's ids mean the same."""
        return _digest(self.contents)

    def encoding_fingerprint(self) -> str:
        """Sixteen hex digits of tokenizer.json's content: equal where every text has equal ids."""
        return _digest(self.backend.to_str())

    def with_options(self, text: str | None) -> Tokenizer:
        """The same, rendering with "enable_thinking=False, name='x'" unless told otherwise.

        ValueError for a variable that the chat template does not read.
        """
        options = template_options(text)
        if unknown := sorted(options.keys() - self.template_variables()):
            raise ValueError(
                f"template is {text!r}, and the chat template of {self.path} uses none of "
                f"{unknown}; its variables are {sorted(self.template_variables())}"
            )
        if "strftime_now" in options:
            chat_template.day(options["strftime_now"])
        return dataclasses.replace(self, options=self.options | options)

    def template_variables(self) -> set[str]:
        """Names that the chat template reads, strftime_now among them."""
        environment = chat_template.environment()
        del environment.globals["strftime_now"]  # Jinja lists no globals
        return jinja2.meta.find_undeclared_variables(environment.parse(self.template))

    def template_fingerprint(self) -> str:
        """Sixteen hex digits of the template, its options and the special tokens that it writes."""
        names = self.template_variables()
        used = {name: token for name, token in self.special.items() if name in names}
        return _digest([self.template, used, *([self.options] if self.options else [])])


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory; runs no code from it.

    Reads tokenizer.json, tokenizer_config.json, chat_template.jinja (or the key chat_template of
    tokenizer_config.json) and, where there is one, generation_config.json. ValueError names the
    file that is missing or wrong.
    """
    path = Path(path)
    backend = _backend(path / "tokenizer.json")
    config = _json(path / "tokenizer_config.json")
    contents = _contents(backend, config, path)
    special = _special(config)
    template = _template(config, path)
    eos_ids = _eos_ids(config, special, contents, path)
    pad_id = eos_ids[0]
    if "pad_token" in special:
        pad_id = _id_of("pad_token", special, contents, path)
    try:
        compiled = chat_template.environment().from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {path} cannot be read: {error}") from error
    chat = Tokenizer(
        path=str(path),
        contents=contents,
        eos_ids=eos_ids,
        end_id=eos_ids[0],
        pad_id=pad_id,
        template=template,
        special=special,
        backend=backend,
        compiled=compiled,
    )
    return dataclasses.replace(chat, end_id=_end_of_turn(chat))


def template_options(text: str | None) -> dict[str, Any]:
    """Variables for the chat template of "enable_thinking=False, name='x'"; {} of None."""
    if text is None:
        return {}
    try:
        call = ast.parse(f"options({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise SyntaxError("only key=value")
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"template options {text!r} are not of the form key=value, key=value with Python "
            f"literals ({error}); write enable_thinking=False, say"
        ) from error


def differences(
    a: Tokenizer, b: Tokenizer, limit: int | None = 5
) -> list[tuple[int, str | None, str | None]]:
    """The first `limit` (id, content in a, content in b) of a's ids that differ in b.

    The content in b is None where b has no such id. Ids that only b has are left out: who samples
    a's ids never meets them. limit None lists all of them.
    """
    theirs = itertools.chain(b.contents, itertools.repeat(None))
    pairs = enumerate(zip(a.contents, theirs))
    differing = ((i, x, y) for i, (x, y) in pairs if x != y and x is not None)
    return list(itertools.islice(differing, limit))


def require_same_ids(student: Tokenizer, other: Tokenizer, role: str) -> None:
    """ValueError unless every id of the student's has the same content in the other.

    Completion ids are shared, and the student writes them. The other may have more ids.
    """
    if not (found := differences(student, other, limit=None)):
        return
    shown = "; ".join(f"id {i}: student {x!r}, {role} {y!r}" for i, x, y in found[:5])
    raise ValueError(
        f"{role} {other.path} ({other.vocab_size} ids) and student {student.path} "
        f"({student.vocab_size} ids) differ in {len(found)} ids ({shown}). The {role} scores the "
        f"student's ids, so give a {role} of the student's tokenizer"
    )


def _json(path: Path, optional: bool = False) -> dict:
    """A JSON object's file; {} for one that may be missing and is."""
    if not path.is_file():
        if optional:
            return {}
        raise ValueError(f"there is no {path}; give the directory of a Hugging Face checkpoint")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ValueError(f"there is no {path}; {_AGAIN}")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{path} is not a tokenizer ({error}); {_AGAIN}") from error
    # A file may ask for padding and cutting, which would change ids unseen.
    backend.no_padding()
    backend.no_truncation()
    return backend


def _contents(backend: tokenizers.Tokenizer, config: dict, path: Path) -> tuple[str | None, ...]:
    """Content of each id; tokenizer_config.json may repeat the added tokens, not change them."""
    ids = backend.get_vocab(with_added_tokens=True)
    if not ids:
        raise ValueError(f"{path / 'tokenizer.json'} has no tokens")
    contents: list[str | None] = [None] * (max(ids.values()) + 1)
    for content, i in ids.items():
        contents[i] = content
    for i, token in config.get("added_tokens_decoder", {}).items():
        have = contents[int(i)] if int(i) < len(contents) else None
        if have != token["content"]:
            raise ValueError(
                f"id {i} is {token['content']!r} in {path / 'tokenizer_config.json'} and {have!r} "
                "in tokenizer.json; save the tokenizer again with transformers' save_pretrained"
            )
    return tuple(contents)


def _special(config: dict) -> dict[str, str]:
    """bos_token, eos_token, ...: each a text, or an object with its content."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _template(config: dict, path: Path) -> str:
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise ValueError(
            f"{path} has no chat template: there is no chat_template.jinja, nor a chat_template "
            "(with the name default, if there are several) in tokenizer_config.json; copy "
            "chat_template.jinja from the instruction-tuned model of the same family"
        )
    return template


def _id_of(name: str, special: dict[str, str], contents: tuple, path: Path) -> int:
    try:
        return contents.index(special[name])
    except ValueError:
        raise ValueError(
            f"{name} is {special[name]!r} in {path / 'tokenizer_config.json'}, which is no token "
            "of tokenizer.json"
        ) from None


def _eos_ids(config: dict, special: dict[str, str], contents: tuple, path: Path) -> tuple[int, ...]:
    """The ends that generation_config.json lists, in its order, then the tokenizer's own."""
    ids = _json(path / "generation_config.json", optional=True).get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for i in ids:
        if type(i) is not int or not 0 <= i < len(contents) or contents[i] is None:
            raise ValueError(
                f"eos_token_id has {i!r} in {path / 'generation_config.json'}, and tokenizer.json "
                f"has no such id; its highest is {len(contents) - 1}"
            )
    if "eos_token" in special:
        ids = [*ids, _id_of("eos_token", special, contents, path)]
    if not ids:
        raise ValueError(
            f"{path} names no end token: set eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json"
        )
    return tuple(dict.fromkeys(ids))


def _end_of_turn(chat: Tokenizer) -> int:
    """The end token that the template writes behind an assistant's text; the first if it has none.

    generation_config.json may list another first: Llama 3.1 Instruct's has <|end_of_text|> before
    <|eot_id|>, and Gemma 3's <eos> before <end_of_turn>. Models do not write these after a turn.
    """
    said = "The answer is 42."
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    dated = {"strftime_now": "2024-07-26"}  # no day is named yet, and any will do
    try:
        _, found, after = chat.text(turns, add_generation_prompt=False, **dated).rpartition(said)
    except ValueError:  # it has turns of its own
        return chat.eos_ids[0]
    written = chat.encode(after) if found else []
    return next((i for i in written if i in chat.eos_ids), chat.eos_ids[0])


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
