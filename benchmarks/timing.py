"""Times prefills and whole generations of contestants in turns; the command line times decoding steps."""

from collections.abc import Callable

import torch

from peft_fanlora.command_line.timing import Contestant, Generation, Seconds, Stopwatch, in_turns


@torch.inference_mode()
def prefills(
    contestants: list[Contestant], rounds: int, prompts: Callable[[], torch.Tensor], stopwatch: Stopwatch
) -> Seconds:
    """Times passes over whole prompts; one before them does not count."""
    prompt = prompts()
    for contestant in contestants:
        Generation(contestant).prefill(prompt)
    return in_turns(contestants, rounds, lambda one: stopwatch(lambda: Generation(one).prefill(prompt)))


@torch.inference_mode()
def generations(
    contestants: list[Contestant],
    rounds: int,
    prompts: Callable[[], torch.Tensor],
    stopwatch: Stopwatch,
    new_tokens: int,
    beams: int,
) -> Seconds:
    """Times `generate` of a fixed number of tokens."""
    prompt = prompts()

    def generate(contestant: Contestant) -> None:
        contestant.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=beams,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            **contestant.call,
        )

    return in_turns(contestants, rounds, lambda one: stopwatch(lambda: generate(one)))
