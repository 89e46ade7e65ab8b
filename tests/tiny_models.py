"""Builders of tiny random-weight models in the diffusers folder format, one per family, and requests for them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from PIL import Image
from small_tokenizers import clip_tokenizer, qwen_tokenizer, t5_tokenizer

from ditrelay.models.card import ModelCard
from ditrelay.runtime.request import Request, SamplingParams


def build(family: str, root: Path, make: Callable[[], Any] | None = None) -> Path:
    """The folder of the family's tiny model under ``root``; made on the first call, by ``make`` if it is given."""
    folder = root / family
    if not folder.exists():
        torch.manual_seed(0)
        pipeline = (make or BUILDERS[family])()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                _liven(component)
        pipeline.save_pretrained(folder)
    return folder


def small_request(card: ModelCard, **params: Any) -> Request:
    """Three steps, with an odd number of image tokens where the family allows it: two ranks get unequal parts."""
    side = 3 * card.size_multiple
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 50, 50)).save(file, "PNG")
    defaults = dict(
        prompt="a red chair",
        height=side,
        width=side,
        num_frames=1 if card.media == "image" else 2 * card.frame_multiple + 1,
        num_inference_steps=3,
        seed=5,
        image=file.getvalue() if card.needs_image else None,
    )
    return Request(request_id="r", params=card.resolve(SamplingParams(**defaults | params)))


def _liven(module: torch.nn.Module) -> None:
    """Some layers start at zero; without this a transformer could return zeros whatever it is given."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


# ---------------------------------------------------------------- parts used by several families


def _clip(tokenizer: Any, *, projection: bool = False) -> Any:
    config = transformers.CLIPTextConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        projection_dim=32,
        hidden_act="gelu",
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return cls(config)


def _t5(tokenizer: Any, *, width: int = 32, umt5: bool = False) -> Any:
    options = dict(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    options |= dict(relative_attention_num_buckets=8, dropout_rate=0.0)
    if umt5:
        return transformers.UMT5EncoderModel(transformers.UMT5Config(**options))
    return transformers.T5EncoderModel(transformers.T5Config(**options))


def _qwen3_config(tokenizer: Any, layers: int) -> Any:
    return transformers.Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
    )


def _image_vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


# ---------------------------------------------------------------- families


def _z_image() -> Any:
    tokenizer = qwen_tokenizer(chat=True)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 32, 32],
    )
    for parameter in transformer.parameters():  # padding tokens are left uninitialised
        torch.nn.init.normal_(parameter, std=0.05)
    encoder = transformers.Qwen3Model(_qwen3_config(tokenizer, 2))
    return diffusers.ZImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=_image_vae(16),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def flux(guidance_embeds: bool = True, heads: int = 2) -> Any:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return diffusers.FluxPipeline(
        scheduler=_flow(use_dynamic_shifting=True, shift=3.0),
        vae=_image_vae(4),
        text_encoder=_clip(clip),
        tokenizer=clip,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )


def _flux2_klein(is_distilled: bool = False) -> Any:
    tokenizer = qwen_tokenizer(chat=True)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16 * 3,
        axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    encoder = transformers.Qwen3ForCausalLM(_qwen3_config(tokenizer, 28))  # the pipeline reads layers 9, 18 and 27
    return diffusers.Flux2KleinPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    )


def _qwen_image() -> Any:
    tokenizer = qwen_tokenizer()
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    rope = dict(mrope_section=[1, 1, 2], rope_type="default", type="default")
    text |= dict(vocab_size=len(tokenizer), max_position_embeddings=2048, rope_scaling=rope, rope_theta=1e6)
    vision = dict(depth=2, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )
    return diffusers.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential"),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _sd3() -> Any:
    clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer(), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=32,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_flow(shift=3.0),
        vae=_image_vae(4),
        text_encoder=_clip(clip, projection=True),
        tokenizer=clip,
        text_encoder_2=_clip(clip_2, projection=True),
        tokenizer_2=clip_2,
        text_encoder_3=_t5(t5, width=64),
        tokenizer_3=t5,
    )


def _wan_parts(**transformer: Any) -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return dict(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer, umt5=True),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
            **transformer,
        ),
    )


def _wan() -> Any:
    return diffusers.WanPipeline(**_wan_parts(in_channels=16))


def _wan_i2v() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=16,
        patch_size=4,
    )
    return diffusers.WanImageToVideoPipeline(
        **_wan_parts(in_channels=36, image_dim=32, added_kv_proj_dim=24),
        image_encoder=transformers.CLIPVisionModel(vision),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )


def _ltx() -> Any:
    tokenizer = t5_tokenizer()
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        patch_size_t=1,
    )
    return diffusers.LTXPipeline(
        scheduler=_flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        vae=vae,
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _cogvideox() -> Any:
    tokenizer = t5_tokenizer()
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=_t5(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "z-image": _z_image,
    "flux": flux,
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "flux2-klein": _flux2_klein,
    "flux2-klein-distilled": lambda: _flux2_klein(is_distilled=True),
    "qwen-image": _qwen_image,
    "sd3": _sd3,
    "wan": _wan,
    "wan-i2v": _wan_i2v,
    "ltx": _ltx,
    "cogvideox": _cogvideox,
}
