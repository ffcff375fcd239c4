"""Distillation: the loss, what of the teacher is in a run, and what is refused."""

import copy

import pytest
import torch
from conftest import FAMILIES, SHAPES, TINY_RUN, call, random_gpt, random_ids, results, script, write_sums
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from kqv.formats import lora
from kqv.training import distillation, loss
from kqv.training.distillation import Distilled
from model import NextToken

IDS = 17  # of the tokenizer; the models have more rows


class Config:
    distill_weight, distill_temperature, label_smoothing = 0.5, 1.0, 0.0

    def __init__(self, weight=0.5, temperature=1.0, smoothing=0.0):
        self.distill_weight, self.distill_temperature = weight, temperature
        self.label_smoothing = smoothing


def batch(seed=0):
    idx, targets = random_ids(2, 8, below=IDS, seed=seed), random_ids(2, 8, below=IDS, seed=seed + 1)
    targets[0, :3] = targets[1, -1] = -1
    return idx, targets


def naive_loss(student, teacher, idx, targets, weight, temperature):
    total, count = 0, 0
    for row in range(len(idx)):
        ours, theirs = (
            student(idx[row : row + 1])[0, :, :IDS],
            teacher(idx[row : row + 1])[0, :, :IDS].detach(),
        )
        for place in range(idx.size(1)):
            if targets[row, place] < 0:
                continue
            p = (theirs[place] / temperature).softmax(0)
            q = (ours[place] / temperature).softmax(0)
            cross_entropy = -ours[place].softmax(0)[targets[row, place]].log()
            divergence = sum(p[i] * (p[i].log() - q[i].log()) for i in range(IDS))
            total = total + (1 - weight) * cross_entropy + weight * temperature**2 * divergence
            count += 1
    return total / count


@given(
    FAMILIES,
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(0, 100),
    st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_value_and_gradient_are_those_of_a_naive_loop(family, weight, temperature, seed, in_chunks):
    student = random_gpt(seed=seed, **SHAPES[family]).double()
    teacher = random_gpt(seed=seed + 1, n_layer=3).double().requires_grad_(False)
    idx, targets = batch(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda x: x)  # else something is rounded to float32
        if in_chunks:
            patch.setattr(loss, "LOGITS_AT_ONCE", 5 * distillation.BYTES_MORE * IDS)
            patch.setattr(loss, "ROWS", 1)
        model = Distilled(student, None, IDS, teacher, Config(weight, temperature))
        ours = model(idx, targets)
        naive = naive_loss(student, teacher, idx, targets, weight, temperature)
        gradients = [torch.autograd.grad(one, list(student.parameters())) for one in (ours, naive)]
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-9)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_large_batches_are_computed_in_chunks(monkeypatch):
    student, teacher = random_gpt(), random_gpt(seed=1).requires_grad_(False)
    model, sizes = Distilled(student, None, IDS, teacher, Config()), []
    of_chunk = model.of_chunk
    monkeypatch.setattr(model, "of_chunk", lambda *part: sizes.append(len(part[0])) or of_chunk(*part))
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 5 * distillation.BYTES_MORE * IDS)
    monkeypatch.setattr(loss, "ROWS", 1)
    model(*batch()).backward()
    assert sum(sizes) == 2 * 16 and max(sizes) <= 5  # each once more in the backward pass


def test_the_compiler_does_not_unroll_the_chunks(monkeypatch):
    student, teacher = random_gpt(), random_gpt(seed=1).requires_grad_(False)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 5 * distillation.BYTES_MORE * IDS)
    monkeypatch.setattr(loss, "ROWS", 1)
    model, graphs = Distilled(student, None, IDS, teacher, Config()), []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    found = torch.compile(model, backend=backend)(*batch())
    torch.testing.assert_close(found, model(*batch()))
    assert graphs and not any("cross_entropy" in graph for graph in graphs)


def test_numbers_below_0_are_no_targets():
    """Hugging Face's data have -100 there."""
    student, teacher = random_gpt(), random_gpt(seed=1).requires_grad_(False)
    model = Distilled(student, None, IDS, teacher, Config())
    idx, targets = batch()
    assert torch.equal(model(idx, targets), model(idx, targets.where(targets >= 0, -100)))


