"""Generated answers, tokenizers that differ, examples left out or repeated: through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from sst_merge.cli import main
from sst_merge.data import TokenSequence
from sst_merge.generate import generate_answers

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15], [16, 17, 18], [19, 20]]


def write_jsonl(path: Path, records: list) -> None:
    path.write_text("\n".join(json.dumps(record) for record in records))


def merge(setup, out: Path, **calibration) -> int:
    """Exit code of `sst-merge merge` with changes of the calibration section."""
    config = setup.config("sst", samples=2, k=0.5)
    config["calibration"] |= calibration
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return main(["merge", str(path), "--out", str(out)])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def greedy(model, ids: list[int], steps: int, stop=()) -> list[int]:
    """The argmax, token by token, one prompt at a time, without cache or mask."""
    tokens = []
    with torch.no_grad():
        for _ in range(steps):
            tokens.append(int(model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].argmax()))
            if tokens[-1] in stop:
                break
    return tokens


def words(ids: list[int]) -> str:
    """Text of token ids ≥ 3."""
    return " ".join(f"w{i - 3}" for i in ids)


def test_prompts_are_answered_by_the_safety_and_the_utility_model(setup, tmp_path, load_base):
    given = {"prompt": "w1 w2", "response": "w3 w4"}
    forms = [{"prompt": words(ids)} for ids in PROMPTS[:3]]
    forms += [{"messages": [{"role": "user", "content": words(ids)}]} for ids in PROMPTS[3:]]
    write_jsonl(setup.harm, [*forms[:2], given, *forms[2:]])
    write_jsonl(setup.benign, forms)
    assert merge(setup, tmp_path / "out", max_new_tokens=7, batch_size=4) == 0
    for kind, adapter in (("harm", setup.safety), ("benign", setup.utility)):
        model = PeftModel.from_pretrained(load_base(setup.base), adapter).eval()
        records = [json.loads(x) for x in (tmp_path / "out" / f"generated-{kind}.jsonl").read_text().splitlines()]
        for ids, record in zip(PROMPTS, records, strict=True):
            answer = greedy(model, ids, 7, stop=[2])
            assert record["input_ids"] == ids + answer
            assert record["labels"] == [-100] * len(ids) + answer
        remarks = [r for r in report(tmp_path / "out")["remarks"] if f"calibration.{kind}: 6 answers generated" in r]
        assert len(remarks) == 1 and ("safety" if kind == "harm" else "utility") in remarks[0]
        assert records[0]["answer"][:20] in remarks[0]
    counts = report(tmp_path / "out")["sequences"]["harm"]
    assert counts["found"] + counts["held_out"] == 7


def test_generated_answers_are_calibration_files_that_give_the_same_merge(setup, tmp_path):
    write_jsonl(setup.harm, [{"prompt": words(ids)} for ids in PROMPTS])
    assert merge(setup, tmp_path / "first", max_new_tokens=5) == 0
    setup.harm = tmp_path / "first" / "generated-harm.jsonl"
    assert merge(setup, tmp_path / "second") == 0
    assert report(tmp_path / "first")["directions"] == report(tmp_path / "second")["directions"]
    assert not (tmp_path / "second" / "generated-harm.jsonl").exists()


def test_every_form_of_a_record_says_the_same(setup, tmp_path):
    """Completion, text and chat, beside their token ids written by hand, the last two packed in one record."""
    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6 w7"}]
    write_jsonl(setup.harm, [{"prompt": "w1 w2", "completion": " w3"}, {"text": "w4 w5 w6"}, {"messages": chat}])
    assert merge(setup, tmp_path / "text") == 0
    ids = [1, 7, 8, 9, 2, 8, 9, 10, 2]
    packed = {"input_ids": ids, "labels": [-100, 7, 8, 9, 2, -100, 9, 10, 2], "seq_lens": [5, 4]}
    write_jsonl(setup.harm, [{"input_ids": [1, 4, 5, 6, 2], "labels": [-100, -100, -100, 6, 2]}, packed])
    assert merge(setup, tmp_path / "ids") == 0
    assert report(tmp_path / "text")["directions"] == report(tmp_path / "ids")["directions"]


def make_gpt2() -> torch.nn.Module:
    """Absolute positions: left padding shows unless it is allowed for."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    return model


