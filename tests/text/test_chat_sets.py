"""
Sets of conversations: whole ones packed into rows, of which the answers alone are learnt, and which a model
sees one at a time though they stand side by side.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, free_port, process_environment, random_gpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import prepare
import train
from kqv.formats import loading, resize
from kqv.text import dataset_writer
from kqv.text.dataset import SPLITS, Dataset
from kqv.text.order import packed
from kqv.text.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, ChatTokenizer
from kqv.training.objective import checkpoint_activations
from model import NextToken

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
CHAT = ChatTokenizer(CharTokenizer("ab "))  # 3 letters, <|system|> 3, <|user|> 4, <|assistant|> 5, end 6
SAID = st.text(st.sampled_from("ab "), max_size=5)
TURNS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3)
CONVERSATIONS = st.lists(st.tuples(st.none() | SAID, TURNS), min_size=1, max_size=9)
UNEVEN = st.lists(st.tuples(st.none() | SAID, TURNS | st.just([("a", None)])), min_size=1, max_size=9)
TINY = [*TINY_RUN, "--dataset=sums", "--block_size=24", "--dtype=float32"]


def messages_of(conversation):
    instructions, turns = conversation
    said = [] if instructions is None else [("system", instructions)]
    for question, answer in turns:
        said += [("user", question), ("assistant", answer)][: 1 if answer is None else 2]
    return said


def written_out(conversation):
    """[(id, whether it is to be learnt, place in the conversation), ...]"""
    instructions, turns = conversation
    found = [(3, False)] + [("ab ".index(char), False) for char in instructions or ""]
    for question, answer in turns:
        found += [(4, False)] + [("ab ".index(char), False) for char in question]
        found += [(5, False)] + [("ab ".index(char), True) for char in answer] + [(6, True)]
    return [(id, learnt, place) for place, (id, learnt) in enumerate(found)]


def chat_set(folder, conversations):
    ids = np.concatenate([CHAT.encode_chat(messages_of(conversation)) for conversation in conversations])
    dataset_writer.write(folder, {split: ids for split in SPLITS}, CHAT, {})
    return Dataset(folder)


def rows_of(conversations, longest):
    """As many whole conversations in a row as fit into `longest` ids, in order."""
    rows = [[]]
    for found in map(written_out, conversations):
        if len(found) > longest:
            rows.append([])  # what is left out ends the row
        elif len(rows[-1]) + len(found) > longest:
            rows.append(found)
        else:
            rows[-1] = rows[-1] + found
    return [row for row in rows if row]


# Batches


@UNHURRIED
@given(conversations=CONVERSATIONS, block_size=st.integers(3, 40))
def test_rows_are_packed_with_whole_conversations_and_only_answers_are_learnt(
    conversations, block_size, tmp_path
):
    data = chat_set(tmp_path, conversations)
    rows = rows_of(conversations, block_size + 1)
    assert data.windows("train", block_size) == data.windows("val", block_size, anywhere=True) == len(rows)
    if not rows:
        return
    batch = data.batch("train", np.arange(len(rows)), block_size)
    for number, row in enumerate(rows):
        row = row + [(3, False, place) for place in range(block_size + 1 - len(row))]  # one that says nothing
        assert batch.idx[number].tolist() == [id for id, _, _ in row[:-1]]
        assert batch.targets[number].tolist() == [id if learnt else -1 for id, learnt, _ in row[1:]]
        assert batch.positions[number].tolist() == [place for _, _, place in row[:-1]]
    assert (batch.positions == 0).sum(axis=1).max() <= data.most_in_row(block_size) <= 1 + len(conversations)
    for array in batch:
        assert array.dtype == np.int64 and array.shape == (len(rows), block_size) and array.flags.c_contiguous
    found = [ids.tolist() for ids in data.conversations("train")]
    assert found == [[id for id, _, _ in written_out(conversation)] for conversation in conversations]


@UNHURRIED
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 20))
def test_packing_leaves_out_what_is_too_long_and_nothing_else(sizes, longest):
    borders = np.cumsum([0, *sizes])
    rows = packed(borders, longest).tolist()
    assert rows == sorted(rows) and all(0 < end - start <= longest for start, end in rows)
    kept = [i for start, end in rows for i, border in enumerate(borders[:-1]) if start <= border < end]
    assert kept == [i for i, size in enumerate(sizes) if size <= longest]
    for start, end in rows[:-1]:
        following = borders[np.searchsorted(borders, end) + 1]
        assert following - start > longest  # no row has room for the next


def test_every_row_comes_once_in_an_epoch_and_in_evaluation(tmp_path):
    data = chat_set(tmp_path, [(None, [("a" * (i % 5), "b" * (i // 5 % 5))]) for i in range(200)])
    count = data.windows("train", 24)
    assert 20 < count < 100 and data.batches("val", 4, 24) == -(-count // 4)
    seen = [data.training_batch(1, 24, 5, step, 0, "epoch")[0].idx[0].tolist() for step in range(2 * count)]
    rows = data.batch("train", np.arange(count), 24).idx.tolist()
    assert sorted(seen[:count]) == sorted(seen[count:]) == sorted(rows) and seen[:count] != seen[count:]
    evaluated = [data.evaluation_batch("val", 1, 24, index, count).idx[0].tolist() for index in range(count)]
    assert evaluated == rows
    drawn = {tuple(data.training_batch(1, 24, 5, step, 0)[0].idx[0].tolist()) for step in range(20 * count)}
    assert drawn == set(map(tuple, rows))


# No conversation sees another

SIDE_BY_SIDE = [
    ("a", [("b", "a b")]),
    (None, [("ab", "b"), ("", "a")]),
    (None, [("a", "")]),
    ("b b", [("a a", "bab")]),
]


@pytest.fixture
def packed_row(tmp_path):
    """(float64 model, one row with four conversations and some filling, the conversations alone)."""
    data = chat_set(tmp_path, SIDE_BY_SIDE)
    row = data.batch("train", np.array([0]), 48)
    alone = [
        chat_set(tmp_path / str(i), [one]).batch("train", np.array([0]), 48)
        for i, one in enumerate(SIDE_BY_SIDE)
    ]
    gpt = random_gpt(block_size=48, vocab_size=7, n_layer=3).double()
    return gpt, as_tensors(row), [as_tensors(batch) for batch in alone]


def as_tensors(batch):
    return [torch.from_numpy(array) for array in batch]


def ends_of(idx):
    return [*torch.nonzero(idx[0] == 3).flatten().tolist(), idx.size(1)]


def test_a_conversation_in_a_row_has_the_logits_that_it_has_alone(packed_row):
    gpt, (idx, _, positions), alone = packed_row
    logits = gpt.lm_head(gpt.hidden(idx, positions))[0]
    ends = ends_of(idx)
    assert len(ends) > len(alone) + 1  # there is filling
    for start, end, (its_idx, _, _) in zip(ends, ends[1:], alone, strict=False):
        its_idx = its_idx[:, : end - start]
        assert torch.equal(its_idx[0], idx[0, start:end])
        torch.testing.assert_close(gpt.lm_head(gpt.hidden(its_idx))[0], logits[start:end], atol=1e-12, rtol=0)


def test_what_is_in_a_row_beside_a_conversation_does_not_matter(packed_row):
    gpt, (idx, _, positions), _ = packed_row
    ends = ends_of(idx)
    start, end = ends[1], ends[2]
    other = idx.clone()
    other[0, :start] = torch.randint(3, (start,))
    other[0, end:] = torch.randint(3, (48 - end,))
    before, after = (gpt.hidden(ids, positions)[0, start:end] for ids in (idx, other))
    assert torch.equal(before, after)


def test_a_rows_loss_and_gradient_are_those_of_its_conversations(packed_row):
    gpt, row, alone = packed_row

    def loss_and_gradients(batches):
        gpt.zero_grad()
        count = sum((targets >= 0).sum().item() for _, targets, _ in batches)
        total = 0.0
        for idx, targets, positions in batches:
            share = (targets >= 0).sum().item() / count
            loss = NextToken(gpt)(idx, targets, positions) * share
            loss.backward()
            total += loss.item()
        return total, {name: parameter.grad.clone() for name, parameter in gpt.named_parameters()}

    loss, gradients = loss_and_gradients([row])
    expected, expected_gradients = loss_and_gradients(alone)
    assert loss == pytest.approx(expected, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], atol=1e-12, rtol=1e-9, msg=name)
    logits = gpt.lm_head(gpt.hidden(row[0], row[2]))[0]
    assert loss == pytest.approx(F.cross_entropy(logits, row[1][0], ignore_index=-1).item(), rel=1e-12)


@pytest.mark.parametrize("how", ["plain", "checkpointed"])
def test_what_a_row_is_filled_up_with_teaches_nothing(how, packed_row):
    gpt, (idx, targets, positions), _ = packed_row
    if how == "checkpointed":
        checkpoint_activations(gpt)
    end = ends_of(idx)[4]
    losses, gradients = [], []
    for length in (end, 48):
        gpt.zero_grad()
        loss = NextToken(gpt)(idx[:, :length], targets[:, :length], positions[:, :length])
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad.clone() for parameter in gpt.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for short, long in zip(*gradients, strict=True):
        torch.testing.assert_close(short, long, atol=1e-12, rtol=1e-9)


def test_positions_of_one_example_are_those_of_no_positions(packed_row):
    gpt, (idx, targets, _), _ = packed_row
    torch.testing.assert_close(
        NextToken(gpt)(idx, targets, torch.arange(48)[None]), NextToken(gpt)(idx, targets), atol=1e-12, rtol=0
    )


# Training


@pytest.fixture
def run(cli, tmp_path):
    """Call train.py's main on a set of sums and see it succeed -> (what it printed, what it warned of)."""
    write_sums("sums.tsv", 400)
    assert cli(prepare.main, "sums.tsv")[0] == 0

    def succeed(*argv, main=train.main):
        status, out, err = cli(main, *argv)
        assert status == 0 and "error" not in err, err
        return out + err

    return succeed


