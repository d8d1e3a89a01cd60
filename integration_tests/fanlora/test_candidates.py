"""Which modules of a model FanLoRA chooses among."""

import pytest
import torch

from integration_tests.helpers.models import LLAMA, TINY


def test_heads_embeddings_and_towers_are_no_candidates() -> None:
    """A vision tower runs once a request; its linear layers must not compete with those that run at every token."""
    import transformers

    from peft_fanlora.fanlora.candidates import candidates

    text = LLAMA
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 8, "patch_size": 4},
    )
    names = list(candidates(transformers.LlavaForConditionalGeneration(config)))
    assert len(names) == 21
    assert all("language_model.layers" in name for name in names)
    assert len(candidates(TINY["bert"].base())) == 18
    vit = transformers.ViTModel(transformers.ViTConfig(**vision, image_size=8, patch_size=4))
    assert len(candidates(vit)) == 6


@pytest.mark.parametrize(
    ("model_class", "config_class", "stack"),
    [
        ("VideoLlavaForConditionalGeneration", "VideoLlavaConfig", "model.language_model.layers"),
        ("Idefics2ForConditionalGeneration", "Idefics2Config", "model.text_model.layers"),
        ("InstructBlipForConditionalGeneration", "InstructBlipConfig", "language_model.model.decoder.layers"),
        ("GraniteSpeechForConditionalGeneration", "GraniteSpeechConfig", "model.language_model.layers"),
        ("Phi4MultimodalForCausalLM", "Phi4MultimodalConfig", "model.layers"),
        ("GitForCausalLM", "GitConfig", "git.encoder.layer"),
    ],
)
def test_only_the_language_model_of_a_multimodal_model_is_a_candidate(
    model_class: str, config_class: str, stack: str
) -> None:
    """Towers and connectors of these were candidates once; the models have no memory here, and their usual sizes."""
    import transformers

    from peft_fanlora.fanlora.candidates import candidates
    from peft_fanlora.fanlora.modules import ModuleName

    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)())
    assert {ModuleName.parse(name).stack for name in candidates(model)} == {stack}