def test_new_rows_of_a_frozen_head_learn():
    student, teacher = lora.adapt(random_gpt(), 2, 4, new_ids=50), random_gpt(seed=1).requires_grad_(False)
    Distilled(student, None, 64, teacher, Config())(*batch()).backward()
    assert student.lm_head.weight.grad is None and student.lm_head.new_rows.grad.abs().sum() > 0


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it():
    student = random_gpt()
    teacher = copy.deepcopy(student).requires_grad_(False)
    found = Distilled(student, None, IDS, teacher, Config(weight=1.0))(*batch())
    found.backward()
    assert abs(found.item()) < 1e-6
    assert max(parameter.grad.abs().max() for parameter in student.parameters()) < 1e-5


def test_an_evaluation_is_of_the_right_ids_alone():
    student, teacher = random_gpt(), random_gpt(seed=1)
    plain = NextToken(student, vocab_size=IDS)
    with torch.no_grad():
        model = Distilled(student, plain.loss, IDS, teacher, Config(weight=1.0))
        assert torch.equal(model(*batch()), plain(*batch()))


def test_labels_are_smoothed_too():
    student, teacher = random_gpt(), random_gpt(seed=1).requires_grad_(False)
    idx, targets = batch()
    found = Distilled(student, None, IDS, teacher, Config(weight=0.0, smoothing=0.2))(idx, targets)
    torch.testing.assert_close(
        found,
        loss.next_token_loss(
            student.hidden(idx).flatten(0, 1), student.lm_head.weight, targets.flatten(), IDS, 0.2
        ),
    )


def test_the_teacher_is_no_part_of_the_module():
    student, teacher = random_gpt(), random_gpt(seed=1)
    model = Distilled(student, None, IDS, teacher, Config())
    assert {name for name, _ in model.named_parameters()} == {
        f"gpt.{n}" for n, _ in student.named_parameters()
    }


# Runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with sets of texts and of conversations, and a trained model of each."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("a banana and a cabana, an open pan. " * 200, "utf-8")
    (folder / "digits.txt").write_text("0123456789+= " * 200, "utf-8")
    write_sums(folder / "sums.jsonl")
    for command in (
        ["prepare.py", "text.txt", "--name=tiny"],
        ["prepare.py", "digits.txt", "--name=digits"],
        ["prepare.py", "sums.jsonl", "--name=sums", "--tokenizer=data/digits"],
        ["train.py", *TINY_RUN, "--dataset=digits", "--out_dir=of_text"],
        ["train.py", *TINY_RUN, "--dataset=tiny", "--out_dir=teacher", "--n_layer=3"],
        ["train.py", *TINY_RUN, "--dataset=sums", "--out_dir=of_sums"],
        ["train.py", *TINY_RUN, "--dataset=tiny", "--out_dir=short", "--block_size=8"],
        ["train.py", *TINY_RUN, "--dataset=tiny", "--out_dir=own_teacher", "--seed=9"],
    ):
        result = script(*command, cwd=folder)
        assert result.returncode == 0, result.stderr
    (folder / "circle").symlink_to("circle")
    return folder


@pytest.fixture
def run(made, monkeypatch, capsys, tmp_path):
    """Train a small model in that folder: run(*settings) -> (status, out, err). It saves in `own`."""
    monkeypatch.chdir(made)
    return lambda *argv: call(
        train.main, [*TINY_RUN, "--dataset=tiny", f"--out_dir={tmp_path / 'own'}", *argv], monkeypatch, capsys
    )


def saved(tmp_path, name="own"):
    return torch.load(tmp_path / name / "ckpt.pt", weights_only=True)


def test_a_run_names_its_teacher_and_saves_nothing_of_it(run, tmp_path):
    assert run("--out_dir=" + str(tmp_path / "alone"))[0] == 0
    status, out, err = run("--teacher=teacher")
    assert (status, err) == (0, "") and "teacher teacher, 0.04M parameters" in out
    alone, own = saved(tmp_path, "alone"), saved(tmp_path)
    assert own["model"].keys() == alone["model"].keys() and len(own["teacher"]) == 64
    assert any(not torch.equal(weight, own["model"][name]) for name, weight in alone["model"].items())
    assert {*own["optimizer"]["state"]} == {*alone["optimizer"]["state"]}


