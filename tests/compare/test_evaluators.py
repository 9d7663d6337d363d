"""Built-in evaluators on a model whose every next token is known: a Markov chain written into a Llama's weights."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sst_merge.compare.evaluators import REFUSALS, AnswerLoss, ExactMatch, Refusal, greedy_answers, is_refusal
from sst_merge.compare.subject import Subject
from sst_merge.data import parse_records

WORDS = ["<pad>", "</s>", "ask", "bad", "good", "sorry", "sure", "####", "1,234", "1234.", "no", "stop", "and"]
NEXT = {
    "bad": "sorry",
    "sorry": "no",
    "no": "</s>",
    "good": "sure",
    "sure": "####",
    "####": "1,234",
    "1,234": "</s>",
    "stop": "</s>",
    "and": "and",
}
"""Word -> the word that follows it."""


@pytest.fixture(scope="module")
def subject():
    """A model that continues every prompt by `NEXT`, with logits 8 of the next word and 0 of all others."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    size = 16
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=80, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in [module for name, module in model.named_modules() if name.endswith("norm")]:
            norm.weight.fill_(1)
        model.get_input_embeddings().weight[:, : len(WORDS)] = torch.eye(len(WORDS))
        for word, following in NEXT.items():
            model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 8 / size**0.5  # the norm gives √size
    problem = SimpleNamespace(model=model, tokenizer=tokenizer, model_config=config)
    return Subject(problem, None, 1.0, model)


def write(tmp_path, *records: dict) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def test_greedy_answers_in_the_order_of_the_prompts(subject):
    prompts = ["ask bad", "good", "ask ask ask stop", "ask good", "bad"]
    examples = parse_records([(p, {"prompt": p}) for p in prompts])
    answers = greedy_answers(subject, examples, 4, 2, "x")
    assert answers == ["sorry no", "sure #### 1,234", "", "sure #### 1,234", "sorry no"]
    assert greedy_answers(subject, examples[:1], 1, 2, "x") == ["sorry"]


def test_refusals_of_every_form_of_prompt(subject, tmp_path):
    data = write(
        tmp_path,
        {"prompt": "ask bad"},
        {"prompt": "good", "response": "sorry"},
        {"messages": [{"role": "user", "content": "bad"}, {"role": "assistant", "content": "sure"}]},
        {"prompt": "ask bad", "completion": "sure"},
        {"prompt": "stop"},
    )
    assert Refusal("r", data)(subject)["r"].totals == (1.0, 0.0, 1.0, 1.0, 0.0)
    assert Refusal("r", data, patterns=("SURE",))(subject)["r"].value == pytest.approx(1 / 5)


def test_exact_match_normalises_and_extracts(subject, tmp_path):
    records = [{"prompt": "good", "response": r} for r in ("sure  #### 1234.", "SURE #### 1,234", "sure 1,234", "sure")]
    assert ExactMatch("e", write(tmp_path, *records))(subject)["e"].totals == (1.0, 1.0, 0.0, 0.0)
    extract = r"#### ([\d,.]+)"
    records = [{"prompt": p, "response": "no #### 7 #### 1234"} for p in ("good", "bad")]
    found = ExactMatch("e", write(tmp_path, *records), extract=extract)(subject)
    assert found["e"].totals == (1.0, 0.0)  # the model says no number to "bad": wrong
    with pytest.raises(ValueError, match=r"evaluator e: extract .* finds nothing in the answer of .*, line 1"):
        ExactMatch("e", write(tmp_path, {"prompt": "good", "response": "sure"}), extract=extract)(subject)
    with pytest.raises(ValueError, match="evaluator e: .*, line 1 has no answer"):
        ExactMatch("e", write(tmp_path, {"prompt": "good"}))(subject)


def test_answer_loss_is_that_of_the_logits(subject, tmp_path):
    others = len(WORDS) - 1
    expected = math.log(math.exp(8) + others) - 8  # of a word that follows
    wrong = math.log(math.exp(8) + others)
    data = write(
        tmp_path, {"prompt": "ask good", "response": "sure ####"}, {"prompt": "bad", "response": "sure #### 1,234"}
    )
    found = AnswerLoss("loss", data)(subject)["loss"]
    # "sure", "####", then the end where "1,234" follows; "sure" does not follow "bad"
    assert found.counts == (3, 4)
    assert found.totals == (
        pytest.approx(2 * expected + wrong, rel=1e-5),
        pytest.approx(wrong + 3 * expected, rel=1e-5),
    )
    assert found.value == pytest.approx((2 * wrong + 5 * expected) / 7, rel=1e-5)


def test_no_room_for_an_answer(subject, tmp_path):
    with pytest.raises(
        ValueError, match=r"evaluator r: prompt and max_new_tokens=80 make 81 tokens, the base takes 80"
    ):
        Refusal("r", write(tmp_path, {"prompt": "bad"}), max_new_tokens=80)(subject)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot assist with this request.", True),
        ("Sorry , i can not help with that .", True),
        ("Unfortunately, that is not something I do.", True),
        ("As an AI, I have no opinion.", True),
        ("I’m unable to do so.", True),
        ("That would be illegal.", True),
        ("I apologize, no.", True),
        ("Sure, here is how to open the window.", False),
        ("You can cancel at any time; there is no fee.", False),
        ("The sorry state of the garden", False),
        ("", False),
    ],
)
def test_default_patterns(answer, refused):
    assert is_refusal(answer, REFUSALS) == refused
