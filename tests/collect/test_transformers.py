"""Factors from real runs of the Hugging Face Trainer against float64 sums over one unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, Trainer, TrainingArguments

from sst_kernels.accumulate import AccumulatorOptions, FactorAccumulator
from sst_kernels.factors import Factors
from sst_kernels.integrations.transformers import FactorCallback
from sst_kernels.labels import counter_uniform, sample_labels

pytestmark = [
    pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

VOCAB, CLASSES = 23, 3
LAYERS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
]


def llama(kind: type = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, pad_token_id=0, num_labels=CLASSES)
    return kind(config).double()


def examples(lengths: tuple[int, ...] = (6, 4, 7, 3, 5), classify: bool = False) -> list[dict]:
    """Prompts of two tokens without loss, then answers."""
    generator = torch.Generator().manual_seed(1)
    data = []
    for i, length in enumerate(lengths):
        ids = torch.randint(1, VOCAB, (length,), generator=generator)
        labels = ids.clone()
        labels[:2] = -100
        data.append({"input_ids": ids, "labels": torch.tensor(i % CLASSES) if classify else labels})
    return data


def collate(batch: list[dict]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    ids = [example["input_ids"] for example in batch]
    labels = [example["labels"] for example in batch]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": torch.stack(labels) if labels[0].dim() == 0 else pad(labels, True, padding_value=-100),
    }


def trainer(model: nn.Module, acc: FactorAccumulator | None, out: Path, **changes: object) -> Trainer:
    data = changes.pop("data", None) or examples()
    own = {key: changes.pop(key) for key in ("compute_loss_func",) if key in changes}
    arguments = {
        "output_dir": str(out),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.0,  # so that all steps have the same weights
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "remove_unused_columns": False,
    }
    return Trainer(
        model,
        TrainingArguments(**{**arguments, **changes}),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[] if acc is None else [FactorCallback(acc)],
        **own,
    )


def factors_of(model: nn.Module, out: Path, layers: list[str] = LAYERS, **changes: object) -> Factors:
    fisher = changes.pop("fisher", "empirical")
    with FactorAccumulator(model, layers, fisher=fisher) as acc:
        trainer(model, acc, out, **changes).train()
    return acc.factors


def dense_sums(
    model: nn.Module, layers: list[str], data: list[dict], labels_of: Callable[[int, Tensor, Tensor], Tensor]
) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Layer -> (Σ x xᵀ, Σ δ δᵀ, tokens) of the summed cross-entropy at `labels_of(sequence, labels, logits)`."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            calls[name] = args[0].detach(), output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    for i, example in enumerate(data):
        logits = model(input_ids=example["input_ids"].unsqueeze(0), use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(logits.double(), labels_of(i, example["labels"], logits.detach()), reduction="sum")
        deltas = torch.autograd.grad(loss, [calls[name][1] for name in layers])
        for name, delta in zip(layers, deltas, strict=True):
            x = calls[name][0]
            x = F.one_hot(x, VOCAB).double() if "embed" in name else x
            rows[name].append((x.flatten(0, -2).double(), delta.flatten(0, -2).double()))
    for handle in handles:
        handle.remove()
    sums = {}
    for name, parts in rows.items():
        x, delta = (torch.cat(side) for side in zip(*parts, strict=True))
        sums[name] = x.T @ x, delta.T @ delta, len(x)
    return sums


def shifted(i: int, labels: Tensor, logits: Tensor) -> Tensor:
    """The next token's label; a class as it is."""
    return labels.reshape(1) if labels.dim() == 0 else F.pad(labels[1:], (0, 1), value=-100)


def sampled(i: int, labels: Tensor, logits: Tensor) -> Tensor:
    """ŷ of sequence i, where its labels bear loss."""
    position = torch.arange(len(logits))
    drawn = sample_labels(logits, counter_uniform(0, torch.full_like(position, i), position))
    return drawn.where(shifted(i, labels, logits) != -100, -100)


def assert_sums(factors: Factors, expected: dict[str, tuple[Tensor, Tensor, int]], rtol: float = 1e-5) -> None:
    """The models of transformers compute their loss in float32, hence the tolerance."""
    assert factors.layers.keys() == expected.keys()
    for name, (a, g, tokens) in expected.items():
        assert (float(factors.input_of(name)[1]), float(factors.layers[name].counts[1])) == (tokens, tokens), name
        a_mean, g_mean = factors.mean(name)
        a_mean = a_mean.diag() if a_mean.dim() == 1 else a_mean
        for actual, wanted in ((a_mean * tokens, a), (g_mean * tokens, g)):
            torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},  # the last window holds one batch
        {"gradient_accumulation_steps": 3, "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["plain", "accumulation", "checkpointing", "reentrant", "evaluation", "compile"],
)
def test_empirical_factors_equal_dense_sums(tmp_path, changes):
    torch._dynamo.reset()
    model = llama()
    expected = dense_sums(model, LAYERS, examples(), shifted)
    assert_sums(factors_of(model, tmp_path, **changes), expected)


@pytest.mark.parametrize("windows", [1, 2])
def test_a_model_that_takes_its_own_mean(tmp_path, windows):
    """Without `num_items_in_batch` the loss is the mean over each batch, divided by the length of the window."""
    model = llama()
    model.accepts_loss_kwargs = False
    expected = dense_sums(model, LAYERS, examples(), shifted)
    assert_sums(factors_of(model, tmp_path, gradient_accumulation_steps=windows), expected)