def test_answers_depend_neither_on_the_batch_nor_on_the_models_own_generation_settings():
    model = make_gpt2()
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.min_new_tokens = 5.0, True, 3.0, 6
    prompts = [TokenSequence(i, ids, [False] * len(ids)) for i, ids in enumerate(PROMPTS)]
    plain = [greedy(model, ids, 8) for ids in PROMPTS]
    unstopped = generate_answers(model, prompts, (), 8, 4)
    assert [s.input_ids for s in unstopped] == [ids + answer for ids, answer in zip(PROMPTS, plain, strict=True)]
    stop = {plain[0][3], plain[2][1]}
    expected = [greedy(model, ids, 8, stop) for ids in PROMPTS]
    for batch_size in (1, 4, 6):
        answers = {s.index: s for s in generate_answers(model, prompts, stop, 8, batch_size)}
        for i, (ids, answer) in enumerate(zip(PROMPTS, expected, strict=True)):
            if answer[0] in stop:
                assert i not in answers
                continue
            assert answers[i].input_ids == ids + answer
            assert answers[i].is_target == [False] * len(ids) + [True] * len(answer)
    assert model.generation_config is own and own.repetition_penalty == 5.0
    assert {len(answer) for answer in expected} & {1, 2, 3, 4}, "no answer was stopped: the test shows nothing"


def test_prompts_without_an_answer_or_room_are_left_out_with_a_remark(setup, tmp_path, load_base):
    model = PeftModel.from_pretrained(load_base(setup.base), setup.safety).eval()
    first = {words(ids): greedy(model, ids, 1)[0] for ids in PROMPTS}
    ending = first[words(PROMPTS[0])]
    base = tmp_path / "base"
    shutil.copytree(setup.base, base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, ending]}))
    setup.base = base
    write_jsonl(setup.harm, [{"prompt": words(ids)} for ids in PROMPTS] + [{"prompt": "w1 " * 29}])
    assert merge(setup, tmp_path / "out", max_new_tokens=4) == 0
    empty = sum(token == ending for token in first.values())
    remarks = "\n".join(report(tmp_path / "out")["remarks"])
    assert f"calibration.harm: {empty} prompts left out, the answer is empty" in remarks
    assert "calibration.harm: 1 prompts left out, no room for max_new_tokens" in remarks
    assert f"calibration.harm: {len(PROMPTS) - empty} answers generated" in remarks


def test_repeated_and_blank_examples_are_remarked_on(setup, tmp_path):
    lines = [json.loads(line) for line in setup.harm.read_text().splitlines()]
    blank = [{"prompt": "w1", "completion": " \n"}, {"text": ""}]
    write_jsonl(setup.harm, lines + lines[:3] + blank)
    assert merge(setup, tmp_path / "out") == 0
    remarks = "\n".join(report(tmp_path / "out")["remarks"])
    assert "calibration.harm: 3 of 15 sequences repeat another" in remarks
    assert "calibration.harm: 2 of 17 examples left out, no loss-bearing token" in remarks
    assert "calibration.benign" not in remarks


def save_tokenizer(setup, folder: Path, ids: dict[str, int] | None = None, template: str | None = None) -> None:
    """A tokenizer as the base's, with other ids or another chat template, into an adapter's folder."""
    tokenizer = AutoTokenizer.from_pretrained(setup.base)
    if ids is not None:
        core = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        chat_template = tokenizer.chat_template
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
        tokenizer.chat_template = chat_template
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


