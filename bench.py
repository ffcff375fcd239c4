"""
How fast the project is here, as numbers and as fractions of what the machine could do; and by arithmetic
(plan.py), what a run on other machines would take.
"""

import torch

from kqv.device import find_device, out_of_memory_as
from kqv.errors import UsageError, run
from kqv.measuring.generation import BenchSampleSettings, bench_sample
from kqv.measuring.machine import whole_numbers
from kqv.measuring.planned import BenchPlanSettings, bench_plan
from kqv.measuring.training import BenchTrainSettings, bench_train, chosen_presets
from kqv.settings import parse
from model import GPTConfig


def main(argv):
    if argv[:1] not in (["sample"], ["train"], ["plan"]):
        wrong = f"{argv[0]} is nothing to measure" if argv else "name what to measure"
        raise UsageError(
            f"{wrong}: python bench.py train, python bench.py sample or python bench.py plan "
            "(--help lists the settings)"
        )
    if argv[0] == "plan":
        return bench_plan(parse(BenchPlanSettings, argv[1:]))
    if argv[0] == "train":
        config = parse(BenchTrainSettings, argv[1:])
        device = find_device(config.device)
        return bench_train(config, chosen_presets(config, device), device)
    config = parse(BenchSampleSettings, argv[1:])
    batch_sizes = whole_numbers(config.batch_sizes)
    try:
        shape = GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if max(config.prompt_length + config.max_new_tokens, config.prefill_length) > config.block_size:
        raise UsageError(
            f"prompt_length={config.prompt_length} + max_new_tokens={config.max_new_tokens} and "
            f"prefill_length={config.prefill_length} must be within block_size={config.block_size}"
        )
    device = find_device(config.device)
    advice = f"out of memory: try smaller --batch_sizes than {config.batch_sizes}"
    with torch.no_grad(), out_of_memory_as(advice):
        bench_sample(config, shape, batch_sizes, device)


if __name__ == "__main__":
    run(main)
