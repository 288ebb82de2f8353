import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from gopd_jax.models import tokenizer as tokenizer_lib

# The constructs that Qwen3's template uses: namespaces, reversed lists, text methods, tests for
# defined values, tools as JSON, trimmed blocks on lines of their own.
TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {%- for tool in tools %}
        {{- "Tool: " + (tool | tojson) + "\\n" }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.last_query < 0 and message.role == "user" and message.content is string %}
        {%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last_query %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {% generation %}{{- content + '<|im_end|>\\n' }}{% endgeneration %}
    {%- elif message.role != "system" %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write(path, *, special=SPECIAL, template=TEMPLATE, generation=None, **config):
    """A byte-level tokenizer in Hugging Face files; ids 0 .. 255 are bytes, then `special`."""
    path.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    # Llama's tokenizers start every text with a token and this one does so too; files that were
    # saved after a batch was encoded ask for cutting.
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], 256)]
    )
    backend.enable_truncation(max_length=4)
    backend.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": special[-1], **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


CHATS = [
    [{"role": "user", "content": 'Is 2 < 3 & "é" > 1?\n'}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2", "reasoning_content": "hm\n"},
        {"role": "user", "content": "<|im_end|> and more"},
        {"role": "assistant", "content": "3", "reasoning_content": "yes"},
    ],
]
OPTIONS = [
    {},
    {"enable_thinking": False},
    {"add_generation_prompt": False},
    {"tools": [{"type": "function", "function": {"name": "f<é>", "parameters": {}}}]},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("chat", CHATS)
def test_rendered_chats_are_those_of_transformers(tmp_path, chat, options):
    from transformers import PreTrainedTokenizerFast

    path = write(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(path))
    arguments = {"add_generation_prompt": True} | options
    want = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, **arguments)
    assert tokenizer_lib.load(path).render(chat, **options) == want


def test_templates_see_the_special_tokens_that_transformers_shows_them(tmp_path):
    from transformers import PreTrainedTokenizerFast

    template = (
        "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ messages[0].content }}"
        "{{ tools is defined }}{{ documents is defined }}{{ enable_thinking is defined }}"
    )
    bos = {"__type": "AddedToken", "content": SPECIAL[1], "special": True}
    path = write(tmp_path, template=template, bos_token=bos, add_bos_token=False)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(path))
    want = theirs.apply_chat_template(CHATS[0], return_dict=False)
    assert tokenizer_lib.load(path).render(CHATS[0]) == want


NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
DECODER = {
    "256": {"content": "<|endoftext|>", "special": True, "rstrip": True},
    "257": {"content": "<|im_start|>", "special": True},
    "258": {"content": "<|im_end|>", "special": False},
}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"eos_token": None}, {"special_tokens_map.json": NAMED}),
        ({"eos_token": "<|endoftext|>"}, {"special_tokens_map.json": NAMED}),  # the map's
        ({"added_tokens_decoder": DECODER}, {"special_tokens_map.json": NAMED}),  # not read
        ({"added_tokens_decoder": DECODER, **NAMED}, {}),
        ({"extra_special_tokens": {"image_token": "<|endoftext|>"}}, {}),
        ({"additional_special_tokens": ["ab"], **NAMED}, {"vocabulary": ["ab"]}),
        ({"eos_token": "ab"}, {"vocabulary": ["ab"]}),
    ],
)
def test_named_tokens_are_those_of_transformers(tmp_path, config, files):
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{{ image_token }}{{ messages[0].content }}{{ eos_token }}"
    path = write(tmp_path, template=template, **config)
    text = (path / "tokenizer.json").read_text().replace('"special": true', '"special": false')
    (path / "tokenizer.json").write_text(text.replace('"special":true', '"special":false'))
    saved = json.loads((path / "tokenizer.json").read_text())
    files = dict(files)
    for text in files.pop("vocabulary", ()):  # a token that no text is encoded as by itself
        vocabulary = saved["model"]["vocab"]
        saved["model"]["vocab"] = {t if i < 255 else text: i for t, i in vocabulary.items()}
    (path / "tokenizer.json").write_text(json.dumps(saved))
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    theirs, ours = AutoTokenizer.from_pretrained(str(path)), tokenizer_lib.load(path)
    chat = [{"role": "user", "content": "a <|endoftext|> b<|im_end|> cabd"}]
    want = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert ours.render(chat) == want
    assert ours.decode(want) == theirs.decode(want, skip_special_tokens=True)
    assert ours.contents[ours.eos_ids[0]] == theirs.eos_token


