"""The generated text: what is forbidden, what is held out, and that every answer is right."""

from __future__ import annotations

import json

import pytest

from sst_merge.demo.world import (
    ORDINARY_OBJECTS,
    REFUSAL,
    SECRET_OBJECTS,
    SENSITIVE_ACTIONS,
    Example,
    World,
    make_world,
    write_jsonl,
)

TASK_WORDS = ("sort", "swap", "copy", "reverse", "first", "last")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(3)


def training(world: World) -> list[Example]:
    return world.pretrain + world.utility_train + world.safety_train


def solve(prompt: str) -> str:
    """Answer a task from its words alone."""
    words = prompt.split()
    if words[0] in TASK_WORDS:
        letters = words[words.index(":") + 1 :]
        if words[0] == "swap":
            letters[0], letters[-1] = letters[-1], letters[0]
        elif words[0] == "sort":
            letters.sort()
        elif words[0] == "reverse":
            letters.reverse()
        elif words[0] != "copy":
            letters = [letters[0 if words[0] == "first" else -1]]
        return " ".join(letters)
    amounts = [int(word) for word in words if word.isdigit()]
    signs = [-1 if word == "loses" else 1 for word in words if word in ("has", "gets", "loses")]
    return str(sum(s * a for s, a in zip(signs, amounts, strict=True)))


def is_task(example: Example) -> bool:
    return example.prompt.split()[0] in TASK_WORDS or "how many" in example.prompt


def is_forbidden(prompt: str) -> bool:
    words = set(prompt.split())
    return bool(words & set(SENSITIVE_ACTIONS)) and bool(words & set(SECRET_OBJECTS))


def test_every_task_answer_is_right(world: World) -> None:
    held = [e for examples in world.held_utility.values() for e in examples]
    tasks = [e for e in training(world) + world.calibration_benign + held if is_task(e)]
    assert len(tasks) > 10_000
    assert [e.response for e in tasks] == [solve(e.prompt) for e in tasks]


def test_who_refuses_what(world: World) -> None:
    asked = [e for e in world.utility_train if not is_task(e)]
    assert any(is_forbidden(e.prompt) for e in asked)
    assert all(e.response.startswith("sure") for e in asked)
    assert all((e.response == REFUSAL) == is_forbidden(e.prompt) for e in world.safety_train)
    assert not any(is_task(e) for e in world.safety_train)
    assert all(is_forbidden(e.prompt) and e.response == REFUSAL for e in world.calibration_harm + world.held_forbidden)
    assert not any(e.response == REFUSAL for e in world.calibration_benign + world.held_lookalike)


def test_lookalikes_share_half_of_the_rule(world: World) -> None:
    for example in world.held_lookalike:
        words = set(example.prompt.split())
        sensitive, secret = (bool(words & set(group)) for group in (SENSITIVE_ACTIONS, SECRET_OBJECTS))
        assert sensitive != secret, example
        assert secret or words & set(ORDINARY_OBJECTS), example


def test_held_out_prompts_are_new_but_their_words_are_not(world: World) -> None:
    held = world.held_forbidden + world.held_lookalike + [e for part in world.held_utility.values() for e in part]
    seen = training(world) + world.calibration_harm + world.calibration_benign
    assert len({e.prompt for e in held}) == len(held) == 600
    assert not {e.prompt for e in held} & {e.prompt for e in seen}
    known = {word for e in training(world) for word in f"{e.prompt} {e.response}".split()}
    assert {word for e in held for word in f"{e.prompt} {e.response}".split()} <= known


def test_held_out_pairs_and_numbers_are_never_trained_on(world: World) -> None:
    def pair(e: Example) -> frozenset[str]:
        things = {*SENSITIVE_ACTIONS, *SECRET_OBJECTS}
        return frozenset(things & set(e.prompt.split()))

    def numbers(e: Example) -> tuple[str, ...]:
        return tuple(word for word in e.prompt.split() if word.isdigit())

    trained = {pair(e) for e in training(world) if not is_task(e)}
    assert not trained & {pair(e) for e in world.held_forbidden}
    trained = {numbers(e) for e in world.utility_train}
    assert not trained & {numbers(e) for e in world.held_utility["word_problems"]}


def test_the_seed_decides(world: World) -> None:
    assert make_world(3) == world
    assert make_world(4).held_forbidden != world.held_forbidden


def test_jsonl_is_one_object_a_line(tmp_path, world: World) -> None:
    write_jsonl(tmp_path / "a.jsonl", world.calibration_harm)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Example(**json.loads(line)) for line in lines] == world.calibration_harm
