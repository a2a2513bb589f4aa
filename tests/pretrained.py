"""Tiny models of Hugging Face's with random weights, saved to a folder as the hub's are."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def save_clip(folder: Path) -> Path:
    """Both parts; images (3, 16, 16), width 24."""
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2, "pad_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def save_whisper(folder: Path) -> Path:
    """A window of one second, 8 mel bands, width 16."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    config = WhisperConfig(
        vocab_size=20,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=50,
        max_target_positions=10,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    return folder


def save_text(folder: Path) -> Path:
    """XLM-R, width 16, with a tokenizer of words: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

    config = XLMRobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        pad_token_id=1,
        initializer_range=0.3,  # else all texts look alike
    )
    torch.manual_seed(0)
    XLMRobertaModel(config).save_pretrained(folder)
    words = ["<s>", "<pad>", "</s>", "<unk>", "one", "two", "three", *"abcdefghijkl"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "xlm-roberta"
    return folder