def test_autocast(tmp_path):
    model = llama().float()
    layers = LAYERS[1:]
    with torch.autocast("cpu", torch.bfloat16):
        expected = dense_sums(model, layers, examples(), shifted)
    assert_sums(factors_of(model, tmp_path, layers, bf16=True), expected, rtol=2**-6)  # x is bfloat16 in one, not both


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_adapters_on_a_frozen_base(tmp_path, fisher):
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(llama(), config)
    layers = [f"base_model.model.{name}" for name in LAYERS if "q_proj" in name or "up_proj" in name]
    labels_of = shifted if fisher == "empirical" else sampled
    expected = dense_sums(model, layers, examples(), labels_of)
    assert_sums(factors_of(model, tmp_path, layers, fisher=fisher), expected)


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_classification_of_sequences(tmp_path, fisher):
    model, data = llama(LlamaForSequenceClassification), examples(classify=True)
    layers = [*LAYERS[:-1], "score"]

    def drawn(i: int, labels: Tensor, logits: Tensor) -> Tensor:
        return sample_labels(logits, counter_uniform(0, torch.tensor([i]), torch.tensor([0])))

    expected = dense_sums(model, layers, data, shifted if fisher == "empirical" else drawn)
    assert_sums(factors_of(model, tmp_path, layers, fisher=fisher, data=data), expected)


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_true_factors_equal_dense_sums_of_sampled_labels(tmp_path, changes):
    model = llama()
    expected = dense_sums(model, LAYERS, examples(), sampled)
    assert_sums(factors_of(model, tmp_path, fisher="true", **changes), expected)


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_training_itself_is_not_changed(tmp_path, fisher):
    plain, watched = llama(), llama()
    run = {"learning_rate": 0.5, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    trainer(plain, None, tmp_path / "a", **run).train()
    factors_of(watched, tmp_path / "b", fisher=fisher, **run)
    assert not torch.equal(plain.lm_head.weight, llama().lm_head.weight)
    for mine, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("fisher", ["empirical", "true"])
@pytest.mark.parametrize("same_accumulator", [False, True])
def test_a_resumed_run_ends_bit_identical(tmp_path, fisher, same_accumulator):
    run = {"learning_rate": 0.5, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}
    options = AccumulatorOptions(decay=0.9, every=2)
    model = llama()
    with FactorAccumulator(model, LAYERS, fisher=fisher, options=options) as acc:
        trainer(model, acc, tmp_path, **run).train()
    whole, at_end = acc.factors, Factors.load(tmp_path / "checkpoint-6" / "factors.safetensors")
    if not same_accumulator:  # as in a new process
        model = llama()
        acc = FactorAccumulator(model, LAYERS, fisher=fisher, options=options)
    with acc:
        trainer(model, acc, tmp_path, **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert acc.factors is not whole
    for factors in (acc.factors, at_end):
        assert factors.without_sums() == whole.without_sums()
        for name, layer in whole.layers.items():
            for part, tensor in layer.tensors().items():
                assert torch.equal(factors.layers[name].tensors()[part], tensor), (name, part)


def test_a_missing_file_of_factors_is_warned_of(tmp_path):
    run = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2}
    model = llama()
    trainer(model, None, tmp_path, **run).train()
    with (
        FactorAccumulator(model, LAYERS, fisher="empirical") as acc,
        pytest.warns(UserWarning, match="there is no .*checkpoint-2/factors.safetensors"),
    ):
        trainer(model, acc, tmp_path, **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert acc.factors.backwards == 1


class WithPenalty(LlamaForCausalLM):
    def forward(self, **kwargs: object) -> object:
        output = super().forward(**kwargs)
        output["loss"] = output["loss"] + self.lm_head.weight.square().sum()
        return output


class WithoutLogits(LlamaForCausalLM):
    def forward(self, **kwargs: object) -> object:
        output = super().forward(**kwargs)
        output["logits"] = None
        return output


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (LlamaForCausalLM, {"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0"),
        (LlamaForCausalLM, {"compute_loss_func": lambda output, labels, **_: output.logits.sum()}, "no loss"),
        (WithPenalty, {}, "the model's loss has other terms"),
        (WithoutLogits, {}, "must return a ModelOutput with `logits`"),
    ],
)
def test_what_is_not_covered_is_refused(tmp_path, kind, changes, message):
    with pytest.raises(ValueError, match=message):
        factors_of(llama(kind), tmp_path, **changes)


def test_labels_that_are_no_classes_are_refused(tmp_path):
    data = [{**example, "labels": torch.rand(CLASSES)} for example in examples((4, 4))]
    model = llama(LlamaForSequenceClassification)
    model.config.problem_type = "multi_label_classification"
    with (
        pytest.raises(ValueError, match="one class for each row of the logits"),
        FactorAccumulator(model, ["score"], fisher="true") as acc,
    ):
        run = trainer(model, acc, tmp_path, data=data)
        run.data_collator = lambda batch: {key: torch.stack([e[key] for e in batch]) for key in batch[0]}
        run.train()


def test_packed_sequences_are_refused_by_reduce(tmp_path):
    model = llama()
    with (
        pytest.raises(ValueError, match="packs several"),
        FactorAccumulator(model, ["lm_head"], approximation="reduce") as acc,
    ):
        run = trainer(model, acc, tmp_path)
        run.data_collator = lambda batch: {
            "input_ids": torch.cat([e["input_ids"] for e in batch]).unsqueeze(0),
            "labels": torch.cat([e["labels"] for e in batch]).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(len(e["labels"])) for e in batch]).unsqueeze(0),
        }
        run.train()


def test_the_accumulator_must_be_entered_and_of_the_trained_model(tmp_path):
    model = llama()
    acc = FactorAccumulator(model, LAYERS, fisher="empirical")
    with pytest.raises(ValueError, match="not entered"):
        trainer(model, acc, tmp_path).train()
    with acc, pytest.raises(ValueError, match="not the Trainer's"):
        trainer(llama(), acc, tmp_path).train()
