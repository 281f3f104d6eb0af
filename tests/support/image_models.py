"""Small image-text models with random weights, and their processors: nothing is downloaded."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

# Between letters and words: answers of one family may merge with a prompt's last letter elsewhere.
_LETTERS = "abcdefghijklmnopqrstuvwxyz \n"
_SPECIAL = ["<pad>", "<s>", "</s>"]
_MARKERS = ["<user>", "<bot>"]

# Conversations with messages whose content is a list of parts, as processors' templates take them.
TEMPLATE = (
    "{{% for m in messages %}}{{{{ '<user>' if m['role'] == 'user' else '<bot>' }}}}"
    "{{% for part in m['content'] %}}"
    "{{% if part['type'] == 'image' %}}{image}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endfor %}}{{% if add_generation_prompt %}}<bot>{{% endif %}}"
)


def _tokenizer(**image_tokens: str) -> Any:
    """A tokenizer with one token per letter, and special tokens."""
    words = [*_SPECIAL, *_MARKERS, *image_tokens.values(), *_LETTERS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens([*_MARKERS, *image_tokens.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=image_tokens,
    )


class _WithoutVideo:
    """Part of a processor: no video processor, which would need torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if name != "video_processor":
            return super().check_argument_for_proper_class(name, argument)  # pyright: ignore
        return None


class _Qwen25Processor(_WithoutVideo, Qwen2_5_VLProcessor):
    pass


class _Qwen3Processor(_WithoutVideo, Qwen3VLProcessor):
    pass


class _PixtralLike(ProcessorMixin):
    """What transformers' PixtralProcessor does, whose module needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None):
        self.image_token = "[IMG]"
        self.image_token_ids = [_id(tokenizer, f"[IMG{end}]") for end in ("", "_BREAK", "_END")]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        height, width = (size // 8 for size in image_inputs["image_sizes"][image_idx])
        return "[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]"


_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.12,
    "max_position_embeddings": 512,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.12,
}


def _ids(tokenizer: Any) -> dict[str, int]:
    return {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }


def _id(tokenizer: Any, token: str) -> int:
    return tokenizer.convert_tokens_to_ids(token)


def _qwen_vision(**extra: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 48,
        "initializer_range": 0.12,
        **extra,
    }


def _qwen_parts(chat_template: str) -> tuple[Any, Any, dict[str, int]]:
    tokenizer = _tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        size={"shortest_edge": 64, "longest_edge": 512},
    )
    ids = {
        "image_token_id": _id(tokenizer, "<|image_pad|>"),
        "video_token_id": _id(tokenizer, "<|video_pad|>"),
        "vision_start_token_id": _id(tokenizer, "<|vision_start|>"),
        "vision_end_token_id": _id(tokenizer, "<|vision_end|>"),
    }
    return tokenizer, images, ids


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen2_5_vl() -> tuple[Any, Any]:
    template = TEMPLATE.format(image=_QWEN_IMAGE)
    tokenizer, images, ids = _qwen_parts(template)
    processor = _Qwen25Processor(images, tokenizer, None, chat_template=template)
    config = Qwen2_5_VLConfig(
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 2, 2],
            },
        },
        vision_config=_qwen_vision(window_size=16, fullatt_block_indexes=[1]),
        **ids,
    )
    return processor, lambda: Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> tuple[Any, Any]:
    template = TEMPLATE.format(image=_QWEN_IMAGE)
    tokenizer, images, ids = _qwen_parts(template)
    processor = _Qwen3Processor(images, tokenizer, None, chat_template=template)
    config = Qwen3VLConfig(
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "head_dim": 12,
            "vocab_size": len(tokenizer),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config=_qwen_vision(num_position_embeddings=64, deepstack_visual_indexes=[0]),
        **ids,
    )
    return processor, lambda: Qwen3VLForConditionalGeneration(config)


def _gemma3() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = Gemma3Processor(
        images,
        tokenizer,
        chat_template=TEMPLATE.format(image="<start_of_image>"),
        image_seq_length=4,
    )
    config = Gemma3Config(
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size": len(tokenizer),
        },
        vision_config={**_VISION, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=_id(tokenizer, "<image_soft_token>"),
        boi_token_index=_id(tokenizer, "<start_of_image>"),
        eoi_token_index=_id(tokenizer, "<end_of_image>"),
        **_ids(tokenizer),
    )
    return processor, lambda: Gemma3ForConditionalGeneration(config)


def _llava() -> tuple[Any, Any]:
    tokenizer = _tokenizer(image_token="<image>")
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.format(image="<image>"),
    )
    config = LlavaConfig(
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "model_type": "llama",
            "vocab_size": len(tokenizer),
        },
        vision_config={
            **_VISION,
            "model_type": "clip_vision_model",
            "image_size": 16,
            "patch_size": 4,
            "projection_dim": 32,
        },
        image_token_index=_id(tokenizer, "<image>"),
        image_seq_length=16,
        **_ids(tokenizer),
    )
    return processor, lambda: LlavaForConditionalGeneration(config)


def _mistral3() -> tuple[Any, Any]:
    tokenizer = _tokenizer(
        image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"
    )
    images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size=8)
    processor = _PixtralLike(images, tokenizer, TEMPLATE.format(image="[IMG]"))
    config = Mistral3Config(
        text_config={
            **_TEXT,
            **_ids(tokenizer),
            "model_type": "mistral",
            "head_dim": 12,
            "vocab_size": len(tokenizer),
        },
        vision_config={
            **_VISION,
            "model_type": "pixtral",
            "head_dim": 16,
            "image_size": 32,
            "patch_size": 4,
        },
        spatial_merge_size=2,
        image_token_index=_id(tokenizer, "[IMG]"),
        **_ids(tokenizer),
    )
    return processor, lambda: Mistral3ForConditionalGeneration(config)


# Name -> a function that makes a processor, and another that makes the model.
IMAGE_MODELS: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]] = {
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "llava": _llava,
    "mistral3": _mistral3,
}


def image_model(name: str, seed: int = 11) -> tuple[Any, Any]:
    """A small image-text model, and its processor."""
    processor, build = IMAGE_MODELS[name]()
    torch.manual_seed(seed)
    model = build().float()
    if name == "gemma3":  # zero at the start, so that images would not matter
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model, processor


# Images of the rows, by turns.
_COUNTS = (1, 2, 0, 1)


def image_pairs(count: int, seed: int = 3, images: bool = True) -> Dataset:
    """Conversations whose prompts have one, two or no images of several sizes."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(low, high)))

    columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "chosen", "rejected")}
    for _ in range(count):
        columns["prompt"].append([{"role": "user", "content": words(4, 12)}])
        for side in ("chosen", "rejected"):
            columns[side].append([{"role": "assistant", "content": words(3, 20)}])
    if images:
        columns["images"] = [
            [picture(7 * i + j, 16 + 8 * ((i + j) % 3)) for j in range(_COUNTS[i % 4])]
            for i in range(count)
        ]
    return Dataset.from_dict(columns)


def picture(seed: int, width: int = 24, height: int = 16) -> Any:
    """A picture of random pixels."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
