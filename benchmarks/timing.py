"""Times prefills and complete generations of contestants; decoding steps are in `peft_fanlora.timing`."""

from collections.abc import Callable

import torch

from peft_fanlora.timing import Contestant, Generation, Seconds, Stopwatch, in_turns


@torch.inference_mode()
def prefills(
    contestants: list[Contestant], rounds: int, prompts: Callable[[], torch.Tensor], stopwatch: Stopwatch
) -> Seconds:
    """Times forward passes over complete prompts, after one warm-up pass."""
    prompt = prompts()
    for contestant in contestants:
        Generation(contestant).prefill(prompt)
    return in_turns(contestants, range(rounds), lambda one: stopwatch(lambda: Generation(one).prefill(prompt)))


@torch.inference_mode()
def generations(
    contestants: list[Contestant],
    rounds: int,
    prompts: Callable[[], torch.Tensor],
    stopwatch: Stopwatch,
    new_tokens: int,
    beams: int,
) -> Seconds:
    """Times `generate` with a fixed number of new tokens."""
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

    return in_turns(contestants, range(rounds), lambda one: stopwatch(lambda: generate(one)))
