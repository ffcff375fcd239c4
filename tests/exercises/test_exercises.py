"""Each exercise takes its function away, knows five mistakes by a line, and accepts the right function."""

import pytest

from exercises.catalogue import EXERCISES
from exercises.grade import (
    MISSING,
    ROOT,
    difference,
    fault,
    mistaken,
    original,
    outcome,
    plain,
    same,
    text_of,
    without_bodies,
)

every_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.title)


def source_of(exercise):
    return (ROOT / exercise.file).read_text("utf-8")


def written(tmp_path, source):
    path = tmp_path / "written.py"
    path.write_text(source, "utf-8")
    return path


@every_exercise
def test_the_function_is_taken_away_and_nothing_else(exercise, tmp_path):
    source = source_of(exercise)
    taken = without_bodies(source, exercise.names)
    assert taken.count(MISSING) == source.count(MISSING) + len(exercise.names)
    for name in exercise.names:
        assert text_of(taken, name).splitlines()[0] == text_of(source, name).splitlines()[0]
        assert len(text_of(taken, name)) < len(text_of(source, name))
    assert "NotImplementedError" in fault(exercise, written(tmp_path, taken))


@every_exercise
def test_the_right_function_is_accepted(exercise, tmp_path):
    assert fault(exercise, written(tmp_path, source_of(exercise))) is None


@every_exercise
def test_five_mistakes_end_in_a_line_that_helps(exercise, tmp_path):
    assert len(exercise.mistakes) == 5
    found = []
    for hint, (right, wrong) in exercise.mistakes.items():
        source = source_of(exercise)
        assert source.count(right) == 1, right
        assert fault(exercise, written(tmp_path, source.replace(right, wrong))) == hint
        found.append(plain(outcome(exercise, mistaken(exercise, right, wrong))))
    assert not any(same(a, b) for i, a in enumerate(found) for b in found[:i])  # no line is for two mistakes


@every_exercise
def test_the_project_s_tests_that_grade_it_exist(exercise):
    assert all((ROOT / name).exists() for name in exercise.tests if name.endswith(".py"))
    assert not isinstance(outcome(exercise, original(exercise)), Exception)


def test_another_mistake_is_shown_by_its_numbers(tmp_path):
    exercise = next(one for one in EXERCISES if one.title == "The rotation")
    wrong = source_of(exercise).replace("b * cos + a * sin", "b * cos + 2 * a * sin")
    assert "at [0, 0, 0, 3] it gives" in fault(exercise, written(tmp_path, wrong))
    wrong = source_of(exercise).replace(
        "torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)", "(a * cos - b * sin)"
    )
    assert "the shape (2, 5, 4, 3), and (2, 5, 4, 6) is wanted" in fault(exercise, written(tmp_path, wrong))
    broken = source_of(exercise).replace("a, b = x.float()", "a, b = y.float()")
    assert "NameError" in fault(exercise, written(tmp_path, broken))
    assert "can't be run" in fault(exercise, written(tmp_path, "def"))
    assert difference([1], [1, 2]) == "it gives 1 results, and 2 are wanted"


def test_a_function_that_does_not_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("exercises.grade.SECONDS", 1)
    exercise = next(one for one in EXERCISES if one.title == "Merging two pieces of a BPE")
    endless = source_of(exercise).replace("place += 1", "place += 0")
    assert "did not end" in fault(exercise, written(tmp_path, endless))


def test_an_exercise_from_its_beginning_to_the_end(tmp_path, monkeypatch, capsys):
    from exercises import __main__ as command

    monkeypatch.setattr(command, "folder_of", lambda number: ROOT / "out" / f"exercise-{tmp_path.name}")
    folder = command.folder_of(11)
    try:
        assert command.main(["11"]) == 0
        assert "Merging" in capsys.readouterr().out
        path = folder / "exercises/small.py"
        assert command.main(["11"]) == 1 and "Not written yet" in capsys.readouterr().out
        path.write_text(source_of(EXERCISES[10]).replace("place += 2", "place += 1"), "utf-8")
        assert command.main(["11"]) == 1 and "Pairs overlap" in capsys.readouterr().out
        path.write_text(source_of(EXERCISES[10]), "utf-8")
        assert command.main(["11"]) == 0 and "Right." in capsys.readouterr().out
    finally:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
    assert command.main(["0"]) == 2 and command.main(["99"]) == 2
    assert command.main([]) == 0 and "13  The schedule" in capsys.readouterr().out
