"""Conversations in the chat templates of other models, against transformers' apply_chat_template."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import prepare
from kqv.errors import UserError
from kqv.text import template
from kqv.text.chat import BEGINS, LEARNT, ChatTokenizer
from kqv.text.dataset import Dataset
from kqv.text.huggingface import HuggingFaceTokenizer
from kqv.text.template import Template
from kqv.text.templated import TemplatedTokenizer, over
from kqv.text.tokenizers import from_json

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {{- '<tool_call>\n' + tool_call.name + '\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""  # noqa: E501  as in its file

TEMPLATES = {  # template, what ends a turn, special tokens, added words
    "smollm2": (SMOLLM2, "<|im_end|>", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []),
    "llama3": (
        LLAMA3,
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [],
    ),
    "qwen3": (
        QWEN3,
        "<|im_end|>",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>", "<tool_call>"],
    ),
    "mistral": (MISTRAL, "</s>", ["<s>", "</s>", "<unk>"], []),
}

CONVERSATIONS = [
    [("user", "What is a key?"), ("assistant", "It opens a lock.")],
    [
        ("user", "Keys?\nAnd values? "),
        ("assistant", "Both."),
        ("user", "हिन्दी 😀"),
        ("assistant", " Yes.\n "),
    ],
    [("user", "keys"), ("assistant", "No."), ("user", "and values?")],
    [("user", ""), ("assistant", "")],
    [("user", "No."), ("assistant", "\nNo."), ("user", "No."), ("assistant", "No.")],
]
WITH_SYSTEM = [
    [("system", "Be brief."), ("user", "Who?"), ("assistant", "I.")],
    [("system", ""), ("user", "Who?")],
]
HARMLESS = (
    "keys and queries, values and keys: who opens a lock? a system, a user, an assistant. [INST] [/INST] "
)


def definition(name, template=None):
    """The files of a tokenizer that brings a template."""
    source, end, specials, words = TEMPLATES[name]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([HARMLESS * 20], trainer)
    tokenizer.add_tokens(words)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[0],
        "eos_token": end,
        "additional_special_tokens": specials,
        "chat_template": template or source,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings)}
    return {"kind": "huggingface", "files": files, "ends": [tokenizer.token_to_id(end)]}


def chat_of(name, template=None):
    return from_json({"kind": "chat", "base": definition(name, template)})


@pytest.fixture(scope="module", params=list(TEMPLATES))
def pair(request, tmp_path_factory):
    """(a tokenizer of conversations, transformers' of the same files, its name)."""
    from transformers import AutoTokenizer

    chat, folder = chat_of(request.param), tmp_path_factory.mktemp(request.param)
    for name, text in chat.base.files.items():
        (folder / name).write_text(text, "utf-8")
    return chat, AutoTokenizer.from_pretrained(folder), request.param


def theirs(tokenizer, messages):
    found = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages],
        add_generation_prompt=messages[-1][0] == "user",
    )
    return list(found["input_ids"] if not isinstance(found, list) else found)


def test_a_conversation_has_the_ids_that_transformers_gives_it(pair):
    chat, other, name = pair
    assert isinstance(chat, TemplatedTokenizer)
    for messages in CONVERSATIONS + (WITH_SYSTEM if name != "mistral" else []):
        ids = chat.encode_chat(messages)
        assert (ids.tolist(), ids.dtype) == (theirs(other, messages), np.uint32), messages
        assert np.array_equal(chat.encode_marked_chat(messages)[0], ids)


def test_only_answers_and_their_ends_are_learnt(pair):
    chat, _, name = pair
    end = TEMPLATES[name][1]
    for messages in CONVERSATIONS:
        ids, marks = chat.encode_marked_chat(messages)
        assert (marks & BEGINS).tolist() == [BEGINS] + [0] * (len(ids) - 1)
        learnt = (marks & LEARNT) > 0
        names = {number: text for text, number in chat.specials().items()}
        said = "".join(names.get(i) or chat.base.decode_bytes([i]).decode("latin-1") for i in ids[learnt])
        answers = [text for role, text in messages if role == "assistant"]
        assert said.count(end) == len(answers) and (said == "" or said.endswith(end))
        parts = said.replace("<think>\n\n</think>\n\n", "").split(end)
        assert [part.strip() for part in parts[:-1]] == [text.strip() for text in answers]
        for begin in np.flatnonzero(np.diff(learnt.astype(int), prepend=0) == 1):
            messages_before = [role for role, _ in messages].index("assistant")
            if learnt[:begin].sum() == 0:  # what is asked with is what stood before the first answer
                asked = chat.encode_chat(messages[:messages_before])
                assert asked.tolist() == ids[:begin].tolist() or messages[1][1].startswith("\n")


def test_thoughts_are_learnt_with_the_answer_that_they_lead_to():
    chat = chat_of("qwen3")
    thought = "<think>\nhm, keys\n</think>\n\nNo."
    messages = [("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", thought)]
    ids, marks = chat.encode_marked_chat(messages)
    assert chat.decode(ids[(marks & LEARNT) > 0].tolist()) == "No." + thought


def test_no_text_becomes_a_special_id(pair):
    chat, _, name = pair
    specials = {*chat.specials().values()}

    def found(messages):
        return [number for number in chat.encode_chat(messages).tolist() if number in specials]

    plain = found([("user", "a"), ("assistant", "b"), ("user", "c")])
    for special in chat.specials():
        for forged in (special, f"x{special}y {special}", special * 2, special[:-1], special[1:], special[0]):
            messages = [("user", forged), ("assistant", forged), ("user", f"{forged} ")]
            assert found(messages) == plain, forged
            ids = chat.encode_chat([("user", forged)])
            assert forged in chat.decode(ids.tolist()), forged


