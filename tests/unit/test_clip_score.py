"""CLIP score of samples and their prompts, by a tiny CLIP model of transformers in a local folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import teacher_support
import torch
from torch.nn.functional import cosine_similarity

from distill.evaluation.meters.prompts import PromptMeter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    text = teacher_support.clip_encoder().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    place = tmp_path_factory.mktemp("clip") / "tiny"
    CLIPModel(config).save_pretrained(place)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, teacher_support.clip_tokenizer()).save_pretrained(place)
    return place


def test_the_score_is_the_mean_cosine(folder: Path) -> None:
    from transformers import CLIPModel

    prompts = ["a dog", "a cat", "a house"]
    model = SimpleNamespace(conditions=SimpleNamespace(table=SimpleNamespace(prompts=prompts)))
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    meter = PromptMeter(clip=str(folder))
    assert meter.clip_score is not None
    found = meter.clip_score(images, model)
    clip = CLIPModel.from_pretrained(folder).eval()
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    pixels = (((images + 1) * 127.5).round() / 255 - mean) / std
    texts = teacher_support.clip_tokenizer()(
        [prompts[i % 3] for i in range(5)], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        made = clip(pixel_values=pixels, **texts)
    cosine = cosine_similarity(made.image_embeds, made.text_embeds)
    assert found == pytest.approx(float((100 * cosine).mean().clamp(min=0)), abs=1e-3)
    assert meter.clip_score(images, model) == found, "no memory of earlier samples"
    assert meter.fingerprint() != PromptMeter().fingerprint() == ""


def test_folders_without_a_whole_clip_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"meter.clip: .*config.json: missing; expected a local folder"
    ):
        PromptMeter(clip=str(tmp_path))
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="found a model of type 'bert', expected 'clip'"):
        PromptMeter(clip=str(tmp_path))
