#!/usr/bin/env python3
"""Write the tiny Stable Diffusion 3.5 model of the tests and its reference pictures.

The model has the shape of SD3.5 Medium (dual attention, RMS qk-norm, three text encoders, a
16-channel VAE) at a size of 3 MB. Its weights are random, so its pictures are abstract; they are
computed by diffusers in float64, with softmax attention and with the attention replaced by
Test-Time-Training layers that are defined here on their own, by automatic differentiation of
their inner loss. See README.md for how to run it.

Output, below --output (default tests/data):
  sd35-tiny/      the model, a folder as diffusers writes and reads it, float16
  sd35-tiny-ref/  t5.safetensors (fast weights and convolutions of every attention module),
                  the pictures, reference.json, intermediates.safetensors, tokenizers.json
"""

import argparse
import collections
import contextlib
import io
import json
import logging
import math
import pathlib
import platform
import re
import shutil
import sys
import time

import diffusers
import ftfy
import numpy
import regex
import safetensors.torch
import sentencepiece
import torch
import transformers
from PIL import Image
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# What is made
# ---------------------------------------------------------------------------------------------

SEED = 35
DEPTH, HEADS, HEAD_DIM = 4, 4, 16
WIDTH = HEADS * HEAD_DIM
DUAL_BLOCKS = (0, 1)
GRID_LIMIT = 64  # patches a side in the table of positions
LATENT_CHANNELS = 16
CLIP_L_WIDTH, CLIP_G_WIDTH, T5_WIDTH = 24, 32, 64  # T5_WIDTH > sum of the others: zero padding
CLIP_MERGES, T5_PIECES = 256, 232
VAE_CHANNELS = (8, 8, 16, 24)

PROMPTS = (
    "a red fox in the snow, watercolour painting",
    "a lighthouse at night, 7 stars over the dark sea",
)
SEEDS = (0, 42)
PICTURE_HEIGHT, PICTURE_WIDTH = 128, 96  # not square: a token grid of 8 x 6
STEPS, GUIDANCE, T5_TOKENS = 8, 4.5, 256

FOLDER, REFERENCE = "sd35-tiny", "sd35-tiny-ref"

# The text that both vocabularies are learned from.
SENTENCES = """
a red fox in the snow, watercolour painting
a lighthouse at night, stars over the dark sea
a small boat on a quiet lake, oil painting
an old stone bridge over a river in the morning mist
the portrait of a woman with a green hat, pencil drawing
a bowl of oranges and lemons on a wooden table
a cat sleeping in the window, soft light, photograph
a dog running on the beach, wide angle
three white horses in a field of yellow flowers
a city street in the rain at night, neon lights
an astronaut riding a bicycle on the moon, digital art
a castle on a hill, sunset, dramatic clouds
a forest in autumn, red and orange leaves, sunlight through the trees
a glass of water on a black table, studio photograph
a robot reading a book in a library, highly detailed
mountains behind a blue lake, a wooden house, winter
a bird's nest with four eggs, close up
it's a rainy day; they're walking under umbrellas
don't look down, she'll say, we've come too far, I'd rather stay, I'm fine
a sign that says "open 24 hours", 1950s diner, 35mm film
the number 3 painted on a wall, 100% cotton, page 42 of 678
a garden with roses, tulips and a fountain (spring, noon)
portrait of an old man with a beard, renaissance style
an abstract picture of circles, squares and lines: blue, red & gold
a ship in a storm, huge waves, lightning / thunder
a very small house in a very large forest, seen from above
the sun over the sea, golden hour, 4k, high quality
a child flying a kite in the wind, children playing
a train crossing a desert, dust and heat, what a day!
where is the fox? the fox is in the snow, it is cold
a table, a chair, a lamp and a painting of a painting
colour field painting, warm colours, texture, canvas
""".strip().splitlines()