def write_sums(name, count):
    Path(name).write_text("".join(f"{i % 20}+{i // 20}=\t{i % 20 + i // 20}\n" for i in range(count)))


def weights(folder="out", name="ckpt.pt"):
    return loading.load(Path(folder) / name)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(folder, kind="loss"):
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [line[kind] for line in lines if kind in line]


def test_sums_are_learnt_from_pairs(run):
    argv = ["--max_iters=150", "--lr_decay_iters=150", "--eval_interval=150", "--batch_size=16"]
    out = run(*TINY, *argv, "--data_order=epoch")
    assert "warning" not in out and "bits per byte" not in out
    before, after = losses("out", "val_loss")
    assert before > 2.5 and after < 0.55 * before


@pytest.mark.parametrize("sampling", ["random", "epoch"])
def test_a_stopped_run_on_conversations_goes_on_bit_for_bit(sampling, run):
    argv = [
        *TINY,
        f"--data_order={sampling}",
        "--gradient_accumulation_steps=2",
        "--dropout=0.1",
        "--max_iters=7",
    ]
    run(*argv, "--out_dir=straight")
    run(*argv, "--max_iters=4")
    run("--init_from=resume", "--max_iters=7")
    assert same(weights(), weights("straight")) and losses("out") == losses("straight")
    run(*argv, "--out_dir=other", f"--data_order={'epoch' if sampling == 'random' else 'random'}")
    assert not same(weights(), weights("other"))


