"""``cpo-kernels evaluate``: the evaluation of a trained model, as JSON and Markdown."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cpo_kernels.models import attach_linear_loss
from cpo_kernels.negatives.autoregressive import Sampling
from cpo_kernels.negatives.endings import special_tokens
from cpo_kernels.trainer.config import CPOConfig
from cpo_kernels.trainer.data import TokenizedExamples, tokenize_examples
from cpo_kernels.trainer.evaluation import default_sampling
from cpo_kernels.trainer.evaluation import evaluate as evaluate_model
from cpo_kernels.trainer.files import write_whole
from cpo_kernels.trainer.judges import ChatJudge, Judge, LikelihoodJudge

from .errors import InputError, input_errors
from .finished import SETTINGS, trained_on
from .inputs import ADAPTERS, NO_TOKENIZER, Inputs, load_model, load_tokenizer
from .options import RunConfig
from .parsing import Settings, parse
from .yaml12 import read_yaml

KEY_VARIABLE = "CPO_KERNELS_JUDGE_KEY"


def run(arguments: Sequence[str]) -> None:
    """Evaluate the model that ``arguments`` name, print the report, and write it as report.json and report.md."""
    settings = parse(arguments)
    options, config = settings.run, settings.training
    if config.world_size > 1:
        raise InputError(f"evaluate runs in one process, got {config.world_size}; start it without torchrun")
    name = _checkpoint(settings)
    tokenizer = None if options.tokenizer == NO_TOKENIZER else load_tokenizer(name, options)
    inputs = Inputs(settings, tokenizer)
    examples = inputs.eval_examples()
    if examples is None:
        raise InputError("there are no held-out examples; give eval_data, eval_split or eval_fraction")
    directory = Path(options.eval_dir or Path(str(config.output_dir), "evaluation"))
    directory.mkdir(parents=True, exist_ok=True)
    generates = options.eval_generations != 0
    judge = _judge(settings) if generates else None
    model, reference = inputs.trained_model(name), inputs.model() if options.eval_reference else None
    with input_errors(RuntimeError):
        attach_linear_loss(model)  # This raises for a model that cannot be read.
    with input_errors():
        config = config.fitted_to(model.config)
        special = special_tokens(tokenizer, model)
        data = tokenize_examples(
            examples,
            tokenizer,
            max_length=config.length_budget,
            max_prompt_length=config.prompt_budget,
            eos_token_id=special.ends,
            bos_token_id=special.bos,
            disable_tqdm=config.hides_progress,
        )
        seen = _trained_on(name, settings, data)
        report = evaluate_model(
            model,
            tokenizer,
            data,
            config=config,
            ref_model=reference,
            judge=judge,
            generate=generates,
            num_generations=options.eval_generations or None,
            sampling=_sampling(options, config, data) if generates else None,
            directory=directory,
        )
    about = {"checkpoint": name, "trained_on": seen, **report.to_dict()}
    write_whole(directory / "report.json", json.dumps(about, indent=2) + "\n")
    note = f"{_seen(name, seen, len(data))}\n\n" if seen else ""
    write_whole(directory / "report.md", f"# {name}\n\n{note}{report.markdown()}")
    print(report.markdown())
    print(f"report.json and report.md are in {directory}")


def _trained_on(name: str, settings: Settings, data: TokenizedExamples) -> int | None:
    """Count the examples on which the model was trained, and warn of them; None where that is unknown."""
    seen = trained_on(name, data)
    if seen:
        print(f"warning: {_seen(name, seen, len(data))}", file=sys.stderr)
    elif seen is None and settings.run.eval_fraction:
        kept = next((p for p in (Path(name, SETTINGS), Path(name).parent / SETTINGS) if p.is_file()), None)
        before = None if kept is None else read_yaml(str(kept)).get("eval_fraction", 0)
        if kept is not None and before != settings.run.eval_fraction:
            print(
                f"warning: {kept} says that {name} was trained with eval_fraction={before}, not "
                f"{settings.run.eval_fraction}: what is held out now was trained on: scores say nothing of new text",
                file=sys.stderr,
            )
    return seen


def _seen(name: str, seen: int, total: int) -> str:
    return (
        f"{name} was trained on {seen} of these {total} examples: their scores say nothing of text that it has not seen"
    )


def _checkpoint(settings: Settings) -> str:
    name = settings.run.checkpoint or str(settings.training.output_dir)
    here = Path(name)
    if settings.run.checkpoint is None and not any((here / file).is_file() for file in ("config.json", ADAPTERS)):
        raise InputError(f"there is no trained model in output_dir={name}; train it first, or give checkpoint")
    return name


def _sampling(options: RunConfig, config: CPOConfig, data: TokenizedExamples) -> Sampling:
    usual = default_sampling(data, config)
    length = options.eval_max_new_tokens or usual.max_new_tokens
    with input_errors():
        return Sampling(
            temperature=options.eval_temperature,
            top_p=options.eval_top_p,
            max_new_tokens=length,
            batch_size=usual.batch_size,
            seed=usual.seed,
        )


def _judge(settings: Settings) -> Judge | None:
    options = settings.run
    if options.judge == "none":
        return None
    if options.judge == "chat":
        with input_errors(RuntimeError):
            return ChatJudge(str(options.judge_url), str(options.judge_model), api_key=os.environ.get(KEY_VARIABLE))
    if options.judge == "likelihood":
        name = options.judge_model or options.model
        if name is None:
            raise InputError("judge='likelihood' needs judge_model, or model: whose likelihood judges")
        model = load_model(name, options).to(settings.training.device)
        with input_errors(RuntimeError):
            return LikelihoodJudge(model, load_tokenizer(name, options))
    return _callable(options.judge)


def _callable(name: str) -> Judge:
    """Import the function ``MODULE:FUNCTION``, from a module on the path or in the current directory."""
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"judge: there is no {name}: {error}") from error
    if not callable(judge):
        raise InputError(f"judge: {name} is of type {type(judge).__name__}, not a function")
    return judge