def text_probes():
    """Strings that the tokenizer tests encode; each is a fixed point of ftfy.fix_text."""
    return [
        "",
        " ",
        "a",
        *PROMPTS,
        "A Red FOX In The SNOW",
        "  spaces   here\tand\n\nthere  ",
        "non\u00a0breaking\u2003and em spaces",
        "don't you'll we've I'm they're she'd it's",
        "rock'n'roll 's 'tis",
        "1234567890 3.14159 1,000,000 x2 4k 35mm",
        "half ½, squared x², the year Ⅳ",
        "!!! ... ??? (a [b] {c}) -- <d> #e @f $g 50% ^h & *i* + = ~ ` | \\ /",
        "quotes \"double\" and 'single'",
        "under_score hyphen-ated e-mail@example.org https://example.org/a?b=c",
        "naïve café, Zürich, Ångström, señor",
        "Ελληνικά και Кириллица",
        "日本語の絵、中文图片",
        "한국어 العربية עברית हिन्दी",
        "a 🦊 in the ❄️ and 👩‍🚀🚀",
        "zero\u200bwidth\u00adsoft",
        "supercalifragilisticexpialidocious antidisestablishmentarianism",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "the fox, " * 40,
        " ".join(SENTENCES[:24]),
    ]


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------

CLIP_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
CLIP_BEGIN, CLIP_END = "<|startoftext|>", "<|endoftext|>"


def byte_symbols():
    """The 256 printable characters that stand for bytes in a CLIP vocabulary, in id order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return symbols


def learn_bpe(sentences, count):
    """The `count` most frequent merges of adjacent symbols, learned greedily (ties: alphabet)."""
    symbols = byte_symbols()
    words = collections.Counter()
    for sentence in sentences:
        for word in CLIP_WORDS.findall(sentence.lower()):
            *head, last = [symbols[byte] for byte in word.encode()]
            words[(*head, last + "</w>")] += 1
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, frequency in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += frequency
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged = collections.Counter()
        for word, frequency in words.items():
            out, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == best else 1
                out.append("".join(word[i : i + step]))
                i += step
            merged[tuple(out)] += frequency
        words = merged
    return merges


def write_clip_vocabulary(folder):
    """vocab.json and merges.txt: bytes, bytes that end a word, merges, begin, end (largest id)."""
    merges = learn_bpe(SENTENCES, CLIP_MERGES)
    symbols = list(byte_symbols().values())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    tokens += [first + second for first, second in merges] + [CLIP_BEGIN, CLIP_END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert len(vocabulary) == len(tokens) == 512 + CLIP_MERGES + 2
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_tokenizers(scratch):
    """CLIP-L's (padded with its end token), CLIP-G's (padded with id 0, "!") and T5's tokenizer."""
    write_clip_vocabulary(scratch / "clip")
    clip = {
        "vocab_file": str(scratch / "clip" / "vocab.json"),
        "merges_file": str(scratch / "clip" / "merges.txt"),
        "model_max_length": 77,
        "unk_token": CLIP_END,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="unigram",
        vocab_size=T5_PIECES,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    (scratch / "spiece.model").write_bytes(model.getvalue())
    t5 = transformers.T5TokenizerFast(
        vocab_file=str(scratch / "spiece.model"),
        tokenizer_file=None,
        extra_ids=0,
        model_max_length=512,
        legacy=True,
        add_prefix_space=True,  # or the conversion of spiece.model drops SentencePiece's first space
    )
    return (
        transformers.CLIPTokenizer(**clip, pad_token=CLIP_END),
        transformers.CLIPTokenizer(**clip, pad_token="!"),
        t5,
    )


def tokenizer_reference(folder):
    """The ids of `text_probes()` with the padding cut off."""
    clip = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = transformers.T5TokenizerFast.from_pretrained(folder / "tokenizer_3")
    piece = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer_3" / "spiece.model"))
    rows = []
    for text in text_probes():
        assert ftfy.fix_text(text) == text, f"ftfy would change {text!r}"
        row = {"text": text}
        for name, tokenizer, length in (("clip", clip, 77), ("t5", t5, T5_TOKENS)):
            made = tokenizer(text, padding="max_length", max_length=length, truncation=True)
            row[name] = made["input_ids"][: sum(made["attention_mask"])]
        exact = piece.encode(text)[: T5_TOKENS - 1] + [1]
        assert row["t5"] == exact, f"T5TokenizerFast and SentencePiece differ on {text!r}"
        rows.append(row)
    return {
        "note": "CLIP: cut at 77, T5: cut at 256, begin and end tokens included, no padding",
        "clip_pad": {"tokenizer": clip.pad_token_id, "tokenizer_2": 0},
        "t5_pad": t5.pad_token_id,
        "texts": rows,
    }


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


class Initialiser:
    """Draws every parameter of a module: matrices N(0, gain^2 / fan_in), biases N(0, gain^2),
    vectors of normalisations N(gain, (gain / 10)^2). Rules map a regex of the name to the gain."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def __call__(self, module, rules=()):
        for name, parameter in module.named_parameters():
            is_bias = name.endswith("bias") and parameter.ndim == 1
            gain = 0.1 if is_bias else 1.0
            gain = next((value for pattern, value in rules if re.search(pattern, name)), gain)
            draw = self.normal(parameter.shape)
            if is_bias:
                values = gain * draw
            elif parameter.ndim == 1:
                values = gain * (1 + 0.1 * draw)
            else:
                values = gain / math.sqrt(parameter[0].numel()) * draw
            parameter.data = values.to(parameter.dtype)


def make_clip(initialise, width, layers, activation, vocabulary):
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 8,
        max_position_embeddings=77,
        hidden_act=activation,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1 if activation == "quick_gelu" else 0,
    )
    model = transformers.CLIPTextModelWithProjection(config)
    root = math.sqrt(width)
    initialise(
        model,
        [
            (r"token_embedding", root),
            (r"position_embedding", 0.3 * root),
            (r"[qk]_proj\.weight", 1.5),
        ],
    )
    return model


def make_t5(initialise, vocabulary):
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=T5_WIDTH,
        d_kv=16,
        num_heads=T5_WIDTH // 16,
        d_ff=96,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = transformers.T5EncoderModel(config)
    initialise(
        model,
        [
            (r"shared", math.sqrt(T5_WIDTH)),
            (r"relative_attention_bias", 2.0),  # [32, heads]
            (r"SelfAttention\.q", 0.4),  # attention of T5 has no 1 / sqrt(d)
        ],
    )
    return model


def make_transformer(initialise):
    """SD3.5 Medium's transformer. The output layer holds a part of the inverse of the patch
    embedding, so that the sampler takes the noise off as it does with a trained model."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=2 * GRID_LIMIT,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=DEPTH,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=CLIP_L_WIDTH + CLIP_G_WIDTH,
        pos_embed_max_size=GRID_LIMIT,
        dual_attention_layers=DUAL_BLOCKS,
        qk_norm="rms_norm",
    )
    initialise(
        model,
        [
            (r"norm_(added_)?[qk]", 1.3),
            (r"norm1.*weight", 0.8),
            (r"norm1.*bias", 0.3),
            (r"time_text_embed.*linear_2.weight", 2.0),
            (r"to_v|add_v_proj", 1.5),
            (r"to_out|to_add_out", 1.5),
        ],
    )
    embed = torch.linalg.qr(initialise.normal((WIDTH, WIDTH)))[0]  # columns: channel, row, column
    inverse = embed.T.reshape(LATENT_CHANNELS, 4, WIDTH).transpose(0, 1).reshape(WIDTH, WIDTH)
    model.pos_embed.proj.weight.data = embed.reshape(WIDTH, LATENT_CHANNELS, 2, 2).float()
    random = initialise.normal((WIDTH, WIDTH)) / math.sqrt(WIDTH)
    model.proj_out.weight.data = (0.6 * inverse + 1.0 * random).float()
    return model