def test_a_token_that_nothing_writes_may_be_missing(tmp_path):
    """CodeLlama's fill_token; and a file that transformers does not read beside a decoder."""
    decoder = {"258": {"content": "<|im_end|>", "special": True}, "257": {"content": SPECIAL[1]}}
    path = write(tmp_path, fill_token="<FILL_ME>", added_tokens_decoder=decoder, x_token={"a": 1})
    (path / "added_tokens.json").write_text('{"<stale>": 9}')
    assert tokenizer_lib.load(path).vocab_size == 259
    (path / "chat_template.jinja").write_text("{{ fill_token }}" + TEMPLATE)
    with pytest.raises(ValueError, match=r"fill_token is '<FILL_ME>' in .* no token of tokenizer"):
        tokenizer_lib.load(path)
    path = write(tmp_path / "old", added_tokens_decoder=None)
    (path / "added_tokens.json").write_text('{"<stale>": 9}')
    assert tokenizer_lib.load(path).vocab_size == 259


def test_ends_are_config_jsons_where_there_is_no_generation_config(tmp_path):
    """As transformers' GenerationConfig.from_model_config; beside the file it is not read."""
    path = write(tmp_path)
    (path / "config.json").write_text(json.dumps({"eos_token_id": [256, 257]}))
    assert tokenizer_lib.load(path).eos_ids == (256, 257, 258)
    (path / "generation_config.json").write_text("{}")
    assert tokenizer_lib.load(path).eos_ids == (258,)


def test_ids_behind_the_embedding_may_be_special_and_are_never_written(tmp_path):
    """Gemma 3's smallest models have no row for the image token that their tokenizer has."""
    path = write(tmp_path / "a", special=(*SPECIAL, "<image>"), eos_token=SPECIAL[0])
    whole = tokenizer_lib.load(path)
    own = whole.within(259)
    assert (whole.vocab_size, own.vocab_size) == (260, 259)
    assert own.encode("a<|im_end|>") == whole.encode("a<|im_end|>")
    with pytest.raises(ValueError, match=r"text holds '<image>', which .* no embedding"):
        own.encode("a<image>")
    assert whole.within(260) is whole
    with pytest.raises(ValueError, match="260 ids and the embedding 255 rows"):
        whole.within(255)  # a byte would have none
    with pytest.raises(ValueError, match="260 ids and the embedding 256 rows"):
        whole.within(256)  # nor the end


def test_a_template_that_breaks_is_told(tmp_path):
    broken = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 1 / 0 }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_lib.load(write(tmp_path, template=broken))
    with pytest.raises(ValueError, match=r"roles .'assistant'.: division by zero"):
        tokenizer.render([{"role": "assistant", "content": "1"}])


def test_any_text_makes_the_round_trip_and_nothing_is_added_or_cut(tmp_path):
    tokenizer = tokenizer_lib.load(write(tmp_path))
    text = "grüße,\n\t\\frac{1}{2} 🙂 longer than four tokens"
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_drops_special_tokens_and_ids_of_the_padded_embedding(tmp_path):
    tokenizer = tokenizer_lib.load(write(tmp_path))
    ids = tokenizer.encode("ab<|im_end|>c<|endoftext|>")
    assert ids[2:] == [258, *tokenizer.encode("c"), 256]
    assert tokenizer.decode([*ids, 999]) == "abc"


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (TEMPLATE, 258),
        ("{{ messages[-1].content }}<|endoftext|>", 256),
        ("{{ messages[-1].content }}", 256),  # writes none
        ("{{ raise_exception('no') }}", 256),
    ],
)
def test_the_end_to_append_is_the_one_that_the_template_writes(tmp_path, template, want):
    """Llama 3.1 Instruct and Gemma 3 list another end first."""
    generation = {"eos_token_id": [256, 258]}
    tokenizer = tokenizer_lib.load(write(tmp_path, template=template, generation=generation))
    assert (tokenizer.eos_ids, tokenizer.end_id) == ((256, 258), want)


DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
    "{{ date_string }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
)


def test_a_date_in_a_template_is_the_day_that_is_named(tmp_path):
    """Llama 3.2's template, shortened. With today's, a run goes on with other prompts tomorrow."""
    generation = {"eos_token_id": [256, 258]}
    tokenizer = tokenizer_lib.load(write(tmp_path, template=DATED, generation=generation))
    assert tokenizer.end_id == 258, "found although no day is named"
    with pytest.raises(ValueError, match=r"today's date.*strftime_now='2024-07-26'"):
        tokenizer.render([])
    fingerprints = {tokenizer.template_fingerprint()}
    for option, want in (
        ("strftime_now='2024-07-26'", "26 Jul 2024"),
        ("strftime_now='2025-07-26'", "26 Jul 2025"),
        ("date_string='now'", "now"),
    ):
        dated = tokenizer.with_options(option)
        assert dated.decode(dated.render([])) == want
        fingerprints.add(dated.template_fingerprint())
    assert len(fingerprints) == 4
    for wrong in ("'26 Jul 2024'", "20240726", "None"):
        with pytest.raises(ValueError, match=r"strftime_now is .*'2024-07-26'"):
            tokenizer.with_options(f"strftime_now={wrong}")


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        (None, {}, (258,)),
        ({"eos_token_id": 256}, {}, (256, 258)),
        ({"eos_token_id": [258, 256]}, {}, (258, 256)),
        ({"eos_token_id": [257]}, {"eos_token": None}, (257,)),
        ({}, {"eos_token": {"content": "<|im_start|>"}}, (257,)),
    ],
)
def test_end_ids_are_those_of_both_files(tmp_path, generation, config, want):
    tokenizer = tokenizer_lib.load(write(tmp_path, generation=generation, **config))
    assert tokenizer.eos_ids == want
    assert tokenizer.pad_id == want[0]


def test_sizes_and_padding_come_from_the_files(tmp_path):
    tokenizer = tokenizer_lib.load(write(tmp_path, pad_token="<|endoftext|>"))
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_ids) == (259, 256, (258,))


def test_a_template_in_the_configuration_is_read_and_the_file_comes_first(tmp_path):
    config = {
        "chat_template": [
            {"name": "tool", "template": "t"},
            {"name": "default"} | {"template": "d"},
        ]
    }
    tokenizer = tokenizer_lib.load(write(tmp_path / "a", template=None, **config))
    assert tokenizer.decode(tokenizer.render([])) == "d"
    tokenizer = tokenizer_lib.load(write(tmp_path / "b", template=None, chat_template="one"))
    assert tokenizer.decode(tokenizer.render([])) == "one"
    tokenizer = tokenizer_lib.load(write(tmp_path / "c", template="file", chat_template="one"))
    assert tokenizer.decode(tokenizer.render([])) == "file"


def test_templates_cannot_leave_the_sandbox_or_change_the_messages(tmp_path):
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    for i, template in enumerate([escape, "{{ messages.append(1) }}"]):
        tokenizer = tokenizer_lib.load(write(tmp_path / str(i), template=template))
        with pytest.raises(ValueError, match=r"unsafe|not safely callable"):
            tokenizer.render(CHATS[0])


def test_a_refusal_of_the_template_names_its_directory_and_the_roles(tmp_path):
    tokenizer = tokenizer_lib.load(write(tmp_path))
    with pytest.raises(ValueError, match=r"roles \['judge'\]: no role judge") as error:
        tokenizer.render([{"role": "judge", "content": "x"}])
    assert str(tmp_path) in str(error.value)


