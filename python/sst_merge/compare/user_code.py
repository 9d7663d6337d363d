"""Evaluators of the user's own: a Python function of the model in memory, or a command given the written model.

Both run code that the configuration names, with the rights of whoever runs the comparison.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .outcome import Outcome, read_answer
from .subject import Subject

LAST_LINES = 12  # of a command that failed


@dataclass(frozen=True)
class PythonFunction:
    """f(model, tokenizer) -> a number, a list of numbers (one a prompt), or a mapping of these.

    Attributes:
        name: Of what is measured; of a mapping, `name.key`.
        function: "package.module:function" or "path/to/file.py:function".
    """

    name: str
    function: str

    def __call__(self, subject: Subject) -> dict[str, Outcome]:
        """Measure; the function's own exceptions come through as ValueError with its name."""
        function = load_function(self.name, self.function)
        try:
            answer = function(subject.model, subject.tokenizer)
        except Exception as error:
            raise ValueError(
                f"evaluator {self.name}: {self.function} raised {type(error).__name__}: {error}"
            ) from error
        return read_answer(self.name, answer)


def load_function(name: str, function: str) -> Callable[[Any, Any], Any]:
    """The function that a configuration names; its module or file is run.

    Args:
        name: The evaluator's.
        function: "package.module:function" or "path/to/file.py:function".

    Returns:
        The function.

    Raises:
        ValueError: There is no such file, module or function, or importing it fails.
    """
    place, _, attribute = function.rpartition(":")
    try:
        module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, attribute)
    except Exception as error:
        raise ValueError(f"evaluator {name}: {function} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"evaluator {name}: {function} is no function, but {type(found).__name__}")
    return found


def source_of(function: str) -> Path | None:
    """The file a function is in, without running it; None where that cannot be told."""
    place = function.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _from_file(path: str) -> Any:
    """The module of a file, run anew."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(f"sst_merge_evaluator_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Command:
    """A command, run for every merged model, that prints one JSON value on its last line.

    Attributes:
        name: Of what is measured; of a JSON object, `name.key`.
        command: Words as a shell would split them, run without a shell; {model} becomes the folder of the merged
            adapter, {base} the base model.
        timeout: Seconds a run may take.
        merge_into_base: {model} is a full checkpoint instead.
        folder: Where it is run; the configuration's folder unless given, relative to that.
    """

    name: str
    command: str
    timeout: float = 3600.0
    merge_into_base: bool = False
    folder: str = "."

    def __call__(self, subject: Subject) -> dict[str, Outcome]:
        """Measure; the model lies in a temporary folder that is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="sst-merge-") as folder:
            subject.write(Path(folder), merge_into_base=self.merge_into_base)
            subject.tokenizer.save_pretrained(folder)
            places = {"{model}": folder, "{base}": subject.problem.config.base_model}
            words = [_filled(word, places) for word in shlex.split(self.command)]
            return read_answer(self.name, self._run(words))

    def _run(self, words: list[str]) -> Any:
        """The JSON value of the command's last line."""
        try:
            done = subprocess.run(
                words, cwd=self.folder, capture_output=True, text=True, timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise self._failed(f"took longer than timeout={self.timeout:g} s", error.stdout, error.stderr) from None
        except OSError as error:
            raise ValueError(f"evaluator {self.name}: {words[0]!r} cannot be run: {error}") from None
        if done.returncode != 0:
            raise self._failed(f"ended with exit code {done.returncode}", done.stdout, done.stderr)
        lines = done.stdout.strip().splitlines()
        try:
            return json.loads(lines[-1] if lines else "")
        except json.JSONDecodeError:
            raise self._failed("printed no JSON on its last line", done.stdout, done.stderr) from None

    def _failed(self, what: str, *outputs: str | bytes | None) -> ValueError:
        """The error, with the last lines of both outputs."""
        texts = [o.decode(errors="replace") if isinstance(o, bytes) else o or "" for o in outputs]
        last = [line for text in texts for line in text.strip().splitlines()[-LAST_LINES:]]
        said = "\n  ".join(last) if last else "(nothing)"
        return ValueError(f"evaluator {self.name}: the command {what}: {self.command}\nIts last lines:\n  {said}")


def _filled(word: str, places: dict[str, str]) -> str:
    """A word of the command with its places filled in."""
    for place, value in places.items():
        word = word.replace(place, value)
    return word