def make_vae(initialise):
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=2,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=16 * GRID_LIMIT,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    initialise(model)
    smooth = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.shape[2:] == (3, 3):
            parameter.data = (parameter.data * torch.outer(smooth, smooth) * 1.33).float()
    return model


def write_model(folder):
    """Draw the model and write it through diffusers."""
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder.with_name(folder.name + ".scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    tokenizer, tokenizer_2, tokenizer_3 = make_tokenizers(scratch)
    initialise = Initialiser(SEED)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=make_transformer(initialise),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(initialise),
        text_encoder=make_clip(initialise, CLIP_L_WIDTH, 3, "quick_gelu", len(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=make_clip(initialise, CLIP_G_WIDTH, 4, "gelu", len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        text_encoder_3=make_t5(initialise, len(tokenizer_3)),
        tokenizer_3=tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    balance_colours(pipeline)
    pipeline.to(torch.float16).save_pretrained(folder)
    (folder / "tokenizer_3" / "tokenizer.json").unlink()  # spiece.model says it all
    shutil.rmtree(scratch)


def balance_colours(pipeline):
    """Scale the last convolution so that the pictures have mean 0 and standard deviation 0.42 in
    each colour, measured on the softmax pictures: few values then lie outside [-1, 1]."""
    pipeline.to(torch.float64)
    pictures = torch.cat([paint(pipeline, p, s)["image"] for p in PROMPTS for s in SEEDS])
    deviation, mean = torch.std_mean(pictures, dim=(0, 2, 3))
    last = pipeline.vae.decoder.conv_out
    last.weight.data *= (0.42 / deviation)[:, None, None, None]
    last.bias.data = (last.bias.data - mean) * 0.42 / deviation


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


class Attention:
    """SD3.5's attention around a core that maps q, k, v [batch, head, token, channel] to the
    output; the image's `count` tokens come first. As an attention processor of diffusers it
    serves the joint and the image-only modules."""

    def core(self, q, k, v, count):
        raise NotImplementedError

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        def heads(projection, norm, tokens):
            split = projection(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return norm(split) if norm is not None else split

        image, text = hidden_states, encoder_hidden_states
        q = heads(attn.to_q, attn.norm_q, image)
        k = heads(attn.to_k, attn.norm_k, image)
        v = heads(attn.to_v, None, image)
        if text is not None:
            q = torch.cat([q, heads(attn.add_q_proj, attn.norm_added_q, text)], dim=2)
            k = torch.cat([k, heads(attn.add_k_proj, attn.norm_added_k, text)], dim=2)
            v = torch.cat([v, heads(attn.add_v_proj, None, text)], dim=2)
        count = image.shape[1]
        out = self.core(q, k, v, count).transpose(1, 2).flatten(2)
        image = attn.to_out[0](out[:, :count])
        if text is None:
            return image
        text = out[:, count:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class Removed(Attention):
    """No attention at all: the output projections see zeros."""

    def core(self, q, k, v, count):
        return torch.zeros_like(q)


class TestTimeTraining(Attention):
    """T5: one step of gradient descent on the inner-product loss of a SwiGLU inner model.

    f(x; W) = (silu(x W1) * (x W2)) W3 for each sample and head,
    l(W) = -(scale / N) sum_n <v_n, f(k_n; W)>, scale = d^-1/2, N = all keys,
    output = f(q; W - rate * dl/dW).
    Before that, k is normalised over all tokens (image and text) per channel,
    (k - mean) / sqrt(variance + eps) with the biased variance, and a depthwise 3x3 convolution
    over the (height, width) grid with zero padding and bias is added to the image rows of q and
    of k; text rows stay as they are.
    """

    def __init__(self, weights, grid, rate=1.0, eps=1.0):
        self.weights, self.grid, self.rate, self.eps = weights, grid, rate, eps

    def key_norm(self, k, count):
        mean = k.mean(dim=2, keepdim=True)
        variance = ((k - mean) ** 2).mean(dim=2, keepdim=True)
        return (k - mean) / torch.sqrt(variance + self.eps)

    def add_convolution(self, x, name, count):
        batch, heads, _, width = x.shape
        image = x[:, :, :count].permute(0, 1, 3, 2).reshape(batch, heads * width, *self.grid)
        image = image + torch.nn.functional.conv2d(
            image,
            self.weights[f"{name}.weight"].to(x.dtype),
            self.weights[f"{name}.bias"].to(x.dtype),
            padding=1,
            groups=heads * width,
        )
        image = image.reshape(batch, heads, width, count).permute(0, 1, 3, 2)
        return torch.cat([image, x[:, :, count:]], dim=2)

    def core(self, q, k, v, count):
        def model(x, weights):
            w1, w2, w3 = weights
            return (torch.nn.functional.silu(x @ w1) * (x @ w2)) @ w3

        q = self.add_convolution(q, "q_conv2d", count)
        k = self.add_convolution(self.key_norm(k, count), "k_conv2d", count)
        with torch.enable_grad():
            slow = [self.weights[name].to(q.dtype) for name in ("w1", "w2", "w3")]
            slow = [w.expand(q.shape[0], -1, -1, -1).clone().requires_grad_() for w in slow]
            loss = -(v * model(k, slow)).sum() / (math.sqrt(q.shape[-1]) * k.shape[2])
            gradients = torch.autograd.grad(loss, slow)
        return model(q, [w.detach() - self.rate * g for w, g in zip(slow, gradients)])


class ImageKeyStatistics(TestTimeTraining):
    """A mistake to be seen: the key statistics are those of the image tokens alone."""

    def key_norm(self, k, count):
        mean = k[:, :, :count].mean(dim=2, keepdim=True)
        variance = ((k[:, :, :count] - mean) ** 2).mean(dim=2, keepdim=True)
        return (k - mean) / torch.sqrt(variance + self.eps)


def attention_modules(choice):
    """The modules that a conversion replaces, by name; "softmax" replaces none."""
    dual = [f"transformer_blocks.{i}.attn2" for i in DUAL_BLOCKS]
    joint = [f"transformer_blocks.{i}.attn" for i in range(DEPTH)]
    tail = max(1, round(5 / 24 * DEPTH))
    return {"softmax": [], "paper": dual + joint[-tail:], "all": dual + joint}[choice]


def draw_fast_weights():
    """Fast weights of order d^-1/2 and convolutions that are not small, for every module."""
    initialise = Initialiser(SEED + 1)
    tensors = {}
    for name in attention_modules("all"):
        for matrix in ("w1", "w2", "w3"):
            draw = initialise.normal((1, HEADS, HEAD_DIM, HEAD_DIM))
            tensors[f"{name}.{matrix}"] = 1.3 * draw / math.sqrt(HEAD_DIM)
        for conv in ("q_conv2d", "k_conv2d"):
            tensors[f"{name}.{conv}.weight"] = 0.3 * initialise.normal((WIDTH, 1, 3, 3))
            tensors[f"{name}.{conv}.bias"] = 0.2 * initialise.normal((WIDTH,))
    return {name: tensor.to(torch.float16) for name, tensor in tensors.items()}


@contextlib.contextmanager
def replaced(pipeline, names, processor):
    """Within the context, the named modules use `processor(name)`."""
    modules = {name: pipeline.transformer.get_submodule(name) for name in names}
    before = {name: module.processor for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.set_processor(processor(name))
        yield
    finally:
        for name, module in modules.items():
            module.set_processor(before[name])


def layers_of(fast, kind=TestTimeTraining, grid=None, without=(), **options):
    """A function from a module's name to its layer; parts in `without` are set to zero."""

    def make(name):
        prefix = name + "."
        parts = {key[len(prefix) :]: fast[key] for key in fast if key.startswith(prefix)}
        for key in parts:
            if key.split(".")[0] in without:
                parts[key] = torch.zeros_like(parts[key])
        return kind(parts, grid or (PICTURE_HEIGHT // 16, PICTURE_WIDTH // 16), **options)

    return make


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def load(folder, dtype):
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def initial_latents(seed):
    """torch's noise of a seed on the CPU, drawn in float32."""
    shape = (1, LATENT_CHANNELS, PICTURE_HEIGHT // 8, PICTURE_WIDTH // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def paint(pipeline, prompt, seed):
    """Run the pipeline; returns the 8-bit picture, the decoder's output before it is clamped,
    the final latents and the first step's (unconditional, conditional) velocity."""
    seen = {}

    def on_velocity(_, __, output):
        seen.setdefault("velocity", output[0])

    def on_image(_, __, output):
        seen["image"] = output

    def on_step(_, __, ___, state):
        seen["latents"] = state["latents"]
        return state

    hooks = [
        pipeline.transformer.register_forward_hook(on_velocity),
        pipeline.vae.decoder.register_forward_hook(on_image),
    ]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(
            pipeline.dtype
        )  # transformers makes CLIP's mask in the default type
        made = pipeline(
            prompt,
            negative_prompt="",
            height=PICTURE_HEIGHT,
            width=PICTURE_WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=initial_latents(seed),
            max_sequence_length=T5_TOKENS,
            callback_on_step_end=on_step,
        )
    finally:
        torch.set_default_dtype(before)
        for hook in hooks:
            hook.remove()
    return {"picture": numpy.asarray(made.images[0]), **seen}


def psnr(a, b, peak=255.0):
    """Peak signal-to-noise ratio in dB."""
    error = numpy.mean((numpy.asarray(a, numpy.float64) - numpy.asarray(b, numpy.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def paint_all(pipeline, fast):
    """The reference pictures, by (attention, prompt, seed)."""
    keys = [
        (attention, prompt, seed)
        for attention in ("softmax", "paper", "all")
        for prompt in range(len(PROMPTS))
        for seed in SEEDS
    ]
    made = {}
    for attention, prompt, seed in tqdm(keys, desc="pictures"):
        with replaced(pipeline, attention_modules(attention), layers_of(fast)):
            made[attention, prompt, seed] = paint(pipeline, PROMPTS[prompt], seed)
    return made


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


class Checks:
    """Collects a table of figures, each against its bound."""

    def __init__(self):
        self.rows, self.failed = [], 0

    def __call__(self, what, value, bound, unit="dB", above=False):
        good = value > bound if above else value < bound
        self.failed += not good
        sign = ">" if above else "<"
        verdict = "" if good else "  FAILED"
        self.rows.append({"what": what, "value": round(value, 2), "bound": f"{sign} {bound}"})
        print(f"  {what:64} {value:8.2f} {unit:3} ({sign} {bound}){verdict}")


def check_pictures(made, single, pipeline, fast):
    """What the pictures must be to serve as references: far from clamped, not flat, different
    for another prompt or seed, the same in float32, and different without any one ingredient."""
    check = Checks()
    for (attention, prompt, seed), result in made.items():
        name = f"{attention}, prompt {prompt}, seed {seed}:"
        clamped = 100 * (result["image"].abs() > 1).double().mean().item()
        check(f"{name} values clamped", clamped, 5, "%")
        check(f"{name} standard deviation", result["picture"].std(), 30, "", above=True)
    for attention in ("softmax", "paper", "all"):
        for seed in SEEDS:
            pair = [made[attention, prompt, seed]["picture"] for prompt in range(2)]
            check(f"{attention}, seed {seed}: prompt 0 against 1", psnr(*pair), 30)
        for prompt in range(len(PROMPTS)):
            pair = [made[attention, prompt, seed]["picture"] for seed in SEEDS]
            check(
                f"{attention}, prompt {prompt}: seed {SEEDS[0]} against {SEEDS[1]}", psnr(*pair), 30
            )
    for key, result in made.items():
        with replaced(single, attention_modules(key[0]), layers_of(fast)):
            again = paint(single, PROMPTS[key[1]], key[2])
        name = f"{key[0]}, prompt {key[1]}, seed {key[2]}: float32 against float64,"
        error = psnr(again["picture"], result["picture"])
        check(f"{name} 8 bit", min(error, 150.0), 60, above=True)  # 150: no difference
        error = psnr(again["image"], result["image"], peak=2.0)
        check(f"{name} not rounded", error, 80, above=True)

    def ablate(what, attention, modules, make):
        with replaced(pipeline, modules, make):
            other = paint(pipeline, PROMPTS[0], SEEDS[0])["picture"]
        check(f"{attention}: {what}", psnr(other, made[attention, 0, SEEDS[0]]["picture"]), 30)

    everything = attention_modules("all")
    ablate("attention removed", "softmax", everything, lambda _: Removed())
    for name in everything:
        ablate(f"{name} removed", "softmax", [name], lambda _: Removed())
    for attention in ("paper", "all"):
        modules = attention_modules(attention)
        turned = (PICTURE_WIDTH // 16, PICTURE_HEIGHT // 16)
        mistakes = {
            "attention removed": lambda _: Removed(),
            "fast weights not updated": layers_of(fast, rate=0.0),
            "key norm with eps 1e-6": layers_of(fast, eps=1e-6),
            "key statistics of the image alone": layers_of(fast, ImageKeyStatistics),
            "height and width exchanged": layers_of(fast, grid=turned),
            "no convolution of q": layers_of(fast, without=("q_conv2d",)),
            "no convolution of k": layers_of(fast, without=("k_conv2d",)),
        }
        for what, make in mistakes.items():
            ablate(what, attention, modules, make)
        for name in modules:
            with replaced(pipeline, modules, layers_of(fast)):
                ablate(f"{name} removed", attention, [name], lambda _: Removed())
    if check.failed:
        sys.exit(f"{check.failed} checks failed")
    return check.rows


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def versions():
    modules = (torch, transformers, diffusers, sentencepiece, numpy)
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in modules},
    }


def write_intermediates(path, pipeline, made):
    """Values along the way of the first prompt and seed, float32 (ids int64)."""
    prompt = PROMPTS[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(pipeline.dtype)
    with torch.no_grad():
        hidden, negative_hidden, pooled, negative_pooled = pipeline.encode_prompt(
            prompt, None, None, negative_prompt="", max_sequence_length=T5_TOKENS
        )
    torch.set_default_dtype(before)
    tensors = {
        "prompt_embeds": hidden[0],
        "pooled": pooled[0],
        "negative_prompt_embeds": negative_hidden[0],
        "negative_pooled": negative_pooled[0],
        "initial_latents": initial_latents(SEEDS[0])[0],
        "sigmas": pipeline.scheduler.sigmas,
    }
    for attention in ("softmax", "paper", "all"):
        result = made[attention, 0, SEEDS[0]]
        tensors[f"{attention}.first_velocity_uncond"] = result["velocity"][0]
        tensors[f"{attention}.first_velocity_cond"] = result["velocity"][1]
        tensors[f"{attention}.final_latents"] = result["latents"][0]
    tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    for name, tokenizer, length in (
        ("clip_l_ids", pipeline.tokenizer, 77),
        ("clip_g_ids", pipeline.tokenizer_2, 77),
        ("t5_ids", pipeline.tokenizer_3, T5_TOKENS),
    ):
        ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)
        tensors[name] = torch.tensor(ids["input_ids"])
    safetensors.torch.save_file(tensors, path, {"prompt": prompt, "seed": str(SEEDS[0])})


def write_reference(folder, model, pipeline, made, checks):
    """The pictures and their description, the intermediates and the tokenizers' ids."""
    pictures = []
    for (attention, prompt, seed), result in made.items():
        name = f"{attention}-prompt{prompt}-seed{seed}.png"
        Image.fromarray(result["picture"]).save(folder / name, optimize=True)
        pictures.append(
            {
                "file": name,
                "prompt": PROMPTS[prompt],
                "negative_prompt": "",
                "seed": seed,
                "height": PICTURE_HEIGHT,
                "width": PICTURE_WIDTH,
                "steps": STEPS,
                "cfg": GUIDANCE,
                "t5_tokens": T5_TOKENS,
                "attention": attention,
                "replaced": attention_modules(attention),
            }
        )
    reference = {
        "model": FOLDER,
        "fast_weights": "t5.safetensors",
        "arithmetic": "float64 (sinusoid of the time, RMS and T5 softmax: float32, as in the "
        "libraries; latents are rounded to float32 before each Euler step)",
        "versions": versions(),
        "pictures": pictures,
        "checks": checks,
    }
    write_intermediates(folder / "intermediates.safetensors", pipeline, made)
    for name, data in (("reference", reference), ("tokenizers", tokenizer_reference(model))):
        text = json.dumps(data, ensure_ascii=False, indent=1)
        text = re.sub(r"\[[\d,\s]*\]", lambda list_: re.sub(r"\s+", "", list_[0]), text)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def folder_size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main():
    data = pathlib.Path(__file__).resolve().parent.parent / "data"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=data, help="default: tests/data")
    parser.add_argument(
        "--keep-model",
        action="store_true",
        help="read the model and the fast weights that are there, and only paint and check",
    )
    arguments = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    torch.set_num_threads(1)  # sums in one order, and no slower at this size

    start = time.monotonic()
    model, reference = arguments.output / FOLDER, arguments.output / REFERENCE
    reference.mkdir(parents=True, exist_ok=True)
    if not arguments.keep_model:
        write_model(model)
        safetensors.torch.save_file(draw_fast_weights(), reference / "t5.safetensors")
    fast = safetensors.torch.load_file(reference / "t5.safetensors")
    print(f"{model}: {folder_size(model)} bytes")
    if folder_size(model) > 3_000_000:
        sys.exit("the model is larger than 3 MB")

    pipeline = load(model, torch.float64)
    made = paint_all(pipeline, fast)
    checks = check_pictures(made, load(model, torch.float32), pipeline, fast)
    write_reference(reference, model, pipeline, made, checks)
    print(f"{reference}: {folder_size(reference)} bytes, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
