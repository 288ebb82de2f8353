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

from gopd_jax.models import chat_template, tokenizer_files


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokenizer:
    """One model's ids and chat template.

    contents[id] is the token's text as the vocabulary spells it, None where no token has the id;
    eos_ids end a completion; turn_ids are what the template writes behind an assistant's text;
    end_id is appended to a completion; pad_id only fills: no mask is read off ids.
    """

    path: str
    contents: tuple[str | None, ...]
    eos_ids: tuple[int, ...]
    turn_ids: tuple[int, ...]
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
        except Exception as error:  # a template is a program, which may raise anything
            roles = [message.get("role") for message in messages]
            raise ValueError(
                f"the chat template of {self.path} refuses messages of roles {roles}: {error}"
            ) from error

    def within(self, n_rows: int) -> Tokenizer:
        """The same for an embedding of n_rows: ids behind it may be special tokens, never written.

        Gemma 3's smallest models have no row for their image token. ValueError for other ids.
        """
        if self.vocab_size <= n_rows:
            return self
        added = self.backend.get_added_tokens_decoder()
        if all(i in added and added[i].special for i in range(n_rows, self.vocab_size)) and all(
            i < n_rows for i in (*self.eos_ids, self.pad_id)
        ):
            return dataclasses.replace(self, contents=self.contents[:n_rows])
        raise ValueError(
            f"{self.path}: the tokenizer has {self.vocab_size} ids and the embedding {n_rows} "
            "rows; the two files are not of one model"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with nothing added: no token at its start or end.

        ValueError for a token that the model has no embedding of.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        if outside := [i for i in ids if i >= len(self.contents)]:
            raise ValueError(
                f"the text holds {self.backend.id_to_token(outside[0])!r}, which {self.path} has "
                "an id for and no embedding; take it out"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens and ids that name no token."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def fingerprint(self, n_ids: int | None = None) -> str:
        """Sixteen hex digits of id -> content, of the first n_ids (None: of all).

        Equal where a completion's ids mean the same.
        """
        return _digest(self.contents[:n_ids])

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

    def ending_with(self, ids: Sequence[int]) -> Tokenizer:
        """The same, appending one of `ids`: the first that the template writes, or the first.

        generation_config.json may list another first: Llama 3.1 Instruct's has <|end_of_text|>
        before <|eot_id|>, Gemma 3's <eos> before <end_of_turn>. Models do not end turns with these.
        """
        return dataclasses.replace(
            self, end_id=next((i for i in self.turn_ids if i in ids), ids[0])
        )

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
    tokenizer_config.json) and, where there are such, special_tokens_map.json, added_tokens.json and
    generation_config.json, else config.json. ValueError names the file that is missing or wrong.
    """
    files = tokenizer_files.read(Path(path))
    try:
        compiled = chat_template.environment().from_string(files.template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template of {path} cannot be read: {error}") from error
    chat = Tokenizer(
        path=str(path),
        contents=files.contents,
        eos_ids=files.eos_ids,
        turn_ids=(),
        end_id=files.eos_ids[0],
        pad_id=files.pad_id,
        template=files.template,
        special=files.special,
        backend=files.backend,
        compiled=compiled,
    )
    return dataclasses.replace(chat, turn_ids=_turn_ids(chat)).ending_with(files.eos_ids)


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


def _turn_ids(chat: Tokenizer) -> tuple[int, ...]:
    """Ids of what the template writes behind an assistant's text; () if it has turns of its own."""
    said = "The answer is 42."
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    dated = {"strftime_now": "2024-07-26"}  # no day is named yet, and any will do
    try:
        _, found, after = chat.text(turns, add_generation_prompt=False, **dated).rpartition(said)
    except ValueError:
        return ()
    return tuple(chat.encode(after)) if found else ()


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