def test_two_processes_train_on_conversations_as_one(run):
    argv = [*TINY, "--data_order=epoch", "--gradient_accumulation_steps=4", "--dropout=0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port()}"]
    command += [str(ROOT / "train.py"), *argv]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run(*argv, "--out_dir=alone")
    assert losses("out") == pytest.approx(losses("alone"), abs=1e-5)
    for name, weight in weights("alone").items():
        torch.testing.assert_close(weights("out")[name], weight, atol=1e-5, rtol=0, msg=name)


def test_a_run_on_conversations_with_activations_computed_again_is_the_same(run):
    run(*TINY, "--out_dir=plain")
    run(*TINY, "--activation_checkpointing=True")
    assert losses("out") == pytest.approx(losses("plain"), abs=1e-5)


@settings(UNHURRIED, max_examples=30)
@given(conversations=UNEVEN, block_size=st.integers(5, 40), batch_size=st.integers(1, 5))
def test_what_a_batch_learns_is_known_without_reading_it(conversations, block_size, batch_size, tmp_path):
    data = chat_set(tmp_path, conversations)
    if not data.windows("train", block_size):
        return
    for order in ("random", "epoch"):
        for index in range(3):
            which = (batch_size, block_size, 7, 2, index, order, 3)
            batch, _ = data.training_batch(*which)
            assert data.learnt_tokens(*which) == (batch.targets >= 0).sum()


