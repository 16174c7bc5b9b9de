"""Fresh networks of the miniature, small enough for a laptop: a whole SD3, and a whole FLUX.1 Kontext for edits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

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
    tokenizer = make_tokenizer(prompts, sizes.text_length)
    clip, t5 = _text_configs(len(tokenizer), sizes)
    hidden = sizes.heads * sizes.head_dim
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        num_layers=sizes.layers,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        caption_projection_dim=hidden,
        pooled_projection_dim=sizes.text_width,
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


def make_editing_pipeline(prompts: list[str], sizes: Sizes, vae: AutoencoderKL, seed: int) -> FluxKontextPipeline:
    """FLUX.1 Kontext around a trained VAE: random weights, tokenizers trained on `prompts`, no guidance as an input.

    Half as many joint as single blocks, `sizes.layers` of these.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(prompts, sizes.text_length)
    clip, t5 = _text_configs(len(tokenizer), sizes)
    # Of a head two channels each turn with row and column, the rest with the picture: where there are more, these turn
    # too slowly to tell the places of a grid of 4 x 4 apart.
    place = 2
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,  # patches of 2 x 2
        num_layers=sizes.layers // 2,
        num_single_layers=sizes.layers,
        attention_head_dim=sizes.head_dim,
        num_attention_heads=sizes.heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=clip.hidden_size,
        guidance_embeds=False,
        axes_dims_rope=(sizes.head_dim - 2 * place, place, place),
    )
    _look_at_own_place(transformer, sizes)
    return FluxKontextPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(prompts, sizes.text_length),
    )


@torch.no_grad()
def _look_at_own_place(transformer: FluxTransformer2DModel, sizes: Sizes) -> None:
    """Half of the heads begin with the attention that edits need, of every place to itself in image and picture.

    Their queries and keys are nearly constant, so rotation alone tells keys apart. Nothing else in FLUX says where a
    token is, and so small a network finds this out late.
    """
    half = sizes.heads // 2 * sizes.head_dim
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for layer in (block.attn.to_q, block.attn.to_k):
            layer.bias[:half] = 1
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.weight.fill_(2)


def _text_configs(words: int, sizes: Sizes) -> tuple[CLIPTextConfig, T5Config]:
    """For a vocabulary of `words`; CLIP has half the width."""
    width = sizes.text_width
    clip = CLIPTextConfig(
        vocab_size=words,
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
        vocab_size=words, d_model=width, d_ff=2 * width, d_kv=width // 2, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return clip, t5