VOCABULARY = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(47))])}


def test_the_same_tokenizer_in_an_adapters_folder_is_no_matter(setup, tmp_path):
    save_tokenizer(setup, setup.utility)
    assert merge(setup, tmp_path / "out") == 0
    assert "tokenizer" not in "\n".join(report(tmp_path / "out")["remarks"])


@pytest.mark.parametrize("role", ["utility", "safety"])
def test_tokens_with_other_ids_are_refused(setup, tmp_path, capsys, role):
    save_tokenizer(setup, getattr(setup, role), VOCABULARY | {"w7": 20, "w17": 10})
    assert merge(setup, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"tokenizers of base and {role} give tokens different ids" in error
    assert "'w7' = 10, 'w17' = 20" in error and "'w17' = 10, 'w7' = 20" in error


@pytest.mark.parametrize(
    "changed", [{"other": 49}, {"w46": 50}], ids=["an id that stands for two tokens", "a token that moved"]
)
def test_one_token_is_enough(setup, tmp_path, capsys, changed):
    save_tokenizer(setup, setup.safety, {word: i for word, i in VOCABULARY.items() if i < 49} | changed)
    assert merge(setup, tmp_path / "out") == 2
    ((word, token),) = changed.items()
    assert "'w46' = 49" in (error := capsys.readouterr().err) and f"{word!r} = {token}" in error


def test_added_tokens_and_another_template_are_remarked_on(setup, tmp_path):
    reversed_template = (
        "{% for m in messages %}<s> {{ m.content }} {% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    )
    save_tokenizer(setup, setup.safety, VOCABULARY | {"<tool>": 50}, reversed_template)
    assert merge(setup, tmp_path / "base") == 0
    remarks = "\n".join(report(tmp_path / "base")["remarks"])
    assert "the base's tokenizer lacks 1 tokens of the other: '<tool>' = 50" in remarks
    assert (
        "differ in chat_template; that of base is used, `calibration: {tokenizer: safety}` takes the other" in remarks
    )
    assert merge(setup, tmp_path / "safety", tokenizer="safety") == 0
    remarks = "\n".join(report(tmp_path / "safety")["remarks"])
    assert "the base's tokenizer lacks 1 tokens of the other: '<tool>' = 50" in remarks
    assert "that of safety is used" in remarks
    traces = [report(tmp_path / name)["fisher_trace"]["harm"] for name in ("base", "safety")]
    assert traces[0] != traces[1]  # other prompts: each turn begins with <s>


def test_a_tokenizer_that_is_not_there_is_named(setup, tmp_path, capsys):
    assert merge(setup, tmp_path / "out", tokenizer="utility") == 2
    assert "error: calibration.tokenizer: 'utility' has none" in capsys.readouterr().err
    assert merge(setup, tmp_path / "out", tokenizer="utilty") == 2
    assert "did you mean 'utility'?" in capsys.readouterr().err


def test_a_damaged_tokenizer_of_an_adapter_is_remarked_on(setup, tmp_path):
    (setup.utility / "tokenizer.json").write_text("{")
    assert merge(setup, tmp_path / "out") == 0
    assert "no tokenizer was read from the utility's" in "\n".join(report(tmp_path / "out")["remarks"])


def test_token_ids_beyond_the_vocabulary_are_refused(setup, tmp_path, capsys):
    write_jsonl(setup.harm, [{"input_ids": [1, 5, 50]}, {"input_ids": [1, 2]}])
    assert merge(setup, tmp_path / "out") == 2
    assert "the data hold token 50, the base's vocabulary has 50" in capsys.readouterr().err


def test_a_vocabulary_resized_in_one_adapter_names_the_remedy(setup, base_dir, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    model.resize_token_embeddings(53)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(setup.safety)  # embeddings and head are saved whole
    assert merge(setup, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "(53, 32), the base model has (50, 32)" in error and "resize the base model's embeddings" in error