@settings(UNHURRIED, max_examples=30)
@given(conversations=UNEVEN, batch_size=st.integers(1, 7), count=st.integers(1, 9))
def test_an_evaluation_learns_each_row_at_most_once(conversations, batch_size, count, tmp_path):
    data = chat_set(tmp_path, conversations)
    rows = data.batch("val", np.arange(data.windows("val", 40)), 40)
    batches = [data.evaluation_batch("val", batch_size, 40, index, count) for index in range(count)]
    read = np.unique(np.linspace(0, len(rows.idx) - 1, count * batch_size).astype(int))
    learnt = sum((batch.targets >= 0).sum() for batch in batches)
    assert learnt == (rows.targets[read] >= 0).sum()
    if count >= data.batches("val", batch_size, 40):
        assert learnt == (rows.targets >= 0).sum()  # all of a small split


def test_conversations_that_are_too_long_are_counted(run, cli):
    Path("long.tsv").write_text(Path("sums.tsv").read_text() + f"{'9' * 50}+0=\t{'9' * 50}\n" * 3)
    assert cli(prepare.main, "long.tsv")[0] == 0
    longest = 50 + 3 + 50 + 3 - 1 + 1  # the marks, and the end, which is not read
    out = run(*TINY, "--dataset=long")
    warned = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "3 conversations of the " in warned[0]
    assert f"block_size=24 and left out; the longest needs --block_size={longest}" in warned[0]
    assert "warning" not in run(*TINY, "--dataset=long", f"--block_size={longest}", "--out_dir=all")


def test_where_no_conversation_fits_the_size_that_does_is_named(run, refusal):
    data = Dataset("sums")
    sizes = [len(ids) - 1 for ids in data.conversations("train")]
    line = refusal(train.main, *TINY, "--block_size=5")
    assert "no conversation of the train split" in line and "block_size=5" in line
    assert f"--block_size={min(sizes)}, the longest {max(sizes)}" in line
    assert "warning" in run(*TINY, f"--block_size={min(sizes)}")


def test_a_set_that_begins_with_no_conversation_is_refused(tmp_path, refusal):
    dataset_writer.write(
        tmp_path / "data/x", {split: np.array([0, 3, 4, 5, 1, 6]) for split in SPLITS}, CHAT, {}
    )
    line = refusal(train.main, *TINY, "--dataset=x")
    assert "begins with no conversation" in line and "prepare.py again" in line


