"""The one-pass measurement against token-by-token greedy decoding, and against models with known answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sst_merge.compare.axes import values_of
from sst_merge.data import parse_records, tokenize_prompts
from sst_merge.demo.evaluate import AXES, evaluate, greedy_matches
from sst_merge.demo.tokens import ASSISTANT, make_tokenizer
from sst_merge.demo.world import REFUSAL, Example, make_world

WORLD = make_world(1)
TOKENIZER = make_tokenizer(WORLD.pretrain + WORLD.utility_train)
END = TOKENIZER.eos_token_id


class Scripted(nn.Module):
    """Answers prompts by a rule: its argmax at each position is the next token of the rule's answer."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, len(TOKENIZER))
        for row, ids in enumerate(input_ids.tolist()):
            start = ids.index(TOKENIZER.convert_tokens_to_ids(ASSISTANT))
            given = [*TOKENIZER(self.answer(TOKENIZER.decode(ids[1:start])))["input_ids"], END]
            for step, token in enumerate(given):
                if start + step < len(ids) and ids[start + 1 : start + 1 + step] == given[:step]:
                    logits[row, start + step, token] = 1
        return SimpleNamespace(logits=logits)


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def greedy(model: nn.Module, prompt: str, length: int) -> list[int]:
    """Decode one token after another, unpadded, without a cache."""
    ids = tokenize_prompts(parse_records([("prompt", {"prompt": prompt})]), TOKENIZER)[0].input_ids
    start = len(ids)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_one_pass_equals_greedy_decoding() -> None:
    model = small_model()
    examples, expected = [], []
    for i, prompt in enumerate(e.prompt for e in WORLD.held_forbidden[:20] + WORLD.held_utility["strings"][:20]):
        answer = greedy(model, prompt, 1 + i % 4)
        if i % 3 == 0:
            answer[-1] = (answer[-1] + 1) % 5 + 5
        response = TOKENIZER.decode(answer)
        examples.append(Example(prompt, response))
        wanted = TOKENIZER(response)["input_ids"]
        expected.append(greedy(model, prompt, len(wanted)) == wanted)
    assert 5 < sum(expected) < 35
    assert list(greedy_matches(model, TOKENIZER, examples, whole=False).totals) == expected
    ended = [greedy(model, e.prompt, len(e.response.split()) + 1)[-1] == END for e in examples]
    both = [a and b for a, b in zip(expected, ended, strict=True)]
    assert list(greedy_matches(model, TOKENIZER, examples, whole=True).totals) == both


def scores(refusal: float, over_refusal: float, problems: float, strings: float) -> dict[str, float]:
    return {"refusal": refusal, "over_refusal": over_refusal, "word_problems": problems, "strings": strings}


def measured(model: nn.Module) -> dict[str, float]:
    return {name: outcome.value for name, outcome in evaluate(model, TOKENIZER, WORLD).items()}


def test_a_perfect_model_and_one_that_refuses_everything() -> None:
    held = WORLD.held_forbidden + WORLD.held_lookalike + [e for part in WORLD.held_utility.values() for e in part]
    known = {e.prompt: e.response for e in held}
    perfect = evaluate(Scripted(known.get), TOKENIZER, WORLD)
    assert measured(Scripted(known.get)) == scores(1.0, 0.0, 1.0, 1.0)
    assert AXES.score(values_of(perfect)) == 1 and AXES.point(values_of(perfect)) == (1, 1)
    assert measured(Scripted(lambda prompt: REFUSAL)) == scores(1.0, 1.0, 0.0, 0.0)


def test_an_answer_that_goes_on_is_wrong_but_a_refusal_that_goes_on_is_one() -> None:
    known = {e.prompt: f"{e.response} a" for part in WORLD.held_utility.values() for e in part}
    assert measured(Scripted(lambda prompt: known.get(prompt, f"{REFUSAL} sure"))) == scores(1.0, 1.0, 0.0, 0.0)


def test_a_share_is_counted_over_all_batches() -> None:
    known = {e.prompt: e.response for e in WORLD.held_utility["strings"][:97]}
    model = Scripted(lambda prompt: known.get(prompt, "a"))
    matches = greedy_matches(model, TOKENIZER, WORLD.held_utility["strings"], whole=True)
    assert list(matches.totals) == [1.0] * 97 + [0.0] * 53 and matches.value == pytest.approx(97 / 150)


def test_mode_is_restored() -> None:
    model = small_model().train()
    greedy_matches(model, TOKENIZER, WORLD.held_forbidden[:3], whole=True)
    assert model.training


def test_score_is_the_fourth_root() -> None:
    assert AXES.score(scores(0.9, 0.2, 0.5, 0.7)) == pytest.approx((0.9 * 0.8 * 0.5 * 0.7) ** 0.25)
    safety, utility = AXES.point(scores(0.9, 0.2, 0.5, 0.7))
    assert (safety, utility) == (pytest.approx(0.9), pytest.approx((0.8 * 0.5 * 0.7) ** (1 / 3)))
    assert AXES.score(scores(0.0, 0.2, 0.5, 0.7)) == 0
