"""The user's own evaluators: what a function gets and may return, and how commands fail."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sst_merge.compare.outcome import Outcome, read_answer
from sst_merge.compare.user_code import Command, PythonFunction, source_of

SUBJECT = SimpleNamespace(model="the model", tokenizer="the tokenizer")


def function(tmp_path, body: str) -> PythonFunction:
    path = tmp_path / "mine.py"
    path.write_text(f"def measure(model, tokenizer):\n    {body}\n")
    return PythonFunction("mine", f"{path}:measure")


def test_a_function_gets_model_and_tokenizer(tmp_path):
    body = "return 0.5 if (model, tokenizer) == ('the model', 'the tokenizer') else 0.0"
    assert function(tmp_path, body)(SUBJECT) == {"mine": Outcome(0.5)}


def test_a_function_of_a_module():
    assert PythonFunction("mine", "operator:eq")(SUBJECT) == {"mine": Outcome(False)}
    assert source_of("json.decoder:JSONDecoder").name == "decoder.py"
    assert source_of("/x/y.py:f").name == "y.py" and source_of("no.such.module:f") is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (3, {"m": 3.0}),
        (np.float32(0.5), {"m": 0.5}),
        (torch.tensor(0.25), {"m": 0.25}),
        ([True, False], {"m": 0.5}),
        ({"a": 1.0, "b": [1, 2]}, {"m.a": 1.0, "m.b": 1.5}),
    ],
)
def test_answers(answer, expected):
    assert {name: outcome.value for name, outcome in read_answer("m", answer).items()} == expected


@pytest.mark.parametrize("answer", ["0.5", None, [], {}, float("nan"), [1.0, "x"], {"a": float("inf")}])
def test_answers_that_are_none(answer):
    with pytest.raises(ValueError, match="evaluator m.*: expected a finite number, a list of numbers"):
        read_answer("m", answer)


def test_failures_name_the_evaluator(tmp_path):
    with pytest.raises(ValueError, match=r"evaluator mine: .*mine.py:measure raised KeyError: 'x'"):
        function(tmp_path, "return {}['x']")(SUBJECT)
    with pytest.raises(ValueError, match=r"evaluator mine: .* cannot be imported: AttributeError"):
        replace(function(tmp_path, "return 1"), function=f"{tmp_path}/mine.py:other")(SUBJECT)
    with pytest.raises(ValueError, match=r"evaluator mine: .* cannot be imported: ModuleNotFoundError"):
        PythonFunction("mine", "no_such_module_here:f")(SUBJECT)
    with pytest.raises(ValueError, match="is no function, but str"):
        PythonFunction("mine", "os:sep")(SUBJECT)


class Written:
    """A subject that writes one file."""

    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    problem = SimpleNamespace(config=SimpleNamespace(base_model="the base"))

    def write(self, folder, merge_into_base):
        (folder / "adapter.txt").write_text(f"whole: {merge_into_base}")


def command(script: str, **options) -> Command:
    return Command("mine", f"{shlex.quote(sys.executable)} -c {shlex.quote(script)} {{model}} {{base}}", **options)


def test_a_command_gets_the_written_model_and_the_base(tmp_path):
    script = (
        "import json, sys; print('working'); "
        "text = open(sys.argv[1] + '/adapter.txt').read(); print(json.dumps({'words': [1, 0], 'base': len(sys.argv[2]),"
        " 'whole': float(text == 'whole: True'), 'folder': float(open('here').read())}))"
    )
    (tmp_path / "here").write_text("7")
    found = command(script, merge_into_base=True, folder=str(tmp_path))(Written())
    assert {name: outcome.value for name, outcome in found.items()} == {
        "mine.words": 0.5, "mine.base": 8.0, "mine.whole": 1.0, "mine.folder": 7.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; print('half way'); sys.exit('no GPU')", "ended with exit code 1: .*half way\n  no GPU"),
        ("print('accuracy 0.5')", "printed no JSON on its last line: .*accuracy 0.5"),
        ("pass", r"printed no JSON on its last line: .*\(nothing\)"),
        ("print('[]')", "expected a finite number"),
        ("import time; print('slow', flush=True); time.sleep(60)", r"took longer than timeout=2 s: .*slow"),
    ],
)
def test_commands_that_fail(script, message):
    with pytest.raises(ValueError, match=f"(?s)evaluator mine: .*{message}"):
        command(script, timeout=2.0)(Written())


def test_a_command_that_is_not_there():
    with pytest.raises(ValueError, match="evaluator mine: 'no-such-program' cannot be run"):
        Command("mine", "no-such-program {model}")(Written())


def test_last_lines_are_few():
    script = "for i in range(100): print('line', i)"
    with pytest.raises(ValueError, match="line 99") as caught:
        command(script + "\nraise SystemExit(3)")(Written())
    assert "line 87" not in str(caught.value) and json.dumps("line 88")[1:-1] in str(caught.value)