def test_weight_0_is_a_run_without_a_teacher_bit_for_bit(run, tmp_path):
    assert run("--out_dir=" + str(tmp_path / "alone"))[0] == 0
    status, out, _ = run("--teacher=no_such_model", "--distill_weight=0")
    assert status == 0 and "teacher (distill_weight is 0)" in out
    own = saved(tmp_path)["model"]
    assert all(torch.equal(weight, own[name]) for name, weight in saved(tmp_path, "alone")["model"].items())


def test_a_run_resumes_bit_for_bit(run, tmp_path):
    whole = "--out_dir=" + str(tmp_path / "whole")
    assert run("--teacher=teacher", whole, "--dropout=0.1")[0] == 0
    assert run("--teacher=teacher", "--max_iters=3", "--dropout=0.1")[0] == 0
    status, _, err = run("--init_from=resume", "--max_iters=6")
    assert (status, err) == (0, "")
    one, other = saved(tmp_path, "whole"), saved(tmp_path)
    assert all(torch.equal(weight, other["model"][name]) for name, weight in one["model"].items())
    assert results(tmp_path / "whole") == results(tmp_path / "own")


def test_another_teacher_is_said(run, tmp_path, made):
    assert run("--teacher=teacher", "--max_iters=3")[0] == 0
    kept = (made / "teacher/best.pt").read_bytes()
    try:
        (made / "teacher/best.pt").write_bytes((made / "short/best.pt").read_bytes())
        status, _, err = run("--init_from=resume", "--max_iters=6", "--block_size=16")
        assert status == 1 and "block_size" in err  # short reads 8 tokens
        assert (
            script(
                "train.py", *TINY_RUN, "--dataset=tiny", "--out_dir=teacher", "--seed=9", cwd=made
            ).returncode
            == 0
        )
        status, _, err = run("--init_from=resume", "--max_iters=6")
        assert status == 0 and "not those that this run learnt from" in err
    finally:
        (made / "teacher/best.pt").write_bytes(kept)


def test_a_new_run_from_a_student_may_have_another_teacher(run, made, tmp_path):
    assert run("--teacher=teacher", "--max_iters=3")[0] == 0
    student = f"--init_from={tmp_path / 'own/ckpt.pt'}"
    assert run("--teacher=own_teacher", student, f"--out_dir={tmp_path / 'new'}")[::2] == (0, "")


def test_an_evaluation_needs_no_teacher(run, made):
    assert run("--teacher=teacher", "--max_iters=3")[0] == 0
    (made / "teacher").rename(made / "moved")
    try:
        assert run("--init_from=resume", "--eval_only=True")[::2] == (0, "")
        status, _, err = run("--init_from=resume", "--max_iters=6")
        assert status == 1 and err.startswith("error: teacher=teacher is no file")
    finally:
        (made / "moved").rename(made / "teacher")


@pytest.mark.parametrize("shape", SHAPES)
def test_students_of_every_family_and_conversations(run, shape):
    shape = [f"--{name}={value}" for name, value in SHAPES[shape].items()]
    assert run("--teacher=teacher", *shape)[::2] == (0, "")
    assert run("--teacher=of_sums", "--dataset=sums", *shape)[::2] == (0, "")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--teacher=of_sums"], "another tokenizer"),
        (["--teacher=short"], "--block_size=8"),
        (["--teacher=teacher", "--dataset=sums"], "prepare the set with"),
        (["--teacher=of_text", "--dataset=sums"], "no marks of conversations"),
        (["--teacher=nothing"], "teacher=nothing is no file"),
        (["--teacher=circle"], "teacher=circle is no file"),
        (["--teacher=text.txt"], "text.txt"),
        (["--teacher=teacher", "--out_dir=teacher"], "another --out_dir"),
        (["--teacher=teacher", "--dtype_head=float8"], "float8"),
        (["--teacher=teacher", "--distill_weight=1.5"], "distill_weight"),
        (["--teacher=teacher", "--distill_temperature=0"], "distill_temperature"),
    ],
)
def test_what_does_not_fit_is_refused(run, options, says):
    status, _, err = run(*options)
    assert status in (1, 2) and len(err.splitlines()) == 1 and says in err


def test_settings_without_a_teacher_are_said_to_be_unused(run):
    assert "not used: distill_weight (no teacher is named)" in run("--distill_weight=0.3")[1]