def test_fingerprints_tell_ids_and_templates_apart(tmp_path):
    base = tokenizer_lib.load(write(tmp_path / "base"))
    same = tokenizer_lib.load(write(tmp_path / "same", pad_token=SPECIAL[0], bos_token=SPECIAL[1]))
    swapped = tokenizer_lib.load(write(tmp_path / "swapped", special=(*SPECIAL[1:], SPECIAL[0])))
    assert same.fingerprint() == base.fingerprint() != swapped.fingerprint()
    # This template writes no special token by its variable, so other ones do not matter ...
    assert same.template_fingerprint() == base.template_fingerprint()
    assert swapped.template_fingerprint() == base.template_fingerprint()
    # ... and here it does.
    written = [
        tokenizer_lib.load(write(tmp_path / eos, template="{{ eos_token }}", eos_token=eos))
        for eos in SPECIAL[:2]
    ]
    assert written[0].template_fingerprint() != written[1].template_fingerprint()
    assert written[0].template_fingerprint() != base.template_fingerprint()


def test_differences_lists_the_students_ids_that_changed_or_are_lacking(tmp_path):
    a = tokenizer_lib.load(write(tmp_path / "a"))
    b = tokenizer_lib.load(
        write(tmp_path / "b", special=("<|endoftext|>", "<|x|>", "<|im_end|>", "<|y|>"))
    )
    assert tokenizer_lib.differences(a, a) == []
    # Whoever samples a's ids never meets b's further ones; the other way round it does.
    assert tokenizer_lib.differences(a, b) == [(257, "<|im_start|>", "<|x|>")]
    assert tokenizer_lib.differences(b, a) == [(257, "<|x|>", "<|im_start|>"), (259, "<|y|>", None)]
    assert tokenizer_lib.differences(b, a, limit=1) == [(257, "<|x|>", "<|im_start|>")]
    tokenizer_lib.require_same_ids(a, a, "teacher")
    more = tokenizer_lib.load(write(tmp_path / "more", special=(*SPECIAL, "<|z|>")))
    tokenizer_lib.require_same_ids(a, more, "teacher")
    with pytest.raises(
        ValueError, match=r"teacher math .*\(259 ids\) .*\(260 ids\) differ in 2 ids"
    ) as error:
        tokenizer_lib.require_same_ids(b, a, "teacher math")
    assert "id 257: student '<|x|>', teacher math '<|im_start|>'; id 259" in str(error.value)
    assert "give a teacher math of the student's tokenizer" in str(error.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_missing_file_is_named(tmp_path, file):
    (write(tmp_path) / file).unlink()
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as error:
        tokenizer_lib.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_was_cut_is_to_be_copied_again(tmp_path, file):
    path = write(tmp_path) / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="copy it from where the model came from"):
        tokenizer_lib.load(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_broken_file_is_named(tmp_path, file):
    (write(tmp_path) / file).write_text("{% broken")
    with pytest.raises(
        ValueError, match=file.replace(".", r"\.") + "|the chat template of"
    ) as error:
        tokenizer_lib.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ({"eos_token": None}, {}, "names no end token: set eos_token"),
        ({"eos_token": "<eos>"}, {}, "eos_token is '<eos>' in .* no token of tokenizer.json"),
        ({"pad_token": "<pad>"}, {}, "pad_token is '<pad>' in .* no token of tokenizer.json"),
        ({}, {"eos_token_id": 300}, r"eos_token_id has 300 in .*generation_config\.json.*258"),
        ({}, {"eos_token_id": ["a"]}, "eos_token_id has 'a'"),
        ({"additional_special_tokens": ["<x>"]}, {}, "additional_special_tokens is '<x>'"),
        ({"extra_special_tokens": ["<x>"]}, {}, "extra_special_tokens is '<x>'"),
        ({"split_special_tokens": True}, {}, "split_special_tokens is True"),
        (
            {"added_tokens_decoder": {"257": {"content": "<|other|>"}}},
            {},
            "id 257 is '<|other|>' in .* and '<|im_start|>' in tokenizer.json",
        ),
    ],
)
def test_files_that_disagree_are_refused(tmp_path, config, generation, message):
    path = write(tmp_path, generation=generation, **config)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        tokenizer_lib.load(path)