def test_names_of_special_ids_do_not_arise_between_two_messages():
    chat = chat_of("smollm2", "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>")
    ids = chat.encode_chat([("system", "a<|im_ "), ("user", "b<|im_"), ("assistant", "start|>")])
    assert [number in chat.specials().values() for number in ids.tolist()] == [False] * (len(ids) - 1) + [
        True
    ]


def test_an_answer_ends_at_the_end_of_its_turn(pair):
    chat, _, name = pair
    assert chat.ends[0] == chat.specials()[TEMPLATES[name][1]]
    assert set(chat.base.ends) <= set(chat.ends)


def test_an_answer_becomes_the_message_that_it_was_made_of(pair):
    chat, other, name = pair
    ids, marks = chat.encode_marked_chat([("user", "a"), ("assistant", "No keys.")])
    written = chat.decode(ids[(marks & LEARNT) > 0].tolist())
    expected = {"mistral": " No keys.", "qwen3": "<think>\n\n</think>\n\nNo keys."}.get(name, "No keys.")
    assert written == expected
    goes_on = [("user", "a"), ("assistant", chat.message_of(written)), ("user", "b")]
    assert chat.encode_chat(goes_on).tolist() == theirs(
        other, [("user", "a"), ("assistant", "No keys."), ("user", "b")]
    )


def test_the_tokenizer_comes_back_from_json(pair):
    chat = pair[0]
    again = from_json(json.loads(json.dumps(chat.to_json())))
    assert isinstance(again, TemplatedTokenizer) and again.to_json() == chat.to_json()
    assert again.encode_chat(CONVERSATIONS[0]).tolist() == chat.encode_chat(CONVERSATIONS[0]).tolist()


def test_without_a_template_the_own_one_is_used():
    given = definition("smollm2")
    given["files"]["tokenizer_config.json"] = "{}"
    assert isinstance(over(HuggingFaceTokenizer(given["files"], given["ends"])), ChatTokenizer)


# What a template may do


@pytest.mark.parametrize(
    "source, says",
    [
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}", "characters"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("a\n{% if %}", "(line 2)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ '\\ud800' }}", "surrogates"),
    ],
)
def test_a_template_is_kept_in_its_bounds(source, says):
    template = Template(source, {})
    with pytest.raises(UserError, match="the chat template can't be used") as error:
        template.render([("user", "a")])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_takes_too_long_is_ended(monkeypatch):
    sooner = "from kqv.text import template; template.SECONDS = 1; template.serve()"
    monkeypatch.setattr(
        template, "START", template.START.replace("from kqv.text.template import serve; serve()", sooner)
    )
    endless = Template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    with pytest.raises(UserError, match="the chat template can't be used: it ran for more than 5 seconds"):
        endless.render([("user", "a")])


def test_after_a_template_was_ended_another_conversation_is_rendered():
    source = "{% if messages[0].content == 'x' %}{{ 'a' * 10**10 }}{% endif %}{{ messages[0].content }}"
    template = Template(source, {})
    with pytest.raises(UserError):
        template.render([("user", "x")])
    assert template.render([("user", "y")]) == "y"


@pytest.mark.parametrize(
    "source", ["no words", "{{ messages[-1].content }}", "{{ messages | length }}<|im_end|>"]
)
def test_a_template_without_turns_is_not_trained_in(source):
    with pytest.raises(UserError, match="can't be found in what the chat template writes"):
        chat_of("smollm2", source).encode_marked_chat(CONVERSATIONS[0])


# On disk


def test_a_set_has_the_ids_and_marks_of_each_conversation(cli, tmp_path, pair):
    chat, _, name = pair
    Path("data/other").mkdir(parents=True)
    Path("data/other/meta.json").write_text(
        json.dumps(
            {
                "format": 2,
                "dtype": "uint16",
                "vocab_size": chat.vocab_size,
                "tokenizer": chat.to_json(),
                "parts": [{"tokens": {"train": 1, "val": 1}}],
            }
        )
    )
    said = [[("user", f"key {i}"), ("assistant", f"No. {i}")] for i in range(60)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in one]} for one in said]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, err = cli(prepare.main, "a.jsonl", "--tokenizer=data/other", "--name=mine", "--workers=1")
    assert (status, err) == (0, ""), err
    data, expected = Dataset("mine"), {chat.encode_chat(one).tobytes() for one in said}
    found = [
        (ids.astype(np.uint32), learnt)
        for split in ("train", "val")
        for ids, learnt in data.marked_conversations(split)
    ]
    assert {ids.tobytes() for ids, _ in found} == expected and len(found) == 60
    assert all(learnt[0] == 0 and learnt.sum() > 3 for _, learnt in found)
    batch = data.batch("train", np.array([0]), 200)
    first = next(data.marked_conversations("train"))
    assert batch.positions[0][: len(first[0]) + 1].tolist() == [*range(len(first[0])), 0]
    assert (batch.targets[0][: len(first[0]) - 1] >= 0).tolist() == first[1][1:].tolist()
    status, out, err = cli(prepare.main, "a.jsonl", "--tokenizer=data/other", "--name=mine")
    assert "is ready" in out
