"""Fresh networks of the miniature: a whole StableDiffusion3Pipeline, small enough for a laptop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

_PAD, _END, _UNKNOWN, _START = "<pad>", "<end>", "<unk>", "<start>"


@dataclass(frozen=True)
class Sizes:
    """What a miniature pipeline is made of."""

    layers: int = 4
    heads: int = 4
    head_dim: int = 24
    text_width: int = 64
    text_length: int = 10
    vae_channels: tuple[int, int] = (16, 32)
    latent_channels: int = 4
    dual_attention_layers: tuple[int, ...] = ()


def make_tokenizer(prompts: list[str], length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `prompts`."""
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [_PAD, _END, _UNKNOWN, _START]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(prompts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, special.index(_START)), (_END, special.index(_END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, model_max_length=length
    )


def make_pipeline(prompts: list[str], sizes: Sizes, seed: int) -> StableDiffusion3Pipeline:
    """Random weights, tokenizers trained on `prompts`."""
    torch.manual_seed(seed)
    width = sizes.text_width
    tokenizer = make_tokenizer(prompts, sizes.text_length)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width // 2,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=sizes.text_length,
        projection_dim=width // 2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=3,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=2 * width, d_kv=width // 2, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    hidden = sizes.heads * sizes.head_dim
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        num_layers=sizes.layers,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=width,
        caption_projection_dim=hidden,
        pooled_projection_dim=width,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=sizes.dual_attention_layers,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip),
        text_encoder_2=CLIPTextModelWithProjection(clip),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(prompts, sizes.text_length),
        tokenizer_3=make_tokenizer(prompts, sizes.text_length),
    )
