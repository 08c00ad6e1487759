"""Examples of token ids without a tokenizer: the same run as with one, and clear errors where text is needed."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from trainer_runs import config, parameters, steps

from cpo_kernels import CPOTrainer
from cpo_kernels.trainer import evaluate, tokenize_examples
from cpo_kernels.trainer.judges import LikelihoodJudge

pytestmark = pytest.mark.cpu

ALL_KINDS = {"num_mean_field_negatives": 1, "num_autoregressive_negatives": 1, "autoregressive_every": 2}


def examples_of_ids(count: int = 12) -> list[dict[str, list]]:
    """Make examples of token ids; some lack an end, one has no prompt of its own, some bring negatives."""
    tokenizer = tiny_models.tokenizer()
    examples = []
    for number, example in enumerate(tiny_models.examples(count)):
        prompt, completion = (tokenizer(example[name])["input_ids"] for name in ("prompt", "completion"))
        own = {"negatives": [[5, 6, 2]], "ranks": [1]} if number % 3 == 0 else {}
        examples.append({"prompt": prompt, "completion": completion + [2] * (number % 2), **own})
    examples[4]["prompt"] = []
    return examples


def run_of(path, model, tokenizer, examples=None, **options) -> CPOTrainer:
    examples = examples_of_ids() if examples is None else examples
    return CPOTrainer(
        model,
        config(path, **options),
        train_dataset=examples,
        eval_dataset=examples[:6],
        processing_class=tokenizer,
        ref_model=None if options.get("objective") == "scheduled_sampling" else tiny_models.llama(seed=1),
    )


@pytest.mark.parametrize(
    "options",
    [
        ALL_KINDS,
        {"ranking": "similarity", "length_normalized": True},
        {"objective": "scheduled_sampling"},
        {"max_length": 8, "max_prompt_length": 3, "num_batch_negatives": 1, "num_truncation_negatives": 1},
    ],
    ids=["all kinds", "ranked", "scheduled sampling", "cut"],
)
def test_a_run_without_a_tokenizer_is_the_run_with_one(tmp_path, options):
    logs, weights = [], []
    for tokenizer in (tiny_models.tokenizer(), None):
        run = run_of(tmp_path, tiny_models.llama(), tokenizer, **options)
        run.train()
        logs.append([*steps(run), run.evaluate()])
        weights.append(parameters(run))
    for want, got in zip(*logs, strict=True):
        assert want.keys() == got.keys()
        for name in want:
            if not name.endswith(("runtime", "per_second")):
                assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-5), name
    for name, want in weights[0].items():
        torch.testing.assert_close(weights[1][name], want, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_without_a_tokenizer_is_saved_and_resumed(tmp_path):
    options = ALL_KINDS | {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = run_of(tmp_path / "whole", tiny_models.llama(), None, **options)
    whole.train()
    whole.save_model(str(tmp_path / "saved"))
    resumed = run_of(tmp_path / "whole", tiny_models.llama(), None, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, want in parameters(whole).items():
        assert torch.equal(parameters(resumed)[name], want), name
    assert not (tmp_path / "saved" / "tokenizer_config.json").exists()


def test_a_run_with_other_ends_does_not_go_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    run_of(tmp_path, tiny_models.llama(), None, **options).train()
    other = tiny_models.llama()
    other.generation_config.eos_token_id = 3
    with pytest.raises(ValueError, match="eos"):
        run_of(tmp_path, other, None, max_steps=4, **options).train(resume_from_checkpoint=True)


def test_completions_end_with_the_token_that_the_model_names(tmp_path):
    model = tiny_models.gpt2(seed=2)
    model.generation_config.eos_token_id = [7, 9]
    examples = [{"prompt": [3], "completion": [4, 9]}, {"prompt": [3], "completion": [5, 6]}]
    run = CPOTrainer(model, config(tmp_path, num_batch_negatives=1), examples)
    assert run.train_dataset.completions == [[4, 9], [5, 6, 7]]


@pytest.mark.parametrize("eos", [None, 50256, [50256, -1]])
def test_a_model_that_names_no_end_is_refused(tmp_path, eos):
    model = tiny_models.gpt2()
    model.generation_config.eos_token_id = model.config.eos_token_id = eos
    with pytest.raises(ValueError, match=r"no tokenizer.*set model.generation_config.eos_token_id, got"):
        CPOTrainer(model, config(tmp_path), examples_of_ids())


TEXTS = [
    ({"prompt": "the cat", "completion": [3]}, "'prompt' of example 1 holds text, str 'the cat'"),
    ({"prompt": [3], "completion": ""}, "'completion' of example 1 holds text, str ''"),
    ({"prompt": [3], "completion": [4], "negatives": [[5], "ran"]}, "'negatives' of example 1 holds text"),
    ({"prompt": [3], "chosen": [4], "rejected": "ran"}, "'rejected' of example 1 holds text"),
    ({"chosen": "the cat", "rejected": "the dog"}, "'chosen' of example 1 holds text"),
    (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        "'prompt' of example 1 holds text",
    ),
]


@pytest.mark.parametrize(
    ("example", "message"), TEXTS, ids=[message[:13] + str(i) for i, (_, message) in enumerate(TEXTS)]
)
def test_text_without_a_tokenizer_names_example_and_field(tmp_path, example, message):
    with pytest.raises(ValueError, match=message + ".*there is no tokenizer"):
        CPOTrainer(tiny_models.llama(), config(tmp_path), [{"prompt": [3], "completion": [4]}, example])


def test_examples_are_brought_to_one_form_without_a_tokenizer():
    examples, limits = examples_of_ids(), {"max_length": 12, "max_prompt_length": 4}
    with_one = tokenize_examples(examples, tiny_models.tokenizer(), **limits)
    without = tokenize_examples(examples, None, eos_token_id=2, bos_token_id=1, **limits)
    assert without.digest == with_one.digest
    with pytest.raises(ValueError, match="without a tokenizer eos_token_id is needed"):
        tokenize_examples(examples, None, **limits)
    with pytest.raises(ValueError, match="prompt of example 4 has no token of its own and there is no BOS token"):
        tokenize_examples(examples, None, eos_token_id=2, **limits)


def test_a_model_is_evaluated_without_a_tokenizer(tmp_path):
    examples = [{name: example[name] for name in ("prompt", "completion")} for example in examples_of_ids()]
    reports = [
        evaluate(tiny_models.llama(), tokenizer, examples, config=config(tmp_path), directory=tmp_path / str(number))
        for number, tokenizer in enumerate((tiny_models.tokenizer(), None))
    ]
    assert reports[1].generated == reports[0].generated and reports[1].truths == reports[0].truths
    assert reports[1].metrics["perplexity"] == pytest.approx(reports[0].metrics["perplexity"], rel=1e-5)


def test_who_reads_text_says_that_it_needs_a_tokenizer(tmp_path):
    model, examples = tiny_models.llama(), examples_of_ids()
    with pytest.raises(ValueError, match="a judge reads text; pass the tokenizer"):
        evaluate(model, None, examples, config=config(tmp_path), judge=lambda *_: 0.5)
    with pytest.raises(ValueError, match="a judge reads text; pass the tokenizer of its model"):
        LikelihoodJudge(model, None)
    with pytest.raises(ValueError, match="embedding_model='words' reads text; pass the tokenizer"):
        run_of(tmp_path, model, None, ranking="similarity", embedding_model="words")
    server = {"autoregressive_url": "http://localhost:1/v1", "autoregressive_model": "m"}
    with pytest.raises(ValueError, match="autoregressive_url='http://localhost:1/v1' reads and writes text"):
        run_of(tmp_path, model, None, num_autoregressive_negatives=1, **server)