def test_a_chat_set_has_a_marks_ids_and_no_bytes(run):
    meta = json.loads(Path("data/sums/meta.json").read_text())
    assert meta["tokenizer"] == {"kind": "chat", "base": {"kind": "char", "chars": "+0123456789="}}
    assert (meta["vocab_size"], meta["separator"], meta["bytes"], meta["documents"]) == (16, 15, {}, 400)
    answers = {}
    for split in SPLITS:
        for ids in Dataset("sums").conversations(split):
            assert ids[:2].tolist() == [12, 13] and ids[-1] == 15 and (ids == 14).sum() == 1
            place = ids.tolist().index(14)
            decode = Dataset("sums").tokenizer.decode
            answers[decode(ids[2:place])] = decode(ids[place + 1 :])
    assert answers == {f"{i % 20}+{i // 20}=": str(i % 20 + i // 20) for i in range(400)}


def test_empty_words_are_words(cli, tmp_path):
    rows = [[{"role": r, "content": ""} for r in ("user", "assistant")]] * 9
    Path("a.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    status, _, err = cli(prepare.main, "a.jsonl", "--tokenizer=byte", "--val_fraction=0.5")
    assert status == 1 and "split would have 0 tokens" in err  # the same question: all in one split


# From texts to conversations


@pytest.fixture
def base(run, cli):
    """A run on texts of sums, and a set of conversations made with its tokenizer."""
    Path("texts.txt").write_text("".join(f"{i}+{i}={2 * i}\n" for i in range(700)))
    assert cli(prepare.main, "texts.txt", "--name=texts")[0] == 0
    run(*TINY, "--dataset=texts", "--out_dir=base")
    return run


@pytest.mark.parametrize("source", ["data/texts", "base", "base/ckpt.pt"])
def test_what_was_trained_on_texts_goes_on_with_conversations(source, base, cli):
    assert cli(prepare.main, "sums.tsv", "--name=chat", f"--tokenizer={source}")[0] == 0
    frozen = ["--learning_rate=0", "--min_lr=0", "--max_iters=1"]
    base(*TINY, "--dataset=chat", "--init_from=base", "--out_dir=tuned", *frozen)
    old, new = loading.load("base/best.pt"), loading.load("tuned/ckpt.pt")
    known = old["model_args"]["vocab_size"]
    assert new["model_args"] == {**old["model_args"], "vocab_size": known + 4}
    assert new["tokenizer"] == {"kind": "chat", "base": old["tokenizer"]}
    for name, weight in old["model"].items():
        kept = new["model"][name][:known] if weight.size(0) == known else new["model"][name]
        assert torch.equal(kept, weight), name
    marks = new["model"]["lm_head.weight"][known:]
    assert torch.equal(marks, new["model"]["transformer.wte.weight"][known:])
    assert 0.01 < marks.std() < 0.03 and abs(marks.mean()) < 0.01

    base(*TINY, "--dataset=chat", "--init_from=base", "--out_dir=tuned", "--max_iters=3")
    base("--init_from=resume", "--out_dir=tuned", "--max_iters=6")
    base(*TINY, "--dataset=chat", "--init_from=base", "--out_dir=straight", "--max_iters=6")
    assert same(weights("tuned"), weights("straight"))
    assert losses("tuned", "val_loss")[-1] < losses("tuned", "val_loss")[0]
    base(*TINY, "--dataset=chat", "--init_from=tuned", "--out_dir=further", "--max_iters=1")


def test_a_padded_vocabulary_that_has_room_for_the_marks_stays(run, cli):
    Path("texts.txt").write_text("".join(page.read_text("utf-8") for page in sorted(ROOT.glob("docs/*.md"))))
    assert cli(prepare.main, "texts.txt", "--tokenizer=bpe:1100")[0] == 0
    run(*TINY, "--dataset=texts_bpe1100", "--out_dir=base", "--max_iters=1")
    assert cli(prepare.main, "sums.tsv", "--name=chat", "--tokenizer=base")[0] == 0
    run(*TINY, "--dataset=chat", "--init_from=base", "--out_dir=tuned", "--learning_rate=0", "--min_lr=0")
    ids = Dataset("texts_bpe1100").tokenizer.vocab_size
    assert 1024 < ids <= 1100 and len(weights("base")["lm_head.weight"]) == -(-ids // 64) * 64 >= ids + 3
    assert same(weights("base"), weights("tuned"))


def test_conversations_of_another_tokenizer_are_refused(base, refusal):
    line = refusal(train.main, *TINY, "--dataset=sums", "--init_from=base", "--out_dir=tuned")
    assert "data/sums was made with another tokenizer" in line and "prepare it" in line
    assert not Path("tuned").exists()


def test_what_was_trained_on_conversations_is_not_trained_on_texts(base, refusal):
    base(*TINY, "--out_dir=chat", "--max_iters=1")
    line = refusal(train.main, *TINY, "--dataset=texts", "--init_from=chat", "--out_dir=tuned")
    assert "data/texts was made with another tokenizer" in line


def test_texts_take_the_tokenizer_below_that_of_conversations(base, cli):
    status, out, _ = cli(prepare.main, "texts.txt", "--name=new", "--tokenizer=data/sums", "--unknown=skip")
    assert status == 0 and "char tokenizer with 12 ids" in out
    base(*TINY, "--dataset=new", "--out_dir=new", "--max_iters=1")


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer("ab"), BPETokenizer([bytes([i]) for i in range(256)])]
)
def test_a_models_vocabulary_grows_behind_what_it_knows(tokenizer):
    gpt = random_gpt(vocab_size=tokenizer.vocab_size)
    idx = torch.randint(tokenizer.vocab_size, (2, 8))
    before, known = gpt(idx), tokenizer.vocab_size
    resize.grow_vocab_size(gpt, ChatTokenizer(tokenizer).vocab_size)
    after = gpt(idx)
    torch.testing.assert_close(after[..., :known], before, atol=1e-5, rtol=0)
    assert after.size(-1) == gpt.config.vocab_size
    assert gpt.lm_head.weight is gpt.transformer.wte.weight and gpt.lm_head.weight.requires_grad
    assert gpt(torch.full((1, 1), gpt.config.vocab_size - 1)).isfinite().all()
    assert (gpt.lm_head.out_features, gpt.transformer.wte.num_embeddings) == (gpt.config.vocab_size,) * 2
